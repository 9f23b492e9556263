"""The commands `meo-hf bench layer` and `meo-hf bench train-step`: one layer, computed in several ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from meo_hf.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from meo_hf.benchmark.layer import TimeCell
    from meo_hf.benchmark.layer_results import Timed
    from meo_hf.benchmark.layer_shapes import LayerSettings
    from meo_hf.benchmark.machine import Machine

TABLE_WIDTH = 110
SEGMENT_LENGTH = 256

Shapes = Annotated[
    str,
    typer.Option(
        "--shape",
        metavar="NAME,...",
        help="bert-base, olmoe, qwen3-30b-a3b, gpt-oss-20b, mixtral, or numbers: 64x96x4x2 or 64x96x4x2xgated (hidden, "
        "intermediate, experts, top_k).",
    ),
]
Batch = Annotated[str, typer.Option(metavar="N,...", help="Rows.")]
Tokens = Annotated[str, typer.Option(metavar="N,...", help="Tokens per row.")]
TopK = Annotated[
    str | None, typer.Option(metavar="K,...", help="Experts that are selected.  [default: the shape's own]")
]
Level = Annotated[
    str, typer.Option(metavar="NAME,...", help="Who shares a gate: tokens of a sequence, a segment or a task.")
]
SegmentLength = Annotated[
    int | None, typer.Option(help=f"Tokens per segment, at level segment.  [default: {SEGMENT_LENGTH}]")
]
Dtype = Annotated[str, typer.Option(metavar="TYPE,...", help="float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option(help="Device to run on, like cpu or cuda.")]
Rounds = Annotated[int, typer.Option(help="Timed rounds.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write each cell as JSON once it is timed; skip those already there."),
]
Plot = Annotated[Path | None, typer.Option(help="Also draw the times as a PNG.")]
Cells = Annotated[int | None, typer.Option(help="Stop after so many new cells.  [default: all]")]


def layer_command(
    shape: Shapes = "bert-base",
    batch: Batch = "8",
    tokens: Tokens = "128",
    top_k: TopK = None,
    level: Level = "sequence",
    segment_length: SegmentLength = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="Replay CUDA graphs.  [default: on a CUDA device]")
    ] = None,
    rounds: Rounds = 7,
    seed: Seed = 0,
    json_file: JsonFile = None,
    plot: Plot = None,
    cells: Cells = None,
) -> None:
    """Time one layer: a dense expert, the same experts as a mixture, and MEO by each plan.

    Lists are run as a grid, cell by cell. Ratios to the floor compare with what measured rates would allow at best.
    """
    from meo_hf.benchmark.layer import LayerTimer
    from meo_hf.benchmark.layer_report import layer_table

    settings = _settings(
        shape, batch, tokens, top_k, level, segment_length, dtype, device, rounds, seed, _graphs(graphs, device)
    )
    _run("layer", settings, LayerTimer(), layer_table, json_file, plot, cells)


def train_step_command(
    shape: Shapes = "bert-base",
    batch: Batch = "8",
    tokens: Tokens = "128",
    top_k: TopK = None,
    level: Level = "sequence",
    segment_length: SegmentLength = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    rounds: Rounds = 7,
    seed: Seed = 0,
    json_file: JsonFile = None,
    plot: Plot = None,
    cells: Cells = None,
) -> None:
    """Time forward and backward of one layer, and count the memory that is kept in between.

    Gradients go to inputs, experts and gates. Lists are run as a grid, cell by cell.
    """
    from meo_hf.benchmark.layer_report import train_table
    from meo_hf.benchmark.train_step import time_train_step

    settings = _settings(shape, batch, tokens, top_k, level, segment_length, dtype, device, rounds, seed, False)
    _run("train-step", settings, time_train_step, train_table, json_file, plot, cells)


def _graphs(wanted: bool | None, device: str) -> bool:
    if wanted is not None and not device.startswith("cuda"):
        raise UsageError(f"--graphs and --no-graphs are for a CUDA device, and --device is {device!r}: leave it out")
    return device.startswith("cuda") if wanted is None else wanted


def _settings(
    shape: str,
    batch: str,
    tokens: str,
    top_k: str | None,
    level: str,
    segment_length: int | None,
    dtype: str,
    device: str,
    rounds: int,
    seed: int,
    graphs: bool,
) -> LayerSettings:
    from meo_hf.benchmark.layer_shapes import LayerSettings

    levels = tuple(level.split(","))
    if segment_length is not None and "segment" not in levels:
        raise UsageError(f"--segment-length has no effect at --level {level}: add segment, or leave it out")
    return LayerSettings(
        shape=tuple(shape.split(",")),
        batch=numbers("--batch", batch),
        tokens=numbers("--tokens", tokens),
        top_k=() if top_k is None else numbers("--top-k", top_k),
        level=levels,
        dtype=tuple(dtype.split(",")),
        segment_length=SEGMENT_LENGTH if segment_length is None else segment_length,
        device=device,
        rounds=rounds,
        seed=seed,
        graphs=graphs,
    )


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Read an option's list of whole numbers. Raises UsageError."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise UsageError(f"{name} is {text!r}: give whole numbers, separated by commas") from None


def _run(
    name: str,
    settings: LayerSettings,
    time_cell: TimeCell,
    table: Callable[[Timed, Machine], Table],
    json_file: Path | None,
    plot: Path | None,
    limit: int | None,
) -> None:
    """Time the cells that a file lacks, show each as soon as it is there, then draw all of them."""
    from meo_hf.benchmark.layer import time_grid
    from meo_hf.benchmark.layer_report import cell_notes, merging_note
    from meo_hf.benchmark.layer_results import Results
    from meo_hf.benchmark.machine import Machine
    from meo_hf.cli_bench import check_outputs
    from meo_hf.cli_progress import out

    if limit is not None and limit < 1:
        raise UsageError(f"--cells is {limit}: give a whole number from 1 on")
    check_outputs(json_file, plot)
    machine = Machine.look(settings.device)
    results = Results(name, settings, machine, json_file)
    known = sum(cell in results for cell in settings.cells())
    if known:
        out.print(f"{known} of {len(settings.cells())} cells are in {json_file} already", markup=False, soft_wrap=True)
    wide = Console(file=out.file, width=max(out.width, TABLE_WIDTH), highlight=False)  # numbers are never cut
    fresh = []
    with _bar(len(settings.cells()) - known) as (advance, finish):
        for timed in time_grid(settings, results, time_cell, limit, advance):
            finish()
            if isinstance(timed, str):
                out.print(timed, markup=False, soft_wrap=True)
                continue
            fresh.append(timed)
            wide.print(table(timed, machine))
            for line in cell_notes(timed):
                out.print(line, markup=False, soft_wrap=True)
    if fresh:
        out.print(merging_note(fresh), markup=False, soft_wrap=True)
    out.print(str(machine), markup=False, soft_wrap=True)
    if plot is not None:
        from meo_hf.benchmark.layer_plot import plot_layers

        plot_layers(settings, results.cells, f"{settings.command(name).partition(' --')[0]}, {machine.device}", plot)
    for path in filter(None, (json_file if fresh else None, plot)):
        out.print(f"wrote {escape(str(path))}", soft_wrap=True)


@contextmanager
def _bar(cells: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Show where a run is; drawn only between what is timed, by no thread of its own."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from meo_hf.cli_progress import err

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, auto_refresh=False, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=cells)
        yield (
            lambda what: bar.update(task, description=what, refresh=True),
            lambda: bar.advance(task),
        )
