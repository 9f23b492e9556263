"""Which experts of an MoE block to keep, by what the block then answers: NAEE (arXiv 2402.14800).

Without some experts a block's router gives token t gates g'_t where it gave g_t, so its answer changes by the sum over
experts e of (g' - g)_te F_te, where F_te [D] is what e answers to t. This needs each expert's answers once, not one run
of the block per subset.

Legend: E experts of a block, T tokens of a batch, D entries of an answer.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meo_hf.errors import CheckpointError, UsageError

ENUMERATED = 5000
"""The largest number of subsets that are all tried: any of up to 14 experts, or 4 of 16, but not 8 of 16."""

Kept = tuple[int, ...]


@dataclass
class OutputGrams:
    """What experts answer to tokens, batch by batch: inner products [T, E, E], or answers [T, E, D] where smaller."""

    batches: list[Tensor] = field(default_factory=list)

    def add(self, outputs: Tensor) -> None:
        """Keep a batch's answers [T, E, D], of all experts to all tokens, in float32 at least."""
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        experts, width = wide.shape[1:]
        # a square tensor is never answers: with E = D inner products are kept
        self.batches.append(wide @ wide.mT if experts <= width else wide)

    def squares(self, at: int, change: Tensor) -> Tensor:
        """Return squared norms [T] of a batch's answers, combined by factors [T, E]."""
        batch = self.batches[at]
        change = change.to(batch)[:, None]
        made = change @ batch
        square = (made * change if batch.shape[1] == batch.shape[2] else made.square()).sum((1, 2))
        return square.clamp(min=0)  # a Gram's rounding can make nothing a little less


def subset_loss(
    grams: OutputGrams,
    full_gates: Sequence[Tensor],
    new_gates: Sequence[Tensor],
    token_weight: Sequence[Tensor] | None = None,
) -> float:
    """Return how much a block's answers change: the sum over batches of the Frobenius norm over a batch's tokens.

    Gates are [T, E] per batch, zero for experts that are not selected; weights [T] leave out tokens with 0. NAEE adds
    norms of batches in float64 too; with one batch it is the norm over all tokens.
    """
    total = 0.0
    for at, (full, new) in enumerate(zip(full_gates, new_gates, strict=True)):
        squares = grams.squares(at, new.double() - full.double()).double()
        if token_weight is not None:
            squares = torch.where(token_weight[at] == 0, 0, squares * token_weight[at])
        total += math.sqrt(float(squares.sum()))
    return total


@dataclass(frozen=True)
class SubsetSearch:
    """The experts to keep, their loss, how they were found, and how many subsets were tried."""

    kept: Kept
    loss: float
    how: str
    evaluated: int


def search_subsets(
    experts: int,
    keep: int,
    loss: Callable[[Kept], float],
    width: int = 1,
    groups: Sequence[int] | None = None,
    limit: int = ENUMERATED,
) -> SubsetSearch:
    """Return the `keep` of E experts with the least loss: the least of all, or what a beam search finds.

    All subsets are tried where there are at most `limit`. Otherwise experts leave one by one, and the `width` best
    subsets of each size go on; that asks for the loss of each size. With `groups`, the router's group of each expert,
    each group keeps equally many in the end. Of equal losses the first subset in the order of numbers counts.
    """
    targets = _targets(experts, keep, groups)
    if width < 1:
        raise UsageError(f"a beam holds at least 1 subset, not {width}")
    of_group = list(groups or [0] * experts)
    sizes = Counter(of_group)
    count = math.prod(math.comb(sizes[group], target) for group, target in targets.items())
    if count <= limit:
        parts = [
            itertools.combinations([one for one in range(experts) if of_group[one] == group], target)
            for group, target in targets.items()
        ]
        ranked = _ranked((tuple(sorted(itertools.chain(*chosen))) for chosen in itertools.product(*parts)), loss)
        found, kept = ranked[0]
        return SubsetSearch(kept, found, f"enumerated {count} subset{'s' if count > 1 else ''}", count)
    beam: list[tuple[float, Kept]] = [(0.0, tuple(range(experts)))]
    evaluated = 0
    while len(beam[0][1]) > keep:
        smaller = set()
        for _, kept in beam:
            left = Counter(of_group[one] for one in kept)
            free = [one for one in kept if left[of_group[one]] > targets[of_group[one]]]
            smaller |= {tuple(other for other in kept if other != one) for one in free}
        evaluated += len(smaller)
        beam = _ranked(smaller, loss)[:width]
    found, kept = beam[0]
    return SubsetSearch(kept, found, f"beam search of width {width} over {evaluated} subsets", evaluated)


def _targets(experts: int, keep: int, groups: Sequence[int] | None) -> dict[int, int]:
    if not 1 <= keep <= experts:
        raise UsageError(f"a block of {experts} experts cannot keep {keep}: give 1 to {experts}")
    if groups is None:
        return {0: keep}
    if len(groups) != experts:
        raise UsageError(f"{len(groups)} group numbers were given for {experts} experts")
    sizes = Counter(groups)
    if keep % len(sizes) or keep // len(sizes) > min(sizes.values()):
        raise UsageError(
            f"the router chooses among {len(sizes)} groups of experts, which stay of one size, so {keep} cannot be "
            f"kept: give a multiple of {len(sizes)} up to {len(sizes) * min(sizes.values())}"
        )
    return {group: keep // len(sizes) for group in sorted(sizes)}


def _ranked(subsets: Iterable[Kept], loss: Callable[[Kept], float]) -> list[tuple[float, Kept]]:
    made = []
    for kept in sorted(subsets):
        value = float(loss(kept))
        if not math.isfinite(value):
            raise CheckpointError(f"without all but experts {list(kept)} the loss is {value}: check the checkpoint")
        made.append((value, kept))
    return sorted(made)
