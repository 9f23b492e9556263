"""Reducing keeps its contracts in every family: what a plan says is what is written, and it loads as any checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import identical, listing, same_tensors, saved, tensors
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from moe_contracts import experts_of, make_experts_alike, moe_modules
from moe_tiny import tiny_moe, tiny_moe_inputs
from reduction_tiny import (
    GROUPED,
    LAYOUTS,
    apply,
    bench_of,
    is_router,
    kept_numbers,
    load_stock,
    reducible,
    sliced,
    source_of,
)
from safetensors.torch import load_file
from torch import Tensor

from meo_hf.errors import CheckpointError, OutputError, UnsupportedError, UsageError
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, one_hot
from meo_hf.reduction.reduce import reduce, reduction_method

torch.set_num_threads(1)
_EXPERT = re.compile(r"(.*\.expert_)(\d+)(\..*)")


def pruned_state(old: dict[str, Tensor], new: dict[str, Tensor], experts: int, kept: list[int]) -> dict[str, Tensor]:
    """Return what a model without some experts should hold, by indexing alone."""
    expected = {}
    for name, tensor in new.items():
        if (split := _EXPERT.fullmatch(name)) is not None:
            expected[name] = old[f"{split[1]}{kept[int(split[2])]}{split[3]}"]
        elif old[name].shape != tensor.shape:
            expected[name] = sliced(old[name], tensor, experts, kept)
        else:
            expected[name] = old[name]
    return expected


@pytest.mark.parametrize("family", reducible())
def test_one_hot_plans_are_indexing(family: str, tmp_path: Path) -> None:
    source = source_of(family, tmp_path / "source")
    stock, _ = load_stock(source, tiny_moe(family))  # loading sets a bias of ZAYA's that belongs to no expert
    limits = bench_of(source).limits
    (experts,) = {one.experts for one in limits.values()}
    (groups,) = {one.groups for one in limits.values()}
    kept = kept_numbers(experts, groups)
    rows = one_hot(kept)
    report = apply(source, tmp_path / "out", {path: BlockPlan(rows, rows) for path in limits})
    model, info = load_stock(tmp_path / "out", stock)
    assert report.why_own is None
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    old, new = stock.state_dict(), model.state_dict()
    expected = pruned_state(old, new, experts, kept)
    routers = [name for name in new if old[name].shape != new[name].shape and is_router(name)]
    assert len(routers) >= len(limits), "no router lost a row"
    assert [name for name in new if not identical(new[name], expected[name])] == []
    assert {len(_experts(model, path)) for path in limits} == {len(kept)}
    with torch.no_grad():
        assert all(torch.isfinite(found).all() for found in model(**tiny_moe_inputs(family)).to_tuple()[:1])


def _experts(model: Any, path: str) -> Any:
    block = model.get_submodule(path)
    experts = getattr(block, "experts", None)
    if hasattr(experts, "mlp"):
        return experts.mlp.w1[:: experts.mlp.ffn_hidden_size]
    return experts.down_proj if hasattr(experts, "down_proj") else experts_of(experts)


@pytest.mark.parametrize("family", LAYOUTS)
def test_keeping_all_changes_nothing(family: str, tmp_path: Path) -> None:
    source = source_of(family, tmp_path / "source")
    blocks = {
        p: BlockPlan(one_hot([*range(o.experts)]), one_hot([*range(o.experts)]))
        for p, o in bench_of(source).limits.items()
    }
    report = apply(source, tmp_path / "out", blocks)
    assert report.why_own is None
    assert same_tensors(tensors(source), tensors(tmp_path / "out")) == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("how", ["mean", "aligned", "joint-svd"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_merged_identical_experts_are_that_expert(family: str, how: str, tmp_path: Path) -> None:
    """Also where the copies' neurons lie in another order, if they are aligned."""
    stock = tiny_moe(family)
    make_experts_alike(stock)
    stock.save_pretrained(tmp_path / "source")
    limits = bench_of(tmp_path / "source").limits
    rows = {p: tuple(((2 * i, 0.25), (2 * i + 1, 0.75)) for i in range(o.experts // 2)) for p, o in limits.items()}
    stands = {p: tuple(i // 2 for i in range(o.experts)) for p, o in limits.items()}
    blocks = {path: BlockPlan(own, stands_for=stands[path], how=how) for path, own in rows.items()}
    apply(tmp_path / "source", tmp_path / "out", blocks)
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if MOE_FAMILIES[family].kind == "encoder-decoder" else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found, expected = model(**tiny_moe_inputs(family)).logits, stock.eval()(**tiny_moe_inputs(family)).logits
    if family == "nllb-moe":  # stock drops what is over an expert's capacity
        return
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plans_are_replayed_byte_for_byte(tmp_path: Path) -> None:
    source = source_of("olmoe", tmp_path / "source")
    made = reduce(
        source, tmp_path / "one", reduction_method("prune", {"score": "random", "keep": "4", "seed": 3}), verify="none"
    )
    assert made.plan is not None
    reduce(source, tmp_path / "two", plan=tmp_path / "one" / "plan.json", verify="none")
    one, two = listing(tmp_path / "one"), listing(tmp_path / "two")
    differing = {name for name in one.keys() | two if one.get(name) != two.get(name)}
    assert differing == {"meo_report.json"}, "it holds times and the output's name"
    dry = reduce(
        source, tmp_path / "three", reduction_method("prune", {"score": "random", "keep": "4", "seed": 3}), dry_run=True
    )
    assert dry.plan is not None
    assert dry.plan.to_json() == (tmp_path / "one" / "plan.json").read_text()
    assert not (tmp_path / "three").exists()
    assert ReductionPlan.load(tmp_path / "one" / "plan.json") == made.plan


def test_plans_of_other_weights_are_refused(tmp_path: Path) -> None:
    source, other = source_of("olmoe", tmp_path / "a"), source_of("mixtral", tmp_path / "b")
    reduce(source, tmp_path / "out", reduction_method("prune", {"score": "random", "keep": "4"}), verify="none")
    with pytest.raises(UsageError, match="whose weight files differ"):
        reduce(other, tmp_path / "no", plan=tmp_path / "out" / "plan.json")
    damaged = tmp_path / "plan.json"
    damaged.write_text('{"blocks": {"model": {"experts": 3}}}')
    with pytest.raises(CheckpointError, match="is no plan of meo-hf reduce"):
        reduce(source, tmp_path / "no", plan=damaged)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("family", ["jetmoe", "nllb-moe"])
def test_results_are_checked_without_meo_hf(family: str, tmp_path: Path) -> None:
    """The command's own check: a fresh process, no remote code where none is needed."""
    source = source_of(family, tmp_path / "source")
    limits = bench_of(source).limits
    rows = {p: tuple(((i, 0.5), (o.experts - 1 - i, 0.5)) for i in range(o.experts // 2)) for p, o in limits.items()}
    report = apply(source, tmp_path / "out", {path: BlockPlan(own, own) for path, own in rows.items()}, verify="full")
    assert (report.verification, len(report.checks)) == ("full", 5)
    assert all(check.passed for check in report.checks)
    assert (report.why_own is None) == (family != "jetmoe")


def test_checks_find_a_wrong_tensor(tmp_path: Path) -> None:
    """A router whose rows lie in another order loads and runs; only the comparison sees it."""
    from meo_hf.reduction import verification
    from meo_hf.reduction.outcome import outcome_of

    source = source_of("olmoe", tmp_path / "source")
    work = bench_of(source)
    rows = one_hot([1, 2, 3, 4])
    apply(source, tmp_path / "out", {path: BlockPlan(rows, rows) for path in work.limits})
    other = one_hot([2, 1, 3, 4])
    wrong = ReductionPlan({}, {}, {path: BlockPlan(rows, other) for path in work.limits})
    outcome = outcome_of(work.source, work.family, wrong, work.mixture)
    request = verification._request(work.source, wrong, work.mixture, outcome, tmp_path / "out", [])
    checks = verification.run_child(verification._CHILD, request)
    assert [check.passed for check in checks] == [True, False, True]
    assert "gate.weight" in checks[1].detail


def test_blocks_that_differ_need_our_class(tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    first, second, _ = bench_of(source).limits
    blocks = {
        first: BlockPlan(one_hot([0, 2, 5]), one_hot([0, 2, 5])),
        second: BlockPlan(one_hot([1, 3]), one_hot([1, 3])),
    }
    report = apply(source, tmp_path / "out", blocks, verify="full")
    assert report.why_own == "blocks have different numbers of experts"
    assert [has for _, has in report.blocks.values()] == [3, 2, 6]
    assert "trust_remote_code" in (tmp_path / "out" / "README.md").read_text()


def test_groups_stay_equally_large(tmp_path: Path) -> None:
    """Routers that choose groups first keep their groups, and correction biases go with their experts."""
    source = source_of("deepseek_v3", tmp_path / "source", n_routed_experts=16)
    report = reduce(
        source, tmp_path / "out", reduction_method("prune", {"score": "random", "keep": "0.75"}), verify="none"
    )
    assert report.plan is not None
    for block in report.plan.blocks.values():
        kept = [row[0][0] for row in block.experts]
        assert [sum(number // 4 == group for number in kept) for group in range(4)] == [3, 3, 3, 3]
    with pytest.raises(UsageError, match="keep 8 or 12 experts, not 10"):
        reduce(source, tmp_path / "no", reduction_method("prune", {"score": "random", "keep": "10"}))


@pytest.mark.parametrize("family", GROUPED)
def test_groups_that_would_be_too_small_are_refused(family: str, tmp_path: Path) -> None:
    source = source_of(family, tmp_path / "source")
    with pytest.raises(UsageError, match="chooses among 4 groups and needs 2 in each: keep at least 8"):
        reduce(source, tmp_path / "no", reduction_method("prune", {"score": "random", "keep": "4"}))


def test_routers_that_look_tokens_up_are_refused(tmp_path: Path) -> None:
    source = source_of("deepseek_v4", tmp_path / "source")
    with pytest.raises(UnsupportedError, match="looks experts up by the token's number"):
        reduce(source, tmp_path / "no", reduction_method("prune", {"score": "random", "keep": "4"}))
    report = reduce(
        source,
        tmp_path / "out",
        reduction_method("prune", {"score": "random", "keep": "4"}),
        layers="1,2",
        verify="none",
    )
    assert [has for _, has in report.blocks.values()] == [8, 4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "0"}, "is a count: give one from 1 to 6"),
        ({"keep": "7"}, "is a count: give one from 1 to 6"),
        ({"keep": "1.5"}, "is a share"),
        ({"keep": "1"}, "but its router selects 2 for each token"),
        ({"keep": "some"}, "is not understood"),
        ({"score": "best"}, "is unknown"),
        ({"score": "router-norm"}, "needs --pretrained"),
        ({"pretrained": "x"}, "does not read --pretrained"),
        ({"keep": None}, "needs --keep"),
        ({"rule": "ratio"}, "--rule has no effect on --method prune"),
        ({"budget": "mine"}, "is unknown"),
    ],
)
def test_bad_options_write_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        reduce(source, tmp_path / "no", reduction_method("prune", {"score": "random", "keep": "4", **options}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_counts_and_shares_differ(tmp_path: Path) -> None:
    source = source_of("switch_transformers", tmp_path / "source")
    one = reduce(source, tmp_path / "1", reduction_method("prune", {"score": "random", "keep": "1"}), verify="none")
    all_ = reduce(source, tmp_path / "2", reduction_method("prune", {"score": "random", "keep": "1.0"}), verify="none")
    assert {has for _, has in one.blocks.values()} == {1}
    assert {has for _, has in all_.blocks.values()} == {6}


def test_outputs_are_not_overwritten_unasked(tmp_path: Path) -> None:
    source = source_of("mixtral", tmp_path / "source")
    method = reduction_method("prune", {"score": "random", "keep": "4"})
    reduce(source, tmp_path / "out", method, verify="none")
    before = listing(tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        reduce(source, tmp_path / "out", method)
    assert listing(tmp_path / "out") == before
    shutil.rmtree(tmp_path / "out")
    saved("llama", tmp_path / "dense")
    with pytest.raises(UnsupportedError, match="is dense"):
        reduce(tmp_path / "dense", tmp_path / "out", method)


def test_router_norm_keeps_what_fine_tuning_grew(tmp_path: Path) -> None:
    """Signed growth of the norms of the routers' rows (arXiv 2405.16646), by hand."""
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "before")
    grown = {path: torch.tensor([0.5, 3.0, 1.0, 0.9, 2.0, 1.1]) for path in moe_modules(model)}
    for path, block in moe_modules(model).items():
        block.gate.weight.data *= grown[path][:, None]
    model.save_pretrained(tmp_path / "after")
    method = reduction_method("prune", {"score": "router-norm", "keep": "3", "pretrained": str(tmp_path / "before")})
    report = reduce(tmp_path / "after", tmp_path / "out", method, verify="none")
    assert report.plan is not None
    old, _ = load_stock(tmp_path / "before", model)
    for path, block in report.plan.blocks.items():
        norms = old.get_submodule(path).gate.weight.norm(dim=1)
        expected = (grown[path] * norms - norms).tolist()
        assert report.plan.scores[path] == pytest.approx(expected, abs=1e-5)
        kept = [row[0][0] for row in block.experts]
        assert kept == sorted(sorted(range(6), key=lambda e: -expected[e])[:3])
    torch.save(load_file(tmp_path / "before" / "model.safetensors"), tmp_path / "before" / "pytorch_model.bin")
    (tmp_path / "before" / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="pickle"):
        reduce(tmp_path / "after", tmp_path / "again", method, verify="none")
    again = reduce(tmp_path / "after", tmp_path / "again", method, verify="none", allow_pickle=True)
    assert again.plan == report.plan
