"""Options that benchmarks share, and what is wrong with one."""

from __future__ import annotations

import torch

from meo_hf.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def option(name: str) -> str:
    """Return the option of a setting as it is typed."""
    return f"--{name.replace('_', '-')}"


def at_least(name: str, value: int, low: int) -> None:
    """Raise UsageError for a number that is too low."""
    if value < low:
        raise UsageError(f"{option(name)} is {value}: give a whole number from {low} on")


def check_place(dtype: str, device: str) -> None:
    """Raise UsageError for a type that is not offered, or a device that this machine lacks."""
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is unknown: give one of {', '.join(DTYPES)}")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):  # no such device, or one that this torch cannot use
        raise UsageError(f"--device {device!r} cannot be used here: give another, like cpu") from None
