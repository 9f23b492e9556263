"""Draw what a comparison measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meo_hf.benchmark.compare import Comparison
from meo_hf.benchmark.compare_report import layer_values, row_values

_COLOURS = {"source": "0.3", "MEO": "#0072B2", "uniform average": "#56B4E9"}  # told apart with any colour vision
_TOP_K, _ALSO = "#D55E00", "#009E73"


def plot_compare(result: Comparison, title: str, path: str | Path) -> None:
    """Draw perplexity against decoding time, one point per variant, and each block's error; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    figure = Figure(figsize=(11, 1.5 + max(2.7, 0.25 * len(result.rows))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_variants(left, result)
    _draw_layers(right, result)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150, format="png")


def _draw_variants(axes: Any, result: Comparison) -> None:
    points = sorted(((row.name, row_values(row)) for row in result.rows), key=lambda point: point[1]["perplexity"])
    times = [values["decode_ratio"] for _, values in points]
    heights = [values["perplexity"] for _, values in points]
    axes.scatter(times, heights, s=50, c=[_colour(name) for name, _ in points], zorder=3)
    if heights[-1] > 3 * heights[0]:
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(0.08, 0.08)
    places = axes.transAxes.inverted().transform(axes.transData.transform(list(zip(times, heights, strict=True))))
    for (name, _), x, y, place in zip(points, times, heights, _apart(places[:, 1], 0.9 / len(points)), strict=True):
        axes.annotate(
            f"{name}, {y:,.1f}",
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": _colour(name), "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    axes.set_xlabel("time per decoded token, relative to the source")
    axes.set_ylabel("perplexity")
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    return _COLOURS.get(name, _TOP_K if name.startswith("source") else _ALSO)


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
    layers = [layer_values(layer) for layer in result.layers]
    axes.bar(range(len(layers)), [values["relative_rms_error"] for values in layers], color=_COLOURS["MEO"])
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")
    step = -(-len(layers) // 16)  # names of more blocks would overlap
    ticks = range(0, len(layers), step)
    axes.set_xticks(list(ticks), [str(_number(layers[tick]["block"])) for tick in ticks])
    axes.set_xlabel("layer (dashed: a block of zeros)")
    axes.set_ylabel("relative RMS error of MEO's block")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.93")
    axes.spines[["top", "right"]].set_visible(False)


def _number(path: str) -> int:
    return next(int(part) for part in path.split(".") if part.isdigit())
