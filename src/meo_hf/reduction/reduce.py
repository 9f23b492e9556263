"""Make a mixture of experts smaller: decide, write beside, check, rename."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from meo_hf.conversion.card import licenses_of, resolve_license
from meo_hf.conversion.companions import write_companions
from meo_hf.conversion.convert import check_shard_size
from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.hub import check_login, check_push, push_folder
from meo_hf.conversion.linking import can_link, place_weights
from meo_hf.conversion.output import check_output, check_space, keep_failed, written_beside
from meo_hf.conversion.progress import SILENT, Progress
from meo_hf.conversion.report import source_entry
from meo_hf.conversion.safetensors_files import sha256_of
from meo_hf.conversion.source import meta_model, open_source
from meo_hf.conversion.verification import MODES
from meo_hf.conversion.write import write_tensors
from meo_hf.errors import CheckFailedError, OutputError, UnsupportedError, UsageError
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_settings_meo import top_k_of
from meo_hf.reduction.applied import Application, apply_plan
from meo_hf.reduction.calibration import Calibration
from meo_hf.reduction.card import write_card
from meo_hf.reduction.joined import JoinedBlocks
from meo_hf.reduction.loading import check_device
from meo_hf.reduction.methods import METHODS, Method
from meo_hf.reduction.outcome import Outcome, outcome_of
from meo_hf.reduction.parted import PartedBlocks
from meo_hf.reduction.plan import ReductionPlan
from meo_hf.reduction.report import ReductionReport
from meo_hf.reduction.verification import verify_reduction
from meo_hf.reduction.workbench import Workbench
from meo_hf.version import versions

PLAN_NAME = "plan.json"
SHARD_SIZE = "5GB"


def reduce(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    method: Method | None = None,
    *,
    plan: ReductionPlan | str | os.PathLike[str] | None = None,
    layers: str = "all",
    top_k: int | None = None,
    calibration: Calibration | None = None,
    device: str = "cpu",
    save_plan: str | os.PathLike[str] | None = None,
    copy: bool = False,
    max_shard_size: str = SHARD_SIZE,
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
) -> ReductionReport:
    """Write a smaller variant of a mixture of experts and return what was done.

    `method` decides (`meo_hf.reduction.methods`), or `plan` is one that was decided before: a `plan.json`, which gives
    the same files again. `layers` limits it to some layers, `top_k` changes how many experts each token selects.
    Where all blocks end up alike, the result is an ordinary checkpoint of its family; else it needs code of ours, which
    is written beside. `calibration` is the text that methods read; it runs on `device`. Nothing is written in a
    `dry_run` but the plan, if `save_plan` says where; the report's `plan` holds it too.

    Raises the errors of `meo_hf.errors`, as `convert` does.
    """
    if (method is None) == (plan is None):
        raise UsageError("give either a --method, or a --plan that one made")
    decides = {"--layers": layers != "all", "--top-k": top_k is not None, "--calibration": calibration is not None}
    if plan is not None and (idle := [option for option, given in decides.items() if given]):
        raise UsageError(f"{idle[0]} has no effect on a --plan, which holds what was decided: leave it out")
    if top_k is not None and top_k < 1:
        raise UsageError(f"--top-k {top_k} is too small: give a whole number >= 1")
    place = None if save_plan is None else _plan_place(Path(save_plan).expanduser(), os.fspath(source), overwrite)
    if verify not in MODES:
        raise UsageError(f"--verify {verify!r} is unknown: give one of {', '.join(MODES)}")
    check_shard_size(max_shard_size)
    check_device(device)
    check_push(push_to_hub, private, push_revision, commit_message)
    output, name = Path(output).expanduser().absolute(), os.fspath(source)
    read = SourceOptions(source_revision, token, trust_remote_code, allow_pickle)
    if not dry_run:
        check_output(output, overwrite, [name])
        if push_to_hub is not None:
            check_login(push_to_hub, private, token)
    with ExitStack() as stack:
        opened = open_source(name, read)
        stack.callback(opened.close)
        if not isinstance(opened.family, MoeFamily):
            raise UnsupportedError(f"{name} is dense: only a mixture of experts has experts to reduce")
        work = Workbench(opened, layers, top_k, calibration, device, progress, read)
        start = time.perf_counter()
        decided = _decide(work, method, plan)
        outcome = outcome_of(opened, work.family, decided, work.mixture)
        licenses = licenses_of([opened])
        license_ = resolve_license(licenses, license)
        made = application_of(work, decided, outcome)
        report = _report(work, decided, outcome, made, output)
        report.decide_seconds = round(time.perf_counter() - start, 3)
        report.licenses, report.dry_run = licenses, dry_run
        report.plan = decided
        reading = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
        report.options = {"copy": copy, "max_shard_size": max_shard_size, **reading}
        if copy and made is not None:
            report.warnings.append("--copy had no effect: the weights change, so they are written anew")
        if max_shard_size != SHARD_SIZE and made is None:
            report.warnings.append("--max-shard-size had no effect: the weights do not change, so their files stay")
        if place is not None:
            _save_plan(decided, place)
        if dry_run:
            return report
        check_space(output, report.bytes_to_write)
        with written_beside(output, overwrite) as folder:
            _write(work, outcome, made, folder, report, copy, max_shard_size)
            decided.save(folder / PLAN_NAME)
            if verify != "none":
                progress.stage(f"checking ({verify})", opened.nbytes)
                found = verify_reduction(opened, decided, work.mixture, outcome, made, folder, verify)
                report.verification, report.checks = found
            write_card(report, decided, opened, license_, folder)
            report.save(folder)
            if not report.passed:
                failed = next(check for check in report.checks if not check.passed)
                kept = keep_failed(folder, output)
                raise CheckFailedError(
                    f"reduced, but a check failed: {failed.name} ({failed.detail}); the output is kept as {kept}"
                )
    if push_to_hub is not None:
        progress.stage("pushing", report.bytes_to_write)
        message = commit_message or f"{opened.public_name} with fewer experts"
        push_folder(output, push_to_hub, private=private, revision=push_revision, message=message, token=token)
    return report


def _plan_place(path: Path, source: str, overwrite: bool) -> Path:
    """Return where a plan is to be saved; raises UsageError where that cannot be, before anything costs time."""
    if path.is_dir() or not path.parent.is_dir() or path.suffix == ".matrices":
        raise UsageError(f"--save-plan {path}: name a file like plan.json, in a folder that exists")
    if Path(source).expanduser().resolve() in path.resolve().parents:
        raise UsageError(f"--save-plan {path} is in the source's folder, which is never written to: name another place")
    if not overwrite and (old := next((one for one in (path, path.with_suffix(".matrices")) if one.exists()), None)):
        raise UsageError(f"--save-plan: {old} exists: name another file, or pass --overwrite")
    return path


def _save_plan(plan: ReductionPlan, path: Path) -> None:
    try:
        plan.save(path)
    except OSError as error:
        raise OutputError(f"--save-plan {path} cannot be written ({error.strerror}): give another place") from None


def _decide(work: Workbench, method: Method | None, plan: Any) -> ReductionPlan:
    if method is not None:
        return method.decide(work)
    known = plan if isinstance(plan, ReductionPlan) else ReductionPlan.load(Path(plan).expanduser())
    if known.source.get("fingerprint") != work.fingerprint:
        raise UsageError(
            f"--plan was made for {known.source.get('id')}, whose weight files differ from {work.source.name}'s: make "
            "a plan of this one"
        )
    return known


def application_of(work: Workbench, plan: ReductionPlan, outcome: Outcome) -> Application | None:
    """Return what to write, None where no weight changes; raises MeoConfigError for a model that cannot be made."""
    if not plan.blocks and not outcome.is_own:
        return None
    made = meta_model(outcome.model_class, outcome.config)
    if not plan.blocks:
        return None
    joined = JoinedBlocks(work.source, work.family, work.mixture, plan.matrices)
    parted = PartedBlocks(joined, plan.blocks)
    return apply_plan(work.source, work.family, plan, work.mixture, work.stock, made, joined.tensor, parted)


def _report(
    work: Workbench, plan: ReductionPlan, outcome: Outcome, made: Application | None, output: Path
) -> ReductionReport:
    source = work.source
    before = sum(ref.spec.numel for ref in source.tensors.values())
    specs = (
        [ref.spec for ref in source.tensors.values()] if made is None else [spec for spec, _ in made.targets.values()]
    )
    old_k = top_k_of(source.config, work.family)
    warnings = []
    capacity = getattr(source.config, "expert_capacity", None)
    if capacity is not None and outcome.counts != work.mixture.blocks:
        warnings.append(
            f"each expert takes at most {capacity} tokens of a row (expert_capacity), and fewer share them now: "
            "more tokens may pass by; raise it in config.json where rows are long"
        )
    if made is not None and made.left_out:
        warnings.append(
            f"{len(made.left_out)} tensors that {source.model_class().__name__} does not load were left out, e.g. "
            f"{made.left_out[0]}"
        )
    if work.calibration is not None and not work.has_read:
        warnings.append("the calibration text was not read: this method needs none")
    if work.device != "cpu" and not work.has_read:
        warnings.append(f"--device {work.device} had no effect: no text was read")
    for path, experts in work.untouched.items():
        warnings.append(
            f"no token of the calibration text reached {len(experts)} of {work.mixture.blocks[path]} experts of "
            f"{path}: {', '.join(map(str, experts))}"
        )
    if outcome.why_own is not None:
        warnings.append(f"the result needs code of ours (it is written beside): {outcome.why_own}")
    return ReductionReport(
        source=source_entry(source),
        output=str(output),
        family=work.family.model_type,
        model_class=outcome.model_class.__name__,
        method=plan.method,
        options={},
        blocks={path: [had, outcome.counts[path]] for path, had in work.mixture.blocks.items()},
        top_k=[old_k, plan.top_k or old_k],
        why_own=outcome.why_own,
        parameters_before=before,
        parameters_after=sum(spec.numel for spec in specs),
        bytes_to_write=sum(spec.nbytes for spec in specs),
        skip=plan.skip,
        calibration=plan.calibration,
        left_out=[] if made is None else made.left_out,
        untouched=work.untouched,
        warnings=warnings,
        versions=versions(),
    )


def _write(
    work: Workbench, outcome: Outcome, made: Application | None, folder: Path, report: ReductionReport, copy: bool,
    max_shard_size: str,
) -> None:  # fmt: skip
    start, source, advance = time.perf_counter(), work.source, work.progress.advance
    if made is None:
        report.weights = "copy" if copy or not can_link(source, folder) else "link"
        work.progress.stage("copying" if report.weights == "copy" else "linking", source.nbytes)
        report.files = place_weights(source, folder, copy, advance)
        copied = sum(file["bytes"] for file in report.files.values() if file["how"] == "copied")
        report.bytes_to_write = copied
    else:
        work.progress.stage("writing", report.bytes_to_write)
        shards = write_tensors(made.targets, folder, max_shard_size, advance)
        report.files = {shard.name: {"bytes": shard.nbytes, "sha256": shard.sha256} for shard in shards}
        report.factorised = made.parted.losses()
    outcome.config.save_pretrained(folder)
    report.code = {path.name: {"sha256": sha256_of(path)} for path in sorted(folder.glob("*.py"))}
    for lost in write_companions(source, folder):
        report.warnings.append(f"not carried over: {lost}")
    report.write_seconds = round(time.perf_counter() - start, 3)


def reduction_method(name: str, options: dict[str, Any], seed: int | None = None) -> Method:
    """Return the method of a name with options as the command takes them; those that are None take its defaults.

    Text is read as the type of the method's field. `seed` is for methods that draw something.

    Raises UsageError for an unknown method, and for an option that the method does not have, or lacks.
    """
    if name not in METHODS:
        raise UsageError(f"--method {name!r} is unknown: give one of {', '.join(METHODS)}")
    kind: Any = METHODS[name]
    given = {key: value for key, value in options.items() if value is not None}
    known, hints = {f.name: f.default for f in fields(kind)}, get_type_hints(kind)
    if idle := sorted(set(given) - set(known)):
        raise UsageError(f"--{idle[0].replace('_', '-')} has no effect on --method {name}: leave it out")
    if lacking := [key for key, default in known.items() if default is MISSING and key not in given]:
        raise UsageError(f"--method {name} needs --{lacking[0].replace('_', '-')}")
    read = {key: _read(key, value, hints[key]) for key, value in given.items()}
    return kind(**read, **({"seed": seed} if seed is not None and "seed" in known else {}))


def _read(key: str, value: Any, hint: Any) -> Any:
    """Read an option's text as a number or a truth value where its field wants one."""
    kinds = [kind for kind in (bool, int, float) if kind is hint or kind in get_args(hint)]
    if not isinstance(value, str) or not kinds or str in get_args(hint):
        return value
    try:
        return {"true": True, "false": False}[value.lower()] if kinds[0] is bool else kinds[-1](value)
    except (KeyError, ValueError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kinds[-1]]
        raise UsageError(f"--{key.replace('_', '-')} is {value!r}: give {wanted}") from None
