"""The command `meo-hf recover`: distil a source into a MEO model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

if TYPE_CHECKING:
    from rich.table import Table

    from meo_hf.training.recover_report import RecoveryReport

_INTERRUPTED = 130


class Train(str, Enum):
    """What is trained."""

    all = "all"
    routers = "routers"
    adapters = "adapters"


def recover_command(
    meo: Annotated[str, typer.Argument(metavar="MEO", help="Model to train: folder or Hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    teacher: Annotated[str, typer.Option(metavar="SOURCE", help="Model to learn from: Hub id or folder.")],
    data: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Text, or .jsonl, .json, .csv with a text column; repeatable.")
    ],
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    train: Annotated[Train, typer.Option(help="What is trained; adapters are merged at the end.")] = Train.all,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on.  [default: one pass over the data]")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train, in place of --tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows that are read together.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window.  [default: 512, or as many as the models have positions]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of AdamW.  [default: 1e-4; 1e-3 for routers and adapters]")
    ] = None,
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps in which the rate rises.")] = 0.05,
    kl_weight: Annotated[float, typer.Option(help="Weight of KL(SOURCE || MEO) per token.")] = 1.0,
    lm_weight: Annotated[float, typer.Option(help="Weight of the next token's loss.")] = 0.0,
    hidden_weight: Annotated[float, typer.Option(help="Weight of matching each layer's hidden states.")] = 0.0,
    ffn_weight: Annotated[float, typer.Option(help="Weight of matching each feed-forward's output.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Softens both distributions of the divergence.")] = 1.0,
    rank: Annotated[int | None, typer.Option(help="Rank of adapters.  [default: 16]")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the windows that is only measured, before and after.  [default: 0.05]"),
    ] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="File to measure on, in place of --held-out; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="float32 or bfloat16 (computation).  [default: bfloat16 on a GPU]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device to run on.  [default: cuda if there is one]")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers again in backward: less memory, slower.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.  [default: a tenth of all]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model folder, or an interrupted run.")
    ] = False,
    source_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of SOURCE.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run SOURCE's own code.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token for the Hub; default: the one you are logged in with.")
    ] = None,
) -> None:
    """Train a model to predict what its source does."""
    from meo_hf.cli_progress import err, out
    from meo_hf.errors import MeoError
    from meo_hf.training.recover import RecoveryStopped, recover
    from meo_hf.training.recover_settings import RecoverySettings
    from meo_hf.training.recover_work import Work

    settings = RecoverySettings(
        train=train.value,  # type: ignore[arg-type]
        tokens=tokens,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        window=window,
        learning_rate=learning_rate,
        warmup_ratio=warmup_ratio,
        kl_weight=kl_weight,
        lm_weight=lm_weight,
        hidden_weight=hidden_weight,
        ffn_weight=ffn_weight,
        temperature=temperature,
        rank=rank,
        held_out=held_out,
        seed=seed,
        dtype=dtype,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        save_steps=save_steps,
    )
    try:
        with _bar() as advance:
            report = recover(
                meo,
                output,
                teacher,
                data,
                settings,
                validation=validation or (),
                text_column=text_column,
                resume=resume,
                overwrite=overwrite,
                source_revision=source_revision,
                token=token,
                trust_remote_code=trust_remote_code,
                advance=advance,
            )
    except RecoveryStopped as stopped:
        err.print(f"interrupted: {stopped}", markup=False, soft_wrap=True)
        raise typer.Exit(_INTERRUPTED) from None
    except MeoError:
        raise
    except BaseException:  # whatever ended the run, its checkpoints are of use
        work = Work(output)
        if work.checkpoint is not None:
            err.print(f"{work.folder} keeps a checkpoint: repeat with --resume to go on", markup=False, soft_wrap=True)
        raise
    out.print(recovery_table(report))
    out.print(_trained(report), markup=False, soft_wrap=True)
    out.print(f"wrote {escape(str(output))}", soft_wrap=True)


def recovery_table(report: RecoveryReport) -> Table:
    """Show what was trained and what it brought."""
    from rich.table import Table

    table = Table("", "before", "after", "teacher", title=f"recovered from {report.teacher['id']}")
    first, last = report.losses
    table.add_row("training loss", f"{first:.4f}", f"{last:.4f}", "")
    before, after = report.before, report.after
    if before is not None and after is not None:
        if after.perplexity is not None:
            values = (before.perplexity, after.perplexity, after.teacher_perplexity)
            table.add_row("held-out perplexity", *(f"{value:.2f}" for value in values))
        table.add_row("held-out KL, nats", f"{before.kl:.4f}", f"{after.kl:.4f}", "0")
        table.add_row("top-1 agrees", f"{before.agreement:.1%}", f"{after.agreement:.1%}", "100%")
    return table


def _trained(report: RecoveryReport) -> str:
    held_out = f", {report.held_out_windows:,} held out" if report.held_out_windows else ", nothing held out"
    return (
        f"{report.trained_parameters:,} of {report.parameters:,} parameters trained on {report.tokens:,} tokens in "
        f"{report.steps:,} steps; {report.training_windows:,} windows of {report.window}{held_out}"
    )


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show what a run does and how far it is."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from meo_hf.cli_progress import err

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        current = ["reading"]

        def advance(what: str, done: int, total: int) -> None:
            if what != current[0]:
                bar.reset(task, description=what, total=total)
                current[0] = what
            bar.update(task, completed=done, total=total)

        yield advance
