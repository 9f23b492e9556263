"""Merge a module's stacked experts for groups of tokens, and keep what was merged beside a KV cache.

Legend: N groups that share a gate, W tokens per group, E experts, K selected experts, I input features,
O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor
from transformers.utils import logging

from .groups_meo import Groups
from .merging_meo import combine_outputs, grouped_linear, merge_experts
from .router_meo import Gates
from .routing_meo import Call, RoutingContext

logger = logging.get_logger(__name__)
Linear = Callable[[Tensor], Tensor]


class Merger:
    """What a module adds to itself to merge its experts' linear maps.

    `combine` is `weights`, or `outputs` for the same function without merged weights.
    """

    combine: str
    _context: RoutingContext

    def stack(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weights [E, O, I] and biases [E, O] of a linear map; only called inside the module's forward."""
        raise NotImplementedError

    def merged_maps(
        self, call: Call, groups: Groups, names: tuple[str, ...], gates: Mapping[str, Gates], tokens: int
    ) -> dict[str, Linear]:
        """Return linear maps as functions of tokens [N, W, I].

        `gates` may be empty where all maps are kept and no group has changed; `tokens` are those per group.
        """
        kept = groups.kept()
        if all(name in kept for name in names):
            if groups.changed and not groups.settled:
                for name in names:
                    kept[name] = self._merge_into(kept[name], name, gates[name], list(groups.changed))
        elif groups.keeps and self.combine == "weights" and self._fits(call, groups, names, gates[names[0]]):
            kept |= {name: self._merge(name, gates[name]) for name in names}
        else:
            return {name: self._linear(name, gates[name], tokens) for name in names}
        return {name: _bound(*kept[name]) for name in names}

    def _linear(self, name: str, gates: Gates, tokens: int) -> Linear:
        """Return one linear map of the merged experts for groups of some tokens."""
        if self.combine == "outputs" or tokens == 1:  # for a single token merging only adds traffic
            stack, bias = self.stack(name)
            return lambda x: combine_outputs(x.to(stack.dtype), stack, bias, *gates)
        return _bound(*self._merge(name, gates))

    def _merge(self, name: str, gates: Gates) -> tuple[Tensor, Tensor | None]:
        stack, bias = self.stack(name)
        return merge_experts(stack, *gates), None if bias is None else merge_experts(bias, *gates)

    def _merge_into(
        self, kept: tuple[Tensor, Tensor | None], name: str, gates: Gates, rows: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Merge the experts of some rows anew, in place where that is allowed."""
        merged = self._merge(name, Gates(gates.top_k_index[rows], gates.top_k_weights[rows]))
        if kept[0].is_inference() and not torch.is_inference_mode_enabled():  # nobody may write to those
            kept = (kept[0].clone(), None if kept[1] is None else kept[1].clone())
        for old, new in zip(kept, merged, strict=True):
            if old is not None:
                old[rows] = cast(Tensor, new)
        return kept

    def _fits(self, call: Call, groups: Groups, names: tuple[str, ...], gates: Gates) -> bool:
        """Whether merged experts of all groups may be kept; if not, say so once and combine outputs from now on."""
        memory, rows = groups.memory, gates.top_k_index.shape[0]
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


def _bound(weight: Tensor, bias: Tensor | None) -> Linear:
    return lambda x: grouped_linear(x, weight, bias)
