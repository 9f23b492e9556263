"""Which experts' absence changes a block's answers least: NAEE's reconstruction (arXiv 2402.14800, section 3.2).

For every subset C of a block's experts the router chooses among C alone, and the loss is ||F(x, C) - F(x)||_F, summed
over batches. Shared experts answer the same and drop out. Experts answer every token once; what a subset costs is its
routing and a product with the answers' Gram matrices.

Legend: T real tokens of a batch, D features, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meo_hf.errors import UnsupportedError
from meo_hf.modeling.moe_adapters_meo import Llama4Experts
from meo_hf.reduction.budget import Limits
from meo_hf.reduction.observing import BlockView, ExpertView, Observer
from meo_hf.reduction.rerouting import SubsetRouters
from meo_hf.reduction.subsets import OutputGrams, SubsetSearch, search_subsets, subset_loss


@dataclass
class _Seen:
    """What one block showed: calls of its router, gates [T, E], token weights, and its experts' answers."""

    calls: list[BlockView] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    grams: OutputGrams = field(default_factory=OutputGrams)
    answers: list[Tensor] = field(default_factory=list)


class Reconstruction(Observer):
    """Finds the best subset of each block when its last batch was seen, and forgets what it read of it."""

    reads = "all"

    def __init__(
        self, routers: SubsetRouters, limits: Mapping[str, Limits], counts: Mapping[str, int], batches: int, width: int
    ) -> None:
        self._routers, self._limits, self._counts = routers, limits, counts
        self._batches, self._width = batches, width
        self._seen: dict[str, _Seen] = {}
        self.found: dict[str, SubsetSearch] = {}

    def see(self, block: BlockView) -> None:
        """Keep how the router was called, and what it said."""
        if block.path in self._counts:
            seen = self._seen.setdefault(block.path, _Seen())
            seen.calls.append(block)
            dense = torch.zeros(len(block.x), self._limits[block.path].experts)
            real = block.index < dense.shape[1]
            weights = torch.where(real, block.gates, 0).float().cpu()
            seen.gates.append(
                _as_weighed(block, dense.scatter_add(1, torch.where(real, block.index, 0).cpu(), weights))
            )
            seen.weights.append(block.weights.cpu())
            seen.answers.clear()

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        """Take in an expert's answers to all tokens; after the last expert of the last batch search."""
        if block.path not in self._counts:
            return
        seen = self._seen[block.path]
        seen.answers.append(_answers(block, expert).float().cpu())
        if expert.number < block.count - 1:
            return
        seen.grams.add(torch.stack(seen.answers, 1))
        seen.answers.clear()
        if len(seen.calls) == self._batches:
            self.found[block.path] = self._search(block.path, self._seen.pop(block.path))

    def _search(self, path: str, seen: _Seen) -> SubsetSearch:
        limits = self._limits[path]
        groups = [limits.group_of(expert) for expert in range(limits.experts)] if limits.groups > 1 else None

        def loss(kept: tuple[int, ...]) -> float:
            gates = [self.rerouted(path, kept, call) for call in seen.calls]
            return subset_loss(seen.grams, seen.gates, gates, seen.weights)

        return search_subsets(limits.experts, self._counts[path], loss, self._width, groups)

    def rerouted(self, path: str, kept: tuple[int, ...], block: BlockView) -> Tensor:
        """Return gates [T, E] of a router that knows some experts only."""
        call = block.call
        found = self._routers.gates(path, kept, call.hidden_states, call.args, call.kwargs)
        return _as_weighed(block, found[block.real.cpu()])


def _weighs_inputs(experts: Any) -> bool:
    return isinstance(experts, Llama4Experts)


def _as_weighed(block: BlockView, gates: Tensor) -> Tensor:
    """Return what experts' answers are multiplied with: 1 where gates weigh their inputs."""
    return (gates != 0).float() if _weighs_inputs(block.experts) else gates


def _answers(block: BlockView, expert: ExpertView) -> Tensor:
    """Return an expert's answers as gates will weigh them; where they weigh inputs, to inputs weighed by its own."""
    if expert.everything is not None and not _weighs_inputs(block.experts):
        return expert.everything
    if block.logits is None:
        raise UnsupportedError(f"the router of {block.path} has no logits: prune by another --score")
    own = torch.sigmoid(block.logits[:, expert.number].float()).to(block.x.dtype)
    return block.outputs(expert.number, block.x * own[:, None])
