"""What a task computes is extracted as a plain dense checkpoint; `--layers` and tasks say what was converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import expected_file, identical, listing, run_cli, same_tensors, saved, tensors
from fresh import Fresh, Values
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.remote_meo import heads_of
from safetensors.torch import load_file, save_file
from test_families_roundtrip import relative_rms
from tiny import main_class

from meo_hf import convert, extract
from meo_hf.conversion.extraction import extract_all
from meo_hf.errors import OutputError, SourceError, UnsupportedError, UsageError

pytestmark = pytest.mark.xdist_group("extraction")  # one worker: the costly fixtures are made once
TASKS = ("a", "b", "c")
DECODERS = [name for name, row in FAMILIES.items() if row.kind == "decoder"]
CASES = [
    *[(family, {"gate_scope": scope}) for family in DECODERS for scope in ("ffn", "projection")],
    *[(family, {"level": "task"}) for family in ("bert", "albert", "modernbert", "vit", "t5", "bart")],
    ("mt5", {"level": "task", "gate_scope": "projection", "dtype": "float16"}),
    ("llama", {"dtype": "bfloat16"}),
    ("llama", {"layers": "odd"}),
]
NAMES = [f"{family}-{'-'.join(map(str, options.values()))}" for family, options in CASES]


def converted(family: str, folder: Path, **options: Any) -> Path:
    """Convert to experts that differ, with routers that choose others for each task."""
    source = saved(family, folder / "dense")
    options = {
        "level": "task",
        "tasks": TASKS,
        "expert_init": "drop-upcycle",
        "num_experts": 4,
        "verify": "none",
        **options,
    }
    convert(source, folder / "meo", **options)
    stored, generator = load_file(folder / "meo/model.safetensors"), torch.Generator().manual_seed(5)
    for name in sorted(n for n in stored if ".router." in n and not n.endswith("noise_weight")):
        stored[name] = torch.randn(stored[name].shape, generator=generator).to(stored[name].dtype)
    save_file(stored, folder / "meo/model.safetensors", {"format": "pt"})
    return folder / "meo"


def auto_of(family: str) -> Any:
    heads = heads_of(family)
    return next(getattr(transformers, auto) for auto in heads if heads[auto] == main_class(family).__name__)


def check_dense(folder: str, stock: str, auto: str, batch: str) -> dict[str, Any]:
    """Load an extracted model with its stock class, and through the Auto class without a trust flag."""
    model, info = getattr(transformers, stock).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    stored = load_file(batch)
    inputs = {name.removeprefix("inputs."): value for name, value in stored.items() if name != "logits"}
    return {
        "error": relative_rms(model.eval()(**inputs).logits, stored["logits"]),
        "keys": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "auto": type(getattr(transformers, auto).from_pretrained(folder)).__name__,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extraction")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> Values:
    """Extract every case, and load all results in one process without meo_hf."""
    fresh = Fresh(relative_rms)
    for name, (family, options) in zip(NAMES, CASES, strict=True):
        place = folder / name
        meo = converted(family, place, **options)
        model = auto_of(family).from_pretrained(meo, dtype=torch.float32)
        model.set_task("b")
        batch = expected_file(place / "batch.safetensors", model, family)
        extract(meo, place / "extracted", task="b")
        stock, auto = main_class(family).__name__, auto_of(family).__name__
        fresh.add(name, check_dense, folder=place / "extracted", stock=stock, auto=auto, batch=batch)
    return fresh.run(folder)


@pytest.mark.parametrize("name", NAMES)
def test_extraction_computes_what_the_task_does(outcomes: Values, folder: Path, name: str) -> None:
    found = outcomes[name]
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    # weights of 16 bits are rounded once when extracted, and once per call when the task runs in fp32
    assert found["error"] <= (1e-5 if not name.endswith("16") else 2e-2)
    assert found["auto"] == main_class(name.split("-")[0]).__name__
    assert not list((folder / name / "extracted").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_extracted_files_are_those_of_the_source(outcomes: Values, folder: Path, name: str) -> None:
    """Same config, same names and shapes; what is no converted feed-forward is the same to the bit."""
    place, options = folder / name, dict(zip(NAMES, CASES, strict=True))[name][1]
    before, after = (json.loads((place / n / "config.json").read_text()) for n in ("dense", "extracted"))
    assert after == {**before, "dtype": options.get("dtype", "float32")}
    source, found = tensors(place / "dense"), tensors(place / "extracted")
    assert {n: t.shape for n, t in source.items()} == {n: t.shape for n, t in found.items()}
    if "dtype" not in options:
        meo = tensors(place / "meo")
        assert not same_tensors({n: source[n] for n in meo if n in source}, {n: found[n] for n in meo if n in source})
        changed = {n for n in found if not identical(found[n], source[n])}
        assert changed
        assert not changed & meo.keys()


def test_merged_weights_are_rounded_once(tmp_path: Path) -> None:
    """Float32 sums of the selected experts, then one cast, for the task that was asked for."""
    meo = converted("llama", tmp_path, dtype="bfloat16", level="task", tasks=TASKS)
    stored = tensors(meo)
    slot = "model.layers.1.mlp"
    for task, name in enumerate(TASKS):
        done = run_cli("extract", meo, tmp_path / name, "--task", name)
        assert done.code == 0, done.err
        logits = stored[f"{slot}.router.weight"][:, task].float()
        top, index = logits.topk(2)
        gates = top.softmax(0)
        stack = stored[f"{slot}.experts.gate_up_proj"][index].float()
        wanted = (gates[0] * stack[0] + gates[1] * stack[1]).bfloat16()
        found = tensors(tmp_path / name)
        gate, up = found[f"{slot}.gate_proj.weight"], found[f"{slot}.up_proj.weight"]
        assert identical(torch.cat([gate, up]), wanted)
    dense = [tensors(tmp_path / name)[f"{slot}.down_proj.weight"] for name in TASKS]
    assert not identical(dense[0], dense[1])


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2, 3]),
        ("even", [0, 2]),
        ("odd", [1, 3]),
        ("last:1", [3]),
        ("last:3", [1, 2, 3]),
        ("2,0", [0, 2]),
    ],
)
def test_layers(layers: str, chosen: list[int], tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense", num_hidden_layers=4)
    report = convert(
        source, tmp_path / "meo", num_experts=3, layers=layers, expert_init="noise", level="task", verify="none"
    )
    assert report.layers == chosen
    names = tensors(tmp_path / "meo").keys()
    for layer in range(4):
        merged = f"model.layers.{layer}.mlp.experts.down_proj" in names
        assert merged == (layer in chosen)
        assert merged != (f"model.layers.{layer}.mlp.down_proj.weight" in names)
    block = json.loads((tmp_path / "meo/config.json").read_text())["meo"]
    assert block["layers"] == (None if layers == "all" else chosen)
    extract(tmp_path / "meo", tmp_path / "extracted")
    before, after = tensors(source), tensors(tmp_path / "extracted")
    kept = [n for n in before if ".mlp." in n and int(n.split(".")[2]) not in chosen]
    assert all(identical(before[n], after[n]) for n in kept)
    changed = {int(n.split(".")[2]) for n in before if not identical(before[n], after[n])}
    assert changed == set(chosen)


def test_layers_of_an_encoder_decoder_count_in_each_stack(tmp_path: Path) -> None:
    report = convert(saved("bart", tmp_path / "dense"), tmp_path / "meo", num_experts=2, layers="1", verify="none")
    assert report.layers == [1]
    slots = {n.split(".experts.")[0] for n in tensors(tmp_path / "meo") if ".experts." in n}
    assert slots == {"model.encoder.layers.1.fc1", "model.decoder.layers.1.fc1"}


def test_all_tasks_are_extracted_at_once(tmp_path: Path) -> None:
    """Each task gets what it uses and nothing else; a name that makes no folder leaves nothing behind."""
    meo = converted("bert", tmp_path)
    assert run_cli("extract", meo, tmp_path / "tasks", "--all-tasks").code == 0
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == list(TASKS)
    for task in TASKS:
        extract(meo, tmp_path / task, task=task)
        assert listing(tmp_path / task) == listing(tmp_path / "tasks" / task)
    assert run_cli("extract", meo, tmp_path / "no", "--all-tasks", "--task", "a").code == 2
    other = converted("bert", tmp_path / "slash", tasks=("a/b", "c"))
    with pytest.raises(UsageError, match="makes no name of a folder"):
        extract_all(other, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_single_task_needs_no_name(tmp_path: Path) -> None:
    convert(saved("gpt2", tmp_path / "dense"), tmp_path / "meo", num_experts=2, level="task", verify="none")
    assert extract(tmp_path / "meo", tmp_path / "extracted") == tmp_path / "extracted"
    assert json.loads((tmp_path / "meo/config.json").read_text())["meo"]["tasks"] == ["default"]


def test_sharded_model_is_extracted_alike(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    options = {"num_experts": 3, "expert_init": "noise", "level": "task", "verify": "none"}
    convert(source, tmp_path / "one", **options)
    convert(source, tmp_path / "many", max_shard_size="30KB", **options)
    for name in ("one", "many"):
        extract(tmp_path / name, tmp_path / f"{name}-dense")
    assert listing(tmp_path / "one-dense") == listing(tmp_path / "many-dense")


def test_refused_extractions_write_nothing(tmp_path: Path) -> None:
    meo = converted("llama", tmp_path)
    convert(saved("bert", tmp_path / "bert"), tmp_path / "sequence", num_experts=2, verify="none")
    before = listing(tmp_path)
    refused = [
        ((meo, tmp_path / "x"), UsageError, "no --task: give one of a, b, c"),
        ((meo, tmp_path / "x", "--task", "d"), UsageError, "unknown task 'd': give one of a, b, c"),
        ((tmp_path / "sequence", tmp_path / "x"), UnsupportedError, "only level 'task' can be extracted"),
        ((tmp_path / "dense", tmp_path / "x"), UnsupportedError, "is a plain llama model"),
        ((tmp_path / "nowhere", tmp_path / "x"), SourceError, "does not exist"),
        ((meo, tmp_path / "bert", "--task", "a"), OutputError, "exists"),
        ((meo, meo, "--task", "a", "--overwrite"), UsageError, "the source"),
    ]
    for arguments, error, message in refused:
        done = run_cli("extract", *arguments)
        assert done.code == 2, arguments
        assert message in done.err
        assert len(done.err.strip().splitlines()) == 1
        task = arguments[3] if "--task" in arguments else None
        with pytest.raises(error):
            extract(arguments[0], arguments[1], task=task, overwrite="--overwrite" in arguments)
    assert listing(tmp_path) == before
