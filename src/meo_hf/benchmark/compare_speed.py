"""What a variant costs: time beside its source, floating point operations, and memory."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.benchmark.compare_variants import Subject
from meo_hf.benchmark.decode import now, per_token
from meo_hf.benchmark.flops import count_run

NEW_TOKENS = 32
"""Steps of one token that are timed, at most half of a window."""


@dataclass
class Speed:
    """What was timed of one model, in seconds, one number per round: a prompt, and the median step of one token."""

    prompt_tokens: int
    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)

    def ratio(self, name: str, source: Speed) -> float:
        """Return the median of the rounds' ratios to the source, whose rounds alternated with these."""
        mine, its = getattr(self, name), getattr(source, name)
        return statistics.median(a / b for a, b in zip(mine, its, strict=True))


def time_beside(
    source: Subject, variant: Subject, window: Tensor, rounds: int, advance: Callable[[str], None]
) -> tuple[Speed, Speed]:
    """Time both models in turns on one text [1, S], every other round beginning with the other; source first.

    A first round is dropped. The source beside itself is timed once per round.
    """
    prompt = window.shape[1] - min(NEW_TOKENS, window.shape[1] // 2)
    timed = [(subject, Speed(prompt)) for subject in ([source] if variant is source else [source, variant])]
    for number in range(rounds + 1):
        advance(f"{variant.name}: {f'round {number}' if number else 'warm-up'}")
        for subject, speed in timed[:: -1 if number % 2 else 1]:
            prefill, token = _read(subject, window, prompt)
            if number:
                speed.prefill.append(prefill)
                speed.token.append(token)
    return timed[0][1], timed[-1][1]


@torch.inference_mode()
def _read(subject: Subject, window: Tensor, prompt: int) -> tuple[float, float]:
    """Read a prompt at once, then token by token with a KV cache; return the seconds of both."""
    names = inspect.signature(subject.model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    began = now(window.device)
    outputs = subject.model(window[:, :prompt], use_cache=True, **last, **subject.arguments)
    prefill = now(window.device) - began
    steps = []
    for token in window[:, prompt:].split(1, dim=1):
        began = now(window.device)
        outputs = subject.model(token, past_key_values=outputs.past_key_values, use_cache=True, **subject.arguments)
        steps.append(now(window.device) - began)
    return prefill, per_token(steps, prompt, subject.segment)[0]


def flops_per_token(subject: Subject, windows: Tensor) -> float:
    """Return the floating point operations of windows [N, S], read one by one, per token.

    Two per multiply-accumulate of a matrix product, 2 m - 1 per value that is merged from m experts. A mixture of
    experts is counted in its plain implementation, which runs each expert on just the tokens that selected it.
    """
    total = 0
    with _eager_experts(subject.model):
        for window in windows.split(1):
            count = count_run(subject.model, {"input_ids": window, "use_cache": False, **subject.arguments})
            total += count.total("mul_add")
    return total / windows.numel()


@contextmanager
def _eager_experts(model: PreTrainedModel) -> Iterator[None]:
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def peak_bytes(subject: Subject, window: Tensor) -> int:
    """Return what a model's weights take, and on a GPU what reading a window adds to that at most."""
    if window.device.type != "cuda":
        return subject.nbytes
    torch.cuda.reset_peak_memory_stats(window.device)
    before = torch.cuda.memory_allocated(window.device)
    _read(subject, window, window.shape[1] - min(NEW_TOKENS, window.shape[1] // 2))
    return subject.nbytes + torch.cuda.max_memory_allocated(window.device) - before
