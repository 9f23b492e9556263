"""Show and write what a comparison measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from meo_hf.benchmark.compare import Comparison, Layer, Row
from meo_hf.benchmark.machine import Machine


def compare_table(result: Comparison, machine: Machine) -> Table:
    """Show one row per variant."""
    tokens, settings = result.rows[0].quality.tokens, result.settings
    title = (
        f"{tokens:,} predicted tokens in {len(result.windows)} windows of {result.windows.shape[1]}, {settings.dtype}; "
        f"times at batch 1, {settings.rounds} round{'s' * (settings.rounds > 1)}"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=machine.noise or None)
    table.add_column("variant", no_wrap=True)
    memory = f"{memory_name(settings.device)}\nMB"
    names = ("per-\nplexity", "KL\nnats", "top-1\nagrees", "prefill\nms", "tokens\nper s", "ratio to\nsource")
    for name in (*names, "decode\nms", "ratio to\nsource", "MFLOPs\nper token", memory):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        values = row_values(row)
        table.add_row(
            row.name,
            f"{values['perplexity']:.2f}",
            f"{values['kl_nats']:.4f}",
            f"{values['top1_agreement']:.1%}",
            f"{values['prefill_ms']:.1f}",
            f"{values['prefill_tokens_per_s']:,.0f}",
            f"{values['prefill_ratio']:.2f}",
            f"{values['decode_ms_per_token']:.2f}",
            f"{values['decode_ratio']:.2f}",
            f"{row.flops / 1e6:,.2f}",
            f"{row.nbytes / 1e6:,.1f}",
        )
    return table


def layers_table(result: Comparison) -> Table:
    """Show one row per merged MoE block, and the mean of all."""
    title = "MEO's blocks on the states that the source's blocks read, and its gates"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("block", no_wrap=True)
    names = ("relative\nRMS error", "really\nmerged", "entropy\nnats", "of\nlog k", "from\nuniform")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for number, values in enumerate([*map(layer_values, result.layers), mean_layer(result.layers)]):
        relative = values["gate_entropy_relative"]
        table.add_row(
            values["block"],
            f"{values['relative_rms_error']:.3f}",
            f"{values['merged_share']:.0%}",
            f"{values['gate_entropy_nats']:.3f}",
            "" if relative is None else f"{relative:.0%}",
            f"{values['gate_distance_to_uniform']:.3f}",
            values["label"],
            end_section=number == len(result.layers) - 1,
        )
    return table


def notes(result: Comparison, machine: Machine, source: str) -> list[str]:
    """Say in lines below the tables what their numbers depend on."""
    window = result.windows.shape[1]
    prompt = result.rows[0].speed.prompt_tokens
    lines = [f"MEO's gates: {result.gates}"]
    if result.segment >= window:
        lines.append(f"a window of {window} is no longer than a segment: every gate has read one token only")
    lines.append(
        "uniform average: one expert per block, the mean of all, its output scaled by what MEO's gates summed to on "
        "average before they were normalised"
    )
    if result.settings.window > window:
        lines.append(f"windows have {window} tokens, not {result.settings.window}: more positions than a model has")
    lines += [f"no row '{name}': {reason}" for name, reason in result.skipped.items()]
    lines.append(
        f"prefill reads {prompt} tokens, decoding the next {window - prompt} one by one, where a step that merges "
        "counts by its share of a segment; each variant took turns with the source"
    )
    lines.append(memory_note(result.settings.device))
    lines.append(f"{source} ({result.model_class}, experts run as {result.experts_implementation}); {machine}")
    return lines


def memory_name(device: str) -> str:
    """Name what the memory column holds on a device."""
    return "peak" if device.startswith("cuda") else "weights"


def memory_note(device: str) -> str:
    """Explain the memory column."""
    if device.startswith("cuda"):
        return "peak: bytes of the weights, and what reading a window of one row added to the GPU's memory at most"
    return "weights: bytes of parameters and buffers, nothing else"


def write_results(result: Comparison, machine: Machine, names: dict[str, Any], path: str | Path) -> None:
    """Write command, settings, machine, every row with its rounds, and every layer as JSON."""
    settings = result.settings
    content = {
        "command": settings.command(names["source"], names["out"], names["text"], names["also"]),
        "settings": asdict(settings),
        "model": {"class": result.model_class, "experts_implementation": result.experts_implementation},
        "machine": {**asdict(machine), "noisy": bool(machine.noise)},
        "text": {
            "windows": len(result.windows),
            "window": result.windows.shape[1],
            "predicted_tokens": result.rows[0].quality.tokens,
        },
        "meo_gates": {"formed": result.gates, "segment_length": result.segment, **mean_layer(result.layers)},
        "memory": memory_note(settings.device),
        "variants": [{"variant": row.name, **row_values(row), "rounds": _rounds(row)} for row in result.rows],
        "skipped": result.skipped,
        "layers": [layer_values(layer) for layer in result.layers],
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def row_values(row: Row) -> dict[str, float]:
    """Return the numbers of a variant: nats, ms, medians over rounds; ratios are medians of the rounds' ratios."""
    prefill = statistics.median(row.speed.prefill)
    return {
        "perplexity": row.quality.perplexity,
        "kl_nats": row.quality.kl,
        "top1_agreement": row.quality.agreement,
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_s": row.speed.prompt_tokens / prefill,
        "prefill_ratio": row.speed.ratio("prefill", row.source_speed),
        "decode_ms_per_token": 1e3 * statistics.median(row.speed.token),
        "decode_ratio": row.speed.ratio("token", row.source_speed),
        "flops_per_token": row.flops,
        "memory_bytes": row.nbytes,
    }


def _rounds(row: Row) -> dict[str, list[float]]:
    timed = {"": row.speed, "source_": row.source_speed}
    return {
        f"{prefix}{name}_ms": [round(1e3 * seconds, 4) for seconds in getattr(speed, name)]
        for prefix, speed in timed.items()
        for name in ("prefill", "token")
    }


def layer_values(layer: Layer) -> dict[str, Any]:
    """Return the numbers of a block."""
    gates = layer.gates
    return {
        "block": layer.path,
        "relative_rms_error": layer.error.relative,
        "merged_share": gates.merged_share,
        "gate_entropy_nats": gates.entropy,
        "gate_entropy_relative": gates.relative_entropy,
        "gate_distance_to_uniform": gates.distance,
        "gate_total": gates.totals[0],
        "label": gates.label,
    }


def mean_layer(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the means over all blocks; the label of all, if they share it."""
    each = [layer_values(layer) for layer in layers]
    labels = {values["label"] for values in each}
    means: dict[str, Any] = {"block": "mean", "label": labels.pop() if len(labels) == 1 else ""}
    for name in each[0]:
        if name not in means:
            numbers = [values[name] for values in each]
            means[name] = None if None in numbers else statistics.fmean(numbers)
    return means
