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

from meo_hf.benchmark.compare import Comparison, Layer, Merging, Row
from meo_hf.benchmark.compare_outputs import labels_of
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
    sizes = not result.only_meo
    spread = ("weights\nMB",) if sizes and memory_name(settings.device) != "weights" else ()
    more = ("M para-\nmeters", *spread) if sizes else ()
    for name in (*names, "decode\nms", "ratio to\nsource", "MFLOPs\nper token", *more, memory):
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
            *([f"{row.parameters / 1e6:,.2f}"] if sizes else []),
            *([f"{row.weight_bytes / 1e6:,.1f}"] if spread else []),
            f"{row.nbytes / 1e6:,.1f}",
        )
    return table


def layers_table(merging: Merging) -> Table:
    """Show one row per merged MoE block of a MEO model, and the mean of all."""
    owner = "MEO's" if merging.name == "MEO" else f"{merging.name}: its"
    title = f"{owner} blocks on the states that the source's blocks read, and its gates"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("block", no_wrap=True)
    names = ("relative\nRMS error", "really\nmerged", "entropy\nnats", "of\nlog k", "from\nuniform")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    layers = merging.layers
    for number, values in enumerate([*map(layer_values, layers), mean_layer(layers)]):
        relative = values["gate_entropy_relative"]
        table.add_row(
            values["block"],
            f"{values['relative_rms_error']:.3f}",
            f"{values['merged_share']:.0%}",
            f"{values['gate_entropy_nats']:.3f}",
            "" if relative is None else f"{relative:.0%}",
            f"{values['gate_distance_to_uniform']:.3f}",
            values["label"],
            end_section=number == len(layers) - 1,
        )
    return table


def notes(result: Comparison, machine: Machine, source: str) -> list[str]:
    """Say in lines below the tables what their numbers depend on."""
    window = result.windows.shape[1]
    prompt = result.rows[0].speed.prompt_tokens
    lines = []
    for merging in result.merging:
        lines.append(f"{merging.name}'s gates: {merging.gates}")
        if merging.segment >= window:
            whose = "" if merging.name == "MEO" else f"{merging.name}: "
            lines.append(f"{whose}a window of {window} is no longer than a segment: every gate has read one token only")
    if result.merging:
        lines.append(
            "uniform average: one expert per block, the mean of all, its output scaled by what MEO's gates summed to "
            "on average before they were normalised"
        )
    for row in result.rows:
        if row.depends_on_text:
            lines.append(
                f"{row.name}: {row.experts_per_token:.2f} experts run per token and block, which depends on the text; "
                "this and its FLOPs are means over the whole text, its times are of one window"
            )
    if result.settings.window > window:
        lines.append(f"windows have {window} tokens, not {result.settings.window}: more positions than a model has")
    lines += [f"no row '{name}': {reason}" for name, reason in result.skipped.items()]
    merges = ", where a step that merges counts by its share of a segment" if result.merging else ""
    lines.append(
        f"prefill reads {prompt} tokens, decoding the next {window - prompt} one by one{merges}; each variant took "
        "turns with the source"
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
    """Write command, settings, machine, every row with its rounds, and every layer as JSON.

    `meo_gates` is there where one MEO model was compared, `meo_models` holds the same of each.
    """
    settings = result.settings
    gates = [{"formed": one.gates, "segment_length": one.segment, **mean_layer(one.layers)} for one in result.merging]
    content: dict[str, Any] = {
        "command": settings.command(names["source"], labels_of(names["outs"]), names["text"], names["also"]),
        "settings": asdict(settings),
        "model": {"class": result.model_class, "experts_implementation": result.experts_implementation},
        "machine": {**asdict(machine), "noisy": bool(machine.noise)},
        "text": {
            "windows": len(result.windows),
            "window": result.windows.shape[1],
            "predicted_tokens": result.rows[0].quality.tokens,
        },
        **({"meo_gates": gates[0]} if len(gates) == 1 else {}),
        "meo_models": [{"variant": one.name, **its} for one, its in zip(result.merging, gates, strict=True)],
        "memory": memory_note(settings.device),
        "variants": [
            {"variant": row.name, "kind": row.kind, **row_values(row), **_more(row), "rounds": _rounds(row)}
            for row in result.rows
        ],
        "skipped": result.skipped,
        "layers": [
            {"variant": merging.name, **layer_values(layer)} for merging in result.merging for layer in merging.layers
        ],
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


def _more(row: Row) -> dict[str, Any]:
    """Return what else is known of a variant; the number of experts only where they run one by one in our class."""
    more = {
        "flops_counted_on": "whole text" if row.depends_on_text else "first window",
        "weight_bytes": row.weight_bytes,
        "parameters": row.parameters,
    }
    return more if row.experts_per_token is None else {**more, "experts_per_token": row.experts_per_token}


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
