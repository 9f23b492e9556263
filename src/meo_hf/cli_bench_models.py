"""The commands `meo-hf bench prefill` and `meo-hf bench convert`: whole models, read at once or made anew."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from meo_hf.errors import OutputError, UsageError

if TYPE_CHECKING:
    from meo_hf.benchmark.decode_variants import Models
    from meo_hf.benchmark.prefill_setup import PrefillSettings

TABLE_WIDTH = 110
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write every round as JSON.")]


def prefill_command(
    source: Annotated[
        str | None, typer.Argument(metavar="DENSE", help="Dense encoder or decoder: Hub id, folder or .gguf file.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Random weights instead of DENSE: bert-base or bert-tiny.")
    ] = None,
    num_experts: Annotated[int, typer.Option(help="Experts per feed-forward.")] = 8,
    top_k: Annotated[str, typer.Option(metavar="K,K,...", help="Experts that are selected.")] = "2,4,8",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Texts that are read together.")] = "8",
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens per text.")] = "128",
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that is dropped.")] = 5,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Device to run on, like cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the times as a PNG.")] = None,
) -> None:
    """Time one forward pass over whole texts: dense, MEO, and the same experts as a mixture of experts.

    Lists of --batch and --tokens are run as a grid. There is no KV cache.
    """
    from meo_hf.benchmark.machine import Machine
    from meo_hf.benchmark.prefill import steps_of, time_prefill
    from meo_hf.benchmark.prefill_report import notes, prefill_table, write_results
    from meo_hf.benchmark.prefill_setup import PrefillSettings
    from meo_hf.cli_bench import bar, check_outputs
    from meo_hf.cli_bench_layer import numbers
    from meo_hf.cli_progress import out
    from meo_hf.conversion.source import public_name

    if (source is None) == (config is None):
        raise UsageError("give either DENSE or --config, one of them")
    settings = PrefillSettings(
        num_experts=num_experts,
        top_k=numbers("--top-k", top_k),
        batch=numbers("--batch", batch),
        tokens=numbers("--tokens", tokens),
        rounds=rounds,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    check_outputs(json_file, plot)
    machine = Machine.look(settings.device)
    name = ["--config", config] if config is not None else [public_name(source or "")]
    models = _load(source, config, settings)
    wide = Console(file=out.file, width=max(out.width, TABLE_WIDTH), highlight=False)  # numbers are never cut
    done = []
    with bar(steps_of(settings, models)) as advance:
        for prefilled in time_prefill(settings, models, advance):
            done.append(prefilled)
            wide.print(prefill_table(settings, prefilled, machine))
            if json_file is not None:
                write_results(settings, done, models, machine, name, json_file)
    for line in notes(done, models, machine, name[-1]):
        out.print(line, markup=False, soft_wrap=True)
    if plot is not None:
        from meo_hf.benchmark.prefill_plot import plot_prefill

        plot_prefill(settings, done, name[-1], plot)
    for path in filter(None, (json_file, plot)):
        out.print(f"wrote {escape(str(path))}", soft_wrap=True)


def _load(source: str | None, config: str | None, settings: PrefillSettings) -> Models:
    """Load a dense model, or draw one, and the MEO model that is converted from it."""
    from meo_hf.benchmark.prefill_setup import draw_preset
    from meo_hf.cli_bench import build_models
    from meo_hf.conversion.source import quiet_transformers

    if source is not None:
        return build_models(source, settings.shared, settings.check_model)
    with tempfile.TemporaryDirectory(prefix="meo-hf-") as folder, quiet_transformers():
        drawn = draw_preset(config or "", settings.seed)
        settings.check_model(drawn.config, config or "")
        drawn.save_pretrained(folder)
        return build_models(folder, settings.shared, settings.check_model)


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Dense model: Hub id, folder or .gguf file.")],
    num_experts: Annotated[int, typer.Option(help="Experts per feed-forward.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that is dropped.")] = 3,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder on the disk to time; what is written there is deleted again.  [default: the temporary one]"
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time a conversion, with and without its checks, beside plain copies of the same files; count peak memory.

    Starting up is not timed; each run has a process of its own, and all inputs were read before.
    """
    from meo_hf.benchmark.convert_timing import convert_table, steps_of, time_convert, write_results
    from meo_hf.benchmark.machine import Machine
    from meo_hf.benchmark.options import at_least
    from meo_hf.cli_bench import bar, check_outputs
    from meo_hf.cli_progress import out
    from meo_hf.conversion.fetch import SourceOptions
    from meo_hf.conversion.source import open_source, public_name
    from meo_hf.modeling.moe_families_meo import MoeFamily

    for name, value in (("rounds", rounds), ("num_experts", num_experts)):
        at_least(name, value, 1)
    if work is not None and not work.is_dir():
        raise OutputError(f"--work {work} is no folder: give one that exists")
    check_outputs(json_file, None)
    machine = Machine.look("cpu")
    opened = open_source(source, SourceOptions())
    try:
        if isinstance(opened.family, MoeFamily):
            raise UsageError(f"{source} is a mixture of experts, whose files are linked: give a dense model")
        options = {"num_experts": num_experts, "top_k": min(2, num_experts)}
        with tempfile.TemporaryDirectory(prefix="meo-hf-", dir=work) as folder, bar(steps_of(rounds)) as advance:
            timings = time_convert(opened, options, rounds, Path(folder), advance)
    finally:
        opened.close()
    wide = Console(file=out.file, width=max(out.width, TABLE_WIDTH), highlight=False)
    wide.print(convert_table(public_name(source), timings, machine))
    out.print(str(machine), markup=False, soft_wrap=True)
    if json_file is not None:
        words = ["meo-hf", "bench", "convert", public_name(source)]
        words += ["--num-experts", str(num_experts), "--rounds", str(rounds)]
        write_results(shlex.join(words), public_name(source), timings, options, machine, json_file)
        out.print(f"wrote {escape(str(json_file))}", soft_wrap=True)
