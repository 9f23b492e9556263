"""The mathematics of merging, in plain PyTorch: the reference for every faster way to compute it.

Legend: G groups of tokens that share a gate, T tokens per group, E experts, K selected experts,
I input features, O output features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F

from .kernels_meo import grouped_gemv, usable
from .kernels_meo import merge as merge_kernel
from .kernels_meo import merged_linear as fused_kernel

FEW_TOKENS_PER_GROUP = 16
"""Up to this many tokens per group a GPU multiplies by kept experts in a kernel that only streams their weights."""


def merge_experts(stack: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum selected experts' parameters, weighted by their gates (MEO, arXiv 2310.09832, figure 2).

    stack [E, ...], top_k_index [G, K], top_k_weights [G, K] -> [G, ...] in the stack's dtype, summed in
    float32 or wider. Experts are picked by index, so an unselected expert cannot touch the result.
    """
    wide = torch.promote_types(stack.dtype, torch.float32)
    if _has_kernel(stack, top_k_weights):
        return merge_kernel(stack, top_k_index, top_k_weights)
    if _may_look(stack, top_k_weights):
        return _merge_views(stack, top_k_index.tolist(), top_k_weights.tolist(), wide)
    gates = top_k_weights.to(wide).reshape(*top_k_weights.shape, *[1] * (stack.dim() - 1))  # [G, K, 1...]
    merged = stack.new_zeros((), dtype=wide)
    for k, index in enumerate(top_k_index.unbind(1)):
        merged = merged + gates[:, k] * stack[index].to(wide)  # [G, ...]
    return merged.to(stack.dtype)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply to each group its own linear map: x [G, T, I], weight [G, O, I], bias [G, O] -> [G, T, O]."""
    x = x.to(weight.dtype)
    if weight.shape[0] == 1:  # one gate for the whole batch: an ordinary dense layer
        return F.linear(x, weight[0], None if bias is None else bias[0])
    if x.shape[1] <= FEW_TOKENS_PER_GROUP and _has_kernel(x, weight, bias):
        return grouped_gemv(x, weight, bias)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def owned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor:
    """Apply to each group the linear map of its owner: x [N, T, I], weight [G, O, I], owner [N] -> [N, T, O]."""
    if owner.device.type != "cpu" or torch.compiler.is_compiling() or not len(owner):
        return ragged_linear(x, weight, bias, owner)
    x, y = x.to(weight.dtype), None
    for gate in owner.unique().tolist():
        groups = owner == gate
        part = F.linear(x[groups], weight[gate], None if bias is None else bias[gate])
        y = part.new_empty(*x.shape[:-1], part.shape[-1]) if y is None else y
        y[groups] = part
    return cast(Tensor, y)


def ragged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, owner: Tensor) -> Tensor:
    """As `owned_linear` with no look at the owners: sort groups by owner, and multiply in one grouped product."""
    if _has_kernel(x, weight, bias):
        ones = torch.ones(len(owner), 1, device=owner.device)
        return fused_kernel(x, weight, bias, owner[:, None], ones)
    product = getattr(F, "grouped_mm", None)
    if product is None or weight.dtype != torch.bfloat16 or any(size % 8 for size in weight.shape[1:]):
        return grouped_linear(x, weight[owner], None if bias is None else bias[owner])
    order = owner.argsort(stable=True)
    counts = (owner == torch.arange(len(weight), device=owner.device)[:, None]).sum(1)  # bincount would wait
    ends = (counts.cumsum(0) * x.shape[1]).to(torch.int32)
    y = product(x[order].flatten(0, 1).to(weight.dtype), weight.transpose(1, 2), offs=ends)
    y = y.view(*x.shape[:-1], weight.shape[1])[order.argsort()]
    return y if bias is None else y + bias[owner][:, None]


def combine_outputs(
    x: Tensor, stack: Tensor, bias: Tensor | None, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sum selected experts' outputs of one linear map: the same function as merging their weights first.

    x [G, T, I], stack [E, O, I], bias [E, O] -> [G, T, O].
    """
    wide = torch.promote_types(stack.dtype, torch.float32)
    if _may_look(stack, top_k_weights, x, bias):
        return _combine_views(x, stack, bias, top_k_index, top_k_weights.to(wide))
    gates = top_k_weights.to(wide)[..., None, None]  # [G, K, 1, 1]
    total = x.new_zeros((), dtype=wide)
    for k, index in enumerate(top_k_index.unbind(1)):
        total = total + gates[:, k] * grouped_linear(x, stack[index], None if bias is None else bias[index])
    return total.to(stack.dtype)


def _has_kernel(*tensors: Tensor | None) -> bool:
    """Whether a GPU kernel may take the place of PyTorch's operations: nobody traces them, or asks for gradients."""
    given = [t for t in tensors if t is not None]
    if torch.compiler.is_compiling() or any(type(t) not in (Tensor, Parameter) for t in given):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False
    return usable(*given) and not torch.is_autocast_enabled(given[0].device.type)


def _may_look(*tensors: Tensor | None) -> bool:
    """Whether the host may read the indices at no cost: then experts are views of their stack, and not copied."""
    if torch.compiler.is_compiling():
        return False
    given = [t for t in tensors if t is not None]
    if any(t.device.type != "cpu" or type(t) not in (Tensor, Parameter) for t in given):  # fake tensors have no values
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in given))


def _merge_views(stack: Tensor, index: list[list[int]], weights: list[list[float]], wide: torch.dtype) -> Tensor:
    merged = stack.new_empty(len(index), *stack.shape[1:])
    for group, (experts, gates) in enumerate(zip(index, weights, strict=True)):
        total = stack[experts[0]].to(wide) * gates[0]
        for expert, gate in zip(experts[1:], gates[1:], strict=True):
            total.add_(stack[expert], alpha=gate)
        merged[group] = total
    return merged


def _combine_views(x: Tensor, stack: Tensor, bias: Tensor | None, top_k_index: Tensor, gates: Tensor) -> Tensor:
    """Run each selected expert once, on the groups that selected it."""
    total = x.new_zeros(*x.shape[:-1], stack.shape[1], dtype=gates.dtype)
    x = x.to(stack.dtype)
    for expert in top_k_index.unique().tolist():
        groups, slots = (top_k_index == expert).nonzero(as_tuple=True)
        y = few_linear(x[groups].flatten(0, 1), stack[expert]).view(len(groups), x.shape[1], -1)
        if bias is not None:
            y = y + bias[expert]
        total.index_add_(0, groups, gates[groups, slots, None, None] * y)
    return total.to(stack.dtype)


def few_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Apply a linear map to rows x [N, I]; for a few float32 rows a CPU is up to twice as fast in blocks of outputs."""
    rows, outputs = x.shape[0], weight.shape[0]
    if rows > 16 or outputs % BLOCKS or x.dtype != torch.float32 or x.device.type != "cpu" or weight.stride(1) != 1:
        return F.linear(x, weight)
    blocks = weight.unflatten(0, (BLOCKS, -1))
    if rows == 1:
        return torch.bmm(blocks, x.t().expand(BLOCKS, -1, -1)).view(1, outputs)
    return torch.bmm(x.expand(BLOCKS, -1, -1), blocks.transpose(1, 2)).transpose(0, 1).reshape(rows, outputs)


BLOCKS = 8
