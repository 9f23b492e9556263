"""Draw what the decoding benchmark timed."""

from __future__ import annotations

import statistics
from pathlib import Path

from meo_hf.benchmark.decode import Decoded
from meo_hf.benchmark.decode_variants import Method

_COLOURS: dict[Method, str] = {  # told apart with any colour vision
    "dense": "0.5",
    "meo (prompt)": "#0072B2",
    "meo (segment)": "#56B4E9",
    "moe": "#D55E00",
}


def plot_decode(decoded: Decoded, model: str, path: str | Path) -> None:
    """Draw time per token as bars, the lowest and highest round as whiskers; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    timings = decoded.timings
    medians = [1e3 * statistics.median(t.token) for t in timings]
    whiskers = [
        [middle - 1e3 * min(t.token) for middle, t in zip(medians, timings, strict=True)],
        [1e3 * max(t.token) - middle for middle, t in zip(medians, timings, strict=True)],
    ]
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(timings)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(
        [str(t.variant) for t in timings],
        medians,
        xerr=whiskers,
        color=[_COLOURS[t.variant.method] for t in timings],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    labels = [f"{middle:.2f} ms, {decoded.ratio(t):.2f} x" for middle, t in zip(medians, timings, strict=True)]
    axes.bar_label(bars, labels, padding=8, fontsize=9)
    axes.axvline(medians[0], color="0.2", linewidth=1, linestyle="--")
    axes.invert_yaxis()  # in the order of the table
    axes.set_xlim(0, 1.35 * max(max(t.token) for t in timings) * 1e3)
    axes.set_xlabel("ms per generated token (dashed: the dense model)")
    settings = decoded.settings
    axes.set_title(
        f"{model}\n{settings.num_experts} experts, {settings.dtype}, batch {settings.batch}, "
        f"{settings.new_tokens} tokens after {settings.prompt_tokens}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
