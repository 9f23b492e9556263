"""How long work tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What to call while a conversion runs: `stage(name, bytes)` at each stage, `advance(bytes)` within it."""

    stage: Callable[[str, int], None] = lambda name, total: None
    advance: Callable[[int], None] = lambda count: None


SILENT = Progress()
