"""Which of several equal computations a call of merged experts uses: a small cost model over shapes.

Every plan computes y = x (sum_i g_i W_i)^T. What it costs is a sum of bytes over bandwidths and operations over
rates; the rates are measured by `meo-hf bench calibrate`, and where nobody did, those of the machines named below.
Shapes alone decide: no value is looked at, so nothing waits for a device.

Legend: G gates, N tokens of all gates, E experts, K selected, O output features, I input features.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor

PLANS = ("accumulate", "product", "fused", "combine")
"""Merge by index and multiply; merge as one product [G, E] x [E, O * I] and multiply; merge tiles inside the product;
multiply by each selected expert and add the outputs."""

FEW_TOKENS = 64
"""Up to this many tokens a GPU combines outputs in one pass over the experts."""

executed: Counter[str] = Counter()
"""How often each plan ran in this process."""


@dataclass(frozen=True)
class Work:
    """One linear map of merged experts in one call; `device` and `dtype` are names like `cpu` and `bfloat16`."""

    gates: int
    tokens: int
    experts: int
    top_k: int
    outputs: int
    inputs: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def weights(self) -> int:
        """Elements of one expert's weight."""
        return self.outputs * self.inputs

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return torch.finfo(getattr(torch, self.dtype)).bits // 8

    @property
    def distinct(self) -> float:
        """Expected number of different experts among those that G independent gates select."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** self.gates)


@dataclass(frozen=True)
class Rates:
    """What a device does per second with one dtype."""

    read: float
    """bytes of weights read from memory"""
    matmul: float
    """floating-point operations of a large matrix product"""
    accumulate: float
    """weight elements multiplied by a gate and added to a merged expert that is near"""
    product: float
    """floating-point operations of the product [G, E] x [E, O * I]"""
    sweep: float
    """bytes of all experts read by that product"""
    near: float
    """bytes read from the nearest memory that all cores share: merged tiles, and experts that were just read"""
    launch: float
    """seconds that one operation takes to start"""


RATES: dict[tuple[str, str], Rates] = {
    # AMD EPYC (AVX-512, 2 cores), PyTorch 2.13: measured by `meo-hf bench calibrate`
    ("cpu", "float32"): Rates(3.5e10, 2.0e11, 1.1e10, 9.6e10, 2.6e10, 3.7e10, 1.8e-6),
    ("cpu", "bfloat16"): Rates(1.9e10, 9.0e11, 7.9e9, 3.7e11, 2.1e10, 1.9e10, 1.7e-6),
    ("cpu", "float16"): Rates(3.0e10, 5.0e10, 7.5e9, 3.2e9, 3.1e9, 3.0e10, 1.7e-6),
    # NVIDIA H100: estimates; nothing was measured there yet
    ("cuda", "float32"): Rates(2.9e12, 4.5e13, 5e12, 4e13, 2.9e12, 5.5e12, 5e-6),
    ("cuda", "bfloat16"): Rates(2.9e12, 7e14, 5e12, 3e14, 2.9e12, 5.5e12, 5e-6),
    ("cuda", "float16"): Rates(2.9e12, 7e14, 5e12, 3e14, 2.9e12, 5.5e12, 5e-6),
}


def estimate(work: Work, rates: Rates, wide: Rates) -> dict[str, float]:
    """Return the seconds that each plan of a device would take; `wide` are the rates of float32."""
    return _on_cuda(work, rates) if work.device == "cuda" else _on_cpu(work, rates, wide)


def _on_cpu(work: Work, rates: Rates, wide: Rates) -> dict[str, float]:
    selections = work.gates * work.top_k
    expert = work.weights * work.itemsize
    merged = work.gates * expert
    multiply = max(2 * work.tokens * work.weights / max(rates.matmul, wide.matmul), merged / rates.near)
    tiles = max(1.0, merged / TILE_BYTES)
    return {
        "accumulate": selections * work.weights / rates.accumulate
        + multiply
        + 3 * tiles * (work.top_k + 2) * rates.launch,
        "product": work.experts * expert / rates.sweep
        + 2 * work.gates * work.experts * work.weights / rates.product
        + multiply
        + 2 * tiles * rates.launch,
        "combine": max(work.distinct * expert / rates.read, 2 * work.tokens * work.top_k * work.weights / rates.matmul)
        + 2 * work.tokens * work.top_k * (work.outputs + work.inputs) * 4 / rates.near
        + 6 * work.distinct * rates.launch,
    }


def _on_cuda(work: Work, rates: Rates) -> dict[str, float]:
    selections = work.gates * work.top_k
    expert = work.weights * work.itemsize
    merged = work.gates * expert
    flops = 2 * work.tokens * work.weights / rates.matmul
    read = work.distinct * expert / rates.read
    multiply = max(flops, merged / rates.read) + rates.launch
    blocks = -(-work.tokens // work.gates // FEW_TOKENS)  # each block of tokens merges its own tiles
    costs = {
        "accumulate": max(read + merged / rates.read, selections * work.weights / rates.accumulate)
        + rates.launch
        + multiply,
        "product": max(read + merged / rates.read, 2 * work.gates * work.experts * work.weights / rates.product)
        + 4 * rates.launch
        + multiply,
        "fused": max(
            read,
            blocks * selections * expert / rates.near,
            blocks * selections * work.weights / rates.accumulate,
            flops,
        )
        + rates.launch,
    }
    if work.tokens <= FEW_TOKENS:
        costs["combine"] = read + 4 * rates.launch
    return costs


TILE_BYTES = 6 << 20
"""Bytes of merged weights that a CPU keeps in its caches between merging and multiplying."""


def choose(work: Work, *, fuses: bool = True) -> str:
    """Return the plan that should be fastest; `fuses` says whether there is a kernel for plan `fused`."""
    costs = possible(work, fuses)
    return min(costs, key=lambda plan: costs[plan])


def possible(work: Work, fuses: bool) -> dict[str, float]:
    """Return the seconds of each plan that can run."""
    return {plan: cost for plan, cost in costs_of(work).items() if fuses or plan != "fused"}


@lru_cache(4096)
def costs_of(work: Work) -> dict[str, float]:
    """Return the seconds that each plan of a device should take there, by its rates."""
    return estimate(work, rates_of(work), rates_of(replace(work, dtype="float32")))


def saved_by_keeping(step: Work) -> float:
    """Return the seconds that a step saves if its merged experts were kept, against combining the experts' outputs.

    A kept expert is read for every gate; combining reads every selected expert once, whoever selected it.
    """
    rates = rates_of(step)
    kept = max(step.gates * step.weights * step.itemsize / rates.read, 2 * step.tokens * step.weights / rates.matmul)
    return min(costs_of(step).values()) - kept - rates.launch


def work_of(x: Tensor, stack: Tensor, index: Tensor) -> Work:
    """Describe the product of x [N, T, I] with gates' merged experts: stack [E, O, I], index [G, K]."""
    return work_of_stack(stack, index.shape[0], x.shape[0] * x.shape[1], index.shape[1])


def work_of_stack(stack: Tensor, gates: int, tokens: int, top_k: int) -> Work:
    """Describe the product of so many tokens with gates' merged experts: stack [E, O, I]."""
    experts, outputs, inputs = stack.shape
    dtype = str(stack.dtype).removeprefix("torch.")
    return Work(gates, tokens, experts, top_k, outputs, inputs, dtype, stack.device.type)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a CPU multiplies merged weights: some are slow at half precision."""
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        return x.dtype
    own, wide = (_calibrated().rates(Work(1, 1, 1, 1, 1, 1, name)) for name in (str(x.dtype)[6:], "float32"))
    return torch.float32 if own.matmul <= wide.matmul else x.dtype


def rates_of(work: Work) -> Rates:
    """Return the rates that a plan is chosen by."""
    return _calibrated().rates(work)


@dataclass(frozen=True)
class _Calibration:
    """Measured rates by `device/dtype`, and those built in where nothing was measured."""

    measured: tuple[tuple[str, Rates], ...] = ()

    def rates(self, work: Work) -> Rates:
        measured = dict(self.measured).get(f"{work.device}/{work.dtype}")
        dtype = work.dtype if (work.device, work.dtype) in RATES else "float32"
        device = work.device if work.device == "cuda" else "cpu"
        return measured or RATES[device, dtype]


def rates_file() -> Path:
    """Return where measured rates are kept: `MEO_HF_RATES`, or `meo_hf_rates.json` in the Hugging Face home."""
    return Path(os.environ.get("MEO_HF_RATES") or Path(HF_HOME) / "meo_hf_rates.json")


@cache
def _calibrated() -> _Calibration:
    try:
        found = json.loads(rates_file().read_text("utf-8"))["rates"]
        names = {field.name for field in fields(Rates)}
        rates = {key: Rates(**{name: float(value[name]) for name in names}) for key, value in found.items()}
        if any(not 0 < rate < math.inf for each in rates.values() for rate in asdict(each).values()):
            return _Calibration()
        return _Calibration(tuple(sorted(rates.items(), key=lambda item: item[0])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not ours: the built-in rates hold
        return _Calibration()


def write_rates(measured: dict[str, Rates], about: dict[str, str]) -> Path:
    """Keep measured rates for this user; `about` says what they were measured with."""
    path = rates_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(
        json.dumps({"about": about, "rates": {k: asdict(v) for k, v in measured.items()}}, indent=1) + "\n"
    )
    beside.replace(path)
    _calibrated.cache_clear()
    costs_of.cache_clear()
    return path
