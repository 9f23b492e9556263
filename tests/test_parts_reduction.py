"""`meo-hf reduce --method low-rank`: budgets, decompositions against plain references, and what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import listing, run_cli, tensors
from compare_tiny import words, words_tokenizer
from contracts import assert_close
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.moe_meo import merged_moe
from moe_tiny import tiny_moe, tiny_moe_inputs
from reduction_tiny import apply, bench_of, source_of
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from meo_hf.conversion.source import index_tensors, meta_model
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.reduction.calibration import Calibration
from meo_hf.reduction.decomposing import composed, decompose, heaviest_columns
from meo_hf.reduction.outcome import outcome_of
from meo_hf.reduction.parts_check import parts_check
from meo_hf.reduction.plan import BlockPlan, MapParts, ReductionPlan, one_hot
from meo_hf.reduction.rank_budget import apportion, map_budget, smoothed
from meo_hf.reduction.reduce import application_of, reduce, reduction_method
from meo_hf.reduction.statistics import Frequency
from meo_hf.reduction.verify import verify_reduced
from meo_hf.reduction.workbench import Workbench

torch.set_num_threads(1)
STACKED = ("mixtral", "gpt_oss", "dbrx", "llama4_text", "switch_transformers", "nllb-moe", "longcat_flash")


@pytest.fixture(autouse=True)
def _own_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEO_HF_STATISTICS", str(tmp_path / "statistics"))


def readable(family: str, folder: Path) -> Path:
    """Write a tiny mixture with a tokenizer, and a text beside it."""
    source = source_of(family, folder / "source")
    words_tokenizer().save_pretrained(source)
    (folder / "text.txt").write_text(words(300), "utf-8")
    return source


def calibration(folder: Path) -> Calibration:
    return Calibration((str(folder / "text.txt"),), 16, 8)


def whole_maps(work: Workbench) -> dict[str, Tensor]:
    """Return the linear maps [E, O, I] of all experts of a source, by path."""
    return {
        f"{path}.{name}": module.stack(name)[0][: module.count()].detach()
        for path, module in merged_moe(work.model)
        for name in module.maps
    }


def by_hand(work: Workbench, make: Any) -> dict[str, BlockPlan]:
    """Return plans that keep all experts, each linear map as `make` says of its shape."""
    blocks = {}
    for path, limits in work.limits.items():
        rows = one_hot([*range(limits.experts)])
        own = {name: make(w.shape) for name, w in whole_maps(work).items() if name.startswith(f"{path}.")}
        blocks[path] = BlockPlan(rows, rows, parts=own)
    return blocks


def mean_of(experts: Tensor) -> Tensor:
    return sum(experts.unbind(0)) / len(experts)


def test_decompositions_miss_what_svd_says() -> None:
    experts = torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(1))
    ranks, columns = [0, 2, 3, 7], [(), (4, 1), (6,), ()]
    for shared in (None, mean_of(experts)):
        found = composed(decompose(experts, shared, ranks, columns), shared, ranks, columns)
        for expert, made, rank, own in zip(experts, found, ranks, columns, strict=True):
            rest = expert - (0 if shared is None else shared)
            rest[:, list(own)] = 0
            expected = float(torch.linalg.svdvals(rest.double())[rank:].square().sum()) ** 0.5
            assert float((made - expert).norm()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert_close(made[:, list(own)], expert[:, list(own)], 1e-6) if own else None


def test_columns_are_those_that_low_rank_misses() -> None:
    experts = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(2))
    experts[1, :, 3] *= 9
    shared, ranks = mean_of(experts), [2, 0, 2]
    found = heaviest_columns(experts, shared, ranks, [2, 1, 0])
    for expert, rank, count, own in zip(experts, ranks, [2, 1, 0], found, strict=True):
        u, s, v = torch.linalg.svd(expert - shared, full_matrices=False)
        missed = (expert - shared - (u[:, :rank] * s[:rank]) @ v[:rank]).square().sum(0)
        assert own == sorted(missed.argsort(descending=True)[:count].tolist())
    assert found[1] == [3]


def test_budgets_by_hand() -> None:
    budget = map_budget("map", (4, 10, 6), 0.5, True, 0.5)  # 120 of 240 stay, 60 of them are the mean
    assert (budget.columns, budget.ranks) == (3, 30 // 16)
    assert (budget.largest_rank, budget.largest_columns) == (60 // 16, 6)
    assert map_budget("map", (4, 10, 6), 0.5, False, 0.0).ranks == 120 // 16
    with pytest.raises(UsageError, match="leaves no rank to any of the 4 experts of map; the mean alone takes"):
        map_budget("map", (4, 10, 6), 0.25, True, 0.0)
    assert smoothed([3, 1, 0, 0]) == [0.5, 0.25, 0.125, 0.125]
    assert smoothed([0, 0]) == [0.5, 0.5]
    assert apportion(10, [0.5, 0.25, 0.125, 0.125], 9) == [5, 3, 1, 1]  # remainders .0, .5, .25, .25
    assert apportion(10, [0.5, 0.25, 0.125, 0.125], 4) == [4, 3, 2, 1]  # the others share 6 as 3, 1.5, 1.5
    assert apportion(7, [1, 1, 1], 2) == [2, 2, 2]
    assert apportion(5, [1, 1, 1], 9) == [2, 2, 1]


@pytest.mark.parametrize("family", STACKED)
def test_full_ranks_are_whole_experts(family: str, tmp_path: Path) -> None:
    source = source_of(family, tmp_path / "source")
    work = bench_of(source)
    blocks = by_hand(work, lambda shape: MapParts(True, (min(shape[1:]),) * shape[0], ((),) * shape[0]))
    report = apply(source, tmp_path / "out", blocks)
    assert report.why_own == "experts are kept as parts of less memory"
    assert max(one["error"] for one in report.factorised) < 1e-6
    if family == "nllb-moe":  # stock's own experts read the index as a mask
        return
    auto = AutoModelForSeq2SeqLM if MOE_FAMILIES[family].kind == "encoder-decoder" else AutoModelForCausalLM
    model, inputs = auto.from_pretrained(tmp_path / "out", attn_implementation="eager").eval(), tiny_moe_inputs(family)
    with torch.no_grad():
        assert_close(model(**inputs).logits, tiny_moe(family)(**inputs).logits, 1e-4)
    again = type(model).from_pretrained(tmp_path / "out")
    again.save_pretrained(tmp_path / "saved")
    left, right = tensors(tmp_path / "out"), tensors(tmp_path / "saved")
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("center", ["mean", "none"])
def test_what_is_left_is_the_share_and_errors_are_svd_tails(center: str, tmp_path: Path) -> None:
    source = source_of("gpt_oss", tmp_path / "source")
    method = reduction_method("low-rank", {"share": 0.6, "center": center})
    report = reduce(source, tmp_path / "out", method, verify="none")
    assert report.plan is not None
    work = bench_of(source)
    kept = {name: parts for block in report.plan.blocks.values() for name, parts in block.parts.items()}
    gone = 0
    for one in report.factorised:
        experts, parts = whole_maps(work)[one["map"]], kept[one["map"]]
        outputs, inputs = experts.shape[1:]
        size = (center == "mean") * outputs * inputs + sum(parts.ranks) * (outputs + inputs)
        assert 0.6 * experts.numel() - (outputs + inputs) < size <= 0.6 * experts.numel()
        assert max(parts.ranks) - min(parts.ranks) <= 1
        gone += experts.numel() - size
        rest = experts - (mean_of(experts) if center == "mean" else 0)
        tails = sum(torch.linalg.svdvals(x)[r:].double().square().sum() for x, r in zip(rest, parts.ranks, strict=True))
        assert one["error"] == pytest.approx(math.sqrt(tails) / float(experts.norm()), rel=1e-4)
    assert report.parameters_before - report.parameters_after == gone
    sizes = json.loads((tmp_path / "out" / "config.json").read_text())["meo"]["expert_parts"]
    assert {name: one["ranks"] for name, one in sizes.items()} == {
        name: list(p.ranks) if len(set(p.ranks)) > 1 else p.ranks[0] for name, p in kept.items()
    }


def test_the_command_decides_writes_replays_and_checks(tmp_path: Path) -> None:
    source = readable("mixtral", tmp_path)
    text = ("--calibration", tmp_path / "text.txt", "--window", "16", "--samples", "8")
    low = ("--method", "low-rank", "--share", "0.7", "--ranks-by", "reap", "--columns", "0.3", *text)
    done = run_cli("reduce", source, tmp_path / "out", *low)
    assert done.code == 0, done.err
    assert "FAILED" not in done.out
    replayed = run_cli("reduce", source, tmp_path / "two", "--plan", tmp_path / "out" / "plan.json", "--verify", "none")
    assert replayed.code == 0, replayed.err
    one, two = listing(tmp_path / "out"), listing(tmp_path / "two")
    assert {n for n in one if one[n] != two.get(n)} == {"meo_report.json", "README.md"}, "they tell of their checks"
    report = json.loads((tmp_path / "out" / "meo_report.json").read_text())
    assert {"map", "rank", "columns", "error"} == set(report["factorised"][0])
    assert all(0 < one["error"] < 1 and one["columns"] > 0 for one in report["factorised"])
    assert verify_reduced(tmp_path / "out", "sample").passed
    plan = ReductionPlan.load(tmp_path / "out" / "plan.json")
    assert len({parts.ranks for block in plan.blocks.values() for parts in block.parts.values()}) > 1
    text_ = (tmp_path / "out" / "plan.json").read_text().replace('"shared": false', '"shared": 0')
    with pytest.raises(CheckpointError, match="parts hold"):
        ReductionPlan.from_json(text_, "plan.json")


def test_importance_gives_ranks(tmp_path: Path) -> None:
    source = readable("olmoe", tmp_path)
    method = reduction_method("low-rank", {"share": 0.5, "ranks_by": "frequency", "center": "none"})
    report = reduce(source, tmp_path / "out", method, calibration=calibration(tmp_path), dry_run=True)
    assert report.plan is not None
    work = bench_of(source, calibration=calibration(tmp_path))
    often = Frequency()
    work.observe(often)
    for path, block in report.plan.blocks.items():
        counts = often.result()[path]
        for name, parts in block.parts.items():
            experts, outputs, inputs = whole_maps(work)[name].shape
            total = int(0.5 * experts * outputs * inputs) // (outputs + inputs)
            ideal = total * (0.5 / experts + 0.5 * counts / counts.sum())
            most = outputs * inputs // (outputs + inputs)
            assert sum(parts.ranks) == total
            assert max(parts.ranks) <= most
            if float(ideal.max()) < most:
                assert (torch.tensor(parts.ranks) - ideal).abs().max() < 1
            assert parts.ranks[int(counts.argmax())] > parts.ranks[int(counts.argmin())]


def test_merged_experts_are_decomposed(tmp_path: Path) -> None:
    """MC-SMoE: merge, then low rank and columns; the parts' products are the merged experts."""
    source = readable("mixtral", tmp_path)
    merge = reduction_method("merge", {"keep": "3", "join": "aligned", "group_by": "logits", "router": "map"})
    merged = reduce(source, tmp_path / "merged", merge, calibration=calibration(tmp_path), verify="none")
    options = {"share": 0.8, "columns": 0.2, "ranks_by": "frequency", "after": str(tmp_path / "merged" / "plan.json")}
    options["center"] = "mean"
    low_rank = reduction_method("low-rank", options)
    report = reduce(source, tmp_path / "out", low_rank, calibration=calibration(tmp_path), verify="none")
    assert [has for _, has in report.blocks.values()] == [3, 3, 3]
    assert report.parameters_after < merged.parameters_after
    assert report.plan is not None
    assert str(tmp_path) not in report.plan.to_json()
    assert report.plan.notes["after"]["name"] == "merge"
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    large = {f"{path}.{name}": module.stack(name)[0] for path, module in merged_moe(small) for name in module.maps}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for path, module in merged_moe(made):
        for name in module.maps:
            parts, whole = module.parts[name.removesuffix("_proj")], large[f"{path}.{name}"]
            eye = torch.eye(whole.shape[2])
            found = torch.stack([parts(e, eye, module.stack(name)[0], None).t() for e in range(3)]).detach()
            error = next(one["error"] for one in report.factorised if one["map"] == f"{path}.{name}")
            assert float((found - whole.detach()).norm() / whole.detach().norm()) == pytest.approx(error, rel=1e-4)


def test_checks_find_wrong_parts(tmp_path: Path) -> None:
    source = source_of("switch_transformers", tmp_path / "source")
    work = bench_of(source)
    make = lambda shape: MapParts(True, (2,) * shape[0], ((1, 0),) * shape[0])  # noqa: E731
    blocks = by_hand(work, make)
    report = apply(source, tmp_path / "out", blocks)
    assert report.plan is not None
    outcome = outcome_of(work.source, work.family, report.plan, work.mixture)
    made = application_of(work, report.plan, outcome)
    assert made is not None
    model, kept = meta_model(outcome.model_class, outcome.config), tensors(tmp_path / "out")
    assert parts_check(made.parted, model, index_tensors(tmp_path / "out")).passed
    name = next(name for name in kept if name.endswith("parts.up.A"))
    shared = next(name for name in kept if name.endswith("experts.expert_0.wi.weight"))
    for wrong in (name, name[:-1] + "B", name[:-1] + "S", name[:-1] + "index", shared):
        save_file({**kept, wrong: kept[wrong].roll(1, 0)}, tmp_path / "out" / "model.safetensors", {"format": "pt"})
        assert not parts_check(made.parted, model, index_tensors(tmp_path / "out")).passed, wrong


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    source, other = source_of("mixtral", tmp_path / "source"), source_of("jetmoe", tmp_path / "jetmoe")

    def low_rank(folder: Path = source, **options: Any) -> None:
        reduce(folder, tmp_path / "no", reduction_method("low-rank", {"share": 0.5, **options}))

    with pytest.raises(UnsupportedError, match="cannot keep experts as parts"):
        low_rank(other)
    with pytest.raises(UsageError, match="the mean alone takes one expert's"):
        low_rank(share=0.17, center="mean")
    with pytest.raises(UsageError, match="--share is 1"):
        low_rank(share=1)
    with pytest.raises(UsageError, match="--columns is 1"):
        low_rank(columns=1)
    with pytest.raises(UsageError, match="--center 'zero' is unknown"):
        low_rank(center="zero")
    with pytest.raises(UsageError, match="--ranks-by 'luck' is unknown"):
        low_rank(ranks_by="luck")
    with pytest.raises(UsageError, match="needs --share"):
        reduction_method("low-rank", {})
    with pytest.raises(UsageError, match="give --calibration"):
        low_rank(ranks_by="reap")
    report = reduce(source, tmp_path / "one", reduction_method("low-rank", {"share": 0.5}), verify="none")
    with pytest.raises(UnsupportedError, match="keeps its experts as parts, which only run one by one"):
        low_rank(tmp_path / "one")
    plan = tmp_path / "one" / "plan.json"
    with pytest.raises(UsageError, match="keeps experts as parts already"):
        low_rank(after=str(plan))
    assert report.plan is not None
    replace(report.plan, source={**report.plan.source, "fingerprint": "x"}).save(plan)
    with pytest.raises(UsageError, match="was made for other weights"):
        low_rank(after=str(plan))
    (path, block), *_ = report.plan.blocks.items()
    (name, parts), *_ = block.parts.items()
    for wrong, message in (
        ({name: replace(parts, ranks=parts.ranks[1:])}, "has no ranks or columns for 6 experts"),
        ({name: replace(parts, columns=((3, 3), *parts.columns[1:]))}, "has no ranks or columns for 6 experts"),
        ({name: replace(parts, columns=((999,), *parts.columns[1:]))}, "names columns beyond its"),
        ({"lm_head": parts}, "its linear maps"),
    ):
        with pytest.raises(UsageError, match=message):
            apply(source, tmp_path / "no", {path: replace(block, parts=wrong)})
    assert not (tmp_path / "no").exists()
