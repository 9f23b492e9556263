"""How many experts each block keeps: a count or a share, the same in every block or shared out over all of them.

Legend: E experts of a block, B blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meo_hf.errors import UsageError

BUDGETS = ("uniform", "global")


@dataclass(frozen=True)
class Limits:
    """What a block allows: its experts, the fewest that its router can choose from, and how many groups it has."""

    experts: int
    least: int = 1
    groups: int = 1

    def group_of(self, expert: int) -> int:
        """Return the group that an expert is in."""
        return expert // (self.experts // self.groups)


def parse_keep(text: str, experts: int) -> int:
    """Return the number of experts that `--keep` means: `6` is a count, `0.75` a share, so `1` and `1.0` differ.

    A share is rounded to the nearest number. Raises UsageError for anything else, or for too few or too many.
    """
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        raise UsageError(f"--keep {text!r} is not understood: give a count like 6, or a share like 0.75") from None
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise UsageError(f"--keep {text} is a share (it has a decimal point): give one above 0.0, up to 1.0")
        return max(1, int(value * experts + 0.5))
    if not 1 <= value <= experts:
        raise UsageError(f"--keep {text} is a count: give one from 1 to {experts}, or a share like 0.75")
    return value


def uniform_counts(text: str, limits: Mapping[str, Limits]) -> dict[str, int]:
    """Return the number of experts to keep in each block; raises UsageError for a number that a router cannot take."""
    counts = {path: parse_keep(text, one.experts) for path, one in limits.items()}
    for path, count in counts.items():
        check_count(path, count, limits[path])
    return counts


def check_count(path: str, count: int, limits: Limits) -> None:
    """Raise UsageError for a number of experts that the router of a block cannot take."""
    if count < limits.least and limits.groups > 1:
        raise UsageError(
            f"{path} would keep {count} of {limits.experts} experts, but its router chooses among {limits.groups} "
            f"groups and needs {limits.least // limits.groups} in each: keep at least {limits.least}"
        )
    if count < limits.least:
        raise UsageError(
            f"{path} would keep {count} of {limits.experts} experts, but its router selects {limits.least} for each "
            "token: keep more, or lower --top-k too"
        )
    if count % limits.groups:
        down = count - count % limits.groups
        near = " or ".join(str(one) for one in (down, down + limits.groups) if limits.least <= one <= limits.experts)
        raise UsageError(
            f"the router of {path} chooses among {limits.groups} groups of experts, which must stay equally large: "
            f"keep {near} experts, not {count}"
        )


def global_counts(text: str, scores: Mapping[str, Sequence[float]], limits: Mapping[str, Limits]) -> dict[str, int]:
    """Share `--keep` x B experts out: the lowest scores go first, each block's divided by its largest.

    No block falls below what its router selects; blocks with groups lose one expert of each group at a time. Raises
    UsageError for fewer than routers select.
    """
    total = sum(parse_keep(text, one.experts) for one in limits.values())
    if total < (least := sum(one.least for one in limits.values())):
        raise UsageError(
            f"--keep {text} leaves {total} experts to {len(limits)} blocks, but their routers need {least}: keep more, "
            "or lower --top-k too"
        )
    counts = {path: one.experts for path, one in limits.items()}
    steps = sorted(
        (sum(part) / len(part), path, at)
        for path, own in scores.items()
        for at, part in enumerate(_losses(own, limits[path]))
    )
    for _, path, _ in steps:
        room = limits[path].groups
        if sum(counts.values()) - room >= total and counts[path] - room >= limits[path].least:
            counts[path] -= room
    return counts


def _losses(scores: Sequence[float], limits: Limits) -> list[list[float]]:
    """Return what each step down costs: the scores of the next expert of every group, in shares of the largest."""
    top = max((abs(score) for score in scores), default=0.0) or 1.0
    ordered: list[list[float]] = [[] for _ in range(limits.groups)]
    for expert, score in enumerate(scores):
        ordered[limits.group_of(expert)].append(score / top)
    return [list(step) for step in zip(*map(sorted, ordered), strict=True)]


def highest(scores: Sequence[float], count: int, limits: Limits) -> list[int]:
    """Return the experts with the highest scores, equally many of each group; of equal ones the first, in order."""
    each = count // limits.groups
    kept: list[int] = []
    for group in range(limits.groups):
        own = [expert for expert in range(limits.experts) if limits.group_of(expert) == group]
        kept += sorted(own, key=lambda expert: (-scores[expert], expert))[:each]
    return sorted(kept)
