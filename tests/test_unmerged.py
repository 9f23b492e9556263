"""Mixtures whose experts run one by one equal stock ones; with fewer, joint or skipped experts, plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contracts import assert_close, assert_differs
from meo_hf.modeling.moe_meo import MergedExpertsMixin
from meo_hf.modeling.unmerged_meo import joined, renormalised, skip_by_cumulated, skip_by_ratio
from moe_contracts import KEPT, MoeCase, moe_modules, watched
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from unmerged_reference import (
    block_output,
    case_of,
    count_of,
    gates_of,
    grouped,
    reduced,
    skipped,
    stock_with_fewer,
)

torch.set_num_threads(1)
LAYOUTS = ("olmoe", "gpt_oss", "longcat_flash", "dbrx", "jetmoe", "llama4", "nllb-moe")
OTHERS = ("axk1", "deepseek_v4", "gemma4")  # whose routers or blocks are built in another way
ONE = ("switch_transformers", "zaya")  # each token selects one expert, whatever a user says
TWO = {"llama4": 2, "llama4_text": 2}
RULES = ("ratio", "cumulative")


def several(family: str, **overrides: Any) -> MoeCase:
    """Return a case in which tokens select several experts."""
    return case_of(family, **({"num_experts_per_tok": TWO[family]} if family in TWO else {}), **overrides)


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def every_other(stock: PreTrainedModel) -> dict[str, list[int]]:
    """Return experts to keep, in another order, of every other block."""
    experts = count_of(stock)
    rows = [experts - 1, 0, *range(2, experts - 2)][: experts - 2]
    return {path: rows for i, path in enumerate(moe_modules(stock)) if i % 2 == 0}


@pytest.mark.parametrize("family", KEPT)
def test_unmerged_is_stock(family: str) -> None:
    case = case_of(family)
    stock, inputs = case.stock(), case.inputs()
    if family == "nllb-moe":  # whose stock experts read the index as a mask
        check_blocks(case, stock, reduced(case, stock, {}), {}, {}, None)
        return
    expected = logits(stock, inputs)
    found = logits(case.merged(stock, level="unmerged"), inputs)
    assert torch.equal(found, expected) or family == "dbrx"
    assert_close(found, expected, 1e-12)


def test_full_experts_drop_tokens_as_stock_does() -> None:
    case = case_of("switch_transformers", expert_capacity=2)
    stock, inputs = case.stock(), case.inputs()
    found = logits(case.merged(stock, level="unmerged"), inputs)
    assert_close(found, logits(stock, inputs), 1e-12)
    assert_differs(found, logits(case_of("switch_transformers").stock(), inputs), 1e-3)


@pytest.mark.parametrize("family", KEPT[::3] + [name for name in (*LAYOUTS, *OTHERS, *ONE) if name not in KEPT[::3]])
def test_fewer_experts_per_block(family: str) -> None:
    case = case_of(family)
    stock, inputs = case.stock(), case.inputs()
    kept = every_other(stock)
    model = reduced(case, stock, kept)
    found = [module.count() for module in model.modules() if isinstance(module, MergedExpertsMixin)]
    assert found == [len(kept.get(path, range(count_of(stock)))) for path in moe_modules(stock)]
    expected = stock_with_fewer(stock, kept)
    if family == "nllb-moe":
        check_blocks(case, expected, model, {}, {path: list(range(len(rows))) for path, rows in kept.items()}, None)
        return
    assert_close(logits(model, inputs), logits(expected, inputs), 1e-12)
    assert_differs(logits(model, inputs), logits(stock, inputs), 1e-3)


def check_blocks(
    case: MoeCase, stock: PreTrainedModel, model: PreTrainedModel, maps: dict[str, Any], kept: Any, skip: Any
) -> int:
    """Compare every block with its definition; returns how many (token, expert) pairs should have run."""
    pairs = 0
    with torch.no_grad(), watched(model) as seen:
        model(**case.inputs())
    blocks = moe_modules(stock)
    assert set(seen) == set(blocks)
    for path, one in seen.items():
        x, y = (t.reshape(-1, t.shape[-1]) for t in (one.experts_in, one.experts_out))
        rows = kept.get(path, list(range(count_of(stock))))
        with torch.no_grad():
            gates = gates_of(blocks[path], one)
            gates = grouped(gates, maps[path], len(rows)) if path in maps else gates
            gates = gates if skip is None else skipped(gates, *skip)
            assert_close(y, block_output(blocks[path], gates, x, rows), case.tolerance)
        pairs += int((gates[:, : len(rows)] > 0).sum())
    return pairs


def two_for_all(stock: PreTrainedModel) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return experts to keep of each block, and which of them runs for each old one."""
    experts = count_of(stock)
    return {path: [3, 1] for path in moe_modules(stock)}, {
        path: [(i * 5 + at) % 3 % 2 for i in range(experts)] for at, path in enumerate(moe_modules(stock))
    }


@pytest.mark.parametrize("family", [*LAYOUTS, *OTHERS, *ONE])
def test_one_expert_for_several(family: str) -> None:
    case = MoeCase(family) if family != "nllb-moe" else case_of(family)  # a router that stays may select by groups
    stock = case.stock()
    kept, maps = two_for_all(stock)
    check_blocks(case, stock, reduced(case, stock, kept, expert_maps=maps), maps, kept, None)


def middle(case: MoeCase, stock: PreTrainedModel, rule: str) -> tuple[float, int]:
    """Return the threshold of a rule at which half of the tokens skip something, and how many pairs run without."""
    model, blocks = reduced(case, stock, {}), moe_modules(stock)
    with torch.no_grad(), watched(model) as seen:
        model(**case.inputs())
        weights = [gates_of(blocks[path], one) for path, one in seen.items()]
    shares = torch.cat([w.max(1).values / w.sum(1) for w in weights]).clamp(min=0.5).unique()
    between = float(shares[len(shares) // 2 - 1 : len(shares) // 2 + 1].mean())  # no token is right on it
    pairs = sum(int((w[:, : count_of(stock)] > 0).sum()) for w in weights)
    return (between if rule == "cumulative" else 1 / between - 1), pairs


@pytest.mark.parametrize("family", [*LAYOUTS, *OTHERS, "deepseek_v2", "deepseek_v3", "phimoe", "qwen3_moe"])
def test_skipped_experts(family: str) -> None:
    case = several(family)
    stock = case.stock()
    rule = RULES[len(family) % 2]
    threshold, everything = middle(case, stock, rule)
    model = reduced(case, stock, {}, skip={"rule": rule, "threshold": threshold})
    assert 0.3 * everything < check_blocks(case, stock, model, {}, {}, (rule, threshold)) < everything


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", LAYOUTS)
def test_what_is_skipped_is_not_computed(family: str, rule: str) -> None:
    case = several(family)
    stock, inputs = case.stock(), case.inputs()
    threshold, everything = middle(case, stock, rule)
    each = work_of_an_expert(stock)
    kept, maps = two_for_all(stock)
    for rows, known in (({}, {}), (kept, maps)):
        mapped = {"expert_maps": known} if known else {}
        model = reduced(case, stock, rows, **mapped, skip={"rule": rule, "threshold": threshold})
        pairs = check_blocks(case, stock, model, known, rows, (rule, threshold))
        assert flops(reduced(case, stock, {}), inputs) - flops(model, inputs) == (everything - pairs) * each


def flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        logits(model, inputs)
    return counter.get_total_flops()


def work_of_an_expert(stock: PreTrainedModel) -> int:
    """Return the FLOPs of one token in one expert."""
    model = MoeCase(stock.config.model_type).merged(stock, level="unmerged")
    module = next(module for module in model.modules() if isinstance(module, MergedExpertsMixin))
    if stock.config.model_type == "jetmoe":
        return 2 * sum(linear.weight[0].numel() for linear in (module.input_linear, module.output_linear))
    return 2 * sum(module.stack(name)[0][0].numel() for name in module.maps)


@pytest.mark.parametrize("rule", [("ratio", 0.6), ("cumulative", 0.7)], ids=RULES)
def test_tails_of_four(rule: tuple[str, float]) -> None:
    case = case_of("olmoe", num_experts_per_tok=4)
    stock = case.stock()
    model = reduced(case, stock, {}, skip={"rule": rule[0], "threshold": rule[1]})
    assert check_blocks(case, stock, model, {}, {}, rule) < 4 * 24 * 3


def test_thresholds_by_block() -> None:
    case = case_of("olmoe")
    stock = case.stock()
    paths = list(moe_modules(stock))
    model = reduced(case, stock, {}, skip={"rule": "cumulative", "threshold": {paths[0]: 0.0, paths[2]: 1.0}})
    assert flops(reduced(case, stock, {}), case.inputs()) - flops(model, case.inputs()) == 24 * work_of_an_expert(stock)


def test_rules_by_hand() -> None:
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [0.0, 0.0, 0.6]])
    assert skip_by_ratio(weights, 0.5).int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert skip_by_cumulated(weights, 0.5).int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert skip_by_cumulated(weights, 0.6).int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert skip_by_ratio(weights, 0.0).all()
    kept = renormalised(weights, skip_by_ratio(weights, 0.5))
    assert_close(kept, torch.tensor([[0.625, 0.0, 0.375], [0.0, 1.0, 0.0], [0.0, 0.0, 0.6]]), 1e-6)


def test_two_experts_skip_the_second_by_its_ratio() -> None:
    first = torch.linspace(0.5, 1, 51)
    runs = skip_by_ratio(torch.stack([1 - first, first], 1), 0.4)
    assert runs[:, 1].all()
    assert runs[:, 0].tolist() == [bool(1 - w >= 0.4 * w) for w in first]


def test_an_expert_selected_twice_runs_once() -> None:
    runs, weights = joined(torch.tensor([[1, 0, 1], [2, 2, 2]]), torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]]))
    assert runs.tolist() == [[True, True, False], [True, False, False]]
    assert_close(weights, torch.tensor([[0.7, 0.3, 0.0], [1.0, 0.0, 0.0]]), 1e-6)
