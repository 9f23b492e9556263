"""Routers from example texts: an expert's gate is the larger, the nearer what it reads is to what its texts give.

Pieces of each text run through the converted model, first with their own expert alone, then as routers made of that
choose; every router notes what it reads. With the experts' means c_i and one variance s per feature, over all pieces,
the logits are those of normal distributions, t * (x - c_i / 2) . (c_i / s), where t makes left-out pieces most likely.
Every fourth piece is held out, to say how many the finished model sends to their own expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, TensorSpec, raw_bytes
from meo_hf.errors import UsageError
from meo_hf.modeling.router_meo import Gates, MeoRouter
from meo_hf.texts import read_text

PIECES, LONGEST, SHORTEST = 16, 128, 4
_SCALES = [2.0**-power for power in range(16)]


@dataclass(frozen=True)
class Fitted:
    """A router's tensor that is found once the rest is written; zeros until then."""

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield raw_bytes(torch.zeros(target.shape, dtype=DTYPES[target.dtype]))


@dataclass(frozen=True)
class Centroids:
    """What a router is made of: `weight` [E, D] and `bias` [E]."""

    weight: Tensor
    bias: Tensor


@dataclass
class Seen:
    """What a router read of an expert's pieces, [n, D], and which expert it chose first."""

    reads: list[Tensor]
    choices: list[int]


def pieces_of(path: Path, tokenizer: Any, name: str) -> list[list[int]]:
    """Cut a text file into token pieces of equal length; raises UsageError if it is too short, or cannot be read."""
    tokens = tokenizer(read_text(path, f"--example {name}"), add_special_tokens=False, verbose=False)["input_ids"]
    length = min(LONGEST, len(tokens) // SHORTEST)
    if length < SHORTEST:
        raise UsageError(f"--example {name}={path} has {len(tokens)} tokens: give at least {SHORTEST**2}")
    found = [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)]
    step = max(1, len(found) // PIECES)
    return found[::step][:PIECES]


def fit(reads: Sequence[Tensor]) -> Centroids:
    """Fit a router to what it read of each expert's pieces, [n_i, D] each."""
    centers = torch.stack([each.double().mean(0) for each in reads])
    spread = torch.cat([each.double() - center for each, center in zip(reads, centers, strict=True)])
    variance = spread.square().mean(0)
    variance = variance + 1e-2 * variance.mean() + torch.finfo(torch.float32).tiny
    left_out = torch.cat([_left_out(reads, centers, variance, expert) for expert in range(len(reads))])
    owner = torch.cat([torch.full((len(each),), expert) for expert, each in enumerate(reads)])
    losses = [float(torch.nn.functional.cross_entropy(scale * left_out, owner)) for scale in _SCALES]
    scale = _SCALES[losses.index(min(losses))]
    weight = scale * centers / variance
    bias = -scale * (centers.square() / variance).sum(1) / 2
    return Centroids(weight.float(), bias.float())


def _left_out(reads: Sequence[Tensor], centers: Tensor, variance: Tensor, expert: int) -> Tensor:
    """Return each piece's logits [n, E] where its own expert's centre is that of the other pieces."""
    x, count = reads[expert].double(), len(reads[expert])
    logits = -((x[:, None] - centers).square() / variance).sum(-1) / 2
    if count > 1:
        others = (count * centers[expert] - x) / (count - 1)
        logits[:, expert] = -((x - others).square() / variance).sum(-1) / 2
    return logits


@torch.no_grad()
def fit_routers(
    model: PreTrainedModel, pieces: Sequence[Sequence[list[int]]], advance: Callable[[], None] = lambda: None
) -> tuple[dict[str, Centroids], dict[str, float]]:
    """Make all routers of a model of pieces per expert; returns them, and the share of held-out pieces sent right.

    The model's routers are overwritten. Raises ValueError for an expert with fewer than 4 pieces.
    """
    if any(len(each) < SHORTEST for each in pieces):
        raise ValueError(f"{SHORTEST} pieces per expert are needed, {min(map(len, pieces))} were given")
    held = [each[3::4] for each in pieces]
    known = [[piece for number, piece in enumerate(each) if number % 4 != 3] for each in pieces]
    routers = {name: module for name, module in model.named_modules() if isinstance(module, MeoRouter)}
    read = {name: _reads(seen) for name, seen in _watch(model, routers, known, True, advance).items()}
    made = _fitted(routers, read)
    live = _watch(model, routers, known, False, advance)  # what routers of later layers meet where earlier ones err
    made = _fitted(routers, {n: [torch.cat(p) for p in zip(read[n], _reads(live[n]), strict=True)] for n in routers})
    found = _watch(model, routers, held, False, advance)
    right = {
        name: sum(choice == expert for expert, seen in enumerate(each) for choice in seen.choices) / sum(map(len, held))
        for name, each in found.items()
    }
    return made, right


def _fitted(routers: Mapping[str, MeoRouter], reads: Mapping[str, list[Tensor]]) -> dict[str, Centroids]:
    made = {name: fit(each) for name, each in reads.items()}
    for name, router in routers.items():
        router.weight.data.copy_(made[name].weight)
        cast(Tensor, router.bias).data.copy_(made[name].bias)
    return made


def _reads(seen: list[Seen]) -> list[Tensor]:
    return [torch.cat(each.reads) for each in seen]


def _watch(
    model: PreTrainedModel,
    routers: Mapping[str, MeoRouter],
    pieces: Sequence[Sequence[list[int]]],
    own: bool,
    advance: Callable[[], None],
) -> dict[str, list[Seen]]:
    """Return what each router saw of every expert's pieces, where they use their `own` expert alone, or as it chose."""
    found: dict[str, list[Seen]] = {name: [] for name in routers}
    for expert, texts in enumerate(pieces):
        for seen in found.values():
            seen.append(Seen([], []))
        for tokens in texts:
            with watched(routers, expert if own else None) as seen_once:
                model(**_inputs(model, tokens))
            for name, (read, choice) in seen_once.items():
                found[name][-1].reads.append(read)
                found[name][-1].choices.append(choice)
            advance()
    return found


@contextmanager
def watched(routers: Mapping[str, MeoRouter], expert: int | None) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Note what the last group's gate read [1, D] and chose first, by router; let all choose one expert if told."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, router: MeoRouter, inputs: tuple[Tensor, ...], output: Any) -> Any:
        gates, balance = output
        seen[name] = inputs[0][-1:].float().cpu(), int(gates.top_k_index[-1, 0])
        if expert is None:
            return None
        others = [e for e in range(router.weight.shape[0]) if e != expert]
        row = torch.tensor([expert, *others[: router.top_k - 1]], device=gates.top_k_index.device)
        weights = torch.zeros_like(gates.top_k_weights)
        weights[:, 0] = 1
        return Gates(row.expand_as(gates.top_k_index), weights), balance

    hooks = [
        router.register_forward_hook(lambda module, args, output, name=name: note(name, module, args, output))
        for name, router in routers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(model: Any, tokens: list[int]) -> dict[str, Any]:
    """Return a call in which the last gate reads all tokens."""
    ids = torch.tensor([tokens], device=model.device)
    if model._meo_context.reads_past:  # the gate of an answer reads its prompt
        ids = torch.cat([ids, ids[:, -1:]], 1)
        prompt = torch.tensor([len(tokens)], device=model.device)
        return {"input_ids": ids, "routing": "prompt", "prompt_lengths": prompt, "use_cache": False}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((1, 1), 0 if start is None else start, device=model.device)
    return inputs


def overwrite(ref: TensorRef, value: Tensor) -> None:
    """Write a tensor's values in place of those in its file."""
    with ref.path.open("r+b") as file:
        file.seek(ref.offset)
        file.write(raw_bytes(value.reshape(ref.spec.shape).to(DTYPES[ref.spec.dtype])))
