"""The ways to compute a layer that the layer benchmarks compare.

Legend: B rows, T tokens per row, G groups that share a gate, D hidden features, O output features of a projection,
E experts, K selected.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from meo_hf.benchmark.layer_mixture import mixtures_of
from meo_hf.benchmark.layer_setup import Gates, Linear, Setup, Variant
from meo_hf.modeling import kernels_meo
from meo_hf.modeling.merged_linear_meo import merged_linear
from meo_hf.modeling.merging_meo import merge_experts
from meo_hf.modeling.plans_meo import PLANS, executed


def variants_of(setup: Setup) -> list[Variant]:
    """List what can be timed on this device, the dense expert first."""
    plans = [merging(setup, plan) for plan in PLANS if _can(setup, plan)]
    return [dense(setup), *mixtures_of(setup), published(setup), *plans, chosen(setup)]


def dense(setup: Setup) -> Variant:
    """Run one dense expert."""
    up, down, layer = setup.layer.up.expert(0), setup.layer.down.expert(0), setup.layer
    return Variant("dense", "dense", lambda x: down(layer.activate(up(x))), (*up.parameters(), *down.parameters()))


def published(setup: Setup) -> Variant:
    """Gather the selected experts' weights, weigh them and sum, as the code published with MEO does."""
    cell, layer = setup.cell, setup.layer

    def merged(stack: Tensor, gates: Gates) -> Tensor:
        weights = gates.top_k_weights.to(stack.dtype).reshape(*gates.top_k_weights.shape, *[1] * (stack.dim() - 1))
        return (stack[gates.top_k_index] * weights).sum(1)  # [G, K, ...] -> [G, ...]

    def linear(x: Tensor, of: Linear, gates: Gates) -> Tensor:
        y = torch.einsum("gti,goi->gto", x, merged(of.weight, gates))
        return y if of.bias is None else y + merged(of.bias, gates)[:, None]

    def run(x: Tensor) -> Tensor:
        gates = setup.group_gates(x)
        hidden = layer.activate(linear(setup.grouped(x), layer.up, gates))
        return linear(hidden, layer.down, gates).reshape(x.shape)

    largest = max(cell.shape.first_outputs, cell.shape.intermediate) * cell.shape.hidden
    return Variant(
        "published",
        "merged",
        run,
        merged_parameters(setup),
        room=cell.groups * (2 * cell.top_k + 1) * largest * cell.itemsize,
    )


def merging(setup: Setup, plan: str | None) -> Variant:
    """Merge by one plan, in every call; by the chosen plans if None."""
    cell, layer = setup.cell, setup.layer

    def up(x: Tensor, gates: Gates) -> Tensor:
        return merged_linear(setup.grouped(x), *layer.up, *gates, plan=plan)

    def down(hidden: Tensor, gates: Gates) -> Tensor:
        return merged_linear(layer.activate(hidden), *layer.down, *gates, plan=plan)

    def run(x: Tensor) -> Tensor:
        gates = setup.group_gates(x)
        return down(up(x, gates), gates).reshape(x.shape)

    def plans(x: Tensor) -> tuple[str, str]:
        gates = setup.group_gates(x)
        before = Counter(executed)
        hidden = up(x, gates)
        between = Counter(executed)
        down(hidden, gates)
        return _said(between - before), _said(executed - between)

    largest = max(cell.shape.first_outputs, cell.shape.intermediate) * cell.shape.hidden
    room = 3 * cell.groups * largest * 4 if plan == "combine" else min(cell.groups * largest * cell.itemsize, 2 << 30)
    return Variant("meo" if plan is None else f"meo {plan}", "merged", run, merged_parameters(setup), room, plans)


def merged_parameters(setup: Setup) -> tuple[Tensor, ...]:
    """Return what merging variants train."""
    router = setup.layer.task_logits if setup.cell.level == "task" else setup.pooled_router
    return (*setup.layer.up.parameters(), *setup.layer.down.parameters(), router)


def chosen(setup: Setup) -> Variant:
    """Run what a model in inference does: merge by the chosen plans, or, for a task, use experts merged before."""
    if setup.cell.level != "task":
        return merging(setup, None)
    up, down = kept_experts(setup)
    layer = setup.layer
    kept = ("kept", "kept")
    return Variant("meo", "merged", lambda x: down(layer.activate(up(x))), (), plans=lambda x: kept)


def kept_experts(setup: Setup) -> tuple[Linear, Linear]:
    """Merge the experts of a task."""
    gates = setup.group_gates(torch.empty(0))  # a task's gate reads no token

    def merged(stack: Tensor) -> Tensor:
        return merge_experts(stack, *gates)[0]

    up, down = (
        Linear(merged(of.weight), None if of.bias is None else merged(of.bias))
        for of in (setup.layer.up, setup.layer.down)
    )
    return up, down


def _can(setup: Setup, plan: str) -> bool:
    return plan != "fused" or kernels_meo.usable(setup.layer.router, setup.layer.up.weight)


def _said(ran: Counter[str]) -> str:
    return "+".join(sorted(ran)) or "none"
