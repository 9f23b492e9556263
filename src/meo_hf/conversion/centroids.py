"""Routers from example texts: an expert's gate is the larger, the nearer what it reads is to what its texts give.

Each piece of a text runs through the converted model with its own expert alone, and every router notes what it reads
there. With the experts' means c_i and one variance s per feature, over all pieces, the logits are those of normal
distributions, t * (x - c_i / 2) . (c_i / s), where t makes left-out pieces most likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What a router is made of: `weight` [E, D], `bias` [E], and the share of left-out pieces that it sends right."""

    weight: Tensor
    bias: Tensor
    right: float


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
    right = float((left_out.argmax(1) == owner).double().mean())
    return Centroids(weight.float(), bias.float(), right)


def _left_out(reads: Sequence[Tensor], centers: Tensor, variance: Tensor, expert: int) -> Tensor:
    """Return each piece's logits [n, E] where its own expert's centre is that of the other pieces."""
    x, count = reads[expert].double(), len(reads[expert])
    logits = -((x[:, None] - centers).square() / variance).sum(-1) / 2
    if count > 1:
        others = (count * centers[expert] - x) / (count - 1)
        logits[:, expert] = -((x - others).square() / variance).sum(-1) / 2
    return logits


@torch.no_grad()
def read_examples(
    model: PreTrainedModel, pieces: Sequence[Sequence[list[int]]], advance: Callable[[], None] = lambda: None
) -> dict[str, list[Tensor]]:
    """Return what each router reads of every expert's pieces, [n_i, D] each, with only that expert in use."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, MeoRouter)}
    found: dict[str, list[Tensor]] = {name: [] for name in routers}
    for expert, texts in enumerate(pieces):
        reads: dict[str, list[Tensor]] = {name: [] for name in routers}
        for tokens in texts:
            with only(routers, expert) as seen:
                model(**_inputs(model, tokens))
            for name, read in seen.items():
                reads[name].append(read)
            advance()
        for name, each in reads.items():
            found[name].append(torch.cat(each))
    return found


@contextmanager
def only(routers: Mapping[str, MeoRouter], expert: int) -> Iterator[dict[str, Tensor]]:
    """Let routers choose one expert, and note what the last group's gate read [1, D], by router."""
    seen: dict[str, Tensor] = {}

    def choose(name: str, router: MeoRouter, inputs: tuple[Tensor, ...], output: Any) -> Any:
        seen[name] = inputs[0][-1:].float().cpu()
        gates, balance = output
        others = [e for e in range(router.weight.shape[0]) if e != expert]
        row = torch.tensor([expert, *others[: router.top_k - 1]], device=gates.top_k_index.device)
        weights = torch.zeros_like(gates.top_k_weights)
        weights[:, 0] = 1
        return Gates(row.expand_as(gates.top_k_index), weights), balance

    hooks = [
        router.register_forward_hook(lambda module, args, output, name=name: choose(name, module, args, output))
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
