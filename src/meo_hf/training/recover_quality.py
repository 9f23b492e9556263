"""How far a student is from its teacher on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from meo_hf.training.distillation import IGNORED, gating, targets_of, token_sums
from meo_hf.training.recover_data import Windows


@dataclass(frozen=True)
class Quality:
    """Means over the predicted tokens, in nats; perplexities are None for masked language models."""

    tokens: int
    kl: float
    agreement: float
    perplexity: float | None
    teacher_perplexity: float | None


@torch.no_grad()
def measure(
    student: Any, teacher: Any, windows: Windows, batch_size: int, bf16: bool, advance: Callable[[int, int], None]
) -> Quality:
    """Let both models read all windows, in evaluation mode; `advance` gets the batches done and their number."""
    place, masked = student.device, type(student).__name__.endswith("ForMaskedLM")
    sums = torch.zeros(5, dtype=torch.float64)
    student.eval()
    batches = DataLoader(windows, batch_size)  # type: ignore[arg-type]
    for done, batch in enumerate(batches):
        advance(done, len(batches))
        batch = {name: value.to(place) for name, value in batch.items()}
        targets = targets_of(batch.pop("labels"), shifts=not masked)
        asked = batch if masked else {**batch, "use_cache": False}
        expected = teacher(**asked, **gating(teacher)).logits
        with torch.autocast(place.type, torch.bfloat16, enabled=bf16):
            found = student(**asked, **gating(student)).logits
        kl, nll = token_sums(found, expected, targets)
        _, known = token_sums(expected, expected, targets)
        counted = targets != IGNORED
        agreeing = ((found.argmax(-1) == expected.argmax(-1)) & counted).sum()
        sums += torch.stack([x.double().cpu() for x in (counted.sum(), kl, nll, known, agreeing)])
    tokens, kl, nll, known, agreeing = sums.tolist()
    perplexities = (None, None) if masked else (math.exp(nll / tokens), math.exp(known / tokens))
    return Quality(int(tokens), kl / tokens, agreeing / tokens, *perplexities)
