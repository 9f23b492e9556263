"""Time decoding with a KV cache: a dense model, its MEO model, and the same experts as a mixture of experts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from meo_hf.benchmark.decode_checks import check_cached, check_rival
from meo_hf.benchmark.decode_variants import (
    DecodeSettings,
    Models,
    Variant,
    answer,
    draw_text,
    variants_of,
)
from meo_hf.modeling.cache_meo import merged_bytes


@dataclass
class Timing:
    """What was timed of one variant, in seconds, one number per round.

    `token` is the median step of a round. Steps that merge experts anew (only `meo (segment)` has them) are in
    `merge`, and `token` then holds their share of a segment too.
    """

    variant: Variant
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    merge: list[float] = field(default_factory=list)
    merged_bytes: int = 0


@dataclass(frozen=True)
class Decoded:
    """Timings of all variants, the dense model's first, and by how much the checks before found results to differ."""

    settings: DecodeSettings
    timings: list[Timing]
    checks: dict[str, float]

    def ratio(self, timing: Timing) -> float:
        """Return the median of the rounds' ratios to the dense model."""
        dense = self.timings[0].token
        return statistics.median(mine / its for mine, its in zip(timing.token, dense, strict=True))


def time_decode(
    settings: DecodeSettings, models: Models, advance: Callable[[str], None] = lambda what: None
) -> Decoded:
    """Check every variant, then time all of them in turns, each round beginning with the next one.

    `advance` is called before each of the `steps_of` a run. Raises CheckFailedError, before anything is timed, if
    a variant computes something wrong.
    """
    ids = draw_text(settings, models.dense.config.get_text_config().vocab_size)
    variants = variants_of(settings)
    checks = {}
    for variant in variants:
        advance(f"checking {variant}")
        if variant.method == "moe":  # cached or not, a token's rounding may tip its gate: only its layer is compared
            checks[str(variant)] = check_rival(settings, models, variant.top_k or 1)
        else:
            checks[str(variant)] = check_cached(settings, models, variant, ids)
    timings = [Timing(variant) for variant in variants]
    for number in range(settings.rounds + 1):
        first = number % len(timings)
        for timing in timings[first:] + timings[:first]:
            advance(f"{f'round {number}' if number else 'warm-up'}: {timing.variant}")
            _time_round(settings, models, timing if number else Timing(timing.variant), ids)
    return Decoded(settings, timings, checks)


def steps_of(settings: DecodeSettings) -> int:
    """Return how often a run calls `advance`."""
    return len(variants_of(settings)) * (settings.rounds + 2)


def _time_round(settings: DecodeSettings, models: Models, timing: Timing, ids: Tensor) -> None:
    """Decode once and add a number to each list of a timing."""
    prompt = settings.prompt_tokens
    cache = DynamicCache(config=models.dense.config)
    with (
        torch.inference_mode(),
        models.serving(timing.variant, torch.full_like(ids[:, 0], prompt)) as (model, arguments),
    ):
        seconds = []
        began = now(ids.device)
        for _ in answer(model, arguments, ids, prompt, cache):
            ended = now(ids.device)
            seconds.append(ended - began)
            began = now(ids.device)
    segment = models.segment_length if timing.variant.method == "meo (segment)" else None
    token, merge = per_token(seconds[1:], prompt, segment)
    timing.prefill.append(seconds[0])
    timing.token.append(token)
    timing.merge += [] if merge is None else [merge]
    timing.merged_bytes = merged_bytes(cache)


def merging_steps(count: int, prompt: int, segment: int) -> list[bool]:
    """Say of each step after a prompt whether experts are merged in it: the first, and each that opens a segment."""
    return [number == 0 or (prompt + number) % segment == 0 for number in range(count)]


def per_token(steps: list[float], prompt: int, segment: int | None) -> tuple[float, float | None]:
    """Return the time per token, and of a step that merges experts: the first one, and each that opens a segment.

    The few tokens of a round may hold more or fewer such steps than their share, so they are charged by their share.
    """
    if segment is None:
        return statistics.median(steps), None
    merging = merging_steps(len(steps), prompt, segment)
    merge = statistics.median(s for s, merges in zip(steps, merging, strict=True) if merges)
    plain = statistics.median([s for s, merges in zip(steps, merging, strict=True) if not merges] or [merge])
    return plain + (merge - plain) / segment, merge


def now(device: torch.device) -> float:
    """Return the time in seconds once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
