"""Training MEO models with the stock Trainer: what it logs, tasks, and recovery from a teacher."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meo_hf.training.gate_entropy import sharpen
    from meo_hf.training.progressive import ProgressiveExperts
    from meo_hf.training.tasks import TaskCollator, mix
    from meo_hf.training.watching import watch

_HOMES = {
    "ProgressiveExperts": "meo_hf.training.progressive",
    "TaskCollator": "meo_hf.training.tasks",
    "mix": "meo_hf.training.tasks",
    "sharpen": "meo_hf.training.gate_entropy",
    "watch": "meo_hf.training.watching",
}
__all__ = ["ProgressiveExperts", "TaskCollator", "mix", "sharpen", "watch"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
