"""The contracts of mixtures of experts can fail: each mutation of the model code must break one, in every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moe_contracts
import pytest
import torch
from meo_hf.modeling import merger_meo, routing_meo
from meo_hf.modeling.groups_meo import SegmentGroups
from meo_hf.modeling.merger_meo import Merger
from meo_hf.modeling.moe_meo import MergedExpertsMixin
from meo_hf.modeling.router_meo import Gates
from moe_contracts import DECODERS, KEPT, MoeCase
from torch import Tensor

Patch = pytest.MonkeyPatch
torch.set_num_threads(1)


def case_of(family: str) -> MoeCase:
    return MoeCase(family, MoeCase(family).row.poolings[0])


def constant_gate(patch: Patch) -> None:
    original = MergedExpertsMixin._normalise

    def normalise(self: Any, index: Tensor, weights: Tensor) -> Any:
        gates, scale, identity = original(self, index, weights)
        index = torch.arange(gates.top_k_index.shape[-1]).expand_as(gates.top_k_index)
        return Gates(index, torch.full_like(gates.top_k_weights, 1 / index.shape[-1])), scale, identity

    patch.setattr(MergedExpertsMixin, "_normalise", normalise)


def forgotten_mask(patch: Patch) -> None:
    patch.setattr(routing_meo, "padding_mask", lambda *_: None)
    patch.setattr(routing_meo, "document_starts", lambda *_: None)


def mean_over_the_future(patch: Patch) -> None:
    def read(self: Any, name: str, cells: Tensor) -> Tensor:
        return cells.float().mean(1) if cells.shape[1] else cells[:, 0]

    patch.setattr(SegmentGroups, "read", read)
    patch.setattr(SegmentGroups, "close", lambda self: None)


def mean_over_the_row(patch: Patch) -> None:
    def read(self: Any, name: str, cells: Tensor) -> Tensor:
        rows = self.layout.rows
        whole = cells.reshape(rows, -1, cells.shape[-1]).float().mean(1)
        return whole.repeat_interleave(len(cells) // rows, 0)

    patch.setattr(SegmentGroups, "read", read)
    patch.setattr(SegmentGroups, "close", lambda self: None)


def raw_gates(patch: Patch) -> None:
    original = MergedExpertsMixin._normalise

    def normalise(self: Any, index: Tensor, weights: Tensor) -> Any:
        gates, scale, identity = original(self, index, weights)
        return Gates(gates.top_k_index, gates.top_k_weights * scale[:, None]), torch.ones_like(scale), identity

    patch.setattr(MergedExpertsMixin, "_normalise", normalise)


def dropped_bias(patch: Patch) -> None:
    original = Merger._merge

    def merge(self: Any, name: str, gates: Gates, adapted: Any) -> tuple[Tensor, None]:
        return original(self, name, gates, adapted)[0], None

    def linear(self: Any, groups: Any, name: str, gates: Gates, pieces: bool, adapted: Any) -> Any:
        return merger_meo._bound(*merge(self, name, gates, adapted), None)

    patch.setattr(Merger, "_merge", merge)
    patch.setattr(Merger, "_linear", linear)


def broken(patch: Patch, mutate: Callable[[Patch], None], contract: Callable[[MoeCase], None], case: MoeCase) -> None:
    """Fail unless a mutation breaks a contract."""
    mutate(patch)
    with pytest.raises(AssertionError):
        contract(case)


@pytest.mark.parametrize("family", KEPT)
def test_a_constant_gate_is_noticed(monkeypatch: Patch, family: str) -> None:
    broken(monkeypatch, constant_gate, moe_contracts.blocks_equal_the_oracle, case_of(family))


@pytest.mark.parametrize("family", KEPT)
def test_a_forgotten_mask_is_noticed(monkeypatch: Patch, family: str) -> None:
    broken(monkeypatch, forgotten_mask, moe_contracts.blocks_equal_the_oracle, case_of(family))


@pytest.mark.parametrize("mutation", [mean_over_the_future, mean_over_the_row], ids=lambda m: m.__name__)
@pytest.mark.parametrize("family", DECODERS[::3])
def test_a_look_ahead_is_noticed(monkeypatch: Patch, family: str, mutation: Callable[[Patch], None]) -> None:
    with monkeypatch.context() as patch:
        broken(patch, mutation, moe_contracts.later_tokens_change_nothing_before, case_of(family))
    broken(monkeypatch, mutation, moe_contracts.blocks_equal_the_oracle, case_of(family))


@pytest.mark.parametrize("family", KEPT)
def test_raw_gates_are_noticed(monkeypatch: Patch, family: str) -> None:
    case = case_of(family)
    if gates_sum_to_one(case):  # there raw gates are right
        raw_gates(monkeypatch)
        moe_contracts.one_token_groups_with_alike_experts_are_stock(case)
    else:
        broken(monkeypatch, raw_gates, moe_contracts.one_token_groups_with_alike_experts_are_stock, case)


def gates_sum_to_one(case: MoeCase) -> bool:
    """Return whether a family's published gates sum to one for all tokens."""
    stock = case.stock()
    model = case.merged(stock)
    with torch.no_grad(), moe_contracts.watched(model) as seen:
        model(**case.inputs())
        totals = [
            moe_contracts.stock_gates(block, seen[path].tokens, seen[path].arguments).sum(-1)
            for path, block in moe_contracts.moe_modules(stock).items()
            if path in seen
        ]
    return bool((torch.cat(totals) - 1).abs().max() < 1e-4)


BIASED = ("gpt_oss", "openai_privacy_filter", "nllb-moe")


@pytest.mark.parametrize("family", BIASED)
def test_a_dropped_bias_is_noticed(monkeypatch: Patch, family: str) -> None:
    broken(monkeypatch, dropped_bias, moe_contracts.blocks_equal_the_oracle, case_of(family))
