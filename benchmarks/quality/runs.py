"""Runs of one study, read from a ledger: which rate an arm chose, and its seeds at that rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from arms import Arm
from training import unpacked

Entry = dict[str, Any]


@dataclass(frozen=True)
class ArmRuns:
    """An arm's runs at its chosen rate, by seed."""

    arm: Arm
    rate: float
    rates: tuple[float, ...]
    runs: dict[int, Entry]

    @property
    def done(self) -> int:
        """Runs of the sweep and of further seeds."""
        return len(self.rates) + len(self.runs) - 1

    @property
    def rate_text(self) -> str:
        """The rate, marked where it is at the edge of the sweep."""
        return f"{self.rate:g}" + ("*" if self.rate in (min(self.rates), max(self.rates)) else "")

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results, in the order of seeds."""
        return [self.runs[seed]["result"] for seed in sorted(self.runs)]

    def right(self, seeds: Sequence[int]) -> list[np.ndarray]:
        """Which test rows were right, for each seed."""
        return [unpacked(r["right"], r["rows"]) for r in (self.runs[seed]["result"] for seed in seeds)]

    def mean(self, name: str) -> float | None:
        """Mean of a number over seeds, of a gate statistic where the name is one; None where there is none."""
        found = [result.get(name, result["gates"].get(name)) for result in self.results]
        return None if None in found else float(np.mean(found))


def by_study(entries: Sequence[Entry]) -> dict[tuple[Any, ...], list[Entry]]:
    """Sort entries by set, model, training rows and epochs, in the order of first appearance."""
    studies: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        key = entry["key"]
        studies.setdefault((key["set"], key["model"], key["rows"], key["epochs"]), []).append(entry)
    return studies


def arm_runs(entries: Sequence[Entry], arm: Arm, rates: int = 3) -> ArmRuns | None:
    """Return an arm's runs at the rate with the best dev accuracy; None before the sweep is complete."""
    wanted = {"adapter": None, **arm.key()}  # the key of an arm without an adapter does not name it
    own = [entry for entry in entries if {n: entry["key"].get(n) for n in wanted} == wanted]
    swept = [entry for entry in own if entry["key"]["seed"] == 0]
    if len(swept) < rates:
        return None
    best = min(swept, key=lambda entry: (-entry["result"]["dev"], entry["result"]["dev_loss"]))["key"]["rate"]
    rates_swept = tuple(entry["key"]["rate"] for entry in swept)
    return ArmRuns(arm, best, rates_swept, {e["key"]["seed"]: e for e in own if e["key"]["rate"] == best})
