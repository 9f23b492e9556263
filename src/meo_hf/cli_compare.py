"""The command `meo-hf compare`: what a mixture of experts loses and gains by what was made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from meo_hf.cli_bench import check_outputs

TABLE_WIDTH = 120


def compare_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Mixture of experts: Hub id or folder.")],
    outputs: Annotated[
        list[str],
        typer.Argument(metavar="OUT", help="Models of SOURCE, MEO or with fewer experts: folders or Hub ids."),
    ],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text that all variants read (UTF-8).")],
    also: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Further model with SOURCE's tokenizer; repeat for more.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens per window; at most the models' positions.")] = 512,
    limit: Annotated[int, typer.Option(help="Windows to read at most.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Windows that are read together.")] = 4,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that is dropped.")] = 5,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Device to run on, like cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the result as a PNG.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the models' own code.")] = False,
) -> None:
    """Compare a mixture of experts with models made of it on text."""
    from meo_hf.benchmark.compare import compare
    from meo_hf.benchmark.compare_report import compare_table, layers_table, notes, write_results
    from meo_hf.benchmark.compare_variants import CompareSettings
    from meo_hf.benchmark.machine import Machine
    from meo_hf.cli_progress import out
    from meo_hf.conversion.source import public_name

    settings = CompareSettings(
        window=window,
        limit=limit,
        batch_size=batch_size,
        rounds=rounds,
        dtype=dtype,
        device=device,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    check_outputs(json_file, plot)
    machine = Machine.look(settings.device)
    with _bar() as advance:
        result = compare(source, outputs, text, settings, also or (), advance)
    name = public_name(source)
    for table in (compare_table(result, machine), *map(layers_table, result.merging)):
        needed = Console(width=10_000).measure(table).maximum
        width = max(out.width, TABLE_WIDTH, needed)  # numbers are never cut
        Console(file=out.file, width=width, highlight=False).print(table)
    for line in notes(result, machine, name):
        out.print(line, markup=False, soft_wrap=True)
    if json_file is not None:
        names = {"source": source, "outs": outputs, "text": str(text), "also": also or ()}
        write_results(result, machine, names, json_file)
    if plot is not None:
        from meo_hf.benchmark.compare_plot import plot_compare

        plot_compare(result, f"{name} and {'its MEO model' if result.only_meo else 'what was made of it'}", plot)
    for path in filter(None, (json_file, plot)):
        out.print(f"wrote {escape(str(path))}", soft_wrap=True)


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show where a run is; drawn only between what is timed, by no thread of its own."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from meo_hf.cli_progress import err

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, auto_refresh=False, disable=not err.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, refresh=True)

        yield advance
