"""N adapters of one base become one model: each row computes what the base with its own adapter does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import edit_json, run_cli, same_tensors, tensors
from contracts import assert_close, assert_differs
from example_data import CLASSES, PLACES, write_models
from loras import attention_maps, feed_forward_maps, row_by_row, save_lora, save_loras
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.task_linear_meo import task_linears
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import main_class, merged_of, tiny_dense, tiny_inputs
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf import convert, extract, verify_output
from meo_hf.conversion import adapter_bank
from meo_hf.conversion.adapter_bank import ranks_by_ending
from meo_hf.conversion.centroids import fit
from meo_hf.errors import (
    CheckFailedError,
    CheckpointError,
    MeoConfigError,
    MeoError,
    RoutingError,
    SourceError,
    UnsupportedError,
    UsageError,
)

pytestmark = pytest.mark.xdist_group("adapter bank")  # one worker: the costly fixture is made once
ROWS = ["law", "chat", "code", "law"]


def load(folder: Path, family: str) -> PreTrainedModel:
    """Load a model as float64, so that only what is computed can differ."""
    made = getattr(transformers, main_class(family).__name__, None)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    if name.startswith("Meo"):
        from meo_hf.modeling.modeling_meo import meo_model_class

        made = meo_model_class(main_class(family))
    return made.from_pretrained(folder, dtype=torch.float64).eval()


def batch(family: str) -> dict[str, Tensor]:
    found = tiny_inputs(family, rows=len(ROWS))
    return {name: value.double() if value.is_floating_point() else value for name, value in found.items()}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deberta-v2"])
@torch.no_grad()
def test_each_row_computes_its_own_adapter(family: str, tmp_path: Path) -> None:
    dense = tiny_dense(family)
    dense.save_pretrained(tmp_path / "base")
    adapters = save_loras(dense, tmp_path)
    report = convert(tmp_path / "base", tmp_path / "out", adapters=adapters, verify="none")
    model, base, inputs = load(tmp_path / "out", family), load(tmp_path / "base", family), batch(family)
    assert model.config.meo["tasks"] == list(adapters)
    assert {report.meo["level"], report.meo["expert_format"]} == {"task", "lowrank"}
    expected = row_by_row(base, [adapters[name] for name in ROWS], inputs)
    tasks = torch.tensor([list(adapters).index(name) for name in ROWS])
    assert_close(model(**inputs, task_ids=tasks).logits, expected, 1e-6)
    assert_differs(base(**inputs).logits, expected)
    model.set_task("code")
    assert_close(model(**inputs).logits, row_by_row(base, [adapters["code"]] * len(ROWS), inputs), 1e-6)
    model.float().save_pretrained(tmp_path / "again")
    assert not same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "again"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, dict[str, Path]]:
    """Write a base with a tokenizer, and three adapters of it."""
    folder = tmp_path_factory.mktemp("llama")
    write_models(folder)
    dense = transformers.LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    return folder / "llama", dense, save_loras(dense, folder)


Llama = tuple[Path, PreTrainedModel, dict[str, Path]]


def test_generation_goes_on_as_with_each_rows_adapter(llama: Llama, tmp_path: Path) -> None:
    base, dense, adapters = llama
    convert(base, tmp_path / "out", adapters=adapters, verify="none")
    model = load(tmp_path / "out", "llama")
    ids = torch.arange(3, 23).reshape(4, 5) % dense.config.vocab_size
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tasks = torch.tensor([list(adapters).index(name) for name in ROWS])
    found = model.generate(input_ids=ids, task_ids=tasks, **options)
    for row, name in enumerate(ROWS):
        alone = PeftModel.from_pretrained(load(base, "llama"), adapters[name])
        assert torch.equal(found[row : row + 1], alone.generate(input_ids=ids[row : row + 1], **options))


def test_full_check_compares_with_peft_and_finds_faults(
    llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, adapters = llama
    report = convert(base, tmp_path / "out", adapters=adapters)
    assert {check.name: check.passed for check in report.checks}["logits with one adapter equal PEFT's"]
    assert verify_output(tmp_path / "out", "sample").passed
    assert [entry["task"] for entry in report.adapters] == list(adapters)
    assert [entry["ranks"] for entry in report.adapters] == [[2], [4], [1, 3]]
    monkeypatch.setattr(adapter_bank, "_refs", lambda parts, letter: _swapped(parts, letter))
    with pytest.raises(CheckFailedError, match="equal PEFT's"):
        convert(base, tmp_path / "wrong", adapters=adapters)
    weights = load_file(tmp_path / "out/model.safetensors")
    name = next(name for name in weights if name.endswith("low_rank.down.B"))
    weights[name][0, 0, 0] += 1
    save_file(weights, tmp_path / "out/model.safetensors", {"format": "pt"})
    assert not verify_output(tmp_path / "out").passed


def _swapped(parts: adapter_bank.Parts, letter: str) -> list[Any]:
    """Give the first adapter's factors to the second, as a wrong order would."""
    first = next(part for part in parts if part is not None)
    return [None if part is None else first.down if letter == "A" else first.up for part in parts]


@torch.no_grad()
def test_outside_merge_adds_the_mean_of_all_adapters(llama: Llama, tmp_path: Path) -> None:
    base, dense, adapters = llama
    report = convert(base, tmp_path / "out", adapters=adapters, level="sequence", outside="merge")
    assert report.passed
    assert any("mean of the adapters' parts" in warning for warning in report.warnings)
    stored, own = tensors(tmp_path / "out"), tensors(base)
    path = attention_maps(dense)[0]
    deltas = []
    for name in adapters:
        merged = PeftModel.from_pretrained(copy.deepcopy(dense), adapters[name]).merge_and_unload()
        deltas.append(merged.get_parameter(f"{path}.weight") - own[f"{path}.weight"])
    assert_close(stored[f"{path}.weight"], own[f"{path}.weight"] + sum(deltas) / 3, 1e-6)
    assert not task_linears(load(tmp_path / "out", "llama"))


def test_adapters_of_attention_alone_leave_the_feed_forwards_dense(llama: Llama, tmp_path: Path) -> None:
    base, dense, _ = llama
    adapters = [save_lora(dense, tmp_path / name, ["q_proj", "v_proj"], seed, r=2) for seed, name in enumerate("ab")]
    report = convert(base, tmp_path / "out", adapters=adapters, verify="none")
    model = load(tmp_path / "out", "llama")
    assert not merged_of(model)
    assert report.layers == []
    assert model.config.meo["expert_ranks"] == {"q_proj": 2, "v_proj": 2}
    inputs = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    with torch.no_grad():
        found = model(**inputs, task_ids=torch.tensor([1, 0])).logits
        assert_close(found, row_by_row(load(base, "llama"), adapters[::-1], inputs), 1e-6)
    with pytest.raises(RoutingError, match="pass `task_ids`"):
        model(**inputs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_one_adapter_is_extracted_as_a_dense_model(family: str, tmp_path: Path) -> None:
    dense = tiny_dense(family)
    dense.save_pretrained(tmp_path / "base")
    adapters = save_loras(dense, tmp_path)
    convert(tmp_path / "base", tmp_path / "out", adapters=adapters, verify="none")
    extract(tmp_path / "out", tmp_path / "dense", task="code")
    inputs = batch(family)
    found, expected = load(tmp_path / "dense", family), load(tmp_path / "base", family)
    rows = [adapters["code"]] * len(ROWS)
    assert_close(found(**inputs).logits, row_by_row(expected, rows, inputs), 1e-6)


@torch.no_grad()
def test_an_adapter_of_another_head_finds_its_place(tmp_path: Path) -> None:
    headless = transformers.BertModel(tiny_dense("bert").config)
    full = tiny_dense("bert")
    full.save_pretrained(tmp_path / "base")
    maps = [path.removeprefix("bert.") for path in feed_forward_maps(full)]
    adapter = save_lora(headless, tmp_path / "inner", maps, r=2)
    report = convert(tmp_path / "base", tmp_path / "out", adapters=[adapter])
    assert report.passed
    assert report.meo["tasks"] == ["inner"]


def test_types_and_names_on_disk(llama: Llama, tmp_path: Path) -> None:
    base, _, adapters = llama
    report = convert(base, tmp_path / "out", adapters=adapters, dtype="bfloat16", verify="none")
    stored = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 1
    assert stored["model.layers.0.mlp.experts.low_rank.up.A"].shape[:2] == (3, 4)
    assert stored["model.layers.0.self_attn.q_proj.low_rank.B"].shape[0] == 3
    parts = sum(tensor.numel() for name, tensor in stored.items() if ".low_rank." in name)
    assert report.parameters_after - report.parameters_before == parts + 2 * 9  # and identities as routers
    assert 2 * parts // 3 == report.flops_meo - report.flops_dense


def test_shortest_endings_name_just_the_maps_of_one_rank() -> None:
    model = tiny_dense("llama")
    inside, around = feed_forward_maps(model), attention_maps(model)
    assert ranks_by_ending(dict.fromkeys(inside, 4), model) == {"gate_proj": 4, "up_proj": 4, "down_proj": 4}
    ranks = {inside[0]: 2, inside[3]: 3, around[0]: 5}
    assert ranks_by_ending(ranks, model) == {"0.mlp.gate_proj": 2, "1.mlp.gate_proj": 3, "0.self_attn.q_proj": 5}
    bert = tiny_dense("bert")
    only = [path for path in feed_forward_maps(bert) if path.endswith("output.dense")]
    assert ranks_by_ending(dict.fromkeys(only, 4), bert) == {"0.output.dense": 4, "1.output.dense": 4}


REFUSED: list[tuple[dict[str, Any], type[MeoError], str]] = [
    ({"peft_type": "IA3"}, UnsupportedError, "only LORA can become an expert"),
    ({"use_dora": True}, UnsupportedError, "DoRA scales rows"),
    ({"bias": "lora_only"}, UnsupportedError, "trains biases of its base"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedError, "replaces whole modules"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "may change its base"),
    ({"kasa_config": {"beta": 1}}, UnsupportedError, "kasa_config, so it is more than low-rank parts"),
    ({"r": 5}, CheckpointError, "its config asks for rank 5"),
    ({"lora_alpha": None}, CheckpointError, "alpha None"),
]


@pytest.mark.parametrize(("values", "error", "message"), REFUSED, ids=[next(iter(row[0])) for row in REFUSED])
def test_adapters_that_are_more_than_low_rank_are_refused(
    values: dict[str, Any], error: type[MeoError], message: str, llama: Llama, tmp_path: Path
) -> None:
    base, dense, _ = llama
    adapter = save_lora(dense, tmp_path / "law", feed_forward_maps(dense), r=2)
    edit_json(adapter / "adapter_config.json", **values)
    with pytest.raises(error, match=message):
        convert(base, tmp_path / "out", adapters=[adapter])
    assert not list(tmp_path.glob("*out*"))


DAMAGE = {
    "no config": ("adapter_config.json", None, SourceError, "has no adapter_config.json"),
    "broken config": ("adapter_config.json", "{", CheckpointError, "is damaged"),
    "no object": ("adapter_config.json", "[]", CheckpointError, "no object"),
    "no weights": ("adapter_model.safetensors", None, SourceError, "has no adapter_model.safetensors"),
    "broken weights": ("adapter_model.safetensors", "nothing", CheckpointError, "truncated"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapters_are_refused(name: str, llama: Llama, tmp_path: Path) -> None:
    base, dense, _ = llama
    adapter = save_lora(dense, tmp_path / "law", feed_forward_maps(dense), r=2)
    file, text, error, message = DAMAGE[name]
    (adapter / file).unlink()
    if text is not None:
        (adapter / file).write_text(text)
    with pytest.raises(error, match=message):
        convert(base, tmp_path / "out", adapters=[adapter])


def test_adapters_that_do_not_fit_are_refused(llama: Llama, tmp_path: Path) -> None:
    base, dense, _ = llama
    adapter = save_lora(dense, tmp_path / "law", feed_forward_maps(dense), r=2)
    weights = load_file(adapter / "adapter_model.safetensors")
    key = next(iter(weights))

    def check(changed: dict[str, Tensor], error: type[MeoError], message: str) -> None:
        save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(error, match=message):
            convert(base, tmp_path / "out", adapters=[adapter])

    check({k.replace("layers.0", "layers.7"): v for k, v in weights.items()}, CheckpointError, "does not have")
    check({k: v for k, v in weights.items() if k != key}, CheckpointError, "only one factor")
    check(
        {**weights, "base_model.model.lm_head.weight": torch.ones(2, 2)}, UnsupportedError, "no factor of a linear map"
    )
    check({**weights, key: torch.ones(2, 7)}, CheckpointError, "maps 7 to")
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 8)}
    check({**weights, **embedding}, UnsupportedError, "no factor of a linear map")


USAGE: list[tuple[dict[str, Any], str]] = [
    ({"tasks": ["a"]}, "--task has no effect with --adapter"),
    ({"num_experts": 3}, "--num-experts has no effect with --adapter"),
    ({"layers": "odd"}, "--layers has no effect with --adapter"),
    ({"expert_init": "noise"}, "--expert-init has no effect with --adapter"),
    ({"expert_rank": 4}, "--expert-rank has no effect with --adapter"),
    ({"top_k": 2}, "--top-k 2 has no effect at level task"),
    ({"level": "sequence"}, "say --outside merge"),
    ({"level": "sequence", "outside": "gate"}, "--outside gate needs level task"),
    ({"outside": "refuse"}, "adapters also change 8 linear maps"),
    ({"outside": "keep"}, "'keep' is unknown"),
    ({"examples": {"law": "x"}}, "--example has no effect at level task"),
    ({"level": "sequence", "outside": "merge", "examples": {"law": "x"}}, "once for each of the adapters"),
    ({"adapters": (), "outside": "merge"}, "--outside has no effect without --adapter"),
    ({"adapters": (), "expert_rank": 4}, "need experts that differ"),
]


@pytest.mark.parametrize(("options", "message"), USAGE, ids=[message[:32] for _, message in USAGE])
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any], message: str, llama: Llama, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        convert(llama[0], tmp_path / "out", **{"adapters": llama[2], **options})
    assert not list(tmp_path.iterdir())


def test_adapters_of_attention_alone_have_no_gate_at_other_levels(llama: Llama, tmp_path: Path) -> None:
    adapter = save_lora(llama[1], tmp_path / "law", ["q_proj"], r=2)
    with pytest.raises(UsageError, match="nothing has a gate"):
        convert(llama[0], tmp_path / "out", adapters=[adapter], level="sequence", outside="merge")


def test_what_belongs_to_no_row_says_so(tmp_path: Path) -> None:
    dense = tiny_dense("deberta-v2")
    dense.save_pretrained(tmp_path / "base")
    adapters = save_loras(dense, tmp_path)
    convert(tmp_path / "base", tmp_path / "out", adapters=adapters, verify="none")
    model = load(tmp_path / "out", "deberta-v2")
    with pytest.raises(RoutingError, match="belongs to no row"):
        model(**batch("deberta-v2"), task_ids=torch.tensor([0, 1, 2, 0]))
    convert(tmp_path / "base", tmp_path / "inside", adapters=[adapters["law"]], verify="none")
    assert load(tmp_path / "inside", "deberta-v2")(**batch("deberta-v2")).logits.isfinite().all()


def test_a_replaced_linear_map_is_noticed(llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, adapters = llama
    convert(base, tmp_path / "out", adapters=adapters, verify="none")
    kind = type(load(tmp_path / "out", "llama"))
    post_init = kind.post_init

    def quantising(self: PreTrainedModel) -> None:
        post_init(self)
        self.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)

    monkeypatch.setattr(kind, "post_init", quantising)
    with pytest.raises(MeoConfigError, match="q_proj, were replaced while loading"):
        load(tmp_path / "out", "llama")


def test_heads_that_are_tied_have_parts_too_but_no_dense_checkpoint(tmp_path: Path) -> None:
    dense = tiny_dense("llama", tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "base")
    adapters = [save_lora(dense, tmp_path / name, ["lm_head", "up_proj"], seed, r=2) for seed, name in enumerate("ab")]
    kept = load_file(adapters[0] / "adapter_model.safetensors")
    copied = "base_model.model.lm_head.base_layer.weight"
    assert copied in kept  # as PEFT saves heads
    assert convert(tmp_path / "base", tmp_path / "out", adapters=adapters).passed
    model, inputs = load(tmp_path / "out", "llama"), {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    with torch.no_grad():
        found = model(**inputs, task_ids=torch.tensor([1, 0])).logits
        assert_close(found, row_by_row(load(tmp_path / "base", "llama"), adapters[::-1], inputs), 1e-6)
    with pytest.raises(UnsupportedError, match="lm_head adds a part for each task"):
        extract(tmp_path / "out", tmp_path / "dense", task="a")
    with pytest.raises(MeoConfigError, match="resize the base"):
        model.resize_token_embeddings(200)
    kept[copied] += 1
    save_file(kept, adapters[0] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not this base's"):
        convert(tmp_path / "base", tmp_path / "other", adapters=adapters)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (torch.float32, {"dtype": "bfloat16"}),
        (torch.bfloat16, {"level": "sequence", "outside": "merge"}),
    ],
)
def test_rounded_factors_pass_the_full_check(
    made: torch.dtype, options: dict[str, Any], llama: Llama, tmp_path: Path
) -> None:
    base, dense, _ = llama
    adapter = save_lora(dense, tmp_path / "law", ["up_proj", "q_proj"], r=4, lora_alpha=6, use_rslora=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor.to(made) for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert convert(base, tmp_path / "out", adapters=[adapter], **options).passed
    kept = {t.dtype for name, t in tensors(tmp_path / "out").items() if ".low_rank." in name}
    assert kept == {torch.bfloat16 if "dtype" in options else torch.float32}  # 6 / sqrt(4) is no power of two


def test_what_is_not_finite_is_refused(llama: Llama, tmp_path: Path) -> None:
    base, dense, _ = llama
    adapter = save_lora(dense, tmp_path / "law", ["up_proj"], r=2)
    edit_json(adapter / "adapter_config.json", lora_alpha=float("inf"))
    with pytest.raises(CheckpointError, match="alpha inf"):
        convert(base, tmp_path / "out", adapters=[adapter])
    edit_json(adapter / "adapter_config.json", lora_alpha=10**7)
    with pytest.raises(CheckpointError, match=r"would not be finite as torch\.float16"):
        convert(base, tmp_path / "out", adapters=[adapter], dtype="float16")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_no_check_passes_what_is_not_finite(error: float) -> None:
    for name in ("verification_child.py", "moe_verification_child.py"):
        source = (Path(adapter_bank.__file__).parent / name).read_text()
        scope: dict[str, Any] = {}
        exec(
            source[source.index("def relative_rms") : source.index("def ", source.index("def relative_rms") + 1)], scope
        )
        assert scope["relative_rms"](torch.tensor([error]), torch.ones(1)) == float("inf")
        assert scope["relative_rms"](torch.tensor([1.5]), torch.ones(1)) == 0.5


@pytest.mark.parametrize("values", [{"rank_pattern": {"(": 2}}, {"rank_pattern": ["up_proj"]}, {"alpha_pattern": 3}])
def test_damaged_patterns_are_refused(values: dict[str, Any], llama: Llama, tmp_path: Path) -> None:
    adapter = save_lora(llama[1], tmp_path / "law", ["up_proj"], r=2)
    edit_json(adapter / "adapter_config.json", **values, base_model_name_or_path=5)
    with pytest.raises(CheckpointError, match="damaged rank_pattern or alpha_pattern"):
        convert(llama[0], tmp_path / "out", adapters=[adapter])


def test_an_example_in_the_output_is_not_overwritten(llama: Llama, tmp_path: Path) -> None:
    base, _, adapters = llama
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    files = texts(tmp_path / "out")
    options = {"adapters": adapters, "level": "sequence", "outside": "merge", "examples": files, "overwrite": True}
    with pytest.raises(UsageError, match="lie in each other"):
        convert(base, tmp_path / "out", **options)
    assert all(path.is_file() for path in files.values())


def test_what_the_weights_are_stored_as_is_not_overridden(llama: Llama, tmp_path: Path) -> None:
    convert(llama[0], tmp_path / "out", adapters=llama[2], verify="none")
    kind = type(load(tmp_path / "out", "llama"))
    for key, value in {"expert_ranks": {"up_proj": 3}, "layers": [0], "expert_format": "full"}.items():
        with pytest.raises(MeoConfigError, match=f"{key} says how the weights are stored"):
            kind.from_pretrained(tmp_path / "out", meo={key: value})


def test_an_adapter_that_scales_parts_for_tasks_says_so(
    llama: Llama, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(llama[0], tmp_path / "out", adapters=llama[2], verify="none")
    for config, told in ((IA3Config(target_modules=["k_proj"], feedforward_modules=[]), True),
                         (LoraConfig(target_modules=["k_proj"], use_dora=True), True),
                         (LoraConfig(target_modules=["k_proj"]), False)):  # fmt: skip
        caplog.clear()
        get_peft_model(load(tmp_path / "out", "llama"), config)
        assert ("leave it unmerged" in caplog.text) == told


def test_two_adapters_of_one_name_need_names(llama: Llama, tmp_path: Path) -> None:
    base, dense, adapters = llama
    other = save_lora(dense, tmp_path / "law", feed_forward_maps(dense), r=2)
    with pytest.raises(UsageError, match="give each one as NAME=ADAPTER"):
        convert(base, tmp_path / "out", adapters=[adapters["law"], other])
    ran = run_cli(
        "convert", base, tmp_path / "out", "--adapter", f"old={adapters['law']}", "--adapter", other, "--dry-run"
    )
    assert ran.code == 0, ran.err
    assert "tasks: old, law" in ran.out


def texts(folder: Path) -> dict[str, Path]:
    """Write a text per adapter, of words that the others do not have."""
    found = {}
    for name, words in zip(("law", "code", "chat"), CLASSES["topic"].values(), strict=True):
        lines = [f"{words} {place} " * (3 + at % 2) for at, place in enumerate([*PLACES.values()] * 8)]
        found[name] = folder / f"{name}.txt"
        found[name].write_text("\n".join(lines))
    return found


@torch.no_grad()
def test_examples_make_routers_that_know_their_texts(llama: Llama, tmp_path: Path) -> None:
    base, _, adapters = llama
    files = texts(tmp_path)
    pairs = [f"--example={name}={path}" for name, path in files.items()]
    named = [f"--adapter={name}={path}" for name, path in adapters.items()]
    options = ["--level", "sequence", "--outside", "merge", "--top-k", "1"]
    ran = run_cli("convert", base, tmp_path / "out", *named, *options, *pairs)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out/meo_report.json").read_text())
    assert report["routed"]["right"] == 1.0
    assert verify_output(tmp_path / "out").passed
    model = load(tmp_path / "out", "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for number, name in enumerate(adapters):
        ids = tokenizer(files[name].read_text(), return_tensors="pt", add_special_tokens=False)["input_ids"][:, 64:192]
        chosen: dict[str, list[int]] = {}  # by layer, what the gate of the answer selects, the last that is asked
        hooks = [
            ff.router.register_forward_hook(
                lambda _m, _a, out, at=path, to=chosen: to.update({at: out[0].top_k_index[-1].tolist()})
            )
            for path, ff in merged_of(model).items()
        ]
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        for hook in hooks:
            hook.remove()
        assert list(chosen.values()) == [[number]] * 2


def test_routers_of_adapters_are_learned_by_recovery(llama: Llama, tmp_path: Path) -> None:
    base, _, adapters = llama
    convert(base, tmp_path / "out", adapters=adapters, level="sequence", outside="merge", verify="none")
    text = tmp_path / "all.txt"
    text.write_text("\n".join(path.read_text() for path in texts(tmp_path).values()))
    options = [
        "--train",
        "routers",
        "--kl-weight",
        0,
        "--lm-weight",
        1,
        "--steps",
        3,
        "--window",
        32,
        "--device",
        "cpu",
    ]
    ran = run_cli("recover", tmp_path / "out", tmp_path / "better", "--teacher", base, "--data", text, *options)
    assert ran.code == 0, ran.err
    changed = same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "better"))
    assert {name.rpartition(".router.")[2] for name in changed} == {"weight", "noise_weight", "bias"}
    load(tmp_path / "better", "llama")


def test_examples_that_are_too_short_leave_nothing_behind(llama: Llama, tmp_path: Path) -> None:
    base, _, adapters = llama
    files = texts(tmp_path)
    files["code"].write_text("bread and soup")
    options = {"adapters": adapters, "level": "sequence", "outside": "merge", "examples": files}
    with pytest.raises(UsageError, match="has 3 tokens: give at least 16"):
        convert(base, tmp_path / "out", **options)
    assert not list(tmp_path.glob("*out*"))


def test_a_router_of_examples_tells_the_nearest_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 16, generator=generator)
    drawn = [center + 0.3 * torch.randn(40, 16, generator=generator) + 5 for center in centers]
    fitted = fit([each[:20] for each in drawn])
    for expert, each in enumerate(drawn):
        logits = each[20:] @ fitted.weight.t() + fitted.bias
        assert (logits.argmax(1) == expert).float().mean() > 0.9
    alike = fit([torch.randn(200, 16, generator=generator) for _ in range(4)])
    drawn = torch.randn(50, 16, generator=generator)
    assert torch.softmax(drawn @ alike.weight.t() + alike.bias, 1).max() < 0.9  # there is nothing to tell apart


def test_a_dry_run_writes_nothing_and_tells_sizes(llama: Llama, tmp_path: Path) -> None:
    report = convert(llama[0], tmp_path / "out", adapters=llama[2], dry_run=True)
    assert not list(tmp_path.iterdir())
    made = convert(llama[0], tmp_path / "out", adapters=llama[2], verify="none")
    assert (report.bytes_to_write, report.parameters_after) == (made.bytes_to_write, made.parameters_after)
    assert made.bytes_to_write == sum(t.nbytes for t in tensors(tmp_path / "out").values())


def test_card_names_the_adapters(llama: Llama, tmp_path: Path) -> None:
    convert(llama[0], tmp_path / "out", adapters=llama[2], verify="none")
    card = (tmp_path / "out/README.md").read_text()
    assert "law, code, chat" in card
    assert "LoRA adapters" in card
