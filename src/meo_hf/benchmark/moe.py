"""Run whole experts and add their outputs: what a mixture of experts does, for comparison with MEO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meo_hf.errors import UnsupportedError
from meo_hf.modeling.feedforward_meo import MeoFeedForward, merged_feed_forwards
from meo_hf.modeling.router_meo import Gates


@contextmanager
def whole_experts(model: nn.Module) -> Iterator[None]:
    """Within this context every merged feed-forward runs its selected experts one by one and adds their outputs.

    With an activation between the projections this is another function than MEO, top_k times as expensive.
    Raises UnsupportedError for gate scope `projection`, where maps of one feed-forward select different experts.
    """
    with _patched(model, _group_forward):
        yield


@contextmanager
def token_experts(model: nn.Module) -> Iterator[None]:
    """Within this context every merged feed-forward is a mixture of experts in which each token has its own gate.

    The same routers read each token, and a selected expert runs whole on the tokens that chose it. Nothing is kept
    beside a KV cache: begin with a new one. For inference: gates get no noise. Raises UnsupportedError for gate scope
    `projection`, and for level `task`, whose gates read no token.
    """
    if any(module.level == "task" for _, module in merged_feed_forwards(model)):
        raise UnsupportedError("a gate per token needs routers that read tokens (a level other than task)")
    with _patched(model, _token_forward), _without_groups(model):
        yield


@contextmanager
def _patched(model: nn.Module, forward: Callable[[MeoFeedForward, Tensor], Tensor]) -> Iterator[None]:
    modules = [module for _, module in merged_feed_forwards(model)]
    if any(module.scope != "ffn" for module in modules):
        raise UnsupportedError("whole experts need one gate per feed-forward (gate scope ffn)")
    for module in modules:
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


@contextmanager
def _without_groups(model: nn.Module) -> Iterator[None]:
    """Keep the model from laying out groups, which a gate per token does not ask for: a rival should not pay for it."""
    stacks = {module: module._meo_stack for module in model.modules() if getattr(module, "_meo_stack", None)}
    for module in stacks:
        module._meo_stack = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, stack in stacks.items():
            module._meo_stack = stack  # type: ignore[assignment]


def _group_forward(self: MeoFeedForward, hidden_states: Tensor) -> Tensor:
    """As `MeoFeedForward.forward`, but y = sum_k g_k f(x; W_k)."""
    call = self._context.call()
    groups = call.groups(self.level, self.layer)
    x = groups.split(call.grouped(hidden_states))
    index, weights = self._gates("hidden", groups.read("hidden", x), call, groups)["down_proj"]
    groups.close()
    if self.adapter is not None:
        x = self.adapter(x)
    total = torch.zeros((), device=x.device)
    for k in range(index.shape[1]):
        one = Gates(index[:, k : k + 1], torch.ones_like(weights[:, k : k + 1]))
        linear = {name: self.experts._linear(groups, name, one, False) for name in self.maps}
        total = total + weights[:, k, None, None] * linear["down_proj"](self._activate(linear, x))
    return groups.join(total.to(hidden_states.dtype)).reshape(*hidden_states.shape[:-1], -1)


def _token_forward(self: MeoFeedForward, hidden_states: Tensor) -> Tensor:
    """y_t = sum_k g_k(x_t) f(x_t; W_k); experts are run on views of their stack, so no weight is copied."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, D]
    wide = torch.promote_types(self.router.weight.dtype, torch.float32)  # type: ignore[arg-type]
    logits = F.linear(x.to(wide), self.router.weight.to(wide))  # type: ignore[operator, arg-type]
    top_logits, index = logits.topk(self.router.top_k, dim=1)  # type: ignore[arg-type]
    weights = top_logits.softmax(1)  # [T, K]
    x = (x if self.adapter is None else self.adapter(x)).to(self.experts.down_proj.dtype)
    total = torch.zeros_like(x, dtype=wide)
    if len(x) == 1:  # every decoding step of one row: nobody has to be picked out
        for k, expert in enumerate(index[0].tolist()):
            total += weights[:, k, None] * _expert(self, expert, x)
    else:
        for expert in index.unique().tolist():
            token, k = (index == expert).nonzero(as_tuple=True)
            total.index_add_(0, token, weights[token, k, None] * _expert(self, expert, x[token]))
    return total.to(x.dtype).reshape(*hidden_states.shape[:-1], -1)


def _expert(self: MeoFeedForward, expert: int, x: Tensor) -> Tensor:
    """Run one whole expert on tokens [T, D]."""
    linear = {}
    for name in (self.experts.first, "down_proj"):
        weight, bias = self.experts.stack(name)
        linear[name] = partial(F.linear, weight=weight[expert], bias=None if bias is None else bias[expert])
    return linear["down_proj"](self._activate(linear, x))
