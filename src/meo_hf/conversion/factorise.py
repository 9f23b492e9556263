"""Full experts as what they share plus truncated singular value decompositions: W_i = W_0 + B_i A_i.

W_0 is the experts' mean, or a dense weight that they come from. The best A_i and B_i of a rank (Eckart and Young 1936)
are found by the eigenvectors of the smaller Gram matrix of W_i - W_0, in float64. All experts of a map get one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import cast

import torch
from torch import Tensor

from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, TensorSpec, raw_bytes


@dataclass(frozen=True)
class Loss:
    """What a rank left out of the experts of a linear map.

    `kept` is the share of the squared differences between the experts and W_0 that B A holds, `error` the relative
    Frobenius error of the experts.
    """

    rank: int
    kept: float
    error: float


@dataclass
class Factorised:
    """The experts of one linear map; `load` reads them as [E, O, I], `center` W_0 as [O, I] (None: their mean)."""

    path: str
    shape: tuple[int, int, int]
    load: Callable[[], Tensor]
    center: Callable[[], Tensor] | None
    rank: int = 0
    loss: Loss | None = None
    _factors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @property
    def largest_rank(self) -> int:
        """The rank at which nothing is left out."""
        return min(self.shape[1:])

    def _shared(self, experts: Tensor) -> Tensor:
        """Return W_0 [O, I] of experts [E, O, I]."""
        return experts.mean(0) if self.center is None else self.center().float()

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps this share of the squared differences of all experts together."""
        values = torch.stack([torch.linalg.eigvalsh(_gram(each)) for each in self._differences()[1]])
        kept = values.clamp(min=0).sum(0).flip(0).cumsum(0)  # largest first
        total = kept[-1]
        return max(1, int((kept < energy * total).sum()) + 1) if total > 0 else 1

    def factor(self, letter: str) -> Tensor:
        """Return A [E, R, I] or B [E, R, O]; each is computed with the other, and given away once."""
        with self._lock:
            if letter not in self._factors:
                self._factors = self._solve()
            return self._factors.pop(letter)

    def error(self, factors: dict[str, Tensor], shared: torch.dtype) -> float:
        """Return the relative Frobenius error of all experts with other factors, and W_0 as kept in a type."""
        experts = self.load().float()
        product = factors["B"].float().transpose(1, 2) @ factors["A"].float()
        lost = experts - self._shared(experts).to(shared).float() - product
        norm = float(experts.double().square().sum())
        return (float(lost.double().square().sum()) / norm) ** 0.5 if norm else 0.0

    def best(self) -> Loss:
        """Return what the rank leaves out at least."""
        if self.loss is None:
            self._solve()
        return cast(Loss, self.loss)

    def _differences(self) -> tuple[float, Tensor]:
        """Return the squared norm of all experts, and each one's difference to W_0 [E, O, I]."""
        experts = self.load().float()
        norm = float(experts.double().square().sum())
        return norm, experts - self._shared(experts)

    def _solve(self) -> dict[str, Tensor]:
        norm, differences = self._differences()
        down, up, kept, total = [], [], 0.0, 0.0
        for each in differences:
            left, right, values = truncate(each, self.rank)
            kept += float(values[: self.rank].sum())
            total += float(values.sum())
            down.append(left)
            up.append(right)
        lost = max(total - kept, 0.0)
        self.loss = Loss(self.rank, kept / total if total else 1.0, (lost / norm) ** 0.5 if norm else 0.0)
        return {"A": torch.stack(down), "B": torch.stack(up)}


def truncate(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A [R, I] and B [R, O] of the best B^T A of a rank for x [O, I], and its squared singular values."""
    values, vectors = torch.linalg.eigh(_gram(x))
    top = vectors.flip(1)[:, :rank].float()
    wide = x.shape[0] >= x.shape[1]
    up = x @ top if wide else top
    return top.t() if wide else top.t() @ x, up.t(), values.flip(0).clamp(min=0)


def _gram(x: Tensor) -> Tensor:
    """Return the smaller of x^T x and x x^T, in float64."""
    x = x.double()
    return x.t() @ x if x.shape[0] >= x.shape[1] else x @ x.t()


@dataclass(frozen=True)
class Factor:
    """A target that is one factor, `A` [E, R, I] or `B` [E, R, O]."""

    experts: Factorised
    letter: str

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield raw_bytes(self.experts.factor(self.letter).to(DTYPES[target.dtype]))


@dataclass(frozen=True)
class Mean:
    """The mean of experts' tensors, part after part; each expert's parts are joined along the first axis."""

    experts: tuple[tuple[TensorRef, ...], ...]
    transposed: bool = False

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        for parts in zip(*self.experts, strict=True):
            mean = torch.stack([part.load().float() for part in parts]).mean(0)
            yield raw_bytes((mean.t() if self.transposed else mean).to(DTYPES[target.dtype]))
