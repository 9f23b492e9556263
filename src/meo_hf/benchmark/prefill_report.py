"""Show and write what the prefill benchmark timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from meo_hf.benchmark.decode_variants import Models
from meo_hf.benchmark.machine import Machine
from meo_hf.benchmark.prefill import Prefilled, Timing
from meo_hf.benchmark.prefill_setup import PrefillSettings, is_decoder


def prefill_table(settings: PrefillSettings, prefilled: Prefilled, machine: Machine) -> Table:
    """Show one row per variant: medians over rounds, the lowest and highest round, and what merged."""
    title = (
        f"One forward pass, {prefilled.text}, {settings.dtype}; {settings.num_experts} experts, {settings.rounds} "
        f"round{'s' * (settings.rounds > 1)}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=machine.noise or None)
    table.add_column("variant", no_wrap=True)
    for name in ("top_k", "ms", "spread", "ratio\nto dense", "merged\nmaps"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plans")
    for number, timing in enumerate(prefilled.timings):
        following = prefilled.timings[number + 1 : number + 2]
        table.add_row(
            timing.variant.method,
            str(timing.variant.top_k or ""),
            f"{1e3 * timing.median:.2f}",
            f"{1e3 * min(timing.seconds):.2f}..{1e3 * max(timing.seconds):.2f}",
            f"{prefilled.ratio(timing):.2f}",
            f"{timing.merged} of {timing.plans.total()}" if timing.plans else "",
            ", ".join(f"{plan} {count}" for plan, count in sorted(timing.plans.items())),
            end_section=any(other.variant.method != timing.variant.method for other in following),
        )
    return table


def notes(prefilled: Sequence[Prefilled], models: Models, machine: Machine, source: str) -> list[str]:
    """Say in lines below the tables what their numbers depend on."""
    model = models.describe()
    counts = f"{model['parameters']:,} parameters, as MEO {model['parameters_meo']:,}"
    plans = [timing for one in prefilled for timing in one.timings if timing.variant.method.startswith("meo")]
    merged, ran = sum(timing.merged for timing in plans), sum(timing.plans.total() for timing in plans)
    lines = [f"meo: {merged} of {ran} linear maps merged weights ({100 * merged / ran:.0f} %)"] if ran else []
    if is_decoder(models):
        lines.append(
            f"meo (prompt): the first half of a text is its prompt; segments have {models.segment_length} tokens"
        )
    return [*lines, f"{source} ({model['class']}), {counts}; {machine}"]


def write_results(
    settings: PrefillSettings,
    prefilled: Sequence[Prefilled],
    models: Models,
    machine: Machine,
    source: list[str],
    path: Path,
) -> None:
    """Write the command, settings, model, machine, and every round of every variant as JSON; times in ms.

    The file is written beside its place first, so that it is whole at any time.
    """
    results = {
        "command": settings.command(source),
        "settings": asdict(settings),
        "model": {"source": source[-1], **models.describe()},
        "machine": {**asdict(machine), "noisy": bool(machine.noise)},
        "texts": [_as_json(one) for one in prefilled],
    }
    if is_decoder(models):
        results["model"]["segment_length"] = models.segment_length  # type: ignore[index]
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def _as_json(prefilled: Prefilled) -> dict[str, Any]:
    return {
        **prefilled.text._asdict(),
        "checks_relative_rms": prefilled.checks,
        "variants": [_timing(prefilled, timing) for timing in prefilled.timings],
    }


def _timing(prefilled: Prefilled, timing: Timing) -> dict[str, Any]:
    return {
        "variant": timing.variant.method,
        "top_k": timing.variant.top_k,
        "ms": round(1e3 * timing.median, 4),
        "ratio_to_dense": round(prefilled.ratio(timing), 4),
        "plans": dict(timing.plans),
        "merged_share": timing.merged / timing.plans.total() if timing.plans else None,
        "passes_per_round": timing.calls,
        "rounds_ms": [round(1e3 * seconds, 4) for seconds in timing.seconds],
    }
