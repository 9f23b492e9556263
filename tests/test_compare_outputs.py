"""`meo-hf compare` of several models: MEO models, models with fewer experts, stock ones; what each row says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import run_cli
from compare_tiny import meo_of, saved_pair, silent, windows_of, words_tokenizer
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_meo import merged_moe
from moe_contracts import meo_of_moe
from moe_tiny import tiny_moe
from reduction_tiny import apply
from torch import Tensor
from transformers import MixtralForCausalLM

from meo_hf.benchmark.compare import Comparison, compare
from meo_hf.benchmark.compare_outputs import labels_of
from meo_hf.benchmark.compare_pairs import depends_on_text, mean_pairs, tallied_pairs
from meo_hf.benchmark.compare_plot import plot_compare
from meo_hf.benchmark.compare_quality import measure_quality
from meo_hf.benchmark.compare_report import notes, write_results
from meo_hf.benchmark.compare_speed import flops_per_token
from meo_hf.benchmark.compare_variants import CompareSettings, Subject
from meo_hf.benchmark.machine import Machine
from meo_hf.errors import UsageError
from meo_hf.reduction.plan import BlockPlan, one_hot

torch.set_num_threads(1)
BLOCKS = [f"model.layers.{number}.mlp" for number in range(3)]
SETTINGS = CompareSettings(window=16, limit=5, batch_size=2, rounds=1)
SMALL = ("--window", "16", "--limit", "3", "--batch-size", "2", "--rounds", "1")
RULE = {"rule": "ratio", "threshold": 0.6}
MADE = ("meo", "other/meo", "pruned", "uneven", "skips", "mapped")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a text, and one model of every kind that can be made of it."""
    path = tmp_path_factory.mktemp("made")
    source, _, _ = saved_pair(path)
    meo_of(tiny_moe("mixtral"), segment_length=16).save_pretrained(path / "other" / "meo")
    kept = BlockPlan(one_hot([2, 0, 3, 5]), router=one_hot([2, 0, 3, 5]))
    apply(source, path / "pruned", dict.fromkeys(BLOCKS, kept))
    apply(source, path / "uneven", {BLOCKS[1]: kept})
    apply(source, path / "skips", {}, skip=RULE)
    apply(source, path / "mapped", {BLOCKS[0]: BlockPlan(one_hot([1, 2]), stands_for=(0, 0, 0, 1, 1, 1))})
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    return compare(str(folder / "source"), [folder / name for name in MADE], folder / "text.txt", SETTINGS)


def test_each_model_has_rows_of_its_own(result: Comparison, folder: Path) -> None:
    made = f"{folder.name}/meo"
    assert [(row.name, row.kind) for row in result.rows] == [
        ("source", "source"),
        (f"MEO, {made}", "MEO"),
        (f"uniform average, {made}", "uniform average"),
        ("MEO, other/meo", "MEO"),
        ("uniform average, other/meo", "uniform average"),
        ("pruned", "output"),
        ("uneven", "output"),
        ("skips", "output"),
        ("mapped", "output"),
        ("source, top-1", "top-k"),
    ]
    assert [(one.name, one.segment, len(one.layers)) for one in result.merging] == [
        (f"MEO, {made}", 4, 3),
        ("MEO, other/meo", 16, 3),
    ]
    first, second = ([layer.error.relative for layer in one.layers] for one in result.merging)
    assert first != second
    assert len({row.quality.perplexity for row in result.rows}) == len(result.rows) - 1, "averages of two are one"
    by_name = {row.name: row for row in result.rows}
    stock, pruned = (MixtralForCausalLM.from_pretrained(folder / name).eval() for name in ("source", "pruned"))
    expected = measure_quality(Subject.of("s", stock), Subject.of("p", pruned), windows_of(), 2, silent)
    assert by_name["pruned"].quality.kl == pytest.approx(expected.kl, rel=1e-5)
    assert by_name["pruned"].quality.perplexity == pytest.approx(expected.perplexity, rel=1e-5)


def test_sizes_are_those_of_the_experts_that_are_left(result: Comparison) -> None:
    config = tiny_moe("mixtral").config
    expert = 3 * config.hidden_size * config.intermediate_size
    router = config.hidden_size
    rows = {row.name: row for row in result.rows}
    whole = rows["source"].parameters
    assert config.num_local_experts == 6
    assert whole - rows["pruned"].parameters == 3 * 2 * (expert + router)
    assert whole - rows["uneven"].parameters == 2 * (expert + router)
    assert whole - rows["mapped"].parameters == 4 * expert, "its router stays"
    assert rows["skips"].parameters == rows["source, top-1"].parameters == whole
    assert whole - rows["uniform average, other/meo"].parameters == 3 * 5 * expert
    assert all(row.weight_bytes == row.nbytes for row in result.rows), "on a CPU"
    assert rows["source"].weight_bytes - rows["pruned"].weight_bytes == 4 * 3 * 2 * (expert + router)


def selected(model: MixtralForCausalLM, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return weights and indices of every router, by block, while a model reads."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in BLOCKS}
    for path in BLOCKS:
        model.get_submodule(path).gate.register_forward_hook(
            lambda module, args, output, path=path: seen[path].append(output[1:3])
        )
    with torch.no_grad():
        model(windows, use_cache=False)
    return [tuple(map(torch.cat, zip(*calls, strict=True))) for calls in seen.values()]  # type: ignore[misc]


def test_flops_are_those_of_the_pairs_that_run(result: Comparison, folder: Path) -> None:
    """Against what the models' own routers say on the whole text: who weighs too little, who runs for whom."""
    made = meo_model_class(MixtralForCausalLM)
    gates = selected(made.from_pretrained(folder / "skips").eval(), windows_of())
    skips = [1 + (w.amin(1) >= 0.6 * w.amax(1)).double().mean().item() for w, _ in gates]
    gates = selected(made.from_pretrained(folder / "mapped").eval(), windows_of())
    mapped = [1 + (gates[0][1] // 3).diff().ne(0).double().mean().item(), 2, 2]
    assert all(1.05 < mean < 1.95 for mean in (*skips, mapped[0])), "too easy"
    rows = {row.name: row for row in result.rows}
    config = tiny_moe("mixtral").config
    expert, router = 3 * config.hidden_size * config.intermediate_size, config.hidden_size
    whole = rows["source"].flops
    for name, pairs, routers in (
        ("skips", skips, 0),
        ("mapped", mapped, 0),
        ("uneven", [2] * 3, 2),
        ("pruned", [2] * 3, 6),
    ):
        assert whole - rows[name].flops == pytest.approx(2 * expert * (6 - sum(pairs)) + 2 * router * routers), name
        assert rows[name].depends_on_text == (name in ("skips", "mapped"))
        if name != "pruned":
            assert rows[name].experts_per_token == pytest.approx(sum(pairs) / 3), name
    assert rows["pruned"].experts_per_token is rows["source"].experts_per_token is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "longcat_flash", "gpt_oss"])
def test_pairs_are_counted_in_every_layout(family: str) -> None:
    """Where a rule skips all but the first expert, one runs; experts that return their input are none."""
    model = meo_of_moe(tiny_moe(family), level="unmerged", skip={"rule": "cumulative", "threshold": 0.0})
    subject = Subject.of(family, model)
    assert subject.arguments == {}
    assert depends_on_text(model)
    before = subject.logits(windows_of(1))
    with tallied_pairs(model) as tallies:
        assert torch.equal(subject.logits(windows_of(1)), before)
    assert {tally.tokens for tally in tallies.values()} == {16}
    assert mean_pairs(tallies) == 1 if family != "longcat_flash" else mean_pairs(tallies) < 1
    assert all("_run_each" not in vars(module) for _, module in merged_moe(model)), "the model is not what it was"
    every = meo_of_moe(tiny_moe(family), level="unmerged")
    assert not depends_on_text(every)
    assert flops_per_token(subject, windows_of(2)) < flops_per_token(Subject.of("all", every), windows_of(2))


def test_what_is_written_tells_models_apart(result: Comparison, folder: Path, tmp_path: Path) -> None:
    lines = notes(result, Machine.look("cpu"), "tiny")
    assert [line.split(":")[0] for line in lines if "gates: segments" in line] == [
        f"{one.name}'s gates" for one in result.merging
    ]
    blind = [line for line in lines if "every gate has read one token only" in line]
    assert [line.split(":")[0] for line in blind] == ["MEO, other/meo"]
    depends = [line for line in lines if "depends on the text" in line]
    assert [line.split(":")[0] for line in depends] == ["skips", "mapped"]
    machine = Machine.look("cpu")
    write_results(result, machine, {"source": "s", "outs": MADE, "text": "t", "also": ()}, tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert written["command"].startswith("meo-hf compare s meo other/meo pruned uneven skips mapped --text t ")
    assert "meo_gates" not in written, "there are two"
    assert [(one["variant"], one["segment_length"]) for one in written["meo_models"]] == [
        (one.name, one.segment) for one in result.merging
    ]
    assert [layer["variant"] for layer in written["layers"]] == [one.name for one in result.merging for _ in range(3)]
    counted = {row["variant"]: row["flops_counted_on"] for row in written["variants"]}
    assert [name for name, text in counted.items() if text == "whole text"] == ["skips", "mapped"]
    plot_compare(result, "all", tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_models_that_do_not_merge_are_told_nothing_of_meo(folder: Path, tmp_path: Path) -> None:
    given = [folder / name for name in ("pruned", "skips")]
    written = ("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    done = run_cli("compare", folder / "source", *given, "--text", folder / "text.txt", *SMALL, *written)
    assert done.code == 0, done.err
    rows = [" ".join(line.split()) for line in done.out.splitlines()]
    for start in ("source ", "pruned ", "skips ", "source, top-1 "):
        assert sum(row.startswith(start) and row[len(start)].isdigit() for row in rows) == 1, start
    said = " ".join(done.out.split())
    assert not any(word in said for word in ("MEO", "gate", "segment", "uniform"))
    assert "M para-" in said
    result = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert "meo_gates" not in result
    assert result["meo_models"] == result["layers"] == []
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_others_are_refused(folder: Path, tmp_path: Path) -> None:
    tiny_moe("olmoe").save_pretrained(tmp_path / "olmoe")
    tiny_moe("mixtral", vocab_size=98).save_pretrained(tmp_path / "smaller")
    tiny_moe("mixtral").save_pretrained(tmp_path / "named")
    shutil.copytree(folder / "skips", tmp_path / "ours")
    for name in ("named", "ours"):
        words_tokenizer(bos_token="<s>").save_pretrained(tmp_path / name)
    for outs, message in (
        ([], "OUT is missing"),
        ([folder / "meo", folder / "meo"], "meo twice: give each model once"),
        ([folder / "meo", folder / "source"], "is SOURCE itself"),
        ([folder / "meo", tmp_path / "olmoe"], "nor of .*'s family .mixtral.: give what meo-hf convert or meo-hf red"),
        ([folder / "meo", tmp_path / "smaller"], "has 98 tokens"),
        ([tmp_path / "named"], "named has another tokenizer than .*: give a model that was made of it"),
        ([tmp_path / "ours"], "ours has another tokenizer than .*: give a model that was made of it"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(str(folder / "source"), outs, folder / "text.txt", SETTINGS)


def test_labels_say_no_more_of_a_path_than_it_takes() -> None:
    assert labels_of(["/a/b/one", "/a/b/two"]) == ["one", "two"]
    assert labels_of(["/a/x/m", "/a/y/m", "/b/x/m", "/n"]) == ["a/x/m", "y/m", "b/x/m", "n"]
    assert labels_of(["some/model", "/here/model"]) == ["some/model", "model"]
