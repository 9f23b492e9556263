"""Draw what a comparison measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meo_hf.benchmark.compare import Comparison, Row
from meo_hf.benchmark.compare_report import layer_values, row_values

_COLOURS = {  # told apart with any colour vision
    "source": "0.3", "uniform average": "#56B4E9", "output": "#E69F00", "top-k": "#D55E00", "also": "#009E73",
}  # fmt: skip
_MEO = ("#0072B2", "#CC79A7", "0.6", "#004D40")


def plot_compare(result: Comparison, title: str, path: str | Path) -> None:
    """Draw perplexity against decoding time, one point per variant, and the error of each block that merges.

    Needs matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    figure = Figure(figsize=(11, 1.5 + max(2.7, 0.25 * len(result.rows))), layout="constrained")
    if result.merging:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_layers(right, result)
    else:
        left = figure.subplots()
    _draw_variants(left, result)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150, format="png")


def _draw_variants(axes: Any, result: Comparison) -> None:
    points = sorted(((row, row_values(row)) for row in result.rows), key=lambda point: point[1]["perplexity"])
    times = [values["decode_ratio"] for _, values in points]
    heights = [values["perplexity"] for _, values in points]
    colours = [_colour(result, row) for row, _ in points]
    axes.scatter(times, heights, s=50, c=colours, zorder=3)
    if heights[-1] > 3 * heights[0]:
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.08, 0.08)
    places = axes.transAxes.inverted().transform(axes.transData.transform(list(zip(times, heights, strict=True))))
    apart = _apart(places[:, 1], 0.9 / len(points))
    for (row, _), x, y, place, colour in zip(points, times, heights, apart, colours, strict=True):
        axes.annotate(
            f"{row.name}, {y:,.1f}",
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    axes.set_xlabel("time per decoded token, relative to the source")
    axes.set_ylabel("perplexity")
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)


def _colour(result: Comparison, row: Row) -> str:
    names = [merging.name for merging in result.merging]
    return _MEO[names.index(row.name) % len(_MEO)] if row.kind == "MEO" else _COLOURS[row.kind]


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending places in [0, 1] so far apart that their labels do not overlap."""
    raised, lowered = _raised(places, gap), _raised([1 - place for place in reversed(places)], gap)
    return [(up + 1 - down) / 2 for up, down in zip(raised, reversed(lowered), strict=True)]


def _raised(places: Sequence[float], gap: float) -> list[float]:
    raised: list[float] = []
    for number, place in enumerate(places):
        highest = 1 - gap * (len(places) - 1 - number)
        raised.append(min(max(place, raised[-1] + gap if raised else 0), highest))
    return raised


def _draw_layers(axes: Any, result: Comparison) -> None:
    paths = sorted({layer.path for layer in result.layers}, key=_number)  # MEO models may merge other layers each
    width = 0.8 / len(result.merging)
    for at, merging in enumerate(result.merging):
        places = [paths.index(layer.path) + (at - (len(result.merging) - 1) / 2) * width for layer in merging.layers]
        errors = [layer_values(layer)["relative_rms_error"] for layer in merging.layers]
        axes.bar(places, errors, width, color=_MEO[at % len(_MEO)], label=merging.name)
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    step = -(-len(paths) // 16)  # names of more blocks would overlap
    ticks = range(0, len(paths), step)
    axes.set_xticks(list(ticks), [str(_number(paths[tick])) for tick in ticks])
    if len(result.merging) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("layer (dashed: a block of zeros)")
    axes.set_ylabel("relative RMS error of MEO's block")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.93")
    axes.spines[["top", "right"]].set_visible(False)


def _number(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())
