"""Merge experts on a GPU: Triton kernels beside the plain PyTorch of the reference, without autograd.

Legend: G groups of tokens that share a gate, T tokens per group, E experts, K selected experts,
I input features, O output features. `stack` may be any strided view: a transpose, a half, every second row.
All sums are kept in float32 and rounded once, and none depends on the order in which programs happen to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    import triton.testing
except Exception:  # missing or broken; every function but `usable` needs it
    triton = None

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ON_CPU = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(_ON_CPU) if triton is not None else False


def usable(*tensors: Tensor) -> bool:
    """Tell whether these kernels can run on tensors: their dtype, their device, and Triton itself."""
    return triton is not None and all(t.dtype in _DTYPES and _reachable(t.device) for t in tensors)


def merge(stack: Tensor, index: Tensor, gates: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum selected experts' parameters times their gates, reading each selected expert once for all groups.

    stack [E, O, I] or [E, O], index [G, K], gates [G, K] -> [G, O, I] or [G, O], in memory ordered as the stack.
    """
    if stack.dim() == 2:
        return merge(stack[:, None], index, gates, dtype)[:, 0]
    if stack.stride(1) < stack.stride(2):
        return merge(stack.transpose(1, 2), index, gates, dtype).transpose(1, 2)
    experts, rows, columns = stack.shape
    groups, selected = index.shape
    out = torch.empty(groups, rows, columns, dtype=dtype or stack.dtype, device=stack.device)
    w_e, w_row, w_column = stack.stride()
    if w_row == columns * w_column:  # no gaps between rows: one long row fills whole tiles
        rows, columns = 1, rows * columns
    index, gates = index.contiguous(), gates.float().contiguous()
    given = {"stack": stack, "out": out, "groups": groups, "rows": rows, "columns": columns}
    given |= {"w_e": w_e, "w_row": w_row, "w_column": w_column, "bucket": _bucket(groups)}
    if groups < 16 or groups * selected <= 2 * experts:  # the L2 cache serves repeats faster than a product would
        _MERGE_FEW.launch(
            lambda meta: (rows * triton.cdiv(columns, meta["block"]),),
            **given,
            **{"index": index, "gates": gates, "selected": selected},
        )
        return out
    used, count, dense = _plan(index, gates, experts)
    block_g = min(128, triton.next_power_of_2(groups))
    _MERGE_MANY.launch(
        lambda meta: (triton.cdiv(groups, block_g) * rows * triton.cdiv(columns, meta["block"]),),
        **given,
        **{"used": used, "count": count, "dense": dense, "experts": experts, "block_g": block_g},
    )
    return out


def merged_linear(
    x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor, activation: str | None = None
) -> Tensor:
    """Apply each group's merged linear map without storing it, and an activation if one is named.

    x [G, T, I], stack [E, O, I], bias [E, O], index [G, K], gates [G, K] -> [G, T, O].
    """
    return _merged(x, stack, bias, index, gates, activation, stack.shape[1], 1, 0)


def merged_gated(
    x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor, activation: str,
    interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """Apply each group's merged gate and up projections and return activation(gate) * up.

    x [G, T, I], stack [E, 2O, I] (all gate rows first, or gate and up rows in turn), bias [E, 2O] -> [G, T, O].
    """
    outs = stack.shape[1] // 2
    return _merged(x, stack, bias, index, gates, activation, outs, *((2, 1) if interleaved else (1, outs)))


def combine_linear(x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor) -> Tensor:
    """Run each distinct selected expert once on all rows and sum its outputs where it was selected: few tokens.

    x [G, T, I] with G*T <= 64, stack [E, O, I], bias [E, O], index [G, K], gates [G, K] -> [G, T, O].
    """
    groups, tokens, ins = x.shape
    experts, outs, _ = stack.shape
    selected, rows = index.shape[1], groups * tokens
    shares = _shares(triton.cdiv(outs, 64), min(experts, groups * selected), x.device)
    out = _shared_out(stack, shares, (groups, tokens, outs))
    block_e = triton.next_power_of_2(experts)
    _COMBINE.launch(
        lambda meta: (shares * triton.cdiv(outs, meta["block_o"]),),
        **_operands(x, stack, bias),
        **{"index": index.contiguous(), "gates": gates.float().contiguous(), "out": out, "rows": rows},
        **{"tokens": tokens, "outs": outs, "ins": ins, "chosen": groups * selected, "shares": shares},
        **{"selected": selected, "block_e": block_e, "block_m": max(1, 4096 // block_e)},
        **{"block_k": triton.next_power_of_2(selected), "block_r": max(16, triton.next_power_of_2(rows))},
    )
    return _sum_shares(out, stack.dtype)


def grouped_gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply to each group its own stored linear map, reading each weight once: few tokens per group.

    x [G, T, I] with T <= 16, weight [G, O, I], bias [G, O] -> [G, T, O].
    """
    groups, tokens, ins = x.shape
    outs = weight.shape[1]
    single = tokens == 1
    shares = _shares(groups * triton.cdiv(outs, 8 if single else 16), triton.cdiv(ins, 512), x.device)
    out = _shared_out(weight, shares, (groups, tokens, outs))
    (_GEMV if single else _GEMM).launch(
        lambda meta: (shares * groups * triton.cdiv(outs, meta["block_o"]),),
        **_operands(x, weight, bias),
        **{"out": out, "groups": groups, "tokens": tokens, "outs": outs, "ins": ins, "shares": shares},
        **{"bucket": _bucket(groups), "block_t": 1 if single else max(16, triton.next_power_of_2(tokens))},
    )
    return _sum_shares(out, weight.dtype)


def _merged(
    x: Tensor, stack: Tensor, bias: Tensor | None, index: Tensor, gates: Tensor, activation: str | None,
    outs: int, step: int, up: int,
) -> Tensor:  # fmt: skip
    """Launch the fused merge-and-multiply: output o is row o * step, and its up row, if any, `up` rows further."""
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: one of {', '.join(ACTIVATIONS)} is supported")
    groups, tokens, ins = x.shape
    out = torch.empty(groups, tokens, outs, dtype=stack.dtype, device=stack.device)
    full = stack.dtype == torch.float32  # no tensor cores: larger tiles spill registers
    block_t = min(64 if full else 128, max(16, triton.next_power_of_2(tokens)))
    blocks = groups * triton.cdiv(tokens, block_t)
    given = _operands(x, stack, bias)
    given |= {"w_up": given["w_o"] * up, "w_o": given["w_o"] * step}
    given |= {"b_up": given["b_o"] * up, "b_o": given["b_o"] * step}
    (_LINEAR_FULL if full else _LINEAR_FEW if block_t <= 32 else _LINEAR_MANY).launch(
        lambda meta: (blocks * triton.cdiv(outs, meta["block_o"]),),
        **given,
        **{"index": index.contiguous(), "gates": gates.float().contiguous(), "out": out},
        **{"groups": groups, "tokens": tokens, "outs": outs, "ins": ins, "bucket": _bucket(blocks)},
        **{"selected": index.shape[1], "gated": up > 0, "activation": activation or "", "block_t": block_t},
    )
    return out


def _operands(x: Tensor, stack: Tensor, bias: Tensor | None) -> dict[str, Any]:
    """Name a linear map's tensors and strides as kernels do; without a bias any pointer serves, it is not read."""
    x = x.to(stack.dtype)
    named = {"x": x, "stack": stack, "bias": stack if bias is None else bias, "biased": bias is not None}
    named |= zip(("x_g", "x_t", "x_i"), x.stride(), strict=True)
    named |= zip(("w_e", "w_o", "w_i"), stack.stride(), strict=True)
    return named | dict(zip(("b_e", "b_o"), (0, 0) if bias is None else bias.stride(), strict=True))


def _plan(index: Tensor, gates: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """List the distinct selected experts on the device: their ids [E], how many [1], gates [G, E] in that order.

    Entries past the count are not written.
    """
    groups, selected = index.shape
    used = torch.empty(experts, dtype=torch.int32, device=index.device)
    count = torch.empty(1, dtype=torch.int32, device=index.device)
    dense = torch.empty(groups, experts, dtype=torch.float32, device=index.device)
    block_e = triton.next_power_of_2(experts)
    with torch.cuda.device_of(index):
        _plan_kernel[(groups,)](
            index, gates, used, count, dense, groups * selected, experts, selected, block_e, max(1, 4096 // block_e)
        )
    return used, count, dense


def _shared_out(weight: Tensor, shares: int, shape: tuple[int, int, int]) -> Tensor:
    """Allocate the output, or one float32 part of it for each share of the sum."""
    dtype = weight.dtype if shares == 1 else torch.float32
    return torch.empty(shares, *shape, dtype=dtype, device=weight.device)


def _sum_shares(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up parts [S, ...] in their order -> [...]."""
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    with torch.cuda.device_of(parts):
        _sum_kernel[(triton.cdiv(out.numel(), 512),)](parts, out, out.numel(), parts.shape[0], 512)
    return out


def _shares(tiles: int, most: int, device: torch.device) -> int:
    """Choose into how many parts to split a sum, so that a few programs run on each multiprocessor."""
    return max(1, min(most, triton.cdiv(2 * _multiprocessors(device), max(1, tiles))))


def _bucket(number: int) -> int:
    """Round down to a power of 8, so that a new batch size seldom starts a new search."""
    return 1 << (max(number, 1).bit_length() - 1) // 3 * 3


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _reachable(device: torch.device) -> bool:
    if device.type != "cuda":
        return _ON_CPU and device.type == "cpu"
    return torch.cuda.get_device_capability(device) >= (8, 0)  # older chips have no bfloat16


class _Tuned:
    """A kernel whose tile sizes are searched for once per key and kept on disk where this Triton can.

    While a CUDA graph is captured nothing may be timed: the tiles found before, else the first choice, serve.
    """

    def __init__(self, kernel: Any, key: str, blocks: str, choices: list[tuple[int, ...]]) -> None:
        self.kernel, self.key = kernel, key.split()
        names = [*blocks.split(), "num_warps", "num_stages"]
        self.choices = [dict(zip(names, choice, strict=True)) for choice in choices]
        self.chosen: dict[tuple[Any, ...], dict[str, Any]] = {}

    @cached_property
    def search(self) -> Any:
        configs = [
            triton.Config({k: v for k, v in c.items() if k.startswith("block")}, c["num_warps"], c["num_stages"])
            for c in self.choices
        ]
        do_bench = partial(triton.testing.do_bench, warmup=5, rep=25)
        try:
            return triton.autotune(configs, self.key, do_bench=do_bench, cache_results=True)(self.kernel)
        except TypeError:  # before Triton 3.4
            return triton.autotune(configs, self.key, do_bench=do_bench)(self.kernel)

    def launch(self, grid: Callable[[dict[str, Any]], tuple[int, ...]], **arguments: Any) -> None:
        stack, out = arguments["stack"], arguments["out"]
        if out.numel() == 0:
            return
        key = (*(arguments[name] for name in self.key), stack.dtype, out.dtype)
        with torch.cuda.device_of(stack):
            if key not in self.chosen and not _ON_CPU and not torch.cuda.is_current_stream_capturing():
                try:
                    self.search[grid](**arguments)
                    self.chosen[key] = self.search.best_config.all_kwargs()
                    return
                except torch.OutOfMemoryError:  # a search clears the L2 cache with a buffer of 256 MB
                    pass
            self.kernel[grid](**arguments, **self.chosen.get(key, self.choices[0]))


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _dot(a, b, total):
    """Multiply tiles and add them to a float32 total; float32 tiles without tf32's rounding."""
    if _INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@_jit
def _add_expert(total, stack, w_e, tile, mask, index, gates, k):
    expert = tl.load(index + k).to(tl.int64)
    weight = tl.load(stack + expert * w_e + tile, mask=mask, other=0.0)
    return total + weight.to(tl.float32) * tl.load(gates + k)


@_jit
def _merge_tile(stack, w_e, tile, mask, index, gates, selected: tl.constexpr):
    """Sum selected experts' values at `tile` (offsets inside an expert) times their gates, in float32."""
    total = tl.zeros(tile.shape, tl.float32)
    if selected <= 16:  # unrolled: all loads are in flight at once
        for k in tl.static_range(selected):
            total = _add_expert(total, stack, w_e, tile, mask, index, gates, k)
    else:
        for k in tl.range(0, selected):
            total = _add_expert(total, stack, w_e, tile, mask, index, gates, k)
    return total


@_jit
def _activate(x, activation: tl.constexpr):
    if activation == "silu":
        x = x * tl.sigmoid(x)
    elif activation == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == "gelu_tanh":  # 1 + tanh(z) is 2 * sigmoid(2z)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif activation == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    return x


@_jit
def _marks(index, chosen, block_e: tl.constexpr, block_m: tl.constexpr):
    """Mark with 1 the experts that occur among the first `chosen` entries of index."""
    experts = tl.arange(0, block_e)
    marks = tl.zeros([block_e], tl.int32)
    for start in tl.range(0, chosen, block_m):
        at = start + tl.arange(0, block_m)
        expert = tl.load(index + at, mask=at < chosen, other=-1).to(tl.int32)
        marks = tl.maximum(marks, tl.max((expert[:, None] == experts[None, :]).to(tl.int32), 0))
    return marks


@_jit
def _plan_kernel(
    index, gates, used, count, dense, chosen, experts,
    selected: tl.constexpr, block_e: tl.constexpr, block_m: tl.constexpr,
):  # fmt: skip
    """One program per group: its gates, one for each used expert; the first program also lists these."""
    g = tl.program_id(0)
    ids = tl.arange(0, block_e)
    marks = _marks(index, chosen, block_e, block_m)
    place = tl.cumsum(marks, 0) - 1
    row = tl.zeros([block_e], tl.float32)
    for k in tl.range(0, selected):
        expert = tl.load(index + g * selected + k).to(tl.int32)
        row += tl.where(ids == expert, tl.load(gates + g * selected + k), 0.0)
    tl.store(dense + g * experts + place, row, mask=marks > 0)
    if g == 0:
        tl.store(used + place, ids, mask=marks > 0)
        tl.store(count, tl.sum(marks, 0))


@_jit
def _merge_few_kernel(
    stack, index, gates, out, groups, rows, columns, bucket, w_e, w_row, w_column,
    selected: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per tile of a row: it merges that tile for every group."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(columns, block)
    row = (pid // blocks).to(tl.int64)
    start = pid % blocks * block
    lanes = tl.arange(0, block)
    mask = start + lanes < columns
    stack += row * w_row + start.to(tl.int64) * w_column
    out += row * columns + start
    for _g in tl.range(0, groups):
        total = _merge_tile(stack, w_e, lanes * w_column, mask, index, gates, selected)
        tl.store(out + lanes, total, mask=mask)
        index += selected
        gates += selected
        out += rows * columns


@_jit
def _merge_many_kernel(
    stack, used, count, dense, out, groups, rows, columns, experts, bucket, w_e, w_row, w_column,
    block_g: tl.constexpr, block_e: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program per block of groups and tile of a row: gates [groups, used experts] times [used experts, tile].

    Blocks of groups go first, so that the second finds the experts' tile in the L2 cache.
    """
    pid = tl.program_id(0)
    group_blocks = tl.cdiv(groups, block_g)
    blocks = tl.cdiv(columns, block)
    tile = pid // group_blocks
    row = (tile // blocks).to(tl.int64)
    start = tile % blocks * block
    lanes = tl.arange(0, block)
    inside = start + lanes < columns
    g = pid % group_blocks * block_g + tl.arange(0, block_g)
    stack += row * w_row + start.to(tl.int64) * w_column
    amount = tl.load(count)
    total = tl.zeros([block_g, block], tl.float32)
    for first in tl.range(0, amount, block_e):
        j = first + tl.arange(0, block_e)
        live = j < amount
        expert = tl.load(used + j, mask=live, other=0).to(tl.int64)
        gate = tl.load(dense + g[:, None] * experts + j[None, :], mask=(g < groups)[:, None] & live[None, :], other=0.0)
        weight = tl.load(
            stack + expert[:, None] * w_e + (lanes * w_column)[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        high = gate.to(weight.dtype)
        total = _dot(high, weight, total)
        if weight.dtype != tl.float32:  # the part of a gate that half precision cuts off
            total = _dot((gate - high.to(tl.float32)).to(weight.dtype), weight, total)
    at = (g.to(tl.int64) * rows + row) * columns + start
    tl.store(out + at[:, None] + lanes[None, :], total, mask=(g < groups)[:, None] & inside[None, :])


@_jit
def _linear_kernel(
    x, stack, bias, index, gates, out, groups, tokens, outs, ins, bucket, x_g, x_t, x_i, w_e, w_o, w_i, w_up, b_e,
    b_o, b_up,
    selected: tl.constexpr, gated: tl.constexpr, biased: tl.constexpr, activation: tl.constexpr,
    block_t: tl.constexpr, block_o: tl.constexpr, block_i: tl.constexpr,
):  # fmt: skip
    """One program per group, block of tokens and block of outputs: merge a tile of weights, multiply, go on.

    Groups go first, so that those which share experts find their tiles in the L2 cache. Tiles are [outputs,
    tokens]: the tensor cores' larger side then is the outputs, however few tokens there are.
    """
    pid = tl.program_id(0)
    g = (pid % groups).to(tl.int64)
    token_blocks = tl.cdiv(tokens, block_t)
    first = pid // groups % token_blocks * block_t
    start = (pid // groups // token_blocks * block_o).to(tl.int64)
    o = tl.arange(0, block_o)
    t = tl.arange(0, block_t)
    i = tl.arange(0, block_i)
    is_o = start + o < outs
    is_t = first + t < tokens
    index += g * selected
    gates += g * selected
    x += g * x_g + first.to(tl.int64) * x_t
    rows = stack + start * w_o
    tile = o[:, None] * w_o + i[None, :] * w_i
    total = tl.zeros([block_o, block_t], tl.float32)
    up = tl.zeros([block_o, block_t], tl.float32)
    for done in tl.range(0, ins, block_i):
        is_i = done + i < ins
        mask = is_o[:, None] & is_i[None, :]
        token = tl.load(x + i[:, None] * x_i + t[None, :] * x_t, mask=is_i[:, None] & is_t[None, :], other=0.0)
        weight = _merge_tile(rows, w_e, tile, mask, index, gates, selected)
        total = _dot(weight.to(token.dtype), token, total)
        if gated:
            weight = _merge_tile(rows + w_up, w_e, tile, mask, index, gates, selected)
            up = _dot(weight.to(token.dtype), token, up)
        x += block_i * x_i
        rows += block_i * w_i
    if biased:
        bias += start * b_o
        total += _merge_tile(bias, b_e, o * b_o, is_o, index, gates, selected)[:, None]
        if gated:
            up += _merge_tile(bias + b_up, b_e, o * b_o, is_o, index, gates, selected)[:, None]
    total = _activate(total, activation)
    if gated:
        total = total * up
    out += (g * tokens + first) * outs + start
    tl.store(out + t[None, :] * outs + o[:, None], total, mask=is_o[:, None] & is_t[None, :])


@_jit
def _multiply(x, weight, total, ins, x_i, w_i, is_o, is_r, block_i: tl.constexpr):
    """Add weight [outputs, ins] times x [ins, rows] to a total; both are given as pointers to their first inputs."""
    i = tl.arange(0, block_i)
    for done in tl.range(0, ins, block_i):
        is_i = done + i < ins
        w = tl.load(weight[:, None] + (i * w_i)[None, :], mask=is_o[:, None] & is_i[None, :], other=0.0)
        v = tl.load(x[None, :] + (i * x_i)[:, None], mask=is_i[:, None] & is_r[None, :], other=0.0)
        total = _dot(w, v, total)
        x += block_i * x_i
        weight += block_i * w_i
    return total


@_jit
def _combine_kernel(
    x, stack, bias, index, gates, out, rows, tokens, outs, ins, chosen, shares, x_g, x_t, x_i, w_e, w_o, w_i,
    b_e, b_o,
    selected: tl.constexpr, biased: tl.constexpr, block_e: tl.constexpr, block_m: tl.constexpr, block_k: tl.constexpr,
    block_r: tl.constexpr, block_o: tl.constexpr, block_i: tl.constexpr,
):  # fmt: skip
    """One program per share of the used experts and block of outputs: every row times every expert of the share."""
    pid = tl.program_id(0)
    share = pid % shares
    start = (pid // shares * block_o).to(tl.int64)
    o = tl.arange(0, block_o)
    r = tl.arange(0, block_r)
    k = tl.arange(0, block_k)
    ids = tl.arange(0, block_e)
    is_o = start + o < outs
    is_r = r < rows
    g = r // tokens
    is_k = is_r[:, None] & (k < selected)[None, :]
    picked = tl.load(index + g[:, None] * selected + k[None, :], mask=is_k, other=-1).to(tl.int32)
    gate = tl.load(gates + g[:, None] * selected + k[None, :], mask=is_k, other=0.0)
    marks = _marks(index, chosen, block_e, block_m)
    place = tl.where(marks > 0, tl.cumsum(marks, 0) - 1, -1)
    row = x + g.to(tl.int64) * x_g + (r % tokens).to(tl.int64) * x_t
    line = stack + (start + o) * w_o
    total = tl.zeros([block_o, block_r], tl.float32)
    for j in tl.range(share, tl.sum(marks, 0), shares):
        expert = tl.sum(tl.where(place == j, ids, 0), 0)
        far = expert.to(tl.int64)
        y = tl.zeros([block_o, block_r], tl.float32)
        y = _multiply(row, line + far * w_e, y, ins, x_i, w_i, is_o, is_r, block_i)
        if biased:
            y += tl.load(bias + far * b_e + (start + o) * b_o, mask=is_o, other=0.0).to(tl.float32)[:, None]
        hit = picked == expert
        scale = tl.sum(tl.where(hit, gate, 0.0), 1)
        mine = (
            tl.max(hit.to(tl.int32), 1) > 0
        )  # a row that selected it counts even at gate 0, any other not even by NaN
        total += tl.where(mine[None, :], y * scale[None, :], 0.0)
    out += share.to(tl.int64) * rows * outs + start
    tl.store(out + r[None, :] * outs + o[:, None], total, mask=is_o[:, None] & is_r[None, :])


@_jit
def _gemv_kernel(
    x, stack, bias, out, groups, tokens, outs, ins, shares, bucket, x_g, x_t, x_i, w_e, w_o, w_i, b_e, b_o,
    biased: tl.constexpr, block_t: tl.constexpr, block_o: tl.constexpr, block_i: tl.constexpr,
):  # fmt: skip
    """One program per share of the inputs, group and block of outputs."""
    pid = tl.program_id(0)
    share = pid % shares
    g = (pid // shares % groups).to(tl.int64)
    start = (pid // shares // groups * block_o).to(tl.int64)
    o = tl.arange(0, block_o)
    t = tl.arange(0, block_t)
    is_o = start + o < outs
    is_t = t < tokens
    part = tl.cdiv(tl.cdiv(ins, block_i), shares) * block_i
    left = tl.minimum(ins - share * part, part)
    begin = (share * part).to(tl.int64)
    row = x + g * x_g + begin * x_i
    line = stack + g * w_e + (start + o) * w_o + begin * w_i
    if block_t == 1:  # one product and sum per weight as it arrives: nothing passes through shared memory
        i = tl.arange(0, block_i)
        sums = tl.zeros([block_o, block_i], tl.float32)
        for done in tl.range(0, left, block_i):
            is_i = done + i < left
            w = tl.load(line[:, None] + (i * w_i)[None, :], mask=is_o[:, None] & is_i[None, :], other=0.0)
            v = tl.load(row + i * x_i, mask=is_i, other=0.0)
            sums += w.to(tl.float32) * v.to(tl.float32)[None, :]
            row += block_i * x_i
            line += block_i * w_i
        total = tl.sum(sums, 1)[:, None]
    else:
        total = tl.zeros([block_o, block_t], tl.float32)
        total = _multiply(row + t.to(tl.int64) * x_t, line, total, left, x_i, w_i, is_o, is_t, block_i)
    if biased and share == 0:
        total += tl.load(bias + g * b_e + (start + o) * b_o, mask=is_o, other=0.0).to(tl.float32)[:, None]
    out += (share * groups + g) * tokens * outs + start
    tl.store(out + t[None, :] * outs + o[:, None], total, mask=is_o[:, None] & is_t[None, :])


@_jit
def _sum_kernel(parts, out, size, shares, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for _share in tl.range(0, shares):
        total += tl.load(parts + at, mask=at < size, other=0.0)
        parts += size
    tl.store(out + at, total, mask=at < size)


# The first choice needs little shared memory: it serves where nothing was measured.
_MERGE_FEW = _Tuned(
    _merge_few_kernel, "columns selected w_column bucket", "block",
    [(1024, 4, 1), (512, 4, 1), (512, 2, 1), (2048, 8, 1), (2048, 4, 1)],
)  # fmt: skip
_MERGE_MANY = _Tuned(
    _merge_many_kernel, "columns experts w_column block_g bucket", "block_e block",
    [(16, 64, 4, 3), (32, 64, 4, 3), (16, 128, 4, 3), (32, 128, 8, 3), (32, 256, 8, 3), (64, 128, 8, 2)],
)  # fmt: skip
_LINEAR_FEW = _Tuned(
    _linear_kernel, "outs ins selected gated w_i block_t bucket", "block_o block_i",
    [(32, 64, 4, 1), (16, 128, 4, 1), (16, 128, 4, 2), (64, 64, 4, 2), (16, 256, 8, 1), (64, 128, 8, 1)],
)  # fmt: skip
_LINEAR_MANY = _Tuned(
    _linear_kernel, "outs ins selected gated w_i block_t bucket", "block_o block_i",
    [(64, 32, 8, 1), (64, 32, 4, 1), (64, 32, 8, 2), (64, 64, 8, 1), (128, 32, 8, 1), (128, 32, 8, 2)],
)  # fmt: skip
_LINEAR_FULL = _Tuned(
    _linear_kernel, "outs ins selected gated w_i block_t bucket", "block_o block_i",
    [(32, 16, 4, 1), (16, 32, 4, 1), (32, 32, 8, 1), (64, 16, 8, 1), (64, 32, 8, 1)],
)  # fmt: skip
_COMBINE = _Tuned(
    _combine_kernel, "outs ins shares w_i block_r", "block_o block_i",
    [(64, 64, 4, 3), (64, 128, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 5), (16, 256, 4, 4)],
)  # fmt: skip
_GEMV = _Tuned(
    _gemv_kernel, "outs ins shares w_i bucket", "block_o block_i",
    [(8, 512, 4, 1), (4, 1024, 4, 1), (16, 256, 4, 1), (16, 512, 8, 1), (64, 64, 4, 1), (8, 256, 2, 1)],
)  # fmt: skip
_GEMM = _Tuned(
    _gemv_kernel, "outs ins shares w_i bucket", "block_o block_i",
    [(16, 128, 4, 3), (16, 256, 4, 3), (32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (16, 256, 4, 4)],
)  # fmt: skip
