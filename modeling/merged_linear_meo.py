"""One linear map of merged experts, as one differentiable operation that `torch.compile` does not look into.

The plan is chosen when it runs, from shapes. Merged weights are never saved for backward: gradients recompute them.

Legend: N groups of T tokens, G gates, E experts, K selected, I input features, O output features.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .kernels_meo import ACTIVATIONS, combine_linear, merged_gated, usable
from .kernels_meo import merged_linear as fused_linear
from .merging_meo import combine_outputs, grouped_linear, merge_experts
from .plans_meo import FEW_TOKENS, PLANS, choose, executed, product_dtype, work_of
from .tiles_meo import Merge, Tokens, bias_gradients, merge_multiply, storage_of, weight_gradients

_NAMESPACE = f"meo_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}"  # one per copy of this file in a process
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.6 has no such question


def merged_linear(
    x: Tensor,
    stack: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gates: Tensor,
    owner: Tensor | None = None,
    plan: str | None = None,
) -> Tensor:
    """Apply to each group the linear map that its gate merges: x [N, T, I] -> [N, T, O].

    stack [E, O, I], bias [E, O], index and gates [G, K]; `owner` [N] is each group's gate, None for N == G.
    `plan` is one of PLANS, None to choose. Computes in the stack's dtype, or in that of autocast.
    """
    device = x.device.type
    plain = _plain(x, stack, bias, index, gates)
    if owner is not None and (plain or device != "cpu"):
        index, gates, owner = index[owner], gates[owner], None
    if plain:
        merged = merge_experts(stack, index, gates)
        return grouped_linear(x, merged, None if bias is None else merge_experts(bias, index, gates))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else stack.dtype
    given = (stack, bias, index, gates)
    traced = torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *given))
    )
    with torch.autocast(device, enabled=False):
        return (_linear if traced else _compute)(x.to(dtype), *given, owner, plan or "")


def gated_linear(
    x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor, activation: str
) -> Tensor | None:
    """Apply merged gate and up projections and their activation in one kernel, where that is the fastest plan.

    x [G, T, I], stack [E, 2F, I] (gate rows first) -> [G, T, F]; None where another way must be taken.
    """
    special = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if special or activation not in ACTIVATIONS or _plain(x, stack, bias, index, gates) or not usable(x, stack):
        return None
    if choose(work_of(x, stack, index)) != "fused":
        return None
    executed["fused"] += 1
    return merged_gated(x, stack, bias, index, gates, activation)


def _plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether PyTorch must see every step: for export, function transforms, and sharded, quantised or other tensors."""
    if torch.compiler.is_compiling():
        return _exporting()
    if torch.jit.is_tracing() or _transforms():
        return True
    return x.numel() == 0 or any(t is not None and type(t) not in (Tensor, Parameter) for t in (x, *others))


def _transforms() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work; PyTorch has no public question for it."""
    functions = getattr(torch._C, "_functorch", None)
    peek = getattr(functions, "peek_interpreter_stack", lambda: None)
    return peek() is not None or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def _compute(
    x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor, owner: Tensor | None, plan: str
) -> Tensor:
    """Run the plan named, or the one that fits."""
    if plan and plan not in PLANS:
        raise ValueError(f"plan is {plan!r}; allowed: {', '.join(PLANS)}")
    kernels = usable(x, stack)
    if plan == "fused" and not kernels:
        raise ValueError("plan 'fused' needs Triton and a GPU, and float32, bfloat16 or float16")
    rows = _Rows(x, index, gates, owner)
    chosen = plan or choose(work_of(x, stack, rows.index), fuses=kernels)
    executed[chosen] += 1
    if chosen in ("combine", "fused") and owner is not None:
        index, gates, owner = index[owner], gates[owner], None
    if chosen == "fused":
        return fused_linear(x, stack, bias, index, gates).to(x.dtype)
    if chosen == "combine":
        if kernels and x.shape[:2].numel() <= FEW_TOKENS:
            return combine_linear(x, stack, bias, index, gates).to(x.dtype)
        return combine_outputs(x.to(stack.dtype), stack, bias, index, gates).to(x.dtype)
    storage, transposed = storage_of(stack)
    merged_bias = None if bias is None else merge_experts(bias, rows.index, rows.gates)
    y = _merge_multiply(rows.tokens(x), storage, transposed, rows, chosen == "product", product_dtype(x), merged_bias)
    return rows.groups(y).to(x.dtype)


def _merge_multiply(
    x: Tokens, storage: Tensor, transposed: bool, rows: _Rows, product: bool, dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Merge and multiply; by index where one product with all experts did harm."""
    y = merge_multiply(x, storage, transposed, Merge(storage, rows.index, rows.gates, product, dtype), bias)
    if product and not _sound(y):
        return _merge_multiply(x, storage, transposed, rows, False, dtype, bias)
    return y


_linear = torch.library.custom_op(f"{_NAMESPACE}::linear", _compute, mutates_args=())


@_linear.register_fake
def _(
    x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor, owner: Tensor | None, plan: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], stack.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gates: Tensor,
    owner: Tensor | None,
    to_x: bool,
    to_stack: bool,
    to_bias: bool,
    to_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, stack, bias and gates; those not asked for are empty, or come along."""
    storage, transposed = storage_of(stack)
    rows = _Rows(x, index, gates, owner)
    dtype = product_dtype(x)
    given, wanted = rows.tokens(x).to(dtype), rows.tokens(dy).to(dtype)
    dx, dstack, dbias, dgates = x.new_empty(0), stack.new_empty(0), stack.new_empty(0), gates.new_empty(0)
    if to_x:
        product = x.device.type == "cpu" and rows.index.numel() > len(storage)
        dx = rows.groups(_merge_multiply(wanted, storage, not transposed, rows, product, dtype)).to(x.dtype)
    if to_stack or to_gates:
        experts, found = weight_gradients(given, wanted, storage, transposed, rows.index, rows.gates, to_stack)
        if experts is not None:
            dstack = experts.transpose(1, 2) if transposed else experts
        dgates = rows.gates_of(found)
    if bias is not None and (to_bias or to_gates):
        dbias, found = bias_gradients(wanted, bias, rows.index, rows.gates)
        dgates = rows.gates_of(found) + (dgates if to_stack or to_gates else 0)
    return dx, dstack, dbias, dgates


@_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    bias: Tensor | None,
    index: Tensor,
    gates: Tensor,
    owner: Tensor | None,
    to_x: bool,
    to_stack: bool,
    to_bias: bool,
    to_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else tensor.new_empty(0)

    storage, transposed = storage_of(stack)
    experts = like(storage, to_stack)
    by_bias = bias is not None and (to_bias or to_gates)
    return (
        like(x, to_x),
        experts.transpose(1, 2) if transposed and to_stack else experts,
        like(bias, True) if bias is not None and by_bias else stack.new_empty(0),
        like(gates, to_stack or to_gates or by_bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 2, 4)]
    found = _linear_backward(dy, *ctx.saved_tensors, *needs)
    dx, dstack, dbias, dgates = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dx, dstack, dbias, None, dgates, None, None


_linear.register_autograd(_backward, setup_context=_save)


def _sound(y: Tensor) -> bool:
    """Whether one product with all experts did no harm: one that a gate did not select may hold what is no number."""
    return y.device.type != "cpu" or bool(torch.isfinite(y.sum()))


class _Rows:
    """Groups sorted by the gate that owns them, so that each gate merges once; gates without a group fall out."""

    def __init__(self, x: Tensor, index: Tensor, gates: Tensor, owner: Tensor | None) -> None:
        self.index, self.gates, self._count = index, gates, len(index)
        self._order = None if owner is None else owner.argsort(stable=True)
        if owner is None:
            return
        counts = torch.bincount(owner, minlength=len(index))
        self._present = counts.nonzero()[:, 0]
        self.index, self.gates = index[self._present], gates[self._present]
        ends = counts[self._present].cumsum(0) * x.shape[1]
        self._bounds = [0, *ends.tolist()]

    def tokens(self, x: Tensor) -> Tokens:
        """Return groups [N, T, ...] as tokens by gate."""
        if self._order is None:
            return Tokens(x)
        return Tokens(x[self._order].flatten(0, 1), self._bounds)

    def groups(self, y: Tensor) -> Tensor:
        """Return what `tokens` took, at its old place."""
        if self._order is None:
            return y
        y = y.view(len(self._order), -1, y.shape[-1])
        return torch.empty_like(y).index_copy_(0, self._order, y)

    def gates_of(self, found: Tensor) -> Tensor:
        """Return the gradient of all gates from those that own a group."""
        if self._order is None:
            return found
        return found.new_zeros(self._count, found.shape[1]).index_copy_(0, self._present, found)
