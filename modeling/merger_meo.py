"""Merge a module's stacked experts for groups of tokens, and keep what was merged beside a KV cache.

Legend: N groups that share a gate, W tokens per group, E experts, K selected experts, I input features,
O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .errors_meo import RoutingError
from .groups_meo import Groups, TaskGroups
from .low_rank_meo import Adapted, Factors, LowRank, low_rank_linear, merged_part, part_of
from .merged_linear_meo import gated_linear, merged_linear
from .merging_meo import grouped_linear, merge_experts, owned_linear
from .parallel_meo import Shards
from .plans_meo import saved_by_keeping, work_of_stack
from .router_meo import Gates
from .routing_meo import Call, RoutingContext

logger = logging.get_logger(__name__)
Linear = Callable[[Tensor], Tensor]


class Merger:
    """What a module adds to itself to merge its experts' linear maps.

    `maps` are their names; `combine` is `weights`, or `outputs` for the same function without merged weights,
    whatever that costs. Where a module has `low_rank` factors by map, each stack holds what all its experts share, and
    these add what is each one's own: nothing is merged there but gates.
    """

    combine: str
    maps: tuple[str, ...]
    shards: Shards | None = None  # under tensor parallel
    _context: RoutingContext

    def stack(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weights [E, O, I] and biases [E, O] of a linear map; only called inside the module's forward."""
        raise NotImplementedError

    def bank(self) -> nn.ModuleDict | None:
        """Return the experts' own low-rank parts by map, None where the stacks hold whole experts."""
        return cast(nn.ModuleDict | None, cast(nn.Module, self)._modules.get("low_rank"))

    def keep_parts(self, ranks: Mapping[str, int], experts: int) -> None:
        """Make room for low-rank parts of maps that have a rank."""
        made = {bank_key(n): Factors(experts, r, self.stack(n)[0]) for n, r in ranks.items() if r}
        cast(nn.Module, self).low_rank = nn.ModuleDict(made)

    def _own_part(self, name: str) -> tuple[LowRank, ...]:
        """Return the experts' own part of a linear map, if it has one."""
        bank, key = cast(nn.ModuleDict, self.bank()), bank_key(name)
        return (part_of(bank[key]),) if key in bank else ()

    def count(self) -> int:
        """Return the number of experts."""
        bank = self.bank()
        return len(self.stack(self.maps[-1])[0] if bank is None else next(bank.parameters()))

    def adapted_map(self, adapted: Mapping[str, Adapted], name: str) -> Adapted | None:
        """Return what adapters, by parameter, make of a linear map."""
        return adapted.get(name)

    def merged_maps(
        self,
        call: Call,
        groups: Groups,
        names: tuple[str, ...],
        gates: Mapping[str, Gates],
        *,
        pieces: bool = False,
        adapted: Mapping[str, Adapted] | None = None,
    ) -> dict[str, Linear]:
        """Return linear maps as functions of tokens [N, W, I].

        `gates` may be empty where all maps are kept and no group has changed; `pieces` says that each map will be
        asked several times; `adapted`, what adapters make of some. Raises RoutingError for adapters of experts that
        are split over processes.
        """
        if self.shards is None:
            return self._own_maps(call, groups, names, gates, pieces, adapted or {})
        if adapted:
            raise RoutingError(
                "adapters of experts do not work where tensor parallelism splits the experts: merge them into the "
                "weights first (`merge_and_unload`), or load the model without it"
            )
        with self.shards.local(cast(nn.Module, self)):
            maps = self._own_maps(call, groups, names, self.shards.enter(gates), pieces, {})
        return self.shards.around(maps)

    def _own_maps(
        self,
        call: Call,
        groups: Groups,
        names: tuple[str, ...],
        gates: Mapping[str, Gates],
        pieces: bool,
        adapted: Mapping[str, Adapted],
    ) -> dict[str, Linear]:
        """Return linear maps of the experts, or of the part of them that this process holds."""
        kept = groups.kept()
        if all(name in kept for name in names):
            if groups.changed and not groups.settled:
                for name in names:
                    rows = list(groups.changed)
                    kept[name] = self._merge_into(kept[name], name, gates[name], self.adapted_map(adapted, name), rows)
        elif groups.keeps and self._keeps(call, groups, names, gates):
            kept |= {name: self._merge(name, gates[name], self.adapted_map(adapted, name)) for name in names}
        else:
            return {
                name: self._linear(groups, name, gates[name], pieces, self.adapted_map(adapted, name)) for name in names
            }
        if self.bank() is not None:
            found = {name: cast(Gates, Gates(*kept[name])) for name in names}  # type: ignore[arg-type]
            own = {name: self.adapted_map(adapted, name) for name in names}
            return {name: self._factored(name, found[name], groups.owner, own[name]) for name in names}
        return {name: _bound(*kept[name], groups.owner) for name in names}

    def _keeps(self, call: Call, groups: Groups, names: tuple[str, ...], gates: Mapping[str, Gates]) -> bool:
        """Whether what is merged now may stay for later calls; of low-rank experts that is no more than gates."""
        if self.bank() is not None:
            return True
        worth = self.combine == "weights" and self._pays(groups, names, gates)
        return worth and self._fits(call, groups, names, gates[names[0]])

    def _linear(self, groups: Groups, name: str, gates: Gates, pieces: bool, adapted: Adapted | None = None) -> Linear:
        """Return one linear map, to be computed by the plan that fits the tokens."""
        if self.bank() is not None:
            return self._factored(name, gates, groups.owner, adapted)
        stack, bias = self.stack(name)
        stack = stack if adapted is None else adapted.scaled(stack)
        if pieces and self.combine == "weights":
            linear = _bound(*_merge(stack, bias, gates), groups.owner)
        else:
            plan = "combine" if self.combine == "outputs" else self._context.plan
            linear = MergedMap(stack, bias, gates, groups.owner, plan)
        return AdaptedMap(linear, adapted.parts, gates, groups.owner) if adapted and adapted.parts else linear

    def _factored(self, name: str, gates: Gates, owner: Tensor | None, adapted: Adapted | None) -> Linear:
        """Return one linear map: a product with what the experts share, and their low-rank parts."""
        parts, (stack, bias) = self._own_part(name), self.stack(name)
        if adapted is not None:
            stack, parts = adapted.scaled(stack), (*parts, *adapted.parts)
        bias = None if bias is None else merge_experts(bias, *gates)
        if self.is_lent():
            whole = stack.expand(len(gates.top_k_index), -1, -1).clone()
            return _bound(*_with_parts(whole, bias, parts, gates), owner)
        shared = SharedMap(stack[0], bias if bias is None or owner is None else bias[owner])
        return AdaptedMap(shared, parts, gates, owner) if parts else shared

    def is_lent(self) -> bool:
        """Whether the weights are gone after this module's forward."""
        return False

    def _pays(self, groups: Groups, names: tuple[str, ...], gates: Mapping[str, Gates]) -> bool:
        """Whether steps of a token per group will be faster with merged experts that stay."""
        if self._context.plan is not None:
            return self._context.plan != "combine"
        if isinstance(groups, TaskGroups):  # they serve calls of any size
            return True
        saved = 0.0
        for name in names:
            count, top_k = gates[name].top_k_index.shape
            saved += saved_by_keeping(work_of_stack(self.stack(name)[0], count, count, top_k))
        return saved >= 0

    def _merge(self, name: str, gates: Gates, adapted: Adapted | None = None) -> tuple[Tensor, Tensor | None]:
        """Return merged weights and biases of each gate, with those of adapters; of low-rank experts their gates."""
        if self.bank() is not None:
            return gates
        stack, bias = self.stack(name)
        if adapted is None:
            return _merge(stack, bias, gates)
        return _with_parts(*_merge(adapted.scaled(stack), bias, gates), adapted.parts, gates)

    def _merge_into(
        self,
        kept: tuple[Tensor, Tensor | None],
        name: str,
        gates: Gates,
        adapted: Adapted | None,
        rows: list[int],
    ) -> tuple[Tensor, Tensor | None]:
        """Merge the experts of some rows anew, in place where that is allowed."""
        merged = self._merge(name, Gates(gates.top_k_index[rows], gates.top_k_weights[rows]), adapted)
        if kept[0].is_inference() and not torch.is_inference_mode_enabled():  # nobody may write to those
            kept = (kept[0].clone(), None if kept[1] is None else kept[1].clone())
        for old, new in zip(kept, merged, strict=True):
            if old is not None:
                old[rows] = cast(Tensor, new)
        return kept

    def _fits(self, call: Call, groups: Groups, names: tuple[str, ...], gates: Gates) -> bool:
        """Whether merged experts of all groups may be kept; if not, say so once and combine outputs from now on."""
        memory, rows = groups.store, gates.top_k_index.shape[0]
        if memory is None or memory.crowded:
            return False
        stacks = [tensor for name in names for tensor in self.stack(name) if tensor is not None]
        need = sum(stack[0].nbytes for stack in stacks) * rows
        room = self._context.room(call, gates.top_k_weights.device)
        if need > room:
            memory.crowded = True
            warn = logger.warning if not self._context.warned else logger.debug
            self._context.warned = True
            warn(
                f"Merged experts of {rows} rows need {need / 2**20:,.1f} MiB more in a layer, and "
                f"{room / 2**20:,.1f} MiB are left of their budget (`merged_cache_bytes` in the config's `meo` block; "
                "by default a quarter of the free memory). Where they do not fit, each step combines the experts' "
                "outputs: the same results, slower."
            )
            return False
        call.room = room - need
        return True


def bank_key(name: str) -> str:
    """Return what a map is called among low-rank parts: families' rules for weights' names must not fit it."""
    return name.removesuffix("_proj")


def _merge(stack: Tensor, bias: Tensor | None, gates: Gates) -> tuple[Tensor, Tensor | None]:
    return merge_experts(stack, *gates), None if bias is None else merge_experts(bias, *gates)


def _with_parts(
    weight: Tensor, bias: Tensor | None, parts: tuple[LowRank, ...], gates: Gates
) -> tuple[Tensor, Tensor | None]:
    """Add parts, multiplied out, to merged weights [G, O, I] and biases [G, O]."""
    for part in parts:
        delta, more = merged_part(part, gates)
        weight = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if more is not None:
            bias = more.to(weight.dtype) if bias is None else bias + more.to(bias.dtype)
    return weight, bias


@dataclass
class SharedMap:
    """A linear map that all groups share but for biases [N, O], for tokens [N, W, I]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map [N, W, O]."""
        y = F.linear(x.to(self.weight.dtype), self.weight)
        return y if self.bias is None else y + self.bias[:, None]


@dataclass
class AdaptedMap:
    """A linear map of merged experts to whose result adapters add theirs, for tokens [N, W, I]."""

    base: Linear
    parts: tuple[LowRank, ...]
    gates: Gates
    owner: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map [N, W, O]."""
        y = self.base(x)
        for part in self.parts:
            y = y + low_rank_linear(x.to(y.dtype), part, self.gates, self.owner)
        return y


@dataclass
class MergedMap:
    """A linear map of experts that are merged while it is applied, to tokens [N, W, I]."""

    stack: Tensor
    bias: Tensor | None
    gates: Gates
    owner: Tensor | None
    plan: str | None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the map [N, W, O]."""
        return merged_linear(x, self.stack, self.bias, *self.gates, self.owner, self.plan)

    def gated(self, x: Tensor, activation: object) -> Tensor | None:
        """Apply gate, up and activation at once [N, W, F]; None where that is not possible, or not fastest."""
        name = ACTIVATION_NAMES.get(type(activation).__name__)
        if name is None or self.owner is not None or self.plan not in (None, "fused"):
            return None
        return gated_linear(x, self.stack, self.bias, *self.gates, name)


ACTIVATION_NAMES = {  # class in Transformers or PyTorch -> name in the kernels
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


def gated_at_once(linear: Linear, x: Tensor, activation: object) -> Tensor | None:
    """Return activation(gate) * up of a fused gate and up projection in one kernel, None where there is none."""
    return linear.gated(x, activation) if isinstance(linear, MergedMap) else None


def _bound(weight: Tensor, bias: Tensor | None, owner: Tensor | None) -> Linear:
    if owner is None:
        return lambda x: grouped_linear(x, weight, bias)
    return lambda x: owned_linear(x, weight, bias, owner)
