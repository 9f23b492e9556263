"""What sections of the report share: tables, spreads, paired tests, and where a number was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

SIGNIFICANT = 0.05
NOT_TESTED = "one seed: not tested"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Return mean and standard deviation, the latter where there are several values."""
    text = f"{scale * mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {scale * stdev(values):.{digits}f}"


def setting_of(entries: Sequence[dict[str, Any]]) -> str:
    """Say where entries of a ledger were measured: every device and version that occurs."""
    seen = {f"{entry['device']}; {', '.join(f'{n} {v}' for n, v in entry['versions'].items())}" for entry in entries}
    return "; and ".join(sorted(seen))


@dataclass(frozen=True)
class Comparison:
    """A paired comparison: the difference of accuracies, its 95 % interval and its p value (None for one seed)."""

    difference: float
    half_width: float | None
    p: float | None
    seeds: int

    @property
    def interval(self) -> str:
        """The interval, in points."""
        if self.half_width is None:
            return "-"
        return f"{100 * (self.difference - self.half_width):+.1f} to {100 * (self.difference + self.half_width):+.1f}"


def compare(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Comparison:
    """Compare two arms by which rows each got right, seed by seed on the same rows.

    The variance of the difference is that of the rows plus that of the seeds; a t test with the degrees of freedom of
    Welch and Satterthwaite.
    """
    differences = np.stack(first).astype(float) - np.stack(second).astype(float)  # [seeds, rows]
    seeds, rows = differences.shape
    difference = float(differences.mean())
    if seeds < 2:
        return Comparison(difference, None, None, seeds)
    of_rows = float(differences.mean(0).var(ddof=1)) / rows
    of_seeds = float(differences.mean(1).var(ddof=1)) / seeds
    variance = of_rows + of_seeds
    if variance == 0:
        return Comparison(difference, 0.0, 1.0 if difference == 0 else 0.0, seeds)
    freedom = variance**2 / (of_rows**2 / (rows - 1) + of_seeds**2 / (seeds - 1))
    error = math.sqrt(variance)
    p = 2 * float(stats.t.sf(abs(difference) / error, freedom))
    return Comparison(difference, float(stats.t.ppf(0.975, freedom)) * error, p, seeds)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Return p values that hold for all comparisons together (Holm); None stays None."""
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected


def verdict(comparison: Comparison, p: float | None) -> str:
    """Say what a comparison shows."""
    if p is None:
        return NOT_TESTED
    if p >= SIGNIFICANT:
        return "within noise"
    return "better" if comparison.difference > 0 else "worse"


def p_text(p: float | None) -> str:
    """Return a p value as text."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_words(p: float) -> str:
    """Return a p value with its sign of comparison."""
    return p_text(p) if p < 0.001 else f"= {p_text(p)}"
