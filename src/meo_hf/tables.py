"""Reports as tables for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from meo_hf.conversion.inspection import Inspection
from meo_hf.conversion.report import ConversionReport
from meo_hf.modeling.families_meo import FAMILIES, LEVELS

REFUSED = (
    "mixture-of-experts models: not supported yet",
    "quantised models: convert the unquantised checkpoint, then quantise the result",
    "models that are MEO already: nothing to convert",
    "families without a row: the error names what was found and proposes the row",
    "models with code of their own, unless --trust-remote-code says that you trust it",
)


def _two_columns(title: str, rows: dict[str, object]) -> Table:
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
        "experts": f"{meo['num_experts']}, {meo['top_k']} merged per gate, gate scope {meo['gate_scope']}",
        "born by": ", ".join(e["id"] for e in report.experts) or report.options["expert_init"],
        "layers": ", ".join(map(str, report.layers)),
        "parameters": f"{report.parameters_before:,} -> {report.parameters_after:,}",
        "FLOPs per token": f"{report.flops_dense:,} -> {report.flops_meo:,} "
        f"(linear maps; {report.tokens_per_merge} tokens per merged expert; merge charged as top_k * weights)",
        "tensors": f"{report.tensors['copied']} copied, {report.tensors['expert_stacks']} expert stacks, "
        f"{report.tensors['new']} new (routers{', token blocks' if meo['level'] == 'token' else ''})",
    }
    if report.dry_run:
        rows["would write"] = f"{report.bytes_to_write:,} bytes"
        rows["memory needed"] = f"about {(report.working_memory + 700 * 2**20) / 2**20:,.0f} MiB, without checks"
        return _two_columns("Plan (dry run: nothing was written)", rows)
    rows["written"] = f"{report.bytes_to_write:,} bytes in {len(report.files)} file(s), {report.write_seconds} s"
    for name, file in report.files.items():
        rows[f"sha256 {name}"] = file["sha256"]
    for check in report.checks:
        rows["passed" if check.passed else "FAILED"] = ""
        rows[f"  {check.name}"] = check.detail
    rows.pop("passed", None)
    rows["checks"] = "not verified" if report.verification == "none" else f"{report.verification}: all passed"
    return _two_columns("Converted", rows)


def checks_table(report: ConversionReport) -> Table:
    """Show checks with their outcome."""
    table = Table(title=f"Checks ({report.verification})", title_justify="left")
    for column in ("outcome", "check", "detail"):
        table.add_column(column, overflow="fold")
    for check in report.checks:
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
    return _two_columns("Inspected (headers only)", rows)


def families_table() -> Table:
    """Show every family row with its kind and levels."""
    table = Table(title=f"{len(FAMILIES)} families", title_justify="left")
    for column in ("model type", "kind", "feed-forward", "levels"):
        table.add_column(column)
    for row in FAMILIES.values():
        names = " or ".join("/".join(up) for up in row.up)
        levels = ", ".join(f"{level} (default)" if level == row.default_level else level for level in LEVELS[row.kind])
        table.add_row(row.model_type, row.kind, f"{names}, {row.down}", levels)
    return table
