"""Convert a checkpoint into a MEO model: plan, write beside, check, rename."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int

from meo_hf.conversion.card import licenses_of, resolve_license, write_card
from meo_hf.conversion.dense_convert import DenseConversion
from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.hub import check_login, check_push, push_folder
from meo_hf.conversion.lora_source import LoraSource, named_adapters, open_adapter
from meo_hf.conversion.moe_convert import MoeConversion
from meo_hf.conversion.options import Options
from meo_hf.conversion.output import check_output, check_space, keep_failed, written_beside
from meo_hf.conversion.placement import Placement
from meo_hf.conversion.progress import SILENT, Progress
from meo_hf.conversion.report import Check, ConversionReport
from meo_hf.conversion.safetensors_files import sha256_of
from meo_hf.conversion.source import Source, open_source
from meo_hf.conversion.verification import MODES
from meo_hf.errors import CheckFailedError, UsageError
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.reference_meo import fingerprint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    level: str | None = None,
    pooling: str | None = None,
    segment_length: int | None = None,
    routing: str | None = None,
    expert_init: str = "copy",
    layers: str = "all",
    gate_scope: str = "ffn",
    tasks: Sequence[str] | Mapping[str, str] = (),
    experts: Sequence[str | os.PathLike[str]] = (),
    adapters: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] = (),
    outside: str | None = None,
    examples: Mapping[str, str | os.PathLike[str]] | None = None,
    expert_rank: int | None = None,
    expert_energy: float | None = None,
    expert_center: str | None = None,
    reference: bool = False,
    align: bool = False,
    copy: bool = False,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    max_shard_size: str = "5GB",
    source_revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    token: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: str = "full",
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    push_revision: str | None = None,
    commit_message: str | None = None,
    progress: Progress = SILENT,
) -> ConversionReport:
    """Convert a dense checkpoint or a mixture of experts into a MEO model and return what was done.

    `source` is a Hub id, a folder or a GGUF file; `experts` are checkpoints of the same family that each become
    one expert (8 copies of the source's own feed-forwards if none are given). `level` defaults to `sequence`, for
    decoder-only models to `segment`; there `segment_length` is the number of tokens per segment (256 if not given)
    and `routing` freezes the gates at the end of the prompt (`prompt`, the default of level `sequence`) or refreshes
    them with each segment (`segment`). `tasks` are the names of level `task`, or a mapping from names to descriptions:
    then gates read the descriptions, embedded by the model's own embeddings, instead of one number per task.

    `adapters` are LoRA adapters of `source`, as a list (tasks are named after their folders) or by name: each becomes
    an expert, kept as a low-rank part beside the base's weights. At level `task`, their default, a row computes what
    the base with its task's adapter does. `outside` says what becomes of adapters' parts of other linear maps than
    those of feed-forwards: `gate` (each row gets its task's; the default of level `task`), `merge` (the mean of all
    goes into the weights) or `refuse`. `examples` are text files by adapter: at level `sequence` routers are made of
    what they read in these (else they are random, and to be trained).

    `expert_rank`, or `expert_energy` (a share of the squared differences), keeps full experts as low-rank parts too,
    beside the dense source (`expert_center` `source`) or the experts' mean (`mean`, the only way for a mixture of
    experts); the report says what was left out.

    A mixture of experts keeps its own experts, router and weight files: they are hard-linked where that is possible,
    copied with `copy`, or left at the source with `reference` (a Hub repository at its commit, or a folder); `align`
    writes them anew with permuted neurons. `top_k` defaults to the source's own, for dense models to 2; `pooling` is
    `hidden` or `probs`.

    `verify` is `full`, `sample` (also taken where both models do not fit in memory)
    or `none`. Nothing is written in a `dry_run`.

    Raises the errors of `meo_hf.errors`: UsageError, SourceError, UnsupportedError, OutputError and others before
    anything is written, CheckFailedError if a check failed (the output then stands as `OUTPUT.failed`), HubError
    if only the push failed.
    """
    if verify not in MODES:
        raise UsageError(f"--verify {verify!r} is unknown: give one of {', '.join(MODES)}")
    check_shard_size(max_shard_size)
    check_push(push_to_hub, private, push_revision, commit_message)
    output = Path(output).expanduser().absolute()
    names = [os.fspath(name) for name in (source, *experts)]
    named = named_adapters(adapters)
    options = Options(
        num_experts=num_experts,
        top_k=top_k,
        level=level,
        pooling=pooling,
        segment_length=segment_length,
        routing=routing,
        gate_scope=gate_scope,
        expert_init=expert_init,
        layers=layers,
        tasks=tuple(tasks),
        descriptions=tuple(tasks.values()) if isinstance(tasks, Mapping) else (),
        dtype=_dtype(dtype),
        seed=seed,
        outside=outside,
        examples=tuple((name, os.fspath(path)) for name, path in (examples or {}).items()),
        expert_rank=expert_rank,
        expert_energy=expert_energy,
        expert_center=expert_center,
    )
    placement = Placement(reference, align, copy)
    read = SourceOptions(source_revision, token, trust_remote_code, allow_pickle)
    if not dry_run:
        check_output(output, overwrite, [*names, *named.values(), *(path for _, path in options.examples)])
        if push_to_hub is not None:
            check_login(push_to_hub, private, token)
    with ExitStack() as stack:
        opened = _open_all(names, read, stack, weights=not reference)
        loras = _open_adapters(named, {}, read, opened[0])
        conversion = _conversion(opened, options, placement, max_shard_size, loras)
        if push_to_hub is not None and reference and opened[0].commit is None:
            raise UsageError("a reference to a folder here is of no use on the Hub: leave --reference or the push out")
        licenses = licenses_of([*opened, *loras])
        license_ = resolve_license(licenses, license)
        report = conversion.report(output, _remembered(options, placement, read, max_shard_size))
        report.licenses = licenses
        report.dry_run = dry_run
        if dry_run:
            return report
        check_space(output, report.bytes_to_write)
        with written_beside(output, overwrite) as folder:
            conversion.write(folder, report, progress)
            conversion.check(folder, report, verify, progress)
            write_card(report, opened[0], license_, folder)
            report.save(folder)
            if not report.passed:
                raise CheckFailedError(_failure(report, keep_failed(folder, output)))
    if push_to_hub is not None:
        progress.stage("pushing", report.bytes_to_write)
        message = commit_message or f"MEO variant of {opened[0].public_name}"
        push_folder(output, push_to_hub, private=private, revision=push_revision, message=message, token=token)
    return report


def _conversion(
    opened: list[Source], options: Options, placement: Placement, max_shard_size: str, loras: list[LoraSource]
) -> DenseConversion | MoeConversion:
    """Plan the conversion of opened sources, dense or a mixture of experts."""
    if isinstance(opened[0].family, MoeFamily):
        if options.outside is not None or options.examples:
            idle = "--example" if options.examples else "--outside"
            raise UsageError(f"{idle} has no effect on a mixture of experts: leave it out")
        return MoeConversion(opened, options, placement, max_shard_size)
    for name, asked in (("--reference", placement.reference), ("--align", placement.align), ("--copy", placement.copy)):
        if asked:
            raise UsageError(f"{name} needs a mixture of experts; {opened[0].name} is dense: leave it out")
    return DenseConversion(opened, options, max_shard_size, loras)


def _open_adapters(
    named: dict[str, str], commits: dict[str, str | None], read: SourceOptions, base: Source
) -> list[LoraSource]:
    if not named:
        return []
    if isinstance(base.family, MoeFamily):
        raise UsageError(f"--adapter needs a dense base; {base.name} is a mixture of experts: leave it out")
    model = base.meta_model()
    at = {task: replace(read, revision=commits.get(task)) for task in named}
    return [open_adapter(task, name, at[task], base, model) for task, name in named.items()]


def _open_all(names: list[str], read: SourceOptions, stack: ExitStack, weights: bool = True) -> list[Source]:
    opened = []
    for number, name in enumerate(names):
        options = read if number == 0 else SourceOptions(None, read.token, read.trust_remote_code, read.allow_pickle)
        opened.append(open_source(name, options, weights))
        stack.callback(opened[-1].close)
    return opened


def verify_output(folder: str | os.PathLike[str], mode: str = "full", token: str | None = None) -> ConversionReport:
    """Run the checks of a conversion again; returns its report with the fresh checks.

    Files are compared with the recorded sha256, then the plan is built again from the recorded sources and options.
    Raises SourceError if a source is gone, CheckFailedError never: look at `report.passed`.
    """
    folder = Path(folder).expanduser().absolute()
    report = ConversionReport.load(folder)
    wrong = [name for name, kept in report.files.items() if not unchanged(folder / name, kept)]
    by = "sha256" if all("sha256" in kept for kept in report.files.values()) else "size and header"
    detail = f"{len(report.files)} files, by {by}" if not wrong else f"changed or missing: {', '.join(wrong)}"
    report.checks = [Check("files are as recorded", not wrong, detail)]
    if wrong:
        return report
    kept = dict(report.options)
    read = SourceOptions(report.source["commit"], token, kept["trust_remote_code"], kept["allow_pickle"])
    lists: dict[str, Any] = {name: tuple(kept.get(name, ())) for name in ("tasks", "descriptions")}
    lists["examples"] = tuple((name, path) for name, path in kept.get("examples", ()))
    single = {name: kept.get(name, value) for name, value in asdict(Options()).items() if name not in lists}
    options = Options(**single | {"dtype": _dtype(kept["dtype"])} | lists)
    placement = Placement(**{k: kept[k] for k in asdict(Placement())})
    names = [report.source["id"], *(expert["id"] for expert in report.experts)]
    with ExitStack() as stack:
        opened = _open_all(names, read, stack, weights=not placement.reference)
        named, commits = ({one["task"]: one[key] for one in report.adapters} for key in ("id", "commit"))
        loras = _open_adapters(named, commits, read, opened[0])
        _conversion(opened, options, placement, kept["max_shard_size"], loras).check(folder, report, mode, SILENT)
    return report


def unchanged(path: Path, recorded: dict[str, Any]) -> bool:
    """Return whether a file is as its report says: by its whole hash, or of an untouched file by size and header."""
    if not path.is_file():
        return False
    if "sha256" in recorded:
        return sha256_of(path) == recorded["sha256"]
    return fingerprint(path) == {key: recorded[key] for key in ("bytes", "header_sha256")}


def _remembered(options: Options, placement: Placement, read: SourceOptions, max_shard_size: str) -> dict[str, Any]:
    """What a later `verify` needs to build the same plan; never the token."""
    dtype = None if options.dtype is None else str(options.dtype).removeprefix("torch.")
    reading = {"trust_remote_code": read.trust_remote_code, "allow_pickle": read.allow_pickle}
    return {
        **asdict(options),
        **asdict(placement),
        "tasks": list(options.tasks),
        "descriptions": list(options.descriptions),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        **reading,
    }


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    if value is None or isinstance(value, torch.dtype):
        return value
    if value not in DTYPES:
        raise UsageError(f"--dtype {value!r} is unknown: give one of {', '.join(DTYPES)}")
    return DTYPES[value]


def check_shard_size(text: str) -> None:
    """Raise UsageError for a size that is not understood."""
    try:
        size = parse_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(f"--max-shard-size {text!r} is not understood: give a size like 500MB or 5GB")


def _failure(report: ConversionReport, kept: Path) -> str:
    failed = next(check for check in report.checks if not check.passed)
    return f"converted, but a check failed: {failed.name} ({failed.detail}); the output is kept as {kept}"
