"""Reports as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from meo_hf.conversion.inspection import Inspection
from meo_hf.conversion.report import Check, ConversionReport
from meo_hf.installed import families_without_row, installed_rows
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.levels_meo import LEVELS, MOE_LEVELS
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES

REFUSED = (
    "quantised models: convert the unquantised checkpoint, then quantise the result",
    "models that are MEO already: nothing to convert",
    "families without a row: the error names what was found and proposes the row",
    "models with code of their own, unless --trust-remote-code says that you trust it",
)


def two_columns(title: str, rows: dict[str, object]) -> Table:
    """Show facts by their names."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, Text(str(value)))  # no markup: a path may hold brackets
    return table


def _detail(meo: dict[str, Any]) -> str:
    if meo["level"] == "task":
        return f" (tasks: {', '.join(meo['tasks'])})"
    return f" ({meo['segment_length']} tokens)" if meo["level"] == "segment" else ""


def report_table(report: ConversionReport) -> Table:
    """Show what a conversion did, or would do."""
    meo = report.meo
    rows: dict[str, object] = {
        "source": report.source["id"] + (f" @ {report.source['commit']}" if report.source["commit"] else ""),
        "output": report.output,
        "class": report.model_class,
        "level": meo["level"] + _detail(meo),
        "experts": f"{meo['num_experts']}, {meo['top_k']} merged per gate, " + _gating(meo),
        "born by": _birth(report),
        "layers": ", ".join(map(str, report.layers)),
        "parameters": f"{report.parameters_before:,} -> {report.parameters_after:,}",
        "FLOPs per token": f"{report.flops_dense:,} -> {report.flops_meo:,} " + _charged(report),
        "tensors": f"{report.tensors['copied']} copied, {report.tensors['expert_stacks']} expert stacks, "
        f"{report.tensors['new']} new (routers{', token blocks' if meo['level'] == 'token' else ''})",
    }
    if report.is_moe:
        rows["tensors"] = f"{report.tensors['copied']}, {_WEIGHTS[report.weights]}"
    if ranks := meo.get("expert_ranks"):
        rows["kept as"] = "one weight and parts of rank " + ", ".join(f"{r} ({n})" for n, r in ranks.items())
        if report.is_moe:
            rows["tensors"] = "experts' mean and their parts, all else copied"
    if report.dry_run:
        rows["would write"] = f"{report.bytes_to_write:,} bytes of weights"
        rows["memory needed"] = f"about {(report.working_memory + 700 * 2**20) / 2**20:,.0f} MiB, without checks"
        return two_columns("Plan (dry run: nothing was written or pushed)", rows)
    rows["written"] = f"{report.bytes_to_write:,} bytes in {len(report.files)} file(s), {report.write_seconds} s"
    for name, file in report.files.items():
        if "sha256" in file:
            rows[f"sha256 {name}"] = file["sha256"]
        else:
            rows[f"{file['how']} {name}"] = f"{file['bytes']:,} bytes"
    for row in report.alignment:
        rows[f"distance of experts, layer {row['layer']}"] = f"{row['before']:.4f} -> {row['after']:.4f}"
    for one in report.factorised:
        rows[f"lost of {one['map']}"] = f"relative error {one['error']:.4f}, {one['kept']:.1%} of what differs is kept"
    if report.routed:
        rows["examples"] = (
            f"{report.routed['right']:.1%} of held-out pieces reach their adapter (mean of routers; the worst "
            f"{report.routed['worst_router']:.1%})"
        )
    for check in report.checks:
        rows["passed" if check.passed else "FAILED"] = ""
        rows[f"  {check.name}"] = check.detail
    rows.pop("passed", None)
    rows["checks"] = "not verified" if report.verification == "none" else f"{report.verification}: all passed"
    return two_columns("Converted", rows)


_WEIGHTS = {
    "link": "untouched: the files are hard links to the source's",
    "copy": "untouched: the files are copies of the source's",
    "reference": "not here: loaded from the source",
    "rewrite": "experts' neurons permuted, all else copied",
}


def _charged(report: ConversionReport) -> str:
    if report.meo.get("expert_format") == "lowrank":
        return "(linear maps; low-rank parts of top_k experts for each token)"
    return f"(linear maps; {report.tokens_per_merge} tokens per merged expert; merge charged as top_k * weights)"


def _gating(meo: dict[str, Any]) -> str:
    if "gate_scope" in meo:
        return f"gate scope {meo['gate_scope']}"
    return "its router reads a group's mean state" if meo["pooling"] == "hidden" else "its tokens' gates are averaged"


def _birth(report: ConversionReport) -> str:
    if report.is_moe:
        return "the source's own"
    adapters = ", ".join(f"{one['task']} ({one['id']})" for one in report.adapters)
    return adapters or ", ".join(e["id"] for e in report.experts) or report.options["expert_init"]


def checks_table(mode: str, checks: list[Check]) -> Table:
    """Show checks with their outcome."""
    table = Table(title=f"Checks ({mode})", title_justify="left")
    for column in ("outcome", "check", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row("passed" if check.passed else "FAILED", check.name, Text(check.detail))
    return table


def inspection_table(found: Inspection) -> Table:
    """Show what a checkpoint is."""
    rows: dict[str, object] = {
        "source": found.source + (f" @ {found.commit}" if found.commit else ""),
        "model type": found.model_type,
        "architecture": found.architecture or "none named",
        "parameters": f"{found.parameters:,}",
        "weights": f"{found.nbytes:,} bytes in {found.files} file(s)",
        "types": ", ".join(f"{code}: {count:,}" for code, count in found.dtypes.items()) or "no safetensors",
    }
    if found.meo is not None:
        rows |= {f"meo.{key}": value for key, value in found.meo.items()}
    elif found.convertible:
        rows["convertible"] = f"no: {found.convertible}"
    else:
        rows["convertible"] = f"yes, to level {' or '.join(found.levels)}"
        rows |= found.facts
    return two_columns("Inspected (headers only)", rows)


def families_table() -> Table:
    """Show every dense family's row with its kind and levels."""
    table = Table(title=f"{len(FAMILIES)} dense families", title_justify="left")
    for column in ("model type", "kind", "feed-forward", "levels"):
        table.add_column(column)
    for row in FAMILIES.values():
        names = " or ".join("/".join(up) for up in row.up)
        table.add_row(row.model_type, row.kind, f"{names}, {row.down}", _default_first(LEVELS[row.kind]))
    return table


def moe_families_table() -> Table:
    """Show every mixture-of-experts family of the installed Transformers that has a row and is not refused."""
    rows = [MOE_FAMILIES[name] for name in installed_rows() if MOE_FAMILIES[name].refused is None]
    table = Table(title=f"{len(rows)} mixture-of-experts families", title_justify="left")
    for column in ("model type", "kind", "levels", "pooling", "top_k"):
        table.add_column(column)
    for row in rows:
        chosen = "can be chosen" if row.chooses_top_k and isinstance(row.top_k, str) else "is the router's own"
        table.add_row(
            row.model_type, row.kind, _default_first(MOE_LEVELS[row.kind]), _default_first(row.poolings), chosen
        )
    return table


def _default_first(names: tuple[str, ...]) -> str:
    return ", ".join([f"{names[0]} (default)", *names[1:]])


def refusals() -> list[str]:
    """Return what is refused, and why."""
    rows = [MOE_FAMILIES[name] for name in installed_rows()]
    refused = [f"{row.model_type}: {row.refused}" for row in rows if row.refused is not None]
    missing = [f"{name}: a mixture of experts without a row yet" for name in families_without_row()]
    return [*REFUSED, *refused, *missing]
