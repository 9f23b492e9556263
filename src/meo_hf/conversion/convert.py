"""Convert a dense checkpoint into a MEO model: plan, write beside, check, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization._base import parse_size_to_int

from meo_hf.conversion.card import licenses_of, resolve_license, write_card
from meo_hf.conversion.companions import write_companions
from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.hub import check_login, check_push, push_folder
from meo_hf.conversion.plan import Options, Plan, build_plan
from meo_hf.conversion.report import Check, ConversionReport, report_of
from meo_hf.conversion.safetensors_files import sha256_of
from meo_hf.conversion.source import Source, open_source, public_name
from meo_hf.conversion.verification import MODES, mode_that_fits, outside_differences, verify_files
from meo_hf.conversion.write import write_tensors
from meo_hf.errors import CheckFailedError, OutputError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Progress:
    """What to call while a conversion runs: `stage(name, bytes)` at each stage, `advance(bytes)` within it."""

    stage: Callable[[str, int], None] = lambda name, total: None
    advance: Callable[[int], None] = lambda count: None


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_experts: int | None = None,
    top_k: int = 2,
    level: str | None = None,
    segment_length: int | None = None,
    routing: str | None = None,
    expert_init: str = "copy",
    layers: str = "all",
    gate_scope: str = "ffn",
    tasks: Sequence[str] = (),
    experts: Sequence[str | os.PathLike[str]] = (),
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
    progress: Progress = Progress(),
) -> ConversionReport:
    """Convert a dense checkpoint into a MEO model and return what was done.

    `source` is a Hub id, a folder or a GGUF file; `experts` are checkpoints of the same family that each become
    one expert (8 copies of the source's own feed-forwards if none are given). `level` defaults to `sequence`, for
    decoder-only models to `segment`; there `segment_length` is the number of tokens per segment (256 if not given)
    and `routing` freezes the gates at the end of the prompt (`prompt`, the default of level `sequence`) or refreshes
    them with each segment (`segment`). `verify` is `full`, `sample` (also taken where both models do not fit in memory)
    or `none`. Nothing is written in a `dry_run`.

    Raises the errors of `meo_hf.errors`: UsageError, SourceError, UnsupportedError, OutputError and others before
    anything is written, CheckFailedError if a check failed (the output then stands as `OUTPUT.failed`), HubError
    if only the push failed.
    """
    if verify not in MODES:
        raise UsageError(f"--verify {verify!r} is unknown: give one of {', '.join(MODES)}")
    _check_shard_size(max_shard_size)
    check_push(push_to_hub, private, push_revision, commit_message)
    output = Path(output).expanduser().absolute()
    names = [os.fspath(name) for name in (source, *experts)]
    options = Options(
        num_experts=num_experts,
        top_k=top_k,
        level=level,
        segment_length=segment_length,
        routing=routing,
        gate_scope=gate_scope,
        expert_init=expert_init,
        layers=layers,
        tasks=tuple(tasks),
        dtype=_dtype(dtype),
        seed=seed,
    )
    read = SourceOptions(source_revision, token, trust_remote_code, allow_pickle)
    if not dry_run:
        check_output(output, overwrite, names)
        if push_to_hub is not None:
            check_login(push_to_hub, private, token)
    with ExitStack() as stack:
        opened = _open_all(names, read, stack)
        plan = build_plan(opened[0], opened[1:], options)
        licenses = licenses_of(opened)
        license_ = resolve_license(licenses, license)
        report = report_of(plan, output, _remembered(options, read, max_shard_size))
        report.licenses = licenses
        report.dry_run = dry_run
        if dry_run:
            return report
        _check_space(output, plan.nbytes)
        with written_beside(output, overwrite) as folder:
            _write(plan, folder, report, max_shard_size, progress)
            _check(plan, folder, report, verify, progress)
            write_card(report, opened[0], license_, folder)
            report.save(folder)
            if not report.passed:
                raise CheckFailedError(_failure(report, keep_failed(folder, output)))
    if push_to_hub is not None:
        progress.stage("pushing", report.bytes_to_write)
        message = commit_message or f"MEO variant of {opened[0].public_name}"
        push_folder(output, push_to_hub, private=private, revision=push_revision, message=message, token=token)
    return report


def _open_all(names: list[str], read: SourceOptions, stack: ExitStack) -> list[Source]:
    opened = []
    for number, name in enumerate(names):
        options = read if number == 0 else SourceOptions(None, read.token, read.trust_remote_code, read.allow_pickle)
        opened.append(open_source(name, options))
        stack.callback(opened[-1].close)
    return opened


def _write(plan: Plan, folder: Path, report: ConversionReport, max_shard_size: str, progress: Progress) -> None:
    progress.stage("writing", plan.nbytes)
    start = time.perf_counter()
    shards = write_tensors(plan.targets, folder, max_shard_size, progress.advance)
    report.files = {shard.name: {"bytes": shard.nbytes, "sha256": shard.sha256} for shard in shards}
    plan.config.save_pretrained(folder)
    for lost in write_companions(plan.source, folder):
        report.warnings.append(f"not carried over: {lost}")
    report.write_seconds = round(time.perf_counter() - start, 3)


def _check(plan: Plan, folder: Path, report: ConversionReport, verify: str, progress: Progress) -> None:
    mode = mode_that_fits(plan, verify)
    report.verification = mode
    if mode != verify:
        report.warnings.append("both models do not fit in memory: checked layer by layer (sample), not as a whole")
    if mode == "none":
        if plan.experts:
            report.warnings.append("the experts' tensors outside the feed-forwards were not compared with the source's")
        return
    if plan.experts:
        report.experts = outside_differences(plan)
        for expert in report.experts:
            if count := expert["outside_differing"] + expert["outside_only_here"]:
                report.warnings.append(
                    f"{public_name(expert['id'])} differs from the source in {count} tensors outside the "
                    "feed-forwards: the source's are used"
                )
    progress.stage(f"checking ({mode})", plan.nbytes)
    report.checks = verify_files(plan, folder, mode, progress.advance)


def verify_output(folder: str | os.PathLike[str], mode: str = "full", token: str | None = None) -> ConversionReport:
    """Run the checks of a conversion again; returns its report with the fresh checks.

    Files are compared with the recorded sha256, then the plan is built again from the recorded sources and options.
    Raises SourceError if a source is gone, CheckFailedError never: look at `report.passed`.
    """
    folder = Path(folder).expanduser().absolute()
    report = ConversionReport.load(folder)
    wrong = [n for n, f in report.files.items() if not (folder / n).is_file() or sha256_of(folder / n) != f["sha256"]]
    detail = f"{len(report.files)} files" if not wrong else f"changed or missing: {', '.join(wrong)}"
    report.checks = [Check("files have the recorded sha256", not wrong, detail)]
    if wrong:
        return report
    kept = dict(report.options)
    read = SourceOptions(report.source["commit"], token, kept["trust_remote_code"], kept["allow_pickle"])
    options = Options(
        **{k: kept[k] for k in asdict(Options())} | {"dtype": _dtype(kept["dtype"]), "tasks": tuple(kept["tasks"])}
    )
    with ExitStack() as stack:
        opened = _open_all([report.source["id"], *(expert["id"] for expert in report.experts)], read, stack)
        plan = build_plan(opened[0], opened[1:], options)
        report.verification = mode_that_fits(plan, mode)
        report.checks += verify_files(plan, folder, report.verification)
    return report


def _remembered(options: Options, read: SourceOptions, max_shard_size: str) -> dict[str, Any]:
    """What a later `verify` needs to build the same plan; never the token."""
    dtype = None if options.dtype is None else str(options.dtype).removeprefix("torch.")
    reading = {"trust_remote_code": read.trust_remote_code, "allow_pickle": read.allow_pickle}
    return {
        **asdict(options),
        "tasks": list(options.tasks),
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


def _check_shard_size(text: str) -> None:
    try:
        size = parse_size_to_int(text)
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(f"--max-shard-size {text!r} is not understood: give a size like 500MB or 5GB")


def check_output(output: Path, overwrite: bool, sources: Sequence[str]) -> None:
    """Raise OutputError or UsageError if the output may not be written where it was asked for."""
    place = output.resolve()
    for source in sources:
        path = Path(source).expanduser().resolve()
        if (path.is_dir() and (path == place or path in place.parents)) or (place in path.parents and path.exists()):
            raise UsageError(f"the output {output} and the source {source} lie in each other: give another output")
    parent = _existing_parent(output)
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, no folder to write in: give another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {parent}: give another output")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists: give another output, or pass --overwrite")
    if (
        output.exists()
        and not (output / "config.json").is_file()
        and not (output.is_dir() and not any(output.iterdir()))
    ):
        raise OutputError(
            f"{output} is no model folder (no config.json in it), so it is not overwritten: remove it yourself"
        )


def _existing_parent(output: Path) -> Path:
    return next((folder for folder in output.parents if folder.exists()), output)


def _check_space(output: Path, nbytes: int) -> None:
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < nbytes + SPARE_BYTES:
        raise OutputError(
            f"{nbytes / 1e9:.2f} GB are needed in {parent}, {free / 1e9:.2f} GB are free: make room, or give another "
            "output"
        )


@contextmanager
def written_beside(output: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder beside the output; rename it when all went well, remove it when not."""
    missing = [parent for parent in output.parents if not parent.exists()]
    folder = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        folder.chmod(0o755)
        yield folder
        replace(folder, output, overwrite)
    except OSError as error:
        if error.errno is not None and not hasattr(error, "response"):
            raise OutputError(f"writing {output} failed ({error.strerror or error}): nothing was kept") from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in missing:
            with suppress(OSError):  # it holds the output, or was never made
                parent.rmdir()


def replace(folder: Path, output: Path, overwrite: bool) -> None:
    """Rename a finished folder to its place; an existing one goes only once the new one stands."""
    if not (output.exists() and overwrite):
        folder.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    output.rename(old / output.name)
    try:
        folder.rename(output)
    except BaseException:
        (old / output.name).rename(output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def keep_failed(folder: Path, output: Path) -> Path:
    """Keep an output whose check failed as `OUTPUT.failed`, in the place of an earlier one."""
    failed = output.with_name(f"{output.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    folder.rename(failed)
    return failed


def _failure(report: ConversionReport, kept: Path) -> str:
    failed = next(check for check in report.checks if not check.passed)
    return f"converted, but a check failed: {failed.name} ({failed.detail}); the output is kept as {kept}"
