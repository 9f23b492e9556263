"""Run whole experts and add their outputs: what a mixture of experts does, for comparison with MEO."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from meo_hf.errors import UnsupportedError
from meo_hf.modeling.feedforward_meo import MeoFeedForward, merged_feed_forwards
from meo_hf.modeling.routing_meo import Gates


@contextmanager
def whole_experts(model: nn.Module) -> Iterator[None]:
    """Within this context every merged feed-forward runs its selected experts one by one and adds their outputs.

    With an activation between the projections this is another function than MEO, top_k times as expensive.
    Raises UnsupportedError for gate scope `projection`, where maps of one feed-forward select different experts.
    """
    modules = [module for _, module in merged_feed_forwards(model)]
    if any(module.scope != "ffn" for module in modules):
        raise UnsupportedError("whole experts need one gate per feed-forward (gate scope ffn)")
    for module in modules:
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _forward(self: MeoFeedForward, hidden_states: Tensor) -> Tensor:
    """As `MeoFeedForward.forward`, but y = sum_k g_k f(x; W_k)."""
    call = self._context.call()
    x = call.grouped(hidden_states)
    fixed = self._fixed_task(call)
    if fixed is not None:
        x = x.reshape(1, -1, x.shape[-1])
    index, weights = self._gates(call, x, fixed, self.maps)["down_proj"]
    if self.adapter is not None:
        x = self.adapter(x)
    total = torch.zeros((), device=x.device)
    for k in range(index.shape[1]):
        one = Gates(index[:, k : k + 1], torch.ones_like(weights[:, k : k + 1]))
        first = [self._linear(name, one) for name in self.maps[:-1]]
        y = self._linear("down_proj", one)(self._activate(first, x))
        total = total + weights[:, k, None, None] * y
    return total.to(hidden_states.dtype).reshape(*hidden_states.shape[:-1], -1)
