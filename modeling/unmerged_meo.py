"""Experts that run one by one, as a family's own do: one for several, or skipped by a rule.

Legend: T tokens, D features, E experts, K selected experts, P pairs of a token and an expert that it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def skip_by_ratio(weights: Tensor, threshold: float) -> Tensor:
    """Say which of the selected experts run [T, K]: all before the first tail that weighs too little.

    A tail is skipped if the sum of its weights is below `threshold` times the sum of those before it; with two experts
    that is the rule of arXiv 2402.14800, section 3.3: skip the second if w_2 < beta * w_1. With more it is, but
    for ties, the rule below at a share of 1 / (1 + beta).
    """
    ordered, order = weights.float().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    tail = ordered.sum(-1, keepdim=True) - before
    light = (tail < threshold * before) & (before > 0)
    return torch.zeros_like(light).scatter(-1, order, light.cumsum(-1) == 0)


def skip_by_cumulated(weights: Tensor, threshold: float) -> Tensor:
    """Say which of the selected experts run [T, K]: the fewest whose share of all weights reaches `threshold`.

    An expert runs if those before it hold a smaller share (XMoE, arXiv 2403.18926), the first one always.
    """
    ordered, order = weights.float().sort(dim=-1, descending=True, stable=True)
    share = ordered / ordered.sum(-1, keepdim=True).clamp(min=torch.finfo(ordered.dtype).tiny)
    runs = share.cumsum(-1) - share < threshold
    runs[..., 0] = True
    return torch.zeros_like(runs).scatter(-1, order, runs)


def renormalised(weights: Tensor, runs: Tensor) -> Tensor:
    """Give what skipped experts weighed to those that run, in proportion: the sum [T] stays."""
    kept = weights.float() * runs
    total = kept.sum(-1, keepdim=True)
    return (kept * (weights.float().sum(-1, keepdim=True) / torch.where(total == 0, 1, total))).to(weights.dtype)


def joined(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Let an expert that a token selected several times run once [T, K], with the sum of its weights, else zero."""
    same = index[:, :, None] == index[:, None, :]
    runs = ~(same & torch.ones_like(same).tril(-1)).any(-1)
    return runs, (same * weights[:, None, :]).sum(-1) * runs


def chosen(
    index: Tensor, weights: Tensor, stands_for: Tensor | None, rule: tuple[str, float] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return which experts [T, K] a router's selection means, their weights, and which run, None for all.

    What is mapped to one expert is joined first: skipping a part of it would spare nothing.
    """
    runs = None
    if stands_for is not None:
        index = stands_for[index]
        runs, weights = joined(index, weights)
    if rule is not None:
        kind, threshold = rule
        kept = (skip_by_ratio if kind == "ratio" else skip_by_cumulated)(weights, threshold)
        runs = kept if runs is None else runs & kept
        weights = renormalised(weights, runs)
    return index, weights, runs


def run_pairs(
    module: Any, stock: Callable[..., Tensor] | None, x: Tensor, index: Tensor, weights: Tensor, runs: Tensor | None
) -> Tensor:
    """Run tokens [T, D] through the selected experts [T, K] that `runs` names, all if it is None.

    `stock` is the family's own forward, None where it takes other arguments.
    """
    if stock is not None and runs is None:
        return stock(x, index, weights)
    token, slot = (torch.ones_like(index, dtype=torch.bool) if runs is None else runs).nonzero(as_tuple=True)
    expert, weight = index[token, slot], weights[token, slot]
    if stock is not None:
        y = stock(x[token], expert[:, None], weight[:, None])
    else:
        expert, order = expert.sort(stable=True)
        token, weight = token[order], weight[order, None]
        sizes = expert.bincount(minlength=module.count() + module.zero_expert_num).tolist()
        y = module.run_sorted(x[token], sizes, weight)
    return torch.zeros_like(x).index_add(0, token, y.to(x.dtype))


def run_sorted(module: Any, x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
    """Run tokens [P, D] that are sorted by their experts, `sizes` of each, with their gates [P, 1]."""
    parts = zip(x.split(sizes), weights.split(sizes), strict=True)
    made = [weighed_expert(module, i, *part).to(x.dtype) for i, part in enumerate(parts) if sizes[i]]
    return torch.cat(made) if made else x


def weighed_expert(module: Any, number: int, x: Tensor, weight: Tensor) -> Tensor:
    """Run tokens [P, D] through one expert, with their gates [P, 1]."""
    if number >= module.count():  # LongCat's return their input
        return x * weight
    return module._weigh(x, lambda inputs: module.expert(number, inputs), weight)


def expert_linear(module: Any, name: str, number: int) -> Callable[[Tensor], Tensor]:
    """Return one expert's linear map."""
    weight, bias = module.stack(name)
    sizes, own = module.part_sizes.get(name), None if bias is None else bias[number]
    if sizes is not None:
        parts, shared = module.parts_of(name), weight if sizes.shared else None
        return lambda x: parts(number, x, shared, own)
    return lambda x: F.linear(x.to(weight.dtype), weight[number], own)
