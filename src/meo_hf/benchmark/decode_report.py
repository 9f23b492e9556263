"""Show and write what the decoding benchmark timed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from meo_hf.benchmark.decode import Decoded, Timing, merging_steps
from meo_hf.benchmark.decode_variants import Models
from meo_hf.benchmark.machine import Machine


def decode_table(decoded: Decoded, machine: Machine) -> Table:
    """Show one row per variant: medians over rounds, and the lowest and highest round."""
    settings = decoded.settings
    title = (
        f"Decoding {settings.new_tokens} tokens after {settings.prompt_tokens}, batch {settings.batch}, "
        f"{settings.dtype}; {settings.num_experts} experts, {settings.rounds} round{'s' * (settings.rounds > 1)}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=machine.noise or None)
    table.add_column("variant", no_wrap=True)
    for name in ("top_k", "prefill\nms", "ms per\ntoken", "spread", "ratio\nto dense", "merged\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, timing in enumerate(decoded.timings):
        following = decoded.timings[number + 1 : number + 2]
        table.add_row(
            timing.variant.method,
            str(timing.variant.top_k or ""),
            f"{_median_ms(timing.prefill):.2f}",
            f"{_median_ms(timing.token):.2f}",
            f"{1e3 * min(timing.token):.2f}..{1e3 * max(timing.token):.2f}",
            f"{decoded.ratio(timing):.2f}",
            f"{timing.merged_bytes / 1e6:.1f}" if timing.merged_bytes else "",
            end_section=any(other.variant.method != timing.variant.method for other in following),
        )
    return table


def notes(decoded: Decoded, models: Models, machine: Machine, source: str) -> list[str]:
    """Say in lines below the table what its numbers depend on."""
    model = models.describe()
    segment = next(timing for timing in decoded.timings if timing.merge)
    merge = f"a step that merges takes {_median_ms(segment.merge):.2f} ms"
    steps = decoded.settings.new_tokens
    merged = sum(merging_steps(steps, decoded.settings.prompt_tokens, models.segment_length))
    counts = f"{model['parameters']:,} parameters, as MEO {model['parameters_meo']:,}"
    return [
        f"meo (segment): {merge}, counted once per {models.segment_length} tokens",
        f"steps that merged experts: meo (prompt) 0 of {steps}, meo (segment) {merged} of {steps}; the rest kept them",
        f"{source} ({model['class']}), {counts}; {machine}",
    ]


def write_results(decoded: Decoded, models: Models, machine: Machine, source: str, path: str | Path) -> None:
    """Write the command, settings, model, machine, and every round of every variant as JSON; times in ms."""
    results = {
        "command": decoded.settings.command(source),
        "settings": asdict(decoded.settings),
        "model": {"source": source, **models.describe(), "segment_length": models.segment_length},
        "machine": {**asdict(machine), "noisy": bool(machine.noise)},
        "checks_relative_rms": decoded.checks,
        "variants": [_as_json(decoded, timing) for timing in decoded.timings],
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _as_json(decoded: Decoded, timing: Timing) -> dict[str, Any]:
    return {
        "variant": timing.variant.method,
        "top_k": timing.variant.top_k,
        "prefill_ms": round(_median_ms(timing.prefill), 4),
        "ms_per_token": round(_median_ms(timing.token), 4),
        "ratio_to_dense": round(decoded.ratio(timing), 4),
        "merged_bytes": timing.merged_bytes,
        "rounds": {
            f"{name}_ms": [round(1e3 * seconds, 4) for seconds in getattr(timing, name)]
            for name in ("prefill", "token", "merge")
        },
    }


def _median_ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)
