"""Merge and multiply tile by tile, so that merged weights stay in a CPU's caches; and the gradients, recomputed so.

Experts are stored [E, R, C]: rows are output features, or input features where a family stores them transposed.
A tile is some rows of all experts. With merged tiles M [G, r, C], tokens multiply either M^T ("across": from C to r
features) or M ("along": from r to C features, summed over tiles).

Legend: G gates, T tokens per gate, E experts, K selected, R stored rows, C stored columns, r rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels_meo import merge as merge_kernel
from .kernels_meo import usable
from .plans_meo import TILE_BYTES

FEWEST_ROWS = 64


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

    def across(self, merged: Tensor, bias: Tensor | None, out: Tokens) -> None:
        """Write x M^T + bias [G, r]."""
        if self.bounds is None and len(merged) > 1:
            if bias is None:
                torch.bmm(self.x, merged.transpose(1, 2), out=out.x)
            else:
                torch.baddbmm(bias[:, None], self.x, merged.transpose(1, 2), out=out.x)
            return
        for gate, (x, weight, y) in enumerate(zip(self.each(), merged, out.each(), strict=True)):
            if bias is None:
                torch.mm(x, weight.t(), out=y)
            else:
                torch.addmm(bias[gate], x, weight.t(), out=y)

    def along(self, merged: Tensor, total: Tokens) -> None:
        """Add x M, in the total's dtype."""
        for x, weight, y in zip(self.each(), merged, total.each(), strict=True):
            if y.dtype == x.dtype:
                y.addmm_(x, weight)
            else:
                y.add_(torch.mm(x, weight))

    def outer(self, other: Tokens) -> Tensor:
        """Return x^T other of each gate [G, r, C]."""
        if self.bounds is None:
            return torch.bmm(self.x.transpose(1, 2), other.x)
        return torch.stack([torch.mm(x.t(), y) for x, y in zip(self.each(), other.each(), strict=True)])


def storage_of(stack: Tensor) -> tuple[Tensor, bool]:
    """Return experts [E, R, C] as they lie in memory, and whether rows are input features."""
    transposed = stack.stride(1) == 1 and stack.stride(2) != 1
    return (stack.transpose(1, 2), True) if transposed else (stack, False)


def tiles(storage: Tensor, gates: int, itemsize: int) -> Iterator[slice]:
    """Yield rows of tiles whose merged weights fit into caches; a GPU takes larger ones."""
    budget = TILE_BYTES if storage.device.type == "cpu" else 64 * TILE_BYTES
    rows = max(FEWEST_ROWS, budget // max(1, gates * storage.shape[2] * itemsize))
    rows = -(-storage.shape[1] // max(1, round(storage.shape[1] / rows)))  # tiles of about the same height
    return slices(storage.shape[1], rows)


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
        self.dense = dense_gates(index, gates, len(storage), storage.dtype) if product and not self.kernel else None
        if self.dense is None and self.looks:
            self.chosen = list(zip(index.tolist(), gates.to(self.wide).tolist(), strict=True))
        self._room: dict[tuple[str, int, int], Tensor] = {}

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows, gates and their merged rows [g, r, C]; on a CPU the next ones overwrite them.

        Experts' rows are read for one set of gates after the other, while they are near.
        """
        most = 8 if self.looks and self.dense is None else 64
        for rows in tiles(self.storage, min(self.count, most), self.dtype.itemsize):
            for gates in slices(self.count, most):
                yield rows, gates, self._tile(rows, gates)

    def _tile(self, rows: slice, gates: slice) -> Tensor:
        if self.kernel:
            return merge_kernel(self.storage[:, rows], self.index[gates], self.gates[gates], self.dtype)
        if self.dense is not None:
            made = self._take("merged", rows, gates, self.storage.dtype)
            torch.mm(self.dense[gates], self.storage[:, rows].flatten(1), out=made.view(len(made), -1))
            return made.to(self.dtype)
        return self._by_views(rows, gates) if self.looks else self._by_gathering(rows, gates)

    def _by_views(self, rows: slice, gates: slice) -> Tensor:
        """Read each gate's experts where they lie."""
        made = self._take("merged", rows, gates, self.dtype)
        narrow = self.dtype != self.wide
        sums = self._take("sum", rows, slice(0, 1), self.wide)[0] if narrow else None
        for merged, (experts, weights) in zip(made, self.chosen[gates], strict=True):
            total = merged if sums is None else sums
            torch.mul(self.storage[experts[0], rows], weights[0], out=total)
            for expert, gate in zip(experts[1:], weights[1:], strict=True):
                total.add_(self.storage[expert, rows], alpha=gate)
            if narrow:
                merged.copy_(total)
        return made

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
        for rows, gates, merged in merge.tiles():
            x.part(rows).of(gates).along(merged, y.of(gates))
        for tokens, added in zip(y.each(), () if bias is None else bias, strict=False):
            tokens.add_(added)
        return y.x
    y = x.new(storage.shape[1], merge.dtype)
    bias = None if bias is None else bias.to(merge.dtype)
    for rows, gates, merged in merge.tiles():
        x.of(gates).across(merged, None if bias is None else bias[gates, rows], y.part(rows).of(gates))
    return y.x


def weight_gradients(
    x: Tokens, dy: Tokens, storage: Tensor, transposed: bool, index: Tensor, gates: Tensor, experts: bool
) -> tuple[Tensor | None, Tensor]:
    """Return the gradients of the stored experts [E, R, C] (None if not asked for) and of the gates [G, K].

    With dM [G, R, C], a gate's own weight gradient: dW = G^T dM is one product, and a gate's is <dM, W>.
    """
    rows_of, columns_of = (x, dy) if transposed else (dy, x)
    wide = torch.promote_types(storage.dtype, torch.float32)
    dense = dense_gates(index, gates.to(wide), len(storage), wide).to(storage.dtype)
    grads = torch.empty_like(storage, memory_format=torch.contiguous_format) if experts else None
    sums = torch.zeros(len(index), len(storage), dtype=torch.float64, device=storage.device)
    for rows in tiles(storage, len(index), storage.dtype.itemsize):
        merged = rows_of.part(rows).outer(columns_of).flatten(1)  # [G, r * C]
        if grads is not None:
            torch.mm(dense.t(), merged, out=(made := torch.empty_like(grads[:, rows]).flatten(1)))
            grads[:, rows] = made.view_as(grads[:, rows])
        sums += _products(merged, storage[:, rows].flatten(1), index)
    return grads, sums.gather(1, index).to(gates.dtype)


def bias_gradients(dy: Tokens, bias: Tensor, index: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the experts' biases [E, O] and, through them, of the gates [G, K]."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    sums = torch.stack([tokens.sum(0, dtype=wide) for tokens in dy.each()])  # [G, O]
    dense = dense_gates(index, gates.to(wide), len(bias), wide)
    return (dense.t() @ sums).to(bias.dtype), (sums @ bias.to(wide).t()).gather(1, index).to(gates.dtype)


def _products(merged: Tensor, experts: Tensor, index: Tensor) -> Tensor:
    """Return <merged, expert> [G, E] in float64 where a gate selected the expert; elsewhere nobody asks."""
    if merged.device.type != "cpu" or index.numel() > len(experts):
        return (merged @ experts.t()).to(torch.float64)
    found = torch.zeros(len(merged), len(experts), dtype=torch.float64)
    for gate, selected in enumerate(index.tolist()):
        for expert in set(selected):
            found[gate, expert] = torch.dot(merged[gate], experts[expert])
    return found
