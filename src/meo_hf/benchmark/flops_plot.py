"""Draw the FLOPs figure of the MEO paper from counted points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from meo_hf.benchmark.flops import NUM_EXPERTS, SEQUENCE_LENGTH, SIZES, Method, PaperPoint

_COLOURS = {"small": "#0072B2", "base": "#D55E00", "large": "#009E73"}  # told apart with any colour vision
_STYLES: dict[Method, tuple[str, Literal["-", "-."], str]] = {
    "moe": ("MoE: m experts run", "-", "o"),
    "meo": ("MEO: m experts merged, one runs", "-.", "s"),
}


def plot_paper(points: Sequence[PaperPoint], path: str | Path) -> None:
    """Draw counts (merge charged m|W|) as lines and the published figure's values as markers; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for size, colour in _COLOURS.items():
        for method, (_, line, marker) in _STYLES.items():
            series = sorted((p for p in points if (p.size, p.method) == (size, method)), key=lambda p: p.top_k)
            selected = [p.top_k for p in series]
            axes.plot(selected, [p.count.total("mac") / 1e9 for p in series], line, color=colour, linewidth=1.6)
            axes.plot(
                selected, [p.figure / 1e9 for p in series], marker, color=colour, markersize=5, markerfacecolor="w"
            )

    ticks = sorted({p.top_k for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yscale("log")
    axes.set_yticks(yticks := [10, 30, 100, 300, 1000], [str(tick) for tick in yticks])
    axes.set_yticks([], minor=True)
    axes.set_xlabel("selected experts m")
    axes.set_ylabel("GFLOPs of one forward pass")
    axes.set_title(f"BERT with {NUM_EXPERTS} experts, {SEQUENCE_LENGTH} tokens, masked-LM head included", fontsize=11)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)

    sizes = [
        Line2D([], [], color=_COLOURS[size], linewidth=4, label=f"{size.title()} ({layers} layers, {hidden} features)")
        for size, (layers, hidden) in reversed(SIZES.items())
    ]
    methods = [
        Line2D([], [], color="0.3", linestyle=line, marker=marker, markersize=5, markerfacecolor="w", label=label)
        for label, line, marker in _STYLES.values()
    ]
    axes.legend(
        handles=[*sizes, *methods],
        title="lines: counted, markers: the paper's figure",
        fontsize=9,
        title_fontsize=9,
        alignment="left",
        edgecolor="w",
        framealpha=1,
    )
    figure.savefig(path, dpi=150)
