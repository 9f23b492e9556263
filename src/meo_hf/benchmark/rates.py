"""What a machine can do at best, measured: bytes copied and matrix operations per second; and floors made of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from meo_hf.benchmark.decode import now
from meo_hf.benchmark.layer_shapes import Cell
from meo_hf.benchmark.options import DTYPES
from meo_hf.modeling.memory_meo import free_bytes

REPEATS = 5
_COPIED = {"cuda": 2 << 30, "cpu": 256 << 20}
_SIDE = {"cuda": 8192, "cpu": 2048}
_FIRST_SIDE = 256
_LONG = 0.02


@dataclass(frozen=True)
class Peak:
    """The fastest of a few large copies (bytes read plus bytes written) and matrix products, per second."""

    copy: float
    matmul: float
    dtype: str


@dataclass(frozen=True)
class Floor:
    """Seconds below which no kernel can compute a merged layer, unless caches already hold what it reads.

    Bytes are each distinct selected expert read once, inputs and outputs; operations are those of a dense expert.
    """

    experts: int
    """distinct experts that are read"""
    bytes: int
    flops: int
    max: float
    """if reading and computing overlap perfectly"""
    sum: float
    """if they do not overlap at all"""


def measure_peak(dtype: str, device: torch.device) -> Peak:
    """Measure a device with tensors of one type, as large as the machine lends room for."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    size = min(_COPIED[kind], free_bytes(device) // 8) // DTYPES[dtype].itemsize
    source = torch.ones(size, dtype=DTYPES[dtype], device=device)
    target = torch.empty_like(source)
    copied = fastest(partial(target.copy_, source), device)
    nbytes = 2 * source.nbytes
    del source, target
    return Peak(nbytes / copied, _matmul(DTYPES[dtype], _SIDE[kind], device), dtype)


def _matmul(dtype: torch.dtype, largest: int, device: torch.device) -> float:
    """Return the best rate of square products x W^T, of sizes that grow up to one that takes long enough."""
    best, side = 0.0, _FIRST_SIDE
    while True:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = fastest(partial(F.linear, left, right), device)
        best = max(best, 2 * side**3 / seconds)
        side *= 2
        if side > largest or seconds > _LONG:  # a CPU without half precision takes minutes for a large one
            return best


def fastest(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the seconds of the fastest of a few calls, after one that is dropped."""
    run()
    seconds = []
    for _ in range(repeats):
        began = now(device)
        run()
        seconds.append(now(device) - began)
    return min(seconds)


def floor_of(cell: Cell, distinct: int, peak: Peak) -> Floor:
    """Work out a cell's floor from the number of distinct experts that its gates selected."""
    shape = cell.shape
    moved = distinct * shape.parameters + 2 * cell.all_tokens * shape.hidden
    nbytes = cell.itemsize * moved
    flops = 2 * cell.all_tokens * shape.weights
    read, computed = nbytes / peak.copy, flops / peak.matmul
    return Floor(distinct, nbytes, flops, max(read, computed), read + computed)
