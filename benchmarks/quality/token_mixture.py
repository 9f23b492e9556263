"""A mixture of experts that trains: the routers of a MEO model read each token, whole experts run, outputs are added.

Legend: T real tokens, D features, E experts, K selected experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
from meo_hf.modeling.feedforward_meo import MeoFeedForward, merged_feed_forwards
from torch import Tensor, nn
from torch.nn import functional as F

from meo_hf.errors import UnsupportedError


def make_token_mixture(model: nn.Module) -> None:
    """Turn a MEO model of level `sequence` into a mixture of experts with a gate per token, for good.

    Router, noise, balance loss and parameters stay; padding is neither routed, nor computed, nor balanced.
    Raises UnsupportedError for another level, or for gates per linear map.
    """
    modules = [module for _, module in merged_feed_forwards(model)]
    if any(module.level != "sequence" or module.scope != "ffn" for module in modules):
        raise UnsupportedError("a gate per token is made from level 'sequence' and gate scope 'ffn'")
    for module in modules:
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(self: MeoFeedForward, hidden_states: Tensor) -> Tensor:
    """y_t = sum_k g_k(x_t) f(x_t; W_k) for real tokens; zero for padding, which nobody reads."""
    call = self._context.call()
    rows = call.grouped(hidden_states)
    real = torch.ones(rows.shape[:2], dtype=torch.bool) if call.padding is None else call.padding
    x = rows[real.to(rows.device)]  # [T, D]
    (index, weights), balance = self.router(x)
    if self.training and self.balance_loss:
        call.balance.append(balance * self.balance_loss)
    total = torch.zeros_like(x)
    stacks = {name: self.experts.stack(name) for name in (self.experts.first, "down_proj")}
    # unbound at once: the backward of indexing one expert would write zeros for all others
    unbound = {n: (w.unbind(0), b.unbind(0) if b is not None else None) for n, (w, b) in stacks.items()}
    for expert in range(len(unbound["down_proj"][0])):
        token, k = (index == expert).nonzero(as_tuple=True)
        if len(token):
            linear: dict[str, Callable[[Tensor], Tensor]] = {
                name: partial(F.linear, weight=weight[expert], bias=None if bias is None else bias[expert])
                for name, (weight, bias) in unbound.items()
            }
            y = linear["down_proj"](self._activate(linear, x[token]))
            total = total.index_add(0, token, weights[token, k, None].to(y.dtype) * y)
    out = torch.zeros_like(rows)
    out[real] = total
    return out.reshape(hidden_states.shape)
