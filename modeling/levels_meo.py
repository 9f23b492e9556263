"""Who can share a gate, by the kind of stack that the merged feed-forwards sit in."""

from __future__ import annotations

from typing import Literal

Kind = Literal["encoder", "decoder", "encoder-decoder"]

LEVELS: dict[Kind, tuple[str, ...]] = {
    "encoder": ("sequence", "token", "task"),
    "encoder-decoder": ("sequence", "token", "task"),
    "decoder": ("segment", "sequence", "token", "task"),
}
MOE_LEVELS: dict[Kind, tuple[str, ...]] = {
    "encoder": ("sequence", "unmerged"),
    "encoder-decoder": ("sequence", "unmerged"),
    "decoder": ("segment", "sequence", "unmerged"),
}
POOLINGS = ("hidden", "probs")
