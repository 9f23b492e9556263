"""Draw what the prefill benchmark timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meo_hf.benchmark.decode_variants import Method
from meo_hf.benchmark.prefill import Prefilled
from meo_hf.benchmark.prefill_setup import PrefillSettings

_COLOURS: dict[Method, str] = {  # told apart with any colour vision
    "dense": "0.5",
    "meo": "#0072B2",
    "meo (prompt)": "#0072B2",
    "meo (segment)": "#56B4E9",
    "moe": "#D55E00",
}


def plot_prefill(settings: PrefillSettings, prefilled: Sequence[Prefilled], model: str, path: Path) -> None:
    """Draw time per pass as bars, a panel per size of text, the lowest and highest round as whiskers."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install meo_hf[plot]") from error

    most = max(len(one.timings) for one in prefilled)
    figure = Figure(figsize=(7, len(prefilled) * (1.0 + 0.4 * most) + 0.4), layout="constrained")
    for axes, one in zip(figure.subplots(len(prefilled), 1, squeeze=False)[:, 0], prefilled, strict=True):
        middles = [1e3 * timing.median for timing in one.timings]
        low = [middle - 1e3 * min(t.seconds) for middle, t in zip(middles, one.timings, strict=True)]
        high = [1e3 * max(t.seconds) - middle for middle, t in zip(middles, one.timings, strict=True)]
        bars = axes.barh(
            [str(timing.variant) for timing in one.timings],
            middles,
            xerr=[low, high],
            color=[_COLOURS[timing.variant.method] for timing in one.timings],
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        labels = [f"{middle:.2f} ms, {one.ratio(t):.2f} x" for middle, t in zip(middles, one.timings, strict=True)]
        axes.bar_label(bars, labels, padding=8, fontsize=9)
        axes.axvline(middles[0], color="0.2", linewidth=1, linestyle="--")
        axes.invert_yaxis()  # in the order of the table
        axes.set_xlim(0, 1.4 * max(map(sum, zip(middles, high, strict=True))))
        axes.set_title(str(one.text), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("ms per forward pass (dashed: the dense model)")
    figure.suptitle(f"{model}: {settings.num_experts} experts, {settings.dtype}", fontsize=11)
    figure.savefig(path, dpi=150, format="png")
