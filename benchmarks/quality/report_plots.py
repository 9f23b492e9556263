"""The report's plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from runs import ArmRuns

COLOURS = {
    "dense": "#333333",
    "moe": "#d1495b",
    "uniform": "#999999",
    "frozen": "#c9a227",
    "sequence": "#00798c",
    "token": "#30638e",
    "task": "#6a994e",
}


def draw_accuracy(studies: Sequence[tuple[str, Sequence[ArmRuns], Any]], path: Path) -> None:
    """Draw test accuracy beside FLOPs per row, an arm per line; bars are one standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = max(len(found) for _, found, _ in studies)
    figure, axes = plt.subplots(
        len(studies), 2, figsize=(9, 1.2 + 0.3 * lines * len(studies)), width_ratios=(3, 2), squeeze=False
    )
    for (scored, cost), (title, found, costs) in zip(axes, studies, strict=True):
        dense = [100 * r["test"] for runs in found if runs.arm.kind == "dense" for r in runs.results]
        if dense:
            scored.axvline(mean(dense), color=COLOURS["dense"], linewidth=0.8, linestyle=":")
        for line, runs in enumerate(found):
            accuracy = [100 * result["test"] for result in runs.results]
            colour, mark = COLOURS[runs.arm.kind], "s" if runs.arm.top_k == 4 else "o"
            scored.plot(accuracy, [line] * len(accuracy), ".", color=colour, alpha=0.4)
            error = stdev(accuracy) if len(accuracy) > 1 else None
            scored.errorbar(mean(accuracy), line, xerr=error, fmt=mark, color=colour, capsize=3, markersize=6)
            flops = costs.flops(runs.arm)
            if flops is not None:
                cost.barh(line, flops / 1e6, color=colour, height=0.6)
        names = [runs.arm.name for runs in found]
        scored.set(title=title, xlabel="test accuracy, % (small: seeds)", yticks=range(len(found)), yticklabels=names)
        cost.set(xlabel="MFLOPs per row", yticks=range(len(found)), yticklabels=[])
        for axis in (scored, cost):
            axis.set_ylim(len(found) - 0.4, -0.6)
            axis.grid(alpha=0.3)
            axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
