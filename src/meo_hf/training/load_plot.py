"""Draw how much each expert of each layer was used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

Shares = Mapping[str, Sequence[float]]


def plot_load(whole: Shares, last: Shares, path: str | Path) -> None:
    """Draw layer x expert heat maps of the experts' shares, of a whole run and of its end, as PNG; needs matplotlib.

    White is an even share, blue less, red more; experts that nobody selected are marked.
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    experts = max(len(shares) for shares in whole.values())
    cell = 0.42 if experts <= 16 else 0.14
    figure = Figure(figsize=(5.5 + 2 * experts * cell, 1.9 + 0.34 * len(whole)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    grids = [
        [[x * len(shares[layer]) for x in shares[layer]] + [nan] * (experts - len(shares[layer])) for layer in whole]
        for shares in (whole, last)
    ]
    norm = TwoSlopeNorm(1, 0, max(2, *(x for grid in grids for row in grid for x in row if x == x)))
    image: Any = None
    for axes, title, rows in zip(panels, ("whole run", "since the last log"), grids, strict=True):
        image = axes.imshow(rows, aspect="auto", cmap="RdBu_r", norm=norm)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value == 0:
                    axes.text(x, y, "dead" if experts <= 16 else "x", ha="center", va="center", fontsize=6, color="w")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("expert")
        axes.set_xticks(range(0, experts, 1 if experts <= 16 else 8))
    panels[0].set_yticks(range(len(whole)), [_short(layer) for layer in whole], fontsize=8)
    figure.colorbar(image, ax=list(panels), label="load, 1 = even share")
    figure.savefig(path, dpi=150, format="png")


def _short(layer: str) -> str:
    """Leave out of a module's path what all layers share: numbers tell them apart."""
    parts = layer.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    kept = [*parts[max(first - 1, 0) : first + 1], *(part for part in parts[first + 1 :] if part.endswith("_proj"))]
    stack = [part for part in parts[:first] if part in ("encoder", "decoder")][:1] if first else []
    return " ".join([*(s for s in stack if s not in kept), *kept]) or layer
