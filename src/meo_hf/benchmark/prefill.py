"""Time one forward pass over whole texts: a dense model, its MEO model, and the same experts as a mixture."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meo_hf.benchmark.decode_variants import Models, Variant
from meo_hf.benchmark.layer import measure
from meo_hf.benchmark.layer_results import MERGING
from meo_hf.benchmark.prefill_checks import check_experts, check_variant
from meo_hf.benchmark.prefill_setup import PrefillSettings, Text, draw_texts, read, variants_of
from meo_hf.modeling.plans_meo import executed

SAMPLE = 0.05
"""Seconds that a round of a fast variant lasts, so that the clock's own steps do not matter."""


@dataclass
class Timing:
    """The seconds of a forward pass of one variant in each round, and how often each plan ran in one."""

    variant: Variant
    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    """passes per round"""
    plans: Counter[str] = field(default_factory=Counter)

    @property
    def median(self) -> float:
        """Seconds of a pass."""
        return statistics.median(self.seconds)

    @property
    def merged(self) -> int:
        """Linear maps that merged weights; combining outputs does not."""
        return sum(self.plans[plan] for plan in MERGING)


@dataclass(frozen=True)
class Prefilled:
    """Timings of all variants on one size of text, the dense model's first, and what the checks before found."""

    text: Text
    timings: list[Timing]
    checks: dict[str, float]

    def ratio(self, timing: Timing) -> float:
        """Return the median of the rounds' ratios to the dense model."""
        dense = self.timings[0].seconds
        return statistics.median(mine / its for mine, its in zip(timing.seconds, dense, strict=True))


def time_prefill(
    settings: PrefillSettings, models: Models, advance: Callable[[str], None] = lambda what: None
) -> Iterator[Prefilled]:
    """Yield one result per size of text: every variant is checked, then all are timed in turns.

    `advance` is called before each of the `steps_of` a run. Raises CheckFailedError, before a text is timed, if a
    variant computes something wrong.
    """
    apart = check_experts(models)
    variants = variants_of(settings, models)
    for text in settings.texts():
        ids = draw_texts(settings, models, text)
        checks = {"experts differ by": apart}
        for variant in variants:
            advance(f"{text}: checking {variant}")
            checks[str(variant)] = check_variant(settings, models, variant, text, ids)
        timings = [Timing(variant) for variant in variants]
        for number in range(settings.rounds + 1):
            first = number % len(timings)
            for timing in timings[first:] + timings[:first]:
                advance(f"{text}: {f'round {number}' if number else 'warm-up'}: {timing.variant}")
                _time_round(models, timing, text, ids, warm_up=not number)
        yield Prefilled(text, timings, checks)


def steps_of(settings: PrefillSettings, models: Models) -> int:
    """Return how often a run calls `advance`."""
    return len(settings.texts()) * len(variants_of(settings, models)) * (settings.rounds + 2)


def _time_round(models: Models, timing: Timing, text: Text, ids: Tensor, warm_up: bool) -> None:
    """Add a number to a timing; a warm-up finds out how many passes a round has, and what plans one runs."""
    lengths = torch.full_like(ids[:, 0], text.prompt)
    with torch.inference_mode(), models.serving(timing.variant, lengths) as (model, arguments):
        if not warm_up:
            timing.seconds.append(measure(lambda: read(model, arguments, ids), timing.calls, ids.device))
            return
        before = Counter(executed)
        read(model, arguments, ids)  # not measured: the first one may choose, compile or allocate
        timing.plans = executed - before
        seconds = measure(lambda: read(model, arguments, ids), 1, ids.device)
        timing.calls = math.ceil(SAMPLE / seconds)
