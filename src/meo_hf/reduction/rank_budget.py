"""How a budget of parameters becomes ranks and columns of a linear map's experts.

Legend: E experts, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meo_hf.errors import UsageError


@dataclass(frozen=True)
class MapBudget:
    """The ranks and columns that all experts of a linear map have together, and the most that one may have."""

    ranks: int
    columns: int
    largest_rank: int
    largest_columns: int


def map_budget(path: str, shape: tuple[int, int, int], share: float, shares_weight: bool, columns: float) -> MapBudget:
    """Spend `share` of E * O * I parameters: O * I on a shared weight, `columns` of the rest on columns, else on ranks.

    A rank costs O + I, a column O. No expert gets a rank at which it would be larger than the whole expert. Raises
    UsageError for a budget that is not enough for one rank.
    """
    experts, outputs, inputs = shape
    left = int(share * experts * outputs * inputs) - outputs * inputs * shares_weight
    dense = int(columns * left) // outputs if left > 0 else 0
    ranks = (left - dense * outputs) // (outputs + inputs)
    if ranks < 1:
        why = "the mean alone takes one expert's: raise --share, or take --center none" if shares_weight else "raise it"
        raise UsageError(f"--share {share:g} leaves no rank to any of the {experts} experts of {path}; {why}")
    return MapBudget(ranks, dense, outputs * inputs // (outputs + inputs), inputs)


def smoothed(scores: Sequence[float]) -> list[float]:
    """Return shares of a budget: one half in equal parts, the other half in proportion to scores >= 0."""
    total = sum(scores)
    return [0.5 / len(scores) + 0.5 * score / total if total > 0 else 1 / len(scores) for score in scores]


def apportion(total: int, shares: Sequence[float], most: int) -> list[int]:
    """Divide a whole number by shares > 0, by largest remainders; what goes beyond `most` goes to the others."""
    found, left = [0] * len(shares), total
    free = list(range(len(shares)))
    while free:
        weight = sum(shares[at] for at in free)
        ideal = {at: left * shares[at] / weight for at in free}
        full = [at for at in free if ideal[at] >= most]
        if not full:
            break
        for at in full:
            found[at], left = most, left - most
        free = [at for at in free if at not in full]
    if not free:
        return found
    for at in free:
        found[at] = int(ideal[at])
    rest = left - sum(found[at] for at in free)
    for at in sorted(free, key=lambda at: (int(ideal[at]) - ideal[at], at))[:rest]:
        found[at] += 1
    return found
