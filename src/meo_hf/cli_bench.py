"""The commands `meo-hf bench ...`: timings, always of rivals side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from meo_hf.cli_bench_calibrate import calibrate_command
from meo_hf.cli_bench_layer import layer_command, numbers, train_step_command
from meo_hf.cli_bench_models import convert_command, prefill_command
from meo_hf.errors import OutputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from meo_hf.benchmark.decode_variants import DecodeSettings, Models

bench = typer.Typer(help="Time MEO models beside their rivals.", no_args_is_help=True, rich_markup_mode=None)


@bench.callback()
def _bench() -> None:
    pass


@bench.command("decode")
def decode_command(
    source: Annotated[str, typer.Argument(metavar="DENSE", help="Dense decoder: Hub id, folder or .gguf file.")],
    num_experts: Annotated[int, typer.Option(help="Experts per feed-forward.")] = 8,
    top_k: Annotated[str, typer.Option(metavar="K,K,...", help="Experts that are selected.")] = "2,4,8",
    batch: Annotated[int, typer.Option(help="Texts that are decoded together.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens that are there before the first step.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Timed steps of one token each.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that is dropped.")] = 5,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Device to run on, like cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every round as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the times as a PNG.")] = None,
) -> None:
    """Time tokens decoded with a KV cache: dense, MEO, and the same experts as a mixture of experts."""
    from meo_hf.benchmark.decode import steps_of, time_decode
    from meo_hf.benchmark.decode_report import decode_table, notes, write_results
    from meo_hf.benchmark.decode_variants import DecodeSettings
    from meo_hf.benchmark.machine import Machine
    from meo_hf.cli_progress import out
    from meo_hf.conversion.source import public_name

    settings = DecodeSettings(
        num_experts=num_experts,
        top_k=numbers("--top-k", top_k),
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    check_outputs(json_file, plot)
    machine = Machine.look(settings.device)
    name = public_name(source)
    models = build_models(source, settings, settings.check_model)
    with bar(steps_of(settings)) as advance:
        decoded = time_decode(settings, models, advance)
    out.print(decode_table(decoded, machine))
    for line in notes(decoded, models, machine, name):
        out.print(line, markup=False, soft_wrap=True)
    if json_file is not None:
        write_results(decoded, models, machine, name, json_file)
    if plot is not None:
        from meo_hf.benchmark.decode_plot import plot_decode

        plot_decode(decoded, name, plot)
    for path in filter(None, (json_file, plot)):
        out.print(f"wrote {escape(str(path))}", soft_wrap=True)


bench.command("calibrate")(calibrate_command)
bench.command("layer")(layer_command)
bench.command("train-step")(train_step_command)
bench.command("prefill")(prefill_command)
bench.command("convert")(convert_command)


def check_outputs(json_file: Path | None, plot: Path | None) -> None:
    """Refuse before a long run what could not be written after it."""
    if plot is not None and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'meo_hf[plot]'")
    for path in filter(None, (json_file, plot)):
        if path.is_dir() or not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: give a file in a folder that exists")


def build_models(source: str, settings: DecodeSettings, check: Callable[[PreTrainedConfig, str], None]) -> Models:
    """Load a dense model, and a MEO model converted from it into a folder that does not stay."""
    from meo_hf.benchmark.decode_variants import load_models
    from meo_hf.cli_progress import progress_bar
    from meo_hf.conversion.convert import convert
    from meo_hf.conversion.fetch import SourceOptions
    from meo_hf.conversion.source import open_source, quiet_transformers

    opened = open_source(source, SourceOptions())
    try:
        check(opened.config, source)
        with tempfile.TemporaryDirectory(prefix="meo-hf-") as folder, progress_bar() as progress:
            meo = Path(folder) / "meo"
            convert(
                opened.loadable,
                meo,
                num_experts=settings.num_experts,
                top_k=max(settings.top_k),
                level="sequence",
                expert_init="drop-upcycle",  # copies would hide it if the wrong experts were merged
                seed=settings.seed,
                dtype=settings.dtype,
                verify="none",
                progress=progress,
            )
            with quiet_transformers():
                return load_models(settings, opened.loadable, meo)
    finally:
        opened.close()


@contextmanager
def bar(steps: int) -> Iterator[Callable[[str], None]]:
    """Show where a run is; drawn only between what is timed, by no thread of its own."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from meo_hf.cli_progress import err

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True, auto_refresh=False, disable=not err.is_terminal) as shown:
        task = shown.add_task("", total=steps)
        done = 0

        def advance(what: str) -> None:
            nonlocal done
            shown.update(task, description=what, completed=done, refresh=True)
            done += 1

        yield advance
