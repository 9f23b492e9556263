"""Merge and multiply tile by tile, so that merged weights stay in a CPU's caches; and the gradients, recomputed so.

Experts are stored [E, R, C]: rows are output features, or input features where a family stores them transposed.
A tile is some rows of all experts. With merged tiles M [G, r, C], tokens multiply either M^T ("across": from C to r
features) or M ("along": from r to C features, summed over tiles).

Legend: G gates, T tokens per gate, E experts, K selected, R stored rows, C stored columns, r rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_meo import merge as merge_kernel
from .kernels_meo import usable
from .plans_meo import TILE_BYTES

FEWEST_ROWS = 64

ONE_TILE = 3 << 20
"""Bytes of one gate's merged weights that stay in the caches of a CPU's cores until they are multiplied."""


class Tile(NamedTuple):
    """Merged rows [g, r, C] of some gates: `scale` times `merged` are the weights."""

    rows: slice
    gates: slice
    merged: Tensor
    scale: float = 1.0


class Tokens:
    """Tokens by the gate that they have: [G, T, C], or [N, C] with the bounds of each gate's part."""

    def __init__(self, x: Tensor, bounds: list[int] | None = None) -> None:
        self.x, self.bounds = x, bounds

    def new(self, features: int, dtype: torch.dtype, *, zeros: bool = False) -> Tokens:
        """Return room for as many tokens with other features."""
        shape = (*self.x.shape[:-1], features)
        return Tokens(
            self.x.new_zeros(shape, dtype=dtype) if zeros else self.x.new_empty(shape, dtype=dtype), self.bounds
        )

    def part(self, rows: slice) -> Tokens:
        """Return some features."""
        return Tokens(self.x[..., rows], self.bounds)

    def of(self, gates: slice) -> Tokens:
        """Return the tokens of some gates."""
        if self.bounds is None:
            return Tokens(self.x[gates])
        begin, *bounds = self.bounds[gates.start : gates.stop + 1]
        return Tokens(self.x[begin : bounds[-1]], [0, *(bound - begin for bound in bounds)])

    def to(self, dtype: torch.dtype) -> Tokens:
        """Convert."""
        return Tokens(self.x.to(dtype), self.bounds)

    def each(self) -> Iterator[Tensor]:
        """Yield each gate's tokens."""
        if self.bounds is None:
            yield from self.x
        else:
            yield from (self.x[a:b] for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    def across(self, tile: Tile, bias: Tensor | None, out: Tokens) -> None:
        """Write x M^T + bias [G, r]."""
        beta = 0 if bias is None else 1
        if self.bounds is None and len(tile.merged) > 1:
            added = out.x if bias is None else bias[:, None]
            torch.baddbmm(added, self.x, tile.merged.transpose(1, 2), beta=beta, alpha=tile.scale, out=out.x)
            return
        for gate, (x, weight, y) in enumerate(zip(self.each(), tile.merged, out.each(), strict=True)):
            added = y if bias is None else bias[gate]
            torch.addmm(added, x, weight.t(), beta=beta, alpha=tile.scale, out=y)

    def along(self, tile: Tile, total: Tokens) -> None:
        """Add x M, in the total's dtype."""
        for x, weight, y in zip(self.each(), tile.merged, total.each(), strict=True):
            if y.dtype == x.dtype:
                y.addmm_(x, weight, alpha=tile.scale)
            else:
                y.add_(torch.mm(x, weight), alpha=tile.scale)

    def outer(self, other: Tokens) -> Tensor:
        """Return x^T other of each gate [G, r, C]."""
        if self.bounds is None:
            return torch.bmm(self.x.transpose(1, 2), other.x)
        return torch.stack([torch.mm(x.t(), y) for x, y in zip(self.each(), other.each(), strict=True)])


def storage_of(stack: Tensor) -> tuple[Tensor, bool]:
    """Return experts [E, R, C] as they lie in memory, and whether rows are input features."""
    transposed = stack.stride(1) == 1 and stack.stride(2) != 1
    return (stack.transpose(1, 2), True) if transposed else (stack, False)


def tiles(storage: Tensor, gates: int, itemsize: int, budget: int) -> Iterator[slice]:
    """Yield rows of tiles whose merged weights take so many bytes; a GPU takes larger ones."""
    budget *= 1 if storage.device.type == "cpu" else 64
    rows = max(FEWEST_ROWS, budget // max(1, gates * storage.shape[2] * itemsize))
    height = storage.shape[1] / max(1, round(storage.shape[1] / rows))  # all tiles about the same
    return slices(storage.shape[1], math.ceil(height / FEWEST_ROWS) * FEWEST_ROWS)


def slices(length: int, step: int) -> Iterator[slice]:
    """Yield the parts of a range."""
    return (slice(begin, min(begin + step, length)) for begin in range(0, length, step))


class Merge:
    """Merged tiles of experts, by index or as one product with all experts; `dtype` is that of what follows."""

    def __init__(self, storage: Tensor, index: Tensor, gates: Tensor, product: bool, dtype: torch.dtype) -> None:
        self.storage, self.dtype, self.count = storage, dtype, len(index)
        self.index, self.gates = index, gates
        self.wide = torch.promote_types(storage.dtype, torch.float32)
        self.kernel = usable(storage)
        self.looks = storage.device.type == "cpu" and not self.kernel
        self.dense = dense_gates(index, gates, len(storage), storage.dtype) if product and self.looks else None
        if self.dense is None and self.looks:
            pairs = zip(gates.to(self.wide).tolist(), index.tolist(), strict=True)
            self.chosen = [list(zip(*pair, strict=True)) for pair in pairs]
        self._room: dict[tuple[str, int, int], Tensor] = {}

    def tiles(self) -> Iterator[Tile]:
        """Yield merged tiles; on a CPU the next one overwrites the last.

        Experts' rows are read for one set of gates after the other, while they are near.
        """
        alone = self.looks and self.dense is None
        budget = ONE_TILE if alone else TILE_BYTES
        most = 1 if alone else 64
        for rows in tiles(self.storage, min(self.count, most), self.dtype.itemsize, budget):
            for gates in slices(self.count, most):
                yield self._by_views(rows, gates) if alone else Tile(rows, gates, self._all(rows, gates))

    def _all(self, rows: slice, gates: slice) -> Tensor:
        if self.kernel:
            return merge_kernel(self.storage[:, rows], self.index[gates], self.gates[gates], self.dtype)
        if self.dense is None:
            return self._by_gathering(rows, gates)
        made = self._take("merged", rows, gates, self.storage.dtype)
        torch.mm(self.dense[gates], self.storage[:, rows].flatten(1), out=made.view(len(made), -1))
        return made.to(self.dtype)

    def _by_views(self, rows: slice, gates: slice) -> Tile:
        """Read one gate's experts where they lie; the largest gate is left to the product that follows."""
        weights, experts = zip(*sorted(self.chosen[gates.start], key=lambda pair: -abs(pair[0])), strict=True)
        scale, parts = weights[0], [self.storage[expert, rows] for expert in experts]
        total = self._take("sum", rows, gates, self.wide)[0]
        if len(parts) == 1 or scale == 0:
            total.copy_(parts[0])
        else:
            torch.add(parts[0].to(self.wide), parts[1], alpha=weights[1] / scale, out=total)
        for part, gate in zip(parts[2:], weights[2:], strict=True):
            total.add_(part, alpha=gate / scale if scale else 0)
        if self.dtype == self.wide:
            return Tile(rows, gates, total[None], scale)
        return Tile(rows, gates, torch.mul(total, scale, out=self._take("merged", rows, gates, self.dtype)[0])[None])

    def _by_gathering(self, rows: slice, gates: slice) -> Tensor:
        """Copy each gate's experts, so that the host need not wait for the indices."""
        weights = self.gates[gates].to(self.wide)[..., None, None]
        part = self.storage[:, rows]
        total = torch.zeros((), dtype=self.wide, device=part.device)
        for k, index in enumerate(self.index[gates].unbind(1)):
            total = total + weights[:, k] * part[index].to(self.wide)
        return total.to(self.dtype)

    def _take(self, name: str, rows: slice, gates: slice, dtype: torch.dtype) -> Tensor:
        key = (name, rows.stop - rows.start, gates.stop - gates.start)
        if key not in self._room:
            self._room[key] = self.storage.new_empty(key[2], key[1], self.storage.shape[2], dtype=dtype)
        return self._room[key]


def dense_gates(index: Tensor, gates: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """Return gates [G, E], zero where not selected.

    Rounding passes each gate's error on to the next, so that in a narrow type their sum stays what it is.
    """
    if dtype in (torch.float32, torch.float64):
        rounded = list(gates.to(dtype).unbind(1))
    else:
        rounded, error = [], torch.zeros_like(gates[:, 0])
        for gate in gates.unbind(1):
            rounded.append((gate + error).to(dtype))
            error = gate + error - rounded[-1].to(gate.dtype)
    dense = torch.zeros(len(index), experts, dtype=dtype, device=index.device)
    return dense.scatter_add_(1, index, torch.stack(rounded, 1))


def merge_multiply(x: Tokens, storage: Tensor, transposed: bool, merge: Merge, bias: Tensor | None = None) -> Tensor:
    """Multiply tokens by merged weights and add merged biases [G, O].

    With the other `transposed`, it is output gradients that become input gradients.
    """
    x = x.to(merge.dtype)
    if transposed:
        y = x.new(storage.shape[2], torch.promote_types(merge.dtype, torch.float32), zeros=True)
        for tile in merge.tiles():
            x.part(tile.rows).of(tile.gates).along(tile, y.of(tile.gates))
        for tokens, added in zip(y.each(), () if bias is None else bias, strict=False):
            tokens.add_(added)
        return y.x
    y = x.new(storage.shape[1], merge.dtype)
    bias = None if bias is None else bias.to(merge.dtype)
    for tile in merge.tiles():
        added = None if bias is None else bias[tile.gates, tile.rows]
        x.of(tile.gates).across(tile, added, y.part(tile.rows).of(tile.gates))
    return y.x


def weight_gradients(
    x: Tokens, dy: Tokens, storage: Tensor, transposed: bool, index: Tensor, gates: Tensor, experts: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of the stored experts [E, R, C] (None if not asked for) and of the gates [G, K].

    With dM [G, R, C], a gate's own weight gradient: dW = G^T dM is one product, and a gate's is <dM, W>.
    """
    rows_of, columns_of = (x, dy) if transposed else (dy, x)
    dtype = torch.promote_types(storage.dtype, x.x.dtype)
    dense = dense_gates(index, gates, len(storage), dtype)
    grads = torch.empty_like(storage, memory_format=torch.contiguous_format) if experts else None
    sums = torch.zeros(len(index), len(storage), dtype=widest(storage.device), device=storage.device)
    for rows in tiles(storage, len(index), dtype.itemsize, TILE_BYTES):
        merged = rows_of.part(rows).outer(columns_of).flatten(1).to(dtype)  # [G, r * C]
        if grads is not None:
            made = grads[:, rows].view(len(storage), -1)
            torch.mm(dense.t(), merged, out=made) if made.dtype == dtype else made.copy_(dense.t() @ merged)
        sums += _products(merged, storage[:, rows].flatten(1).to(dtype), index)
    return grads, sums.gather(1, index).to(gates.dtype)


def bias_gradients(dy: Tokens, bias: Tensor, index: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the experts' biases [E, O] and, through them, of the gates [G, K]."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    sums = torch.stack([tokens.sum(0, dtype=wide) for tokens in dy.each()])  # [G, O]
    dense = dense_gates(index, gates.to(wide), len(bias), wide)
    return (dense.t() @ sums).to(bias.dtype), (sums @ bias.to(wide).t()).gather(1, index).to(gates.dtype)


def _products(merged: Tensor, experts: Tensor, index: Tensor) -> Tensor:
    """Return <merged, expert> [G, E] where a gate selected the expert; elsewhere nobody asks.

    Sums of short pieces are added in a wider type: over all of an expert's weights float32 would lose digits.
    """
    if merged.device.type != "cpu" or index.numel() > len(experts):
        left, right = (x.unflatten(1, (-1, _piece(x.shape[1]))).transpose(0, 1) for x in (merged, experts))
        return torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=widest(merged.device))
    found = torch.zeros(len(merged), len(experts), dtype=torch.float64)
    for gate, selected in enumerate(index.tolist()):
        for expert in set(selected):
            product = (merged[gate] * experts[expert]).view(-1, _piece(merged.shape[1]))
            found[gate, expert] = product.sum(1).sum(dtype=torch.float64)
    return found


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _piece(length: int) -> int:
    """Return a divisor of a length, of about a hundred if there is one."""
    return next((size for size in range(128, 31, -1) if length % size == 0), length)
