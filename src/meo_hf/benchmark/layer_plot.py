"""Draw what the layer benchmarks timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meo_hf.benchmark.layer_report import as_ms
from meo_hf.benchmark.layer_results import Row, Timed
from meo_hf.benchmark.layer_shapes import Cell, LayerSettings

_STYLES: dict[str, tuple[str, str]] = {  # told apart with any colour vision, and by their markers
    "dense": ("0.35", "o"),
    "moe eager": ("#E69F00", "v"),
    "moe batched_mm": ("#D55E00", "<"),
    "moe grouped_mm": ("#A3320B", "^"),
    "moe sonicmoe": ("#7A5C00", ">"),
    "moe deepgemm": ("#C4A000", "P"),
    "published": ("#CC79A7", "X"),
    "meo accumulate": ("#56B4E9", "s"),
    "meo product": ("#009E73", "D"),
    "meo fused": ("#66A61E", "p"),
    "meo combine": ("#7570B3", "h"),
    "meo": ("#0072B2", "*"),
}
_AXES = {"top_k": "selected experts (top_k)", "tokens": "tokens per row", "batch": "rows"}
_COLUMNS = 3


def plot_layers(settings: LayerSettings, cells: Sequence[Timed], title: str, path: str | Path) -> None:
    """Draw milliseconds by variant over the longest of the lists top_k, tokens and batch; needs matplotlib.

    Each other combination of options has a panel of its own. With no list longer than one, variants are bars.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    wanted = settings.cells()
    shown = [timed for timed in cells if timed.cell in wanted]
    over = max(_AXES, key=lambda name: len(getattr(settings, name)))
    if len(getattr(settings, over)) < 2:
        over = ""
    panels: dict[str, list[Timed]] = {}
    for timed in shown:
        panels.setdefault(_panel(timed.cell, over), []).append(timed)
    columns = max(1, min(_COLUMNS, len(panels)))
    lines = -(-len(panels) // columns)
    most = max((len(timed.rows) for timed in shown), default=1)
    height = 4.2 if over else 1.4 + 0.36 * most
    figure = Figure(figsize=(max(7.5, 5.6 * columns), height * max(1, lines) + 1.6), layout="constrained")
    grid = figure.subplots(max(1, lines), columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes, (name, members) in zip(grid.flat, panels.items(), strict=False):
        if over:
            _lines(axes, members, over, handles)
        else:
            _bars(axes, members[0])
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    if handles:
        names = [name for name in (*_STYLES, "floor (max)", "floor (sum)") if name in handles]
        figure.legend(
            [handles[name] for name in names], names, loc="outside lower center", ncols=5, fontsize=9, frameon=False
        )
    figure.savefig(path, dpi=150, format="png")


def _panel(cell: Cell, over: str) -> str:
    parts = {
        "batch": f"batch {cell.batch}",
        "tokens": f"{cell.tokens} tokens",
        "top_k": f"top_k {cell.top_k} of {cell.shape.experts}",
    }
    kept = ", ".join(text for name, text in parts.items() if name != over)
    return f"{cell.shape.name}, {cell.level}, {cell.dtype}\n{kept}"


def _lines(axes: Any, members: list[Timed], over: str, handles: dict[str, Any]) -> None:
    """Draw a line per variant; a variant that was left out somewhere has a gap no line crosses."""
    members = sorted(members, key=lambda timed: getattr(timed.cell, over))
    ticks = [getattr(timed.cell, over) for timed in members]
    for name, (colour, marker) in _STYLES.items():
        heights = [_ms_of(timed.rows, name) for timed in members]
        if any(height == height for height in heights):  # not all are NaN
            width, size = (2.2, 9) if name == "meo" else (1.4, 5)
            (handles[name],) = axes.plot(
                ticks, heights, color=colour, marker=marker, markersize=size, linewidth=width, label=name
            )
    for name, style in (("floor (max)", "--"), ("floor (sum)", ":")):
        floors = [getattr(timed.floor, name[7:10], None) for timed in members]
        if None not in floors:
            (handles[name],) = axes.plot(ticks, [1e3 * (f or 0) for f in floors], style, color="0.5", linewidth=1.2)
    if max(ticks) >= 8 * min(ticks):
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(_AXES[over])
    axes.set_ylabel("ms")
    axes.grid(color="0.92")


def _bars(axes: Any, timed: Timed) -> None:
    """Draw a bar per variant, the lowest and highest round as whiskers."""
    rows = timed.rows
    medians = [1e3 * row.median for row in rows]
    whiskers = [
        [middle - 1e3 * min(row.seconds) for middle, row in zip(medians, rows, strict=True)],
        [1e3 * max(row.seconds) - middle for middle, row in zip(medians, rows, strict=True)],
    ]
    bars = axes.barh(
        [row.name for row in rows],
        medians,
        xerr=whiskers,
        color=[_STYLES.get(row.name, ("0.6", ""))[0] for row in rows],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    labels = [f"{as_ms(row.median)} ms, {timed.ratio(row):.2f} x" for row in rows]
    axes.bar_label(bars, labels, padding=8, fontsize=9)
    axes.axvline(medians[0], color="0.2", linewidth=1, linestyle="--")
    low, high = min(medians), max(1e3 * max(row.seconds) for row in rows)
    if timed.floor is not None:
        axes.axvline(1e3 * timed.floor.max, color="0.5", linewidth=1, linestyle=":")
        low = min(low, 1e3 * timed.floor.max)
    if high > 30 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 2, high * (2 * high / low) ** 0.7)  # room for labels
        axes.minorticks_off()
    else:
        axes.set_xlim(0, 1.45 * high)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.invert_yaxis()  # in the order of the table
    dotted = ", dotted: floor (max)" if timed.floor is not None else ""
    axes.set_xlabel(f"ms (dashed: the dense expert{dotted})")


def _ms_of(rows: Sequence[Row], name: str) -> float:
    return next((1e3 * row.median for row in rows if row.name == name), float("nan"))
