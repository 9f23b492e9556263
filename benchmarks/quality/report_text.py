"""What the sections on language share: the runs of an arm at its chosen rate, paired tests of losses, and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from report_tools import compare, holm, p_text, spread, table, verdict

Entry = dict[str, Any]
Result = dict[str, Any]
COLOURS = {"dense": "#333333", "moe": "#d1495b", "meo": "#00798c", "control": "#999999"}


@dataclass(frozen=True)
class Chosen:
    """The runs of one arm at the rate that was best on validation data at the first seed: seed -> result."""

    name: str
    rate: float
    rates: tuple[float, ...]
    planned: int
    runs: dict[int, Result]

    @classmethod
    def of(
        cls, name: str, entries: Iterable[Entry], planned: Sequence[float], score: Callable[[Result], float]
    ) -> Chosen | None:
        """Choose among entries of an arm; None if it was not run."""
        own = list(entries)
        first = {entry["key"]["rate"]: entry["result"] for entry in own if entry["key"]["seed"] == 0}
        if not first:
            return None
        rate = min(first, key=lambda rate: score(first[rate]))
        runs = {entry["key"]["seed"]: entry["result"] for entry in own if entry["key"]["rate"] == rate}
        return cls(name, rate, tuple(sorted(first)), len(planned), runs)

    @property
    def rate_text(self) -> str:
        """The rate; * where it is the first or last that was tried, and how many of the planned were."""
        edge = "*" if self.rate in (self.rates[0], self.rates[-1]) else ""
        short = "" if len(self.rates) == self.planned else f" ({len(self.rates)} of {self.planned} tried)"
        return f"{self.rate:g}{edge}{short}"

    def values(self, name: str) -> list[float]:
        """What all seeds measured."""
        return [result[name] for _, result in sorted(self.runs.items()) if result.get(name) is not None]

    def spread(self, name: str, scale: float = 1, digits: int = 2) -> str:
        """Mean and standard deviation over seeds, - where it was not measured."""
        values = self.values(name)
        return spread(values, scale, digits) if values else "-"

    def mean(self, name: str) -> float | None:
        """Mean over seeds."""
        values = self.values(name)
        return mean(values) if values else None


@dataclass(frozen=True)
class Difference:
    """Two arms on the same windows and seeds: how much lower the first one's loss is, in nats per token."""

    first: Chosen
    second: Chosen
    gain: float
    half_width: float | None
    p: float | None
    verdict: str
    seeds: int

    @property
    def ratio(self) -> float:
        """Perplexity of the first relative to the second."""
        return math.exp(-self.gain)

    @property
    def interval(self) -> str:
        """The ratio's 95 % interval."""
        if self.half_width is None:
            return "-"
        return f"{math.exp(-self.gain - self.half_width):.3f} to {math.exp(-self.gain + self.half_width):.3f}"


def differences(pairs: Sequence[tuple[Chosen | None, Chosen | None]], name: str) -> list[Difference]:
    """Compare arms by their losses per window, `name` in their results; p values corrected together."""
    made = []
    for first, second in pairs:
        if first is None or second is None or not (seeds := sorted(set(first.runs) & set(second.runs))):
            continue
        mine, other = ([-np.array(arm.runs[seed][name]) for seed in seeds] for arm in (first, second))
        made.append((first, second, compare(mine, other)))
    corrected = holm([one.p for _, _, one in made])
    return [
        Difference(first, second, one.difference, one.half_width, p, verdict(one, p), one.seeds)
        for (first, second, one), p in zip(made, corrected, strict=True)
    ]


def difference_table(found: Sequence[Difference], flops: Callable[[Chosen], float | None]) -> str:
    """Return the table of ratios of perplexities and FLOPs."""
    rows = []
    for one in found:
        mine, other = flops(one.first), flops(one.second)
        cost = "-" if mine is None or other is None else f"{mine / other:.2f}"
        name = f"{one.first.name} / {one.second.name}"
        rows.append([name, f"{one.ratio:.3f}", one.interval, p_text(one.p), str(one.seeds), cost, one.verdict])
    return table(["perplexity, ratio", "mean", "95 % interval", "p (Holm)", "seeds", "FLOPs ratio", "shows"], rows)


def kind_of(name: str) -> str:
    """Return the kind of an arm, which gives its colour."""
    if any(word in name for word in ("uniform", "random", "averaged")):
        return "control"
    return "meo" if name.lower().startswith("meo") else "moe" if name.startswith(("moe", "source")) else "dense"


def draw(
    arms: Sequence[Chosen], name: str, cost: str, path: Path, title: str, label: str, logarithmic: bool = False
) -> None:
    """Draw a measure beside a cost in MFLOPs, an arm per line; bars are one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (scored, costs) = plt.subplots(1, 2, figsize=(9, 1.4 + 0.3 * len(arms)), width_ratios=(3, 2))
    for line, arm in enumerate(arms):
        values, colour = arm.values(name), COLOURS[kind_of(arm.name)]
        scored.plot(values, [line] * len(values), ".", color=colour, alpha=0.4)
        error = stdev(values) if len(values) > 1 else None
        scored.errorbar(mean(values), line, xerr=error, fmt="o", color=colour, capsize=3, markersize=6)
        flops = arm.mean(cost)
        if flops is not None:
            costs.barh(line, flops / 1e6, color=colour, height=0.6)
    if logarithmic:
        scored.set_xscale("log")
        for ticks in (scored.xaxis.set_major_formatter, scored.xaxis.set_minor_formatter):
            ticks("{x:.0f}")
    names = [arm.name for arm in arms]
    scored.set(title=title, xlabel=f"{label} (small: seeds)", yticks=range(len(arms)), yticklabels=names)
    costs.set(xlabel="MFLOPs", yticks=range(len(arms)), yticklabels=[])
    for axis in (scored, costs):
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
