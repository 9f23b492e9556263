"""Time one layer computed in several ways: a dense expert, mixtures of experts, and merged experts.

Legend: B rows, T tokens per row, D hidden features.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from meo_hf.benchmark.layer_checks import References
from meo_hf.benchmark.layer_results import Results, Row, Timed
from meo_hf.benchmark.layer_setup import Layer, Setup, Variant, draw_layer
from meo_hf.benchmark.layer_shapes import Cell, LayerSettings
from meo_hf.benchmark.layer_variants import kept_experts, variants_of
from meo_hf.benchmark.rates import Peak, fastest, floor_of, measure_peak
from meo_hf.modeling.memory_meo import free_bytes

Call = Callable[[], object]
Advance = Callable[[str], None]
TimeCell = Callable[[LayerSettings, Setup, Advance], Timed]

SLOW = 20
"""Times a dense expert above which a variant is timed in fewer rounds."""
_SAMPLE = {"cuda": 0.01, "cpu": 0.03}
"""Seconds that a round of a fast variant lasts, so that the clock's own steps do not matter."""
_MOST_CALLS = 2000
_SHARE = {"cuda": 0.9, "cpu": 0.5}


def time_grid(
    settings: LayerSettings,
    results: Results,
    time_cell: TimeCell,
    limit: int | None = None,
    advance: Advance = lambda what: None,
) -> Iterator[Timed | str]:
    """Time the cells that `results` lacks, add each to them, and yield it; or a line that says why it was left out.

    Raises CheckFailedError, before a cell is timed, if one of its variants computes something wrong.
    """
    device = torch.device(settings.device)
    layer: Layer | None = None
    drawn: tuple[object, ...] = ()
    done = 0
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for cell in settings.cells():
            if cell in results:
                continue
            if done == limit:
                return
            if layer is not None and drawn != (cell.shape, cell.dtype):
                layer = None
                _free(device)
            needed, free = bytes_of(cell, weights=layer is None), _room(device)
            if needed > free:
                yield f"left out: {cell}: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB can be used"
                continue
            if layer is None:
                advance(f"drawing {cell.shape.name}")
                layer, drawn = draw_layer(cell.shape, cell.dtype, device, settings.seed), (cell.shape, cell.dtype)
            timed = time_cell(settings, Setup(cell, layer), advance)
            results.add(timed)
            _free(device)
            done += 1
            yield timed


def bytes_of(cell: Cell, weights: bool = True) -> int:
    """Estimate the memory that a cell needs: experts, a dense one, activations, and what the check computes."""
    shape = cell.shape
    elements = shape.parameters * (1 + shape.experts * weights)
    elements += cell.all_tokens * (4 * shape.hidden + 3 * shape.first_outputs + shape.intermediate)
    return elements * cell.itemsize + 8 * shape.hidden * shape.first_outputs


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class LayerTimer:
    """Times forward passes of cells; knows the best rates of the device, which it measures once per type."""

    def __init__(self) -> None:
        self._peaks: dict[str, Peak] = {}

    @torch.inference_mode()
    def __call__(self, settings: LayerSettings, setup: Setup, advance: Advance) -> Timed:
        """Check every variant, then time all in turns, each round beginning with the next one."""
        cell, device = setup.cell, setup.layer.router.device
        if cell.dtype not in self._peaks:
            advance("measuring the machine")
            self._peaks[cell.dtype] = measure_peak(cell.dtype, device)
        peak = self._peaks[cell.dtype]
        x = setup.inputs(settings.seed)
        index = setup.group_gates(x).top_k_index
        # a task's experts were merged before: one expert is read, whichever they were
        distinct = 1 if cell.level == "task" else int(index.unique().numel())
        timed = Timed(cell, [], peak=peak, floor=floor_of(cell, distinct, peak))
        references = References(setup, x)
        calls: dict[str, Call] = {}
        pool = torch.cuda.graph_pool_handle() if settings.graphs else None
        for variant in variants_of(setup):
            advance(f"checking {variant.name}")
            y = first_output(variant, x, timed.notes)
            if y is None:
                continue
            timed.checks[variant.name] = references.check(variant, y)
            row = Row(variant.name, plans=() if variant.plans is None else variant.plans(x))
            captured = _captured(variant, x, references, pool, timed.notes) if settings.graphs else None
            row.graph = captured is not None
            if settings.graphs and captured is None:  # a capture that broke off may hold its memory for good
                pool = torch.cuda.graph_pool_handle()
            calls[variant.name] = captured or _eager(variant, x)
            timed.rows.append(row)
        if cell.level == "task":
            seconds = fastest(lambda: kept_experts(setup), device, repeats=3)
            timed.notes.append(f"meo: merging its experts, once for all calls, takes {1e3 * seconds:.2f} ms")
        time_rows(timed, calls, settings.rounds, device, advance)
        return timed


def first_output(variant: Variant, x: Tensor, notes: list[str]) -> Tensor | None:
    """Run a variant once; None, and a note, if memory does not suffice or somebody else's code cannot do it here."""
    free = _room(x.device)
    if variant.room > free:
        notes.append(f"{variant.name}: needs about {variant.room / 1e9:.1f} GB, {free / 1e9:.1f} GB can be used")
        return None
    try:
        return variant.run(x)
    except Exception as error:
        if variant.optional or "out of memory" in str(error) or "can't allocate memory" in str(error):
            notes.append(f"{variant.name}: cannot run here: {_first_line(error)}")
            return None
        raise


def _room(device: torch.device) -> int:
    """Return the bytes that may be used: less than are free, as needs are estimates.

    A GPU says when there is no more; a CPU's process is killed.
    """
    if device.type != "cuda":
        return int(_SHARE["cpu"] * free_bytes(device))
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_SHARE["cuda"] * (free_bytes(device) + held))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _eager(variant: Variant, x: Tensor) -> Call:
    return lambda: variant.run(x)


def _captured(variant: Variant, x: Tensor, references: References, pool: Any, notes: list[str]) -> Call | None:
    """Capture a variant as a CUDA graph, and check what replaying it computes; None, and a note, if that fails.

    All graphs use the same memory in turns: nobody reads what one left behind.
    """
    if not variant.capturable:
        notes.append(f"{variant.name}: waits for the device, so it is no CUDA graph")
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever is chosen or allocated at first must not happen while capturing
            variant.run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            y = variant.run(x)
    except RuntimeError as error:
        torch.cuda.synchronize()
        notes.append(f"{variant.name}: cannot be captured, so it is no CUDA graph: {_first_line(error)}")
        return None
    graph.replay()
    references.check(variant, y)
    return graph.replay


def time_rows(timed: Timed, calls: dict[str, Call], rounds: int, device: torch.device, advance: Advance) -> None:
    """Time all rows in turns, each round beginning with the next one; slow rows take part in the first rounds only."""
    wanted: dict[str, int] = {}
    dense = 0.0
    for row in timed.rows:
        advance(f"warm-up: {row.name}")
        seconds = measure(calls[row.name], 1, device)
        if not dense or seconds < SLOW * dense:
            seconds = measure(calls[row.name], 1, device)
        dense = dense or seconds
        row.calls = min(_MOST_CALLS, math.ceil(_SAMPLE["cuda" if device.type == "cuda" else "cpu"] / seconds))
        slow = seconds > SLOW * dense
        wanted[row.name] = min(rounds, max(2, rounds // 3)) if slow else rounds
        if wanted[row.name] < rounds:
            timed.notes.append(f"{row.name}: slow, so timed in {wanted[row.name]} of {rounds} rounds")
    for number in range(1, rounds + 1):
        active = [row for row in timed.rows if wanted[row.name] >= number]
        first = number % len(active)
        for row in active[first:] + active[:first]:
            advance(f"round {number}: {row.name}")
            row.seconds.append(measure(calls[row.name], row.calls, device))


def measure(call: Call, times: int, device: torch.device) -> float:
    """Return the seconds of one of some calls in a row; on a GPU by its own clock."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - began) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / times
