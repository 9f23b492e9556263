"""How experts are born: the bytes of each expert stack, computed one source tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, TensorSpec, raw_bytes

BIRTHS = ("copy", "noise", "drop-upcycle")
NOISE = 0.01
DROPPED = 0.5
ROUTER_STD = 0.02


def generator(seed: int, *key: object) -> torch.Generator:
    """Return a generator that depends on the seed and a name only, whatever was drawn before."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


@dataclass(frozen=True)
class Copied:
    """A tensor carried over, cast if the types differ."""

    source: TensorRef

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield from _cast(self.source, target.dtype)


@dataclass(frozen=True)
class Stacked:
    """An expert stack: for each expert its source tensors, joined along the first axis.

    `transposed` marks sources stored [in, out]. `neurons` is the axis, in [out, in], that counts intermediate
    neurons, and `halves` is 2 where one source holds gate and up: each matrix is changed on its own.
    `layer` names the feed-forward.
    """

    experts: tuple[tuple[TensorRef, ...], ...]
    layer: str
    neurons: int
    halves: int = 1
    transposed: bool = False
    birth: str = "copy"
    seed: int = 0

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes, expert by expert."""
        for expert, parts in enumerate(self.experts):
            for part in parts:
                changed = self.birth != "copy" or self.transposed
                if changed and len(part.spec.shape) == 2:
                    yield raw_bytes(self._born(part, expert).to(DTYPES[target.dtype]))
                else:
                    yield from _cast(part, target.dtype)

    def _born(self, part: TensorRef, expert: int) -> torch.Tensor:
        weight = part.load().t() if self.transposed else part.load()
        if self.birth == "copy":
            return weight
        weight = weight.to(torch.float32)
        draw = generator(self.seed, self.birth, self.layer, part.spec.name, expert)
        for matrix in weight.chunk(self.halves):
            if self.birth == "noise":
                matrix.add_(torch.randn(matrix.shape, generator=draw), alpha=NOISE * float(matrix.std()))
            else:
                self._drop(matrix, expert, draw)
        return weight

    def _drop(self, matrix: torch.Tensor, expert: int, draw: torch.Generator) -> None:
        """Redraw half of the neurons, the same ones in all matrices of the expert (arXiv 2502.19261)."""
        width = matrix.shape[self.neurons]
        chosen = torch.randperm(width, generator=generator(self.seed, "neurons", self.layer, expert))
        chosen = chosen[: round(DROPPED * width)]
        replaced = matrix.index_select(self.neurons, chosen)
        fresh = torch.randn(replaced.shape, generator=draw) * replaced.std() + replaced.mean()
        matrix.index_copy_(self.neurons, chosen, fresh)


@dataclass(frozen=True)
class Drawn:
    """A new tensor: normal with a standard deviation, or zeros where it is 0, or uniform within +- `bound`."""

    std: float
    key: str
    seed: int
    bound: float = 0.0

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        draw = generator(self.seed, self.key)
        if self.bound:
            tensor = (torch.rand(target.shape, generator=draw) * 2 - 1) * self.bound
        else:
            tensor = torch.randn(target.shape, generator=draw) * self.std
        yield raw_bytes(tensor.to(DTYPES[target.dtype]))


class Recipe(Protocol):
    """Where the bytes of a target tensor come from."""

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        ...


def _cast(source: TensorRef, dtype: str) -> Iterator[memoryview]:
    """Yield a tensor's bytes in another type, piece by piece; only floating-point types change."""
    if source.spec.dtype == dtype:
        yield from source.chunks()
        return
    for chunk in source.chunks():
        yield raw_bytes(torch.frombuffer(chunk, dtype=DTYPES[source.spec.dtype]).to(DTYPES[dtype]))
