"""Dense checkpoints that become experts of low rank: what they share, and a truncated part of each one's difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.births import Recipe
from meo_hf.conversion.factorise import Factor, Factorised
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.errors import UsageError
from meo_hf.modeling.blocks_meo import Block
from meo_hf.modeling.merger_meo import bank_key

CENTERS = ("source", "mean")


@dataclass(frozen=True)
class Truncation:
    """How much of each expert is kept: a `rank`, or the smallest that keeps a share `energy` of what differs.

    `center` is what experts are differences to: their `mean`, or the `source`, the dense model that they come from.
    """

    rank: int | None = None
    energy: float | None = None
    center: str | None = None

    def __post_init__(self) -> None:
        if self.center is not None and not self:
            raise UsageError("--expert-center has no effect without --expert-rank or --expert-energy: leave it out")
        if self.rank is not None and self.energy is not None:
            raise UsageError("--expert-rank and --expert-energy both say how much is kept: give one")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise UsageError(f"--expert-rank {self.rank!r} is no whole number >= 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"--expert-energy {self.energy!r} is no share: give a number over 0, up to 1")
        if self.center not in (None, *CENTERS):
            raise UsageError(f"--expert-center {self.center!r} is unknown: give one of {', '.join(CENTERS)}")

    def __bool__(self) -> bool:
        return self.rank is not None or self.energy is not None

    def choose(self, experts: Factorised) -> None:
        """Set the rank of a linear map."""
        asked = experts.rank_for(self.energy) if self.energy is not None else self.rank or 1
        experts.rank = min(asked, experts.largest_rank)


@dataclass
class ExpertBank:
    """Linear maps of feed-forwards, by path, whose experts are factorised."""

    center: str
    maps: dict[str, Factorised] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Ranks by path."""
        return {path: one.rank for path, one in self.maps.items()}

    def recipes(self, block: Block) -> Iterator[tuple[str, Recipe]]:
        """Yield target name and recipe of a feed-forward's low-rank parts."""
        for name, path in block.paths.items():
            experts = self.maps[f"{block.path}.{path}"]
            for letter in "AB":
                yield f"{block.slot}.experts.low_rank.{bank_key(name)}.{letter}", Factor(experts, letter)


def expert_bank(
    blocks: Sequence[Block],
    source: dict[str, TensorRef],
    experts: Sequence[dict[str, TensorRef]],
    truncation: Truncation,
) -> ExpertBank:
    """Prepare checkpoints' feed-forwards, by live name, and choose their ranks; for an energy all weights are read."""
    bank = ExpertBank(truncation.center or "source")
    for block in blocks:
        for path in block.paths.values():
            name = f"{block.path}.{path}"
            transposed = isinstance(block.projection(path), Conv1D)
            refs = [expert[f"{name}.weight"] for expert in experts]
            rows, columns = refs[0].spec.shape
            shape = (len(refs), columns, rows) if transposed else (len(refs), rows, columns)
            center = _one(source[f"{name}.weight"], transposed) if bank.center == "source" else None
            bank.maps[name] = Factorised(name, shape, _all(refs, transposed), center)
            truncation.choose(bank.maps[name])
    return bank


def _one(ref: TensorRef, transposed: bool) -> Callable[[], Tensor]:
    return lambda: ref.load().t() if transposed else ref.load()


def _all(refs: list[TensorRef], transposed: bool) -> Callable[[], Tensor]:
    return lambda: torch.stack([_one(ref, transposed)().float() for ref in refs])
