"""Measure the rates that plans are chosen by, and check the choices against measured times.

Legend: G gates, T tokens per gate, E experts, K selected, O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from meo_hf.benchmark.options import DTYPES
from meo_hf.benchmark.rates import fastest, measure_peak
from meo_hf.modeling.kernels_meo import merge as merge_kernel
from meo_hf.modeling.kernels_meo import usable
from meo_hf.modeling.merged_linear_meo import merged_linear
from meo_hf.modeling.plans_meo import Rates, Work, estimate, work_of_stack
from meo_hf.modeling.tiles_meo import Merge

SIDES = {"cuda": (4096, 4096), "cpu": (1024, 1024)}
EXPERTS = 16
CHECKED = (
    # G, T, E, K, O, I
    (1, 1, 16, 4, 3072, 768),
    (1, 128, 16, 4, 3072, 768),
    (8, 1, 16, 4, 3072, 768),
    (8, 128, 16, 4, 3072, 768),
    (8, 512, 16, 4, 3072, 768),
    (32, 128, 16, 4, 3072, 768),
    (1, 16, 64, 8, 2048, 2048),
    (1, 256, 64, 8, 2048, 2048),
    (8, 1, 64, 8, 2048, 2048),
    (8, 64, 64, 8, 2048, 2048),
)


@dataclass(frozen=True)
class CheckedChoice:
    """Seconds of one linear map by each plan, as estimated and as measured, and the plan that was chosen."""

    work: Work
    estimated: dict[str, float]
    measured: dict[str, float]
    chosen: str

    @property
    def loss(self) -> float:
        """Time of the chosen plan over that of the fastest."""
        return self.measured[self.chosen] / min(self.measured.values())


def measure_rates(dtype: str, device: str, advance: Callable[[str], None] = lambda what: None) -> Rates:
    """Measure a device with one dtype; takes some seconds."""
    place, (outputs, inputs) = torch.device(device), SIDES["cuda" if device.startswith("cuda") else "cpu"]
    with torch.inference_mode():
        advance(f"{dtype}: copies and products")
        peak = measure_peak(dtype, place)
        stack = _draw((EXPERTS, outputs, inputs), dtype, place)
        advance(f"{dtype}: reading")
        read = EXPERTS * stack[0].nbytes / _time(stack, 1, 1, EXPERTS, "combine", place)
        few = stack[: max(1, (4 << 20) // stack[0].nbytes)]
        near = len(few) * few[0].nbytes / _time(few, 1, 1, len(few), "combine", place)
        advance(f"{dtype}: merging")
        gates = 8
        merged = fastest(partial(_merge, stack, gates, 4, False), place)
        one, many = (fastest(partial(_merge, stack, count, 4, True), place) for count in (1, 64))
        flops = 2 * 63 * stack.numel()
        return Rates(
            read=min(read, peak.copy) if place.type == "cuda" else read,
            matmul=peak.matmul,
            accumulate=gates * 4 * stack[0].numel() / merged,
            product=flops / max(many - one, 1e-9),
            sweep=stack.nbytes / one,
            near=max(near, read),
            launch=fastest(partial(_tiny, place), place) / _TINY,
        )


_TINY = 100


def _tiny(device: torch.device) -> None:
    x = torch.zeros(8, device=device)
    for _ in range(_TINY):
        x.add_(1)


def _draw(shape: tuple[int, ...], dtype: str, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).mul_(shape[-1] ** -0.5).to(DTYPES[dtype])


def _gates(count: int, experts: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.rand(count, experts, device=device).argsort(1)[:, :top_k]
    return index, torch.rand(count, top_k, device=device).softmax(1)


def _merge(stack: Tensor, gates: int, top_k: int, product: bool) -> None:
    """Merge without multiplying."""
    index, weights = _gates(gates, len(stack), top_k, stack.device)
    if usable(stack):
        merge_kernel(stack, index, weights)
        return
    for _ in Merge(stack, index, weights, product, stack.dtype).tiles():
        pass


def _time(stack: Tensor, gates: int, tokens: int, top_k: int, plan: str, device: torch.device) -> float:
    x = _draw((gates, tokens, stack.shape[2]), str(stack.dtype).removeprefix("torch."), device)
    index, weights = _gates(gates, len(stack), top_k, device)
    return fastest(lambda: merged_linear(x, stack, None, index, weights, None, plan), device)


def check_choices(
    dtype: str, device: str, rates: Rates, wide: Rates, advance: Callable[[str], None] = lambda what: None
) -> list[CheckedChoice]:
    """Time every plan where another one should win, and say which one would be chosen."""
    place, checked = torch.device(device), []
    with torch.inference_mode():
        for gates, tokens, experts, top_k, outputs, inputs in CHECKED:
            stack = _draw((experts, outputs, inputs), dtype, place)
            work = work_of_stack(stack, gates, gates * tokens, top_k)
            estimated = estimate(work, rates, wide)
            plans = [plan for plan in estimated if plan != "fused" or usable(stack)]
            advance(f"{dtype}: {gates} x {tokens} tokens")
            measured = {plan: _time(stack, gates, tokens, top_k, plan, place) for plan in plans}
            chosen = min(plans, key=lambda plan: estimated[plan])
            checked.append(CheckedChoice(work, estimated, measured, chosen))
    return checked
