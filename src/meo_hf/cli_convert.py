"""The command `meo-hf convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from meo_hf.cli_options import (
    AllowPickle,
    CommitMessage,
    MaxShardSize,
    Overwrite,
    Private,
    PushRevision,
    PushToHub,
    Seed,
    SourceRevision,
    Src,
    Token,
    TrustRemoteCode,
    Verify,
)
from meo_hf.cli_progress import out, progress_bar
from meo_hf.cli_tasks import adapter_names, example_files, task_names


class Level(str, Enum):
    """Who shares a gate."""

    segment = "segment"
    sequence = "sequence"
    token = "token"
    task = "task"


class Routing(str, Enum):
    """When a decoder's gates change."""

    segment = "segment"
    prompt = "prompt"


class Pooling(str, Enum):
    """How a mixture of experts' gates are pooled."""

    hidden = "hidden"
    probs = "probs"


class GateScope(str, Enum):
    """What has a gate of its own."""

    ffn = "ffn"
    projection = "projection"


class ExpertInit(str, Enum):
    """How experts are born."""

    copy = "copy"
    noise = "noise"
    drop_upcycle = "drop-upcycle"


class Outside(str, Enum):
    """What becomes of adapters' parts outside of feed-forwards."""

    gate = "gate"
    merge = "merge"
    refuse = "refuse"


class Center(str, Enum):
    """What low-rank experts are differences to."""

    source = "source"
    mean = "mean"


class Dtype(str, Enum):
    """Type of the written weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert_command(
    source: Src,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    num_experts: Annotated[int | None, typer.Option(help="Experts per feed-forward.  [default: 8]")] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Experts that are merged for each gate.  [default: 2; of a mixture of experts its own]"),
    ] = None,
    level: Annotated[
        Level | None, typer.Option(help="Who shares a gate.  [default: sequence; segment for decoder-only models]")
    ] = None,
    segment_length: Annotated[
        int | None, typer.Option(help="Tokens per segment of a decoder-only model.  [default: 256]")
    ] = None,
    routing: Annotated[
        Routing | None,
        typer.Option(
            help="Gates of a decoder-only model: frozen at the end of the prompt, or refreshed with each segment.  "
            "[default: segment at level segment, else prompt]"
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="Gates of a mixture of experts: its router reads a group's mean state, or its tokens' gates are "
            "averaged.  [default: hidden, where the family allows it]"
        ),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Of a mixture of experts write config and code only.")
    ] = False,
    align: Annotated[
        bool, typer.Option("--align", help="Permute a mixture's experts so that they can be averaged.")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy a mixture's weight files, do not link them.")] = False,
    expert_init: Annotated[ExpertInit, typer.Option(help="How experts are born from SRC.")] = ExpertInit.copy,
    layers: Annotated[str, typer.Option(help="Layers to convert: all, even, odd, last:N or i,j,...")] = "all",
    gate_scope: Annotated[GateScope, typer.Option(help="One gate per feed-forward or per linear map.")] = GateScope.ffn,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=TEXT]", help="Task of level task, with a description or not; repeat for more."),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(metavar="CKPT", help="Checkpoint that becomes one expert; repeat for more. Fixes their number."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]LORA",
            help="LoRA adapter of SRC that becomes one expert, kept as it is beside SRC's weights; repeat for more. At "
            "level task, then the default, a row with task NAME computes SRC with that adapter.",
        ),
    ] = None,
    outside: Annotated[
        Outside | None,
        typer.Option(
            help="Adapters' parts outside of feed-forwards: each row gets its task's, their mean is merged into the "
            "weights, or they are refused.  [default: gate at level task, else refuse]"
        ),
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Text that adapter NAME is for, at level sequence: routers are made of one file per adapter.",
        ),
    ] = None,
    expert_rank: Annotated[
        int | None,
        typer.Option(help="Keep experts (of --expert, or a mixture) as parts of this rank beside one weight."),
    ] = None,
    expert_energy: Annotated[
        float | None,
        typer.Option(help="As --expert-rank: the smallest ranks that keep this share of what differs."),
    ] = None,
    expert_center: Annotated[
        Center | None,
        typer.Option(help="The shared weight: SRC's or the experts' mean.  [default: source; mean of a mixture]"),
    ] = None,
    seed: Seed = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.  [default: as in SRC]")] = None,
    max_shard_size: MaxShardSize = "5GB",
    source_revision: SourceRevision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    token: Token = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    verify: Annotated[
        Verify, typer.Option(help="full: compare both models; sample: layer by layer; none: no check.")
    ] = Verify.full,
    license: Annotated[str | None, typer.Option(help="Licence of the result where the sources' differ.")] = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    push_revision: PushRevision = None,
    commit_message: CommitMessage = None,
) -> None:
    """Convert a dense checkpoint or a mixture of experts into a MEO model."""
    from meo_hf.conversion.convert import convert
    from meo_hf.tables import report_table

    with progress_bar() as progress:
        report = convert(
            source,
            output,
            num_experts=num_experts,
            top_k=top_k,
            level=_value(level),
            pooling=_value(pooling),
            reference=reference,
            align=align,
            copy=copy,
            segment_length=segment_length,
            routing=_value(routing),
            expert_init=expert_init.value,
            layers=layers,
            gate_scope=gate_scope.value,
            tasks=task_names(task or []),
            experts=expert or (),
            adapters=adapter_names(adapter or []),
            outside=_value(outside),
            examples=example_files(example or []),
            expert_rank=expert_rank,
            expert_energy=expert_energy,
            expert_center=_value(expert_center),
            seed=seed,
            dtype=_value(dtype),
            max_shard_size=max_shard_size,
            source_revision=source_revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            token=token,
            overwrite=overwrite,
            dry_run=dry_run,
            verify=verify.value,
            license=license,
            push_to_hub=push_to_hub,
            private=private,
            push_revision=push_revision,
            commit_message=commit_message,
            progress=progress,
        )
    out.print(report_table(report))
    for warning in report.warnings:
        out.print(f"note: {warning}", markup=False, soft_wrap=True)


def _value(choice: Enum | None) -> Any:
    return None if choice is None else choice.value
