"""N LoRA adapters of one base as N experts: W_i = W_0 + s_i B_i A_i, with W_0 the base's own weight.

Feed-forwards' maps become low-rank experts. Of other linear maps, such as attention's, `outside` says what becomes of
their parts: `gate` (level `task`: each row gets its own task's), `merge` (the mean of all adapters' goes into the
weight) or `refuse`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.births import Recipe
from meo_hf.conversion.lora_source import LoraPart, LoraSource
from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, TensorSpec, raw_bytes
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.modeling.blocks_meo import Block
from meo_hf.modeling.merger_meo import bank_key

OUTSIDE = ("gate", "merge", "refuse")
Parts = tuple[LoraPart | None, ...]


@dataclass(frozen=True)
class AdapterBank:
    """What adapters add to linear maps, by path: a part per adapter, None where one leaves the map alone.

    `inside` are maps of feed-forwards, `outside` all others.
    """

    adapters: tuple[LoraSource, ...]
    level: str
    rule: str
    inside: dict[str, Parts]
    outside: dict[str, Parts]

    @property
    def gated(self) -> dict[str, Parts]:
        """All maps whose parts stay apart."""
        return {**self.inside, **(self.outside if self.rule == "gate" else {})}

    @property
    def merged(self) -> dict[str, Parts]:
        """Maps that get the mean of the adapters' parts."""
        return self.outside if self.rule == "merge" else {}

    def settings(self, top_k: int | None) -> dict[str, Any]:
        """Return what the `meo` block says of experts and gates; raises UsageError for a top_k that fits no task."""
        count = len(self.adapters)
        block: dict[str, Any] = {"num_experts": count, "expert_format": "lowrank"}
        if self.level != "task":
            return {**block, "top_k": min(2, count) if top_k is None else top_k}
        if top_k not in (None, 1):
            raise UsageError(f"--top-k {top_k} has no effect at level task, where a task is its adapter: leave it out")
        own = {"top_k": 1, "router": "top_k", "balance_loss": 0.0, "tasks": [one.task for one in self.adapters]}
        return {**block, **own}

    def recipes(self, block: Block) -> Iterator[tuple[str, Recipe]]:
        """Yield target name and recipe of a feed-forward's low-rank parts."""
        for name, path in block.paths.items():
            yield from self._pair(
                f"{block.slot}.experts.low_rank.{bank_key(name)}", self.inside.get(f"{block.path}.{path}")
            )

    def outside_recipes(self) -> Iterator[tuple[str, Recipe]]:
        """Yield target name and recipe of other maps' parts for tasks."""
        for path in self.outside if self.rule == "gate" else ():
            yield from self._pair(f"{path}.low_rank", self.outside[path])

    def _pair(self, name: str, parts: Parts | None) -> Iterator[tuple[str, Recipe]]:
        if parts is not None:
            for letter in "AB":
                yield f"{name}.{letter}", Padded(parts, letter)

    @property
    def dtype(self) -> torch.dtype:
        """The widest type of the adapters' factors; one that holds them times their scales without rounding."""
        parts = [part for each in self.gated.values() for part in each if part is not None]
        widest = max((DTYPES[part.up.spec.dtype] for part in parts), key=lambda dtype: dtype.itemsize)
        exact = len({part.up.spec.dtype for part in parts}) == 1 and all(math.frexp(p.scale)[0] == 0.5 for p in parts)
        return widest if exact else torch.promote_types(widest, torch.float32)


def bank_of(
    adapters: Sequence[LoraSource], blocks: Sequence[Block], model: PreTrainedModel, level: str, rule: str | None
) -> AdapterBank:
    """Sort adapters' parts by what becomes of them.

    Raises UsageError where a rule is needed, or contradicts the level, UnsupportedError for what none can express.
    """
    rule = rule or ("gate" if level == "task" else "refuse")
    if rule not in OUTSIDE:
        raise UsageError(f"--outside {rule!r} is unknown: give one of {', '.join(OUTSIDE)}")
    if rule == "gate" and level != "task":
        raise UsageError(f"--outside gate needs level task: at level {level} only feed-forwards have gates")
    parts: dict[str, list[LoraPart | None]] = {}
    for number, adapter in enumerate(adapters):
        for path, part in adapter.parts.items():
            parts.setdefault(path, [None] * len(adapters))[number] = part
    feed_forwards = {f"{block.path}.{path}" for block in blocks for path in block.paths.values()}
    inside = {path: tuple(each) for path, each in parts.items() if path in feed_forwards}
    outside = {path: tuple(each) for path, each in parts.items() if path not in feed_forwards}
    if not inside and level != "task":
        raise UsageError(f"no adapter touches a feed-forward, so at level {level} nothing has a gate: take level task")
    if outside and rule == "refuse":
        raise UsageError(
            f"adapters also change {len(outside)} linear maps outside of the feed-forwards, such as {min(outside)}: "
            "say --outside merge (the mean of their parts goes into the weights), or take level task, where each row "
            "gets its own (--outside gate)"
        )
    bank = AdapterBank(tuple(adapters), level, rule, inside, outside)
    if tied := [path for path in bank.merged if _is_tied(model, path)]:
        raise UnsupportedError(f"--outside merge would change {tied[0]}, whose weight is also another module's")
    return bank


def _is_tied(model: PreTrainedModel, path: str) -> bool:
    tied = model.all_tied_weights_keys
    return f"{path}.weight" in {*tied, *tied.values()}


def ranks_by_ending(parts: Mapping[str, int], model: PreTrainedModel) -> dict[str, int]:
    """Return ranks by the shortest endings of paths that name just the maps of one rank.

    `parts` are ranks by path; paths in the result begin below the base model, so that they fit with any head.
    """
    prefix = f"{model.base_model_prefix}."
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    every = {path.removeprefix(prefix): parts.get(path, 0) for path in {*linears, *parts}}
    found: dict[str, int] = {}
    for path, rank in sorted(every.items()):
        if not rank or any(_ends(path, ending) for ending in found):
            continue
        steps = path.split(".")
        endings = [".".join(steps[-length:]) for length in range(1, len(steps) + 1)]
        ending = next((e for e in endings if {r for p, r in every.items() if _ends(p, e)} == {rank}), path)
        found[ending] = rank
    return found


def _ends(path: str, ending: str) -> bool:
    return f".{path}".endswith(f".{ending}")


def rank(parts: Parts) -> int:
    """Return the rank that holds every adapter's part of a map."""
    return max(part.rank for part in parts if part is not None)


def _refs(parts: Parts, letter: str) -> list[TensorRef | None]:
    return [None if part is None else part.down if letter == "A" else part.up for part in parts]


@dataclass(frozen=True)
class Padded:
    """One factor of all adapters, filled up with zeros to one rank: A [E, R, I], or B [E, R, O] times its scale."""

    parts: Parts
    letter: str

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes, adapter by adapter."""
        for part, ref in zip(self.parts, _refs(self.parts, self.letter), strict=True):
            whole = torch.zeros(target.shape[1:])
            if part is not None and ref is not None:
                factor = ref.load().float()
                factor = factor if self.letter == "A" else factor.t() * part.scale
                whole[: len(factor)] = factor
            kept = whole.to(DTYPES[target.dtype])
            if not kept.isfinite().all():
                where = "" if ref is None else f" ({ref.path})"
                raise CheckpointError(f"{target.name} would not be finite as {kept.dtype}{where}")
            yield raw_bytes(kept)


@dataclass(frozen=True)
class Summed:
    """A weight of the base plus the mean of all adapters' parts; `transposed` where it is stored [in, out]."""

    source: TensorRef
    parts: Parts
    transposed: bool

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        weight = self.source.load().float()
        for part in self.parts:
            if part is not None:
                delta = part.up.load().float() @ part.down.load().float() * (part.scale / len(self.parts))
                weight += delta.t() if self.transposed else delta
        yield raw_bytes(weight.to(DTYPES[target.dtype]))


@dataclass(frozen=True)
class OwnExpert:
    """A router by which each task selects the expert of its own number: the identity."""

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield raw_bytes(torch.eye(*target.shape, dtype=DTYPES[target.dtype]))
