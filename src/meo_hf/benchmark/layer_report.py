"""Show what the layer benchmarks timed."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from meo_hf.benchmark.layer_results import MERGING, Row, Timed
from meo_hf.benchmark.machine import Machine


def layer_table(timed: Timed, machine: Machine) -> Table:
    """Show one row per variant: medians over rounds, the lowest and highest round, and what it is a multiple of."""
    table = _table(str(timed.cell), machine)
    for name in ("ms", "spread", "ratio\nto dense", "ratio to\nfloor (max)", "ratio to\nfloor (sum)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    floors = [] if timed.floor is None else [("floor (max)", timed.floor.max), ("floor (sum)", timed.floor.sum)]
    dense = timed.rows[0].median
    for row, last in _with_last(timed.rows):
        table.add_row(
            row.name,
            as_ms(row.median),
            _spread(row),
            f"{timed.ratio(row):.2f}",
            *(f"{row.median / seconds:.2f}" for _, seconds in floors),
            _plans(row),
            end_section=last,
        )
    for name, seconds in floors:
        table.add_row(name, as_ms(seconds), "", f"{seconds / dense:.2f}")
    return table


def train_table(timed: Timed, machine: Machine) -> Table:
    """Show one row per variant: times of forward and backward, and the memory that both need."""
    table = _table(f"forward and backward: {timed.cell}", machine)
    on_gpu = any(row.peak_bytes is not None for row in timed.rows)
    saved = ("saved for\nbackward, MB", "ratio\nto dense")
    for name in ("ms", "spread", "ratio\nto dense", *saved, *(["peak MB"] if on_gpu else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", no_wrap=True)
    base = timed.rows[0].saved_bytes or 1
    for row in timed.rows:
        kept = row.saved_bytes or 0
        table.add_row(
            row.name,
            as_ms(row.median),
            _spread(row),
            f"{timed.ratio(row):.2f}",
            f"{kept / 1e6:.1f}",
            f"{kept / base:.2f}",
            *([f"{(row.peak_bytes or 0) / 1e6:.1f}"] if on_gpu else []),
            _plans(row),
        )
    return table


def cell_notes(timed: Timed) -> list[str]:
    """Say in lines below a table what its numbers depend on."""
    lines = []
    if timed.peak is not None and timed.floor is not None:
        peak, floor = timed.peak, timed.floor
        lines.append(
            f"floor: {floor.experts} distinct experts of {timed.cell.shape.experts}, {floor.bytes / 1e6:,.1f} MB at "
            f"{peak.copy / 1e9:,.1f} GB/s; {floor.flops / 1e9:,.1f} GFLOP at {peak.matmul / 1e9:,.0f} GFLOP/s; what "
            "stays in caches between calls can be faster"
        )
    return lines + timed.notes


def merging_note(cells: Sequence[Timed]) -> str:
    """Say how many products of `meo` really merged weights; combining outputs and using kept experts do not."""
    plans = [plan for timed in cells for row in timed.rows if row.name == "meo" for plan in row.plans]
    merged = sum(any(name in MERGING for name in plan.split("+")) for plan in plans)
    counts = ", ".join(f"{plan} {plans.count(plan)}" for plan in sorted(set(plans)))
    share = f" ({100 * merged / len(plans):.0f} %)" if plans else ""
    return f"meo: {merged} of {len(plans)} products merged weights{share}: {counts or 'none ran'}"


def _table(title: str, machine: Machine) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=machine.noise or None)
    table.add_column("variant", no_wrap=True)
    return table


def _with_last(rows: Sequence[Row]) -> list[tuple[Row, bool]]:
    return [(row, row is rows[-1]) for row in rows]


def _plans(row: Row) -> str:
    """Name the plans of the first and the second projection, once if they are the same."""
    return ", ".join(dict.fromkeys(row.plans))


def as_ms(seconds: float) -> str:
    """Write milliseconds with three or four digits: calls last from microseconds to seconds."""
    ms = 1e3 * seconds
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 1 else f"{ms:.4f}"


def _spread(row: Row) -> str:
    return f"{as_ms(min(row.seconds))}..{as_ms(max(row.seconds))}"
