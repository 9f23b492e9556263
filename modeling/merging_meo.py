"""The mathematics of merging, in plain PyTorch: the reference for every faster way to compute it.

Legend: G groups of tokens that share a gate, T tokens per group, E experts, K selected experts,
I input features, O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def merge_experts(stack: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Sum selected experts' parameters, weighted by their gates (MEO, arXiv 2310.09832, figure 2).

    stack [E, ...], top_k_index [G, K], top_k_weights [G, K] -> [G, ...] in the stack's dtype, summed in
    float32 or wider. Experts are picked by index, so an unselected expert cannot touch the result.
    """
    wide = torch.promote_types(stack.dtype, torch.float32)
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
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def combine_outputs(
    x: Tensor, stack: Tensor, bias: Tensor | None, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sum selected experts' outputs of one linear map: the same function as merging their weights first.

    x [G, T, I], stack [E, O, I], bias [E, O] -> [G, T, O].
    """
    wide = torch.promote_types(stack.dtype, torch.float32)
    gates = top_k_weights.to(wide)[..., None, None]  # [G, K, 1, 1]
    total = x.new_zeros((), dtype=wide)
    for k, index in enumerate(top_k_index.unbind(1)):
        total = total + gates[:, k] * grouped_linear(x, stack[index], None if bias is None else bias[index])
    return total.to(stack.dtype)
