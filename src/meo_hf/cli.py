"""The command `meo-hf`."""

from __future__ import annotations

import gc
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from meo_hf.cli_bench import bench
from meo_hf.cli_compare import compare_command
from meo_hf.cli_convert import convert_command
from meo_hf.cli_options import Overwrite, SourceRevision, Src, Token, Verify
from meo_hf.cli_progress import err, out, progress_bar
from meo_hf.cli_recover import recover_command
from meo_hf.cli_reduce import reduce_command
from meo_hf.errors import CheckFailedError, HubError, MeoError
from meo_hf.version import __version__

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="meo-hf",
    help="Turn Hugging Face models into MEO models: merge several experts' weights into one and run that one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench, name="bench")

OK, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"meo-hf {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("convert")(convert_command)
app.command("reduce", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(reduce_command)


@app.command("inspect")
def inspect_command(
    source: Src,
    source_revision: SourceRevision = None,
    token: Token = None,
) -> None:
    """Say what a checkpoint is, dense or MEO, from its headers alone."""
    from meo_hf.conversion.inspection import inspect
    from meo_hf.tables import inspection_table

    out.print(inspection_table(inspect(source, revision=source_revision, token=token)))


@app.command("families")
def families_command() -> None:
    """List what can be converted, and what is refused and why."""
    from meo_hf.tables import families_table, moe_families_table, refusals

    out.print(families_table())
    out.print(moe_families_table())
    for line in refusals():
        out.print(f"refused: {line}", markup=False, soft_wrap=True)


@app.command("verify")
def verify_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that meo-hf convert or reduce wrote.")],
    mode: Annotated[Verify, typer.Option(help="full: compare both models; sample: layer by layer.")] = Verify.full,
    token: Token = None,
) -> None:
    """Run the checks of a conversion or a reduction again."""
    from meo_hf.conversion.convert import verify_output
    from meo_hf.reduction.report import is_reduction
    from meo_hf.reduction.verify import verify_reduced
    from meo_hf.tables import checks_table

    report = (verify_reduced if is_reduction(output) else verify_output)(output, mode.value, token)
    out.print(checks_table(report.verification, report.checks))
    if not report.passed:
        raise CheckFailedError(f"{output} fails its checks: make it again")


@app.command("extract")
def extract_command(
    source: Annotated[
        str, typer.Argument(metavar="OUT", help="MEO model of level task, or a mixture with one expert per layer.")
    ],
    output: Annotated[Path, typer.Argument(metavar="DENSE", help="Folder to write; must not exist.")],
    task: Annotated[str | None, typer.Option(help="Task to extract; may be left out if there is one.")] = None,
    all_tasks: Annotated[
        bool, typer.Option("--all-tasks", help="Extract every task, each into a folder of its name in DENSE.")
    ] = False,
    source_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of OUT.")] = None,
    token: Token = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the plain dense checkpoint that a MEO model computes for one task, or a mixture of one expert per layer."""
    from meo_hf.conversion.extraction import extract, extract_all
    from meo_hf.errors import UsageError

    if all_tasks:
        if task is not None:
            raise UsageError("--task and --all-tasks contradict each other: leave one out")
        for folder in extract_all(source, output, revision=source_revision, token=token, overwrite=overwrite).values():
            out.print(f"wrote {escape(str(folder))}: a dense checkpoint that needs no remote code", soft_wrap=True)
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        written = extract(source, output, task=task, revision=source_revision, token=token, overwrite=overwrite)
    for one in told:
        out.print(f"note: {one.message}", markup=False, soft_wrap=True)
    out.print(f"wrote {escape(str(written))}: a dense checkpoint that needs no remote code", soft_wrap=True)


@app.command("flops")
def flops_command(
    paper: Annotated[bool, typer.Option("--paper", help="Reproduce the paper's figure: GFLOPs against top_k.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also write the figure as a PNG.")] = None,
) -> None:
    """Count floating-point operations on running models."""
    from meo_hf.benchmark.flops import paper_rich_table, paper_table
    from meo_hf.errors import UsageError

    if not paper:
        raise UsageError("meo-hf flops counts the paper's models so far: pass --paper")
    with err.status("counting 36 models ..."):
        points = paper_table()
    out.print(paper_rich_table(points))
    if plot is not None:
        from meo_hf.benchmark.flops_plot import plot_paper

        plot_paper(points, plot)
        out.print(f"wrote {escape(str(plot))}", soft_wrap=True)


@app.command("demo")
def demo_command(
    source: Annotated[
        str | None, typer.Argument(metavar="SRC", help="Hub id or folder; default: a small real model from PyPI.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to keep the converted model; default: a temporary folder.")
    ] = None,
) -> None:
    """Convert a small real model, load it without meo_hf and compare it with its source."""
    from meo_hf.demo import run_demo

    with progress_bar() as progress:
        lines = run_demo(source, output, progress, out)
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


app.command("compare")(compare_command)
app.command("recover")(recover_command)


def run(command: Callable[[], Any]) -> int:
    """Run a command and turn its outcome into an exit code and one line on the error stream."""
    try:
        command()
    except (CheckFailedError, HubError) as error:
        return _complain(error, CHECK_FAILED)
    except MeoError as error:
        return _complain(error, BAD_INPUT)
    except (_InterruptedRun, KeyboardInterrupt):
        err.print("interrupted: nothing half-done was kept")
        return INTERRUPTED
    return OK


def _complain(error: Exception, code: int) -> int:
    err.print(f"meo-hf: {error}", markup=False, soft_wrap=True)
    return code


class _InterruptedRun(BaseException):
    """Raised by signals; typer would turn a KeyboardInterrupt into exit code 1."""


def _interrupt(*_: object) -> None:
    raise _InterruptedRun


def main() -> None:
    """Entry point of the console script."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a killed run cleans up like an interrupted one
        signal.signal(number, _interrupt)
    gc.freeze()  # what the imports made stays: no collection needs to look at it again
    try:
        sys.exit(run(app))
    finally:
        gc.unfreeze()  # at the end it must go, or libraries report it as leaked
