"""Experts as what they share, a low-rank part and a few columns of each: W_e = W_0 + B_e A_e + S_e.

Columns are exact, and the low-rank part is the best of its rank (Eckart and Young 1936) for all others: no other choice
has a smaller error with these columns. MC-SMoE (arXiv 2310.01334, step 5) instead decomposes first and trains both.

Legend: E experts, R all ranks together, C all columns together, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meo_hf.conversion.factorise import truncate


@dataclass(frozen=True)
class Decomposed:
    """Parts of experts: A [R, I], B [R, O], S [C, O] and the input [C] that each column reads."""

    A: Tensor
    B: Tensor
    S: Tensor
    index: Tensor


def decompose(
    experts: Tensor, shared: Tensor | None, ranks: Sequence[int], columns: Sequence[Sequence[int]]
) -> Decomposed:
    """Return the parts of experts [E, O, I], as differences to `shared` [O, I]; each has a rank and column numbers."""
    downs, ups, exact, index = [], [], [], []
    for expert, rank, own in zip(experts, ranks, columns, strict=True):
        rest = (expert if shared is None else expert - shared).clone()
        numbers = torch.tensor(list(own), dtype=torch.long)
        exact.append(rest[:, numbers].t())
        rest[:, numbers] = 0
        down, up, _ = truncate(rest, rank)
        down[:, numbers] = 0  # rounding may have left something
        downs.append(down)
        ups.append(up)
        index.append(numbers)
    return Decomposed(torch.cat(downs), torch.cat(ups), torch.cat(exact), torch.cat(index))


def composed(
    parts: Decomposed, shared: Tensor | None, ranks: Sequence[int], columns: Sequence[Sequence[int]]
) -> Tensor:
    """Multiply parts out [E, O, I], in float32."""
    made = []
    pieces = zip(
        parts.A.float().split(list(ranks)),
        parts.B.float().split(list(ranks)),
        parts.S.float().split([len(own) for own in columns]),
        parts.index.split([len(own) for own in columns]),
        strict=True,
    )
    for down, up, exact, index in pieces:
        whole = up.t() @ down
        whole.index_add_(1, index, exact.t())
        made.append(whole if shared is None else whole + shared)
    return torch.stack(made)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the relative Frobenius error of all experts together; 0 where there is nothing to miss."""
    norm = float(expected.double().square().sum())
    return (float((found.double() - expected.double()).square().sum()) / norm) ** 0.5 if norm else 0.0


def heaviest_columns(
    experts: Tensor, shared: Tensor | None, ranks: Sequence[int], counts: Sequence[int]
) -> list[list[int]]:
    """Return the columns of each expert in which its low-rank part alone misses most, in squares; of equal ones first.

    MC-SMoE ranks them by |s * gradient|; this reads weights alone, no text and no gradients.
    """
    found = []
    for expert, rank, count in zip(experts, ranks, counts, strict=True):
        rest = expert if shared is None else expert - shared
        down, up, _ = truncate(rest, rank)
        missed = (rest - up.t() @ down).double().square().sum(0)
        found.append(sorted(missed.sort(descending=True, stable=True).indices[:count].tolist()))
    return found
