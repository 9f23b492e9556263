"""What the layer benchmarks found, and the file that keeps it: cells are written one by one, and found again later."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from meo_hf.benchmark.layer_shapes import Cell, LayerSettings
from meo_hf.benchmark.machine import Machine
from meo_hf.benchmark.rates import Floor, Peak
from meo_hf.errors import UsageError

MERGING = ("accumulate", "product", "fused")
"""Plans that merge weights; `combine` adds outputs instead."""


@dataclass
class Row:
    """One variant's timings: the seconds of a call in each round, and what it was found to do."""

    name: str
    seconds: list[float] = field(default_factory=list)
    calls: int = 1
    """calls per round"""
    plans: tuple[str, ...] = ()
    """what its two projections ran"""
    graph: bool = False
    saved_bytes: int | None = None
    """kept for backward, parameters left out"""
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)


@dataclass
class Timed:
    """A cell's rows, the dense expert's first; what checks found, and what could not be timed."""

    cell: Cell
    rows: list[Row]
    checks: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    peak: Peak | None = None
    floor: Floor | None = None
    load_average: float | None = None
    noisy: bool = False

    def ratio(self, row: Row) -> float:
        """Return the median of the rounds' ratios to the dense expert; a slow variant has fewer rounds."""
        return statistics.median(mine / its for mine, its in zip(row.seconds, self.rows[0].seconds, strict=False))

    def as_json(self) -> dict[str, Any]:
        """Return the cell as JSON can hold it; times in ms."""
        return {
            "cell": self.cell.key(),
            "rows": [self._row(row) for row in self.rows],
            "checks_relative_rms": self.checks,
            "notes": self.notes,
            "peak_per_second": None if self.peak is None else asdict(self.peak),
            "floor_seconds": None if self.floor is None else asdict(self.floor),
            "load_average": self.load_average,
            "noisy": self.noisy,
        }

    def _row(self, row: Row) -> dict[str, Any]:
        found = asdict(row)
        seconds = found.pop("seconds")
        return {
            "variant": found.pop("name"),
            "ms": round(1e3 * row.median, 6),
            "ratio_to_dense": round(self.ratio(row), 4),
            **found,
            "rounds_ms": [round(1e3 * s, 6) for s in seconds],
        }

    @classmethod
    def of(cls, found: dict[str, Any]) -> Timed:
        """Return what `as_json` described."""
        rows = [
            Row(
                row["variant"],
                [ms / 1e3 for ms in row["rounds_ms"]],
                row["calls"],
                tuple(row["plans"]),
                row["graph"],
                row["saved_bytes"],
                row["peak_bytes"],
            )
            for row in found["rows"]
        ]
        peak, floor = found["peak_per_second"], found["floor_seconds"]
        return cls(
            Cell.of(found["cell"]),
            rows,
            found["checks_relative_rms"],
            found["notes"],
            None if peak is None else Peak(**peak),
            None if floor is None else Floor(**floor),
            found["load_average"],
            found["noisy"],
        )


class Results:
    """Timed cells of one machine, in memory and, with a path, in a JSON file that is whole at any time."""

    def __init__(self, benchmark: str, settings: LayerSettings, machine: Machine, path: Path | None = None) -> None:
        """Read the cells that a file holds. Raises UsageError if they do not belong to this run's."""
        self.machine, self.path = machine, path
        self.about: dict[str, Any] = {
            "benchmark": benchmark,
            "settings": settings.lasting(),
            "machine": {
                "device": machine.device,
                "cpus": machine.cpus,
                "threads": machine.threads,
                "versions": {**machine.versions, **_triton()},
            },
        }
        self.command = settings.command(benchmark)
        self.cells: list[Timed] = [] if path is None or not path.exists() else self._read(path)

    def __contains__(self, cell: Cell) -> bool:
        return any(timed.cell.key() == cell.key() for timed in self.cells)

    def add(self, timed: Timed) -> None:
        """Keep a cell, and write the file anew beside the old one before taking its place."""
        timed.load_average, timed.noisy = self.machine.load_average, bool(self.machine.noise)
        self.cells.append(timed)
        if self.path is None:
            return
        found = {"command": self.command, **self.about, "cells": [timed.as_json() for timed in self.cells]}
        beside = self.path.with_name(f"{self.path.name}.tmp")
        beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)

    def _read(self, path: Path) -> list[Timed]:
        try:
            found = json.loads(path.read_text("utf-8"))
            cells = [Timed.of(cell) for cell in found["cells"]]
            theirs = {name: found[name] for name in self.about}
            theirs |= {name: dict(theirs[name]) for name in ("settings", "machine")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path} holds no timings of this benchmark: give another file to --json") from None
        for what, ours in (("", self.about), ("settings", self.about["settings"]), ("machine", self.about["machine"])):
            given = theirs[what] if what else theirs
            for name in ours:
                if name not in ("settings", "machine") and given.get(name) != ours[name]:
                    raise UsageError(
                        f"{path} cannot be continued: its {name} is {_said(given.get(name))}, here "
                        f"{_said(ours[name])}; give another file to --json"
                    )
        return cells


def _said(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _triton() -> dict[str, str]:
    try:
        return {"triton": version("triton")}
    except PackageNotFoundError:
        return {}
