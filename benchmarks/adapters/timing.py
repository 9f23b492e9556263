"""What benchmarks of adapters share: models with common weights, and times taken in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def twin(model: Any) -> Any:
    """Return a model of its own modules with the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def detach_files(model: Any) -> Any:
    """Copy weights, which else would stay mapped to the files that they were loaded from; returns the model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def in_turns(calls: dict[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Time all calls in turns, each round beginning with the next one; a first round is dropped."""
    found: dict[str, list[T]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = calls[name]()
            if number:
                found[name].append(seconds)
    return found


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def median_ms(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 2)


def ratio(mine: list[float], base: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, base, strict=True)), 3)
