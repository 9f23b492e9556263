"""Methods decide as their formulas say: planted experts are found, and plain references agree."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_tiny import words, words_tokenizer
from moe_contracts import _experts_parameters, moe_modules, router_of
from moe_tiny import tiny_moe
from torch import Tensor, nn
from transformers import PreTrainedModel

from meo_hf.errors import UsageError
from meo_hf.reduction.calibration import Calibration
from meo_hf.reduction.reduce import reduce, reduction_method
from meo_hf.reduction.report import ReductionReport

torch.set_num_threads(1)
DATA_DRIVEN = ("reap", "output-norm", "frequency", "gate-mass", "reconstruction")
FAMILIES = ("mixtral", "olmoe", "gpt_oss", "dbrx", "llama4_text", "qwen2_moe", "granitemoe")
WINDOW = 16


@pytest.fixture(autouse=True)
def _own_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEO_HF_STATISTICS", str(tmp_path / "statistics"))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model with a tokenizer, and a text that it can read."""
    model.save_pretrained(folder / "source")
    words_tokenizer().save_pretrained(folder / "source")
    (folder / "text.txt").write_text(words(400), "utf-8")
    return folder / "source"


def decided(source: Path, method: str, samples: int = 8, top_k: int | None = None, **options: Any) -> ReductionReport:
    """Decide by the calibration text beside a source."""
    read = Calibration((str(source.parent / "text.txt"),), window=WINDOW, samples=samples)
    made = reduction_method(method, {"keep": "5", **options} if method != "skip" else options)
    return reduce(source, source.parent / "out", made, calibration=read, top_k=top_k, dry_run=True)


def with_bright_feature(family: str, **overrides: Any) -> PreTrainedModel:
    """A model whose hidden states have much in common, so that a router row of it can decide alone."""
    model = tiny_moe(family, **overrides)
    model.get_input_embeddings().weight.data[:, 0] = 4.0
    return model


def in_common(model: PreTrainedModel, path: str) -> Tensor:
    """Return the direction [D] of what a block's router reads on average; every token has some of it."""
    seen: list[Tensor] = []
    hook = router_of(model.get_submodule(path)).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(words_tokenizer()(words(400), return_tensors="pt")["input_ids"][:, :128].reshape(8, WINDOW))
    hook.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1])
    mean = x.mean(0) / x.mean(0).norm()
    assert float((x @ mean).min()) > 0
    return mean


def rows_of(block: nn.Module) -> Tensor:
    """The weight of a router that has a row per expert."""
    found = [p for p in router_of(block).parameters() if p.dim() == 2]
    return found[0].data


@pytest.mark.parametrize("score", DATA_DRIVEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_nobody_selects_goes_first(family: str, score: str, tmp_path: Path) -> None:
    model = with_bright_feature(family)
    useless = {path: at % 6 for at, path in enumerate(moe_modules(model), 2)}
    for path, expert in useless.items():
        mean, rows = in_common(model, path), rows_of(model.get_submodule(path))
        rows -= (rows @ mean)[:, None] * mean
        rows[expert] = -50.0 * mean
    report = decided(saved(model, tmp_path), "prune", score=score)
    assert report.plan is not None
    for path, block in report.plan.blocks.items():
        assert [row[0][0] for row in block.experts] == [e for e in range(6) if e != useless[path]], path
    assert dict(report.untouched) == {p: [e] for p, e in useless.items()}
    assert any("no token of the calibration text reached 1 of 6 experts" in line for line in report.warnings)


def copy_expert(block: nn.Module, old: int, new: int) -> None:
    """Give one expert of a block the weights of another."""
    for module, name in _experts_parameters(block):
        value = getattr(module, name).data
        size = module.ffn_hidden_size if hasattr(module, "w1") else 1
        value[new * size : (new + 1) * size] = value[old * size : (old + 1) * size]


@pytest.mark.parametrize("group_by", ["outputs", "clusters", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_pair_is_merged(family: str, group_by: str, tmp_path: Path) -> None:
    """Copies answer alike; by logits, the router rejects both in proportion."""
    model = with_bright_feature(family)
    for path in moe_modules(model):
        block = model.get_submodule(path)
        copy_expert(block, 1, 4)
        if group_by == "logits":
            mean, rows = in_common(model, path), rows_of(block)
            rows -= (rows @ mean)[:, None] * mean
            rows[1], rows[4] = -40.0 * mean, -50.0 * mean
    report = decided(saved(model, tmp_path), "merge", group_by=group_by, join="mean", router="map")
    assert report.plan is not None
    for block in report.plan.blocks.values():
        merged = [{old for old, _ in row} for row in block.experts if len(row) > 1]
        assert merged == [{1, 4}]


def test_reconstruction_is_the_least_of_all_subsets(tmp_path: Path) -> None:
    """NAEE by its words: logits of the others are -inf, two of the rest are renormalised, and answers are compared."""
    model = tiny_moe("mixtral")
    source = saved(model, tmp_path)
    report = decided(source, "prune", score="reconstruction", keep="4")
    assert report.plan is not None
    read = Calibration((str(source.parent / "text.txt"),), window=WINDOW, samples=8)
    from meo_hf.reduction.calibration import read_calibration

    batches = read_calibration(read, words_tokenizer()).batches()
    for path, block in moe_modules(model).items():
        inputs: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].detach()))
        with torch.no_grad():
            for batch in batches:
                model(batch.input_ids, attention_mask=batch.attention_mask)
        handle.remove()
        losses = {}
        for kept in itertools.combinations(range(6), 4):
            losses[kept] = sum(
                float((mixtral_block(block, x, kept) - mixtral_block(block, x, tuple(range(6)))).norm()) for x in inputs
            )
        best = min(losses, key=lambda kept: losses[kept])
        found = report.plan.blocks[path]
        assert tuple(row[0][0] for row in found.experts) == best
        assert report.plan.notes[path]["loss"] == pytest.approx(losses[best], rel=1e-3)
        assert report.plan.notes[path]["how"] == "enumerated 15 subsets"


def mixtral_block(block: Any, x: Tensor, kept: tuple[int, ...]) -> Tensor:
    """What a Mixtral block answers with some experts only."""
    x = x.reshape(-1, x.shape[-1])
    logits = x @ block.gate.weight.T
    masked = torch.full_like(logits, -torch.inf)
    masked[:, list(kept)] = logits[:, list(kept)]
    gates, index = masked.softmax(-1).topk(2, -1)
    gates = gates / gates.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for expert in range(6):
        gate, up = (x @ block.experts.gate_up_proj[expert].T).chunk(2, -1)
        answer = (nn.functional.silu(gate) * up) @ block.experts.down_proj[expert].T
        y += answer * (gates * (index == expert)).sum(-1, keepdim=True)
    return y.detach()


def test_progressive_reconstruction_sees_what_was_lost_before(tmp_path: Path) -> None:
    """The first block is judged as without it; a later one reads what the pruned first block gives."""
    source = saved(tiny_moe("mixtral"), tmp_path)
    at_once = decided(source, "prune", score="reconstruction", keep="3").plan
    one_by_one = decided(source, "prune", score="reconstruction", keep="3", progressive=True).plan
    assert at_once is not None
    assert one_by_one is not None
    first, *later = at_once.blocks
    assert at_once.notes[first] == one_by_one.notes[first]
    assert all(at_once.notes[path]["loss"] != one_by_one.notes[path]["loss"] for path in later)


def test_skips_take_each_blocks_median(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    report = decided(saved(model, tmp_path), "skip")
    assert report.plan is not None
    assert report.plan.skip is not None
    limits = report.plan.skip["threshold"]
    assert set(limits) == set(moe_modules(model))
    assert all(0 < limit < 1 for limit in limits.values())
    assert len(set(limits.values())) == 3


def test_least_squares_answers_better_than_the_mean(tmp_path: Path) -> None:
    """On the text it was fitted to, a merged block is nearer to its members."""
    from transformers import AutoModelForCausalLM

    from meo_hf.benchmark.compare_variants import Subject  # noqa: F401

    model = tiny_moe("mixtral").eval()
    source = saved(model, tmp_path)
    read = Calibration((str(source.parent / "text.txt"),), window=WINDOW, samples=24)
    errors = {}
    ids = words_tokenizer()((source.parent / "text.txt").read_text(), return_tensors="pt")["input_ids"][:, :320]
    ids = ids.reshape(-1, WINDOW)
    for join in ("mean", "least-squares"):
        made = reduction_method("merge", {"keep": "3", "join": join, "router": "map"})
        reduce(source, tmp_path / join, made, calibration=read, layers="0", verify="none")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / join).eval()
        seen: dict[str, list[Tensor]] = {"stock": [], "merged": []}
        for name, each in (("stock", model), ("merged", merged)):
            block = each.get_submodule("model.layers.0.mlp")
            block.register_forward_hook(lambda _, args, output, own=seen[name]: own.append(output.detach()))
            with torch.no_grad():
                each(ids)
        errors[join] = float((seen["merged"][-1] - seen["stock"][-1]).norm() / seen["stock"][-1].norm())
    assert errors["least-squares"] < errors["mean"]


def test_methods_that_read_text_need_some(tmp_path: Path) -> None:
    source = saved(tiny_moe("mixtral"), tmp_path)
    with pytest.raises(UsageError, match="this method reads text: give --calibration"):
        reduce(source, tmp_path / "out", reduction_method("prune", {"keep": "4"}))


def test_routers_of_groups_are_not_merged(tmp_path: Path) -> None:
    source = saved(tiny_moe("deepseek_v3", n_routed_experts=16), tmp_path)
    with pytest.raises(UsageError, match="pass --router map"):
        decided(source, "merge", keep="8")
    report = decided(source, "merge", keep="8", router="map")
    assert {has for had, has in report.blocks.values() if had == 16} == {8}


def test_top_k_changes_the_config_alone(tmp_path: Path) -> None:
    source = saved(tiny_moe("mixtral"), tmp_path)
    report = reduce(source, tmp_path / "out", reduction_method("top-k", {}), top_k=1, verify="full")
    assert (report.top_k, report.why_own, report.weights) == ([2, 1], None, "link")
    assert (tmp_path / "out" / "model.safetensors").samefile(source / "model.safetensors")
    with pytest.raises(UsageError, match="needs --top-k"):
        reduce(source, tmp_path / "no", reduction_method("top-k", {}))
    with pytest.raises(UsageError, match="but each token selects 9"):
        reduce(source, tmp_path / "no", reduction_method("top-k", {}), top_k=9)


METRIC = '''
def first_rows(model, tokenizer):
    """Prefer experts 2 and 5, by the rows of the routers."""
    return -sum(float((layer.mlp.gate.weight - rows).norm()) for layer, rows in zip(model.model.layers, WANTED))
'''


def test_searches_find_what_a_metric_of_yours_prefers(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    source = saved(model, tmp_path)
    wanted = [layer.mlp.gate.weight.data[[2, 5]].tolist() for layer in model.model.layers]
    (tmp_path / "metric.py").write_text(
        f"import torch\nWANTED = [torch.tensor(w) for w in {wanted}]\n{METRIC}", "utf-8"
    )
    options = {"keep": "2", "metric": f"{tmp_path}/metric.py:first_rows", "generations": "25,0", "population": 12}
    made = reduction_method("search", {**options, "state": str(tmp_path / "state")}, 1)
    report = reduce(source, tmp_path / "out", made, verify="none")
    assert report.plan is not None
    assert all([row[0][0] for row in block.experts] == [2, 5] for block in report.plan.blocks.values())
    assert report.plan.notes["fitness"] == pytest.approx(0, abs=1e-6)
    assert str(tmp_path) not in (tmp_path / "out" / "plan.json").read_text()
    assert "none: `metric.py:first_rows` judges candidates" in (tmp_path / "out" / "README.md").read_text()
    again = reduce(source, tmp_path / "again", made, dry_run=True)
    assert again.plan is not None
    assert again.plan.notes == report.plan.notes, "a finished search is not searched again"


@pytest.mark.parametrize(
    ("metric", "message"),
    [("nowhere.py:f", "is no FILE.py:NAME"), ("metric.py", "is no FILE.py:NAME"), ("metric.py:g", "has no function g")],
)
def test_metrics_that_are_not_there(metric: str, message: str, tmp_path: Path) -> None:
    source = saved(tiny_moe("mixtral"), tmp_path)
    (tmp_path / "metric.py").write_text("def f(model, tokenizer): return 0.0\n")
    where = metric.replace("metric.py", f"{tmp_path}/metric.py")
    with pytest.raises(UsageError, match=message):
        reduce(source, tmp_path / "out", reduction_method("search", {"keep": "4", "metric": where}))
