"""The command `meo-hf reduce`."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meo_hf.cli_options import (
    AllowPickle,
    CommitMessage,
    MaxShardSize,
    Overwrite,
    Private,
    PushRevision,
    PushToHub,
    SourceRevision,
    Token,
    TrustRemoteCode,
    Verify,
)
from meo_hf.cli_progress import out, progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from meo_hf.reduction.report import ReductionReport


def reduce_command(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SRC", help="Mixture of experts: Hub id or folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    method: Annotated[str | None, typer.Option(help="prune, merge, low-rank, search, skip or top-k.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Apply this plan.json instead.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="N", help="Experts to keep of each block: a count like 6, a share like 0.75.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="uniform: the same number in every block; global: as scores say.  [default: uniform]"),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="prune: who stays, by reap, output-norm, frequency, gate-mass, reconstruction, router-norm or "
            "random.  [default: reap]"
        ),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="REPO", help="router-norm: the checkpoint before fine-tuning.")
    ] = None,
    progressive: Annotated[
        bool | None,
        typer.Option(
            "--progressive", help="reconstruction: later blocks see what earlier ones lost.", show_default=False
        ),
    ] = None,
    beam: Annotated[
        int | None, typer.Option(help="reconstruction: subsets kept where not all are tried.  [default: 4]")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="search: your function of (model, tokenizer), higher is better.  [default: minus the text's loss]",
        ),
    ] = None,
    generations: Annotated[
        str | None, typer.Option(metavar="N,M", help="search: of pruning and of merging.  [default: 40,160]")
    ] = None,
    population: Annotated[int | None, typer.Option(help="search: candidates per generation.  [default: 16]")] = None,
    state: Annotated[Path | None, typer.Option(metavar="FILE", help="search: kept here, and gone on from.")] = None,
    group_by: Annotated[
        str | None, typer.Option(help="merge: who joins, by outputs, logits or clusters.  [default: outputs]")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(help="merge: a group becomes its mean, aligned, joint-svd or least-squares.  [default: aligned]"),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="merge: merge the router's rows too, or let it stay and map who runs, which needs our class.  "
            "[default: merge]"
        ),
    ] = None,
    share: Annotated[float | None, typer.Option(help="low-rank: share of the experts' parameters that stays.")] = None,
    center: Annotated[
        str | None, typer.Option(help="low-rank: what experts are differences to, none or mean.  [default: none]")
    ] = None,
    ranks_by: Annotated[
        str | None, typer.Option(help="low-rank: who keeps more, uniform, frequency or reap.  [default: uniform]")
    ] = None,
    columns: Annotated[
        float | None, typer.Option(help="low-rank: share of what the centre leaves for whole columns.  [default: 0]")
    ] = None,
    after: Annotated[
        Path | None, typer.Option(metavar="FILE", help="low-rank: a plan.json of merging, say, that comes before.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="skip: what is too light to run, by ratio or cumulative.  [default: ratio]")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="skip: of the rule.  [default: for ratio the median on the calibration text]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts that each token selects from now on.")] = None,
    layers: Annotated[str, typer.Option(help="Layers to reduce: all, even, odd, last:N or i,j,...")] = "all",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[=WEIGHT]", help="Text, JSONL or Hub data set that shows how experts are used; repeat."
        ),
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens per row of calibration text.  [default: 512]")] = None,
    samples: Annotated[int | None, typer.Option(help="Rows of each calibration text.  [default: 128]")] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of tables.  [default: messages where there is one, else text]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at a time.  [default: 8]")] = None,
    device: Annotated[str, typer.Option(help="Where calibration text is read: cpu, cuda or auto.")] = "cpu",
    seed: Annotated[int | None, typer.Option(help="Seed of everything that is drawn.  [default: 0]")] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy weight files that do not change, do not link them.")
    ] = False,
    max_shard_size: MaxShardSize = "5GB",
    source_revision: SourceRevision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    token: Token = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and print the plan, write nothing.")] = False,
    save_plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan here too.")] = None,
    verify: Annotated[
        Verify, typer.Option(help="full: compare with SRC in a fresh process; sample: files alone; none: no check.")
    ] = Verify.full,
    license: Annotated[str | None, typer.Option(help="Licence of the result, if SRC states none.")] = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    push_revision: PushRevision = None,
    commit_message: CommitMessage = None,
) -> None:
    """Make a mixture of experts smaller, or let it do less: prune, merge, factorise or skip experts."""
    from meo_hf.reduction.calibration import Calibration
    from meo_hf.reduction.reduce import reduce, reduction_method

    options = {
        "keep": keep,
        "budget": budget,
        "score": score,
        "pretrained": pretrained,
        "progressive": progressive,
        "beam": beam,
        "metric": metric,
        "generations": generations,
        "population": population,
        "state": None if state is None else str(state),
        "group_by": group_by,
        "join": join,
        "router": router,
        "share": share,
        "center": center,
        "ranks_by": ranks_by,
        "columns": columns,
        "after": None if after is None else str(after),
        "rule": rule,
        "threshold": threshold,
    }
    options |= further_options(context)
    _no_effect({**options, "seed": seed} if method is None else {}, "without --method")
    found = None if method is None else reduction_method(method, options, seed or 0)
    rows = {"window": window, "samples": samples, "batch_size": batch_size, "column": column}
    _no_effect({} if calibration else rows, "without --calibration")
    read = None
    if calibration:
        given = {key: value for key, value in rows.items() if value is not None}
        read = Calibration(tuple(calibration), **{"seed": seed or 0, "batch_size": 8, **given})  # type: ignore[arg-type]
    with progress_bar() as progress:
        report = reduce(
            source,
            output,
            found,
            plan=plan,
            layers=layers,
            top_k=top_k,
            calibration=read,
            device=device,
            copy=copy,
            max_shard_size=max_shard_size,
            source_revision=source_revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            token=token,
            overwrite=overwrite,
            dry_run=dry_run,
            save_plan=save_plan,
            verify=verify.value,
            license=license,
            push_to_hub=push_to_hub,
            private=private,
            push_revision=push_revision,
            commit_message=commit_message,
            progress=progress,
        )
    out.print(reduction_table(report))
    if dry_run:
        out.print(plan_table(report))
    for warning in report.warnings:
        out.print(f"note: {warning}", markup=False, soft_wrap=True)


def _no_effect(options: dict[str, Any], when: str) -> None:
    """Raise UsageError for an option that is given where nothing reads it."""
    from meo_hf.errors import UsageError

    if idle := [key for key, value in options.items() if value is not None]:
        raise UsageError(f"--{idle[0].replace('_', '-')} has no effect {when}: leave it out")


def further_options(context: typer.Context) -> dict[str, str]:
    """Return options `--name value` that the command has no words for, and some method has a field for.

    Raises UsageError for anything else.
    """
    from meo_hf.errors import UsageError
    from meo_hf.reduction.methods import METHODS

    own = {option for parameter in context.command.params for option in parameter.opts if option.startswith("--")}
    further = {f"--{one.name.replace('_', '-')}" for method in METHODS.values() for one in fields(method)} - own
    found: dict[str, str] = {}
    rest = list(context.args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("-"):
            raise UsageError(f"got an extra argument, {name}: meo-hf reduce takes SRC and OUT")
        if name not in further:
            near = get_close_matches(name.replace("_", "-"), [*own, *further], 1)
            raise UsageError(f"no such option: {name}" + (f" (did you mean {near[0]}?)" if near else ""))
        if not equals and (not rest or rest[0].startswith("--")):
            raise UsageError(f"{name} lacks a value")
        found[name.removeprefix("--").replace("-", "_")] = value if equals else rest.pop(0)
    return found


def reduction_table(report: ReductionReport) -> Table:
    """Show what a reduction did, or would do."""
    from meo_hf.reduction.card import counts_text, method_rows, parts_text
    from meo_hf.tables import two_columns

    rows: dict[str, object] = {
        "source": report.source["id"] + (f" @ {report.source['commit']}" if report.source["commit"] else ""),
        "output": report.output,
        "class": report.model_class,
        "method": report.method["name"],
        **method_rows(report),
        "experts": counts_text(report),
        "selected per token": f"{report.top_k[0]} -> {report.top_k[1]}",
        "parameters": f"{report.parameters_before:,} -> {report.parameters_after:,}",
        "loads": "as any checkpoint of its family" if report.why_own is None else "with the code beside it",
    }
    if report.skip is not None:
        limit = report.skip["threshold"]
        rows["skips"] = f"{report.skip['rule']}, " + (f"{limit:.4g}" if isinstance(limit, float) else _span(limit))
    if report.calibration is not None:
        rows["calibration"] = "; ".join(f"{d['name']}: {d['tokens']:,} tokens" for d in report.calibration["domains"])
    rows["decided in"] = f"{report.decide_seconds} s"
    if report.dry_run:
        rows["would write"] = f"{report.bytes_to_write:,} bytes of weights"
        return two_columns("Plan (dry run: nothing was written or pushed)", rows)
    rows["written"] = f"{report.bytes_to_write:,} bytes in {len(report.files)} file(s), {report.write_seconds} s"
    if (found := parts_text(report)) is not None:
        rows["kept as"] = found
    for check in report.checks:
        rows[f"check: {check.name}"] = f"{'passed' if check.passed else 'FAILED'}, {check.detail}"
    return two_columns("Reduced", rows)


def _span(limits: dict[str, float]) -> str:
    return f"{min(limits.values()):.4g} to {max(limits.values()):.4g} by block"


def plan_table(report: ReductionReport) -> Table:
    """Show what becomes of every block's experts."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What becomes of the experts", title_justify="left")
    for column in ("block", "experts", "kept or merged"):
        table.add_column(column, overflow="fold")
    for path, block in ({} if report.plan is None else report.plan.blocks).items():
        made = ", ".join("+".join(str(old) for old, _ in row) for row in block.experts)
        table.add_row(path, f"{report.blocks[path][0]} -> {block.count}", Text(made))
    return table
