"""Check a reduced mixture: every byte against the plan, then its behaviour in a process without meo_hf."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedConfig

from meo_hf.conversion.linking import weight_files
from meo_hf.conversion.moe_plan import moe_family
from meo_hf.conversion.names import live_names
from meo_hf.conversion.report import Check
from meo_hf.conversion.source import Source, auto_class_of, first_line, index_tensors, meta_model
from meo_hf.conversion.verification import bytes_check, run_child
from meo_hf.modeling.reference_meo import fingerprint
from meo_hf.reduction.applied import Application
from meo_hf.reduction.counted import Counted, Mixture
from meo_hf.reduction.joined import stack_name
from meo_hf.reduction.outcome import Outcome
from meo_hf.reduction.parts_check import parts_check
from meo_hf.reduction.plan import BlockPlan, ReductionPlan

_CHILD = Path(__file__).with_name("verification_child.py")
_WRITERS = ("transformers_version", "_name_or_path", "auto_map")
_ROUNDING = {"F64": 1e-12, "F32": 1e-5, "F16": 2e-3, "BF16": 1.6e-2}


def verify_reduction(
    source: Source, plan: ReductionPlan, mixture: Mixture, outcome: Outcome, made: Application | None, folder: Path,
    mode: str,
) -> tuple[str, list[Check]]:  # fmt: skip
    """Return the mode that was possible and its checks; `full` loads both models, `sample` compares files alone.

    `made` is None where the weight files are the source's own.
    """
    written = index_tensors(folder)
    if made is not None:
        plain = {disk: target for disk, target in made.targets.items() if disk not in made.parts}
        checks = [bytes_check(plain, {disk: ref for disk, ref in written.items() if disk not in made.parts})]
        if made.parts and checks[0].passed:
            checks.append(parts_check(made.parted, meta_model(outcome.model_class, outcome.config), written))
    else:
        pairs = [(path, folder / path.name) for path in weight_files(source)]
        same = all(ours.is_file() and fingerprint(ours) == fingerprint(theirs) for theirs, ours in pairs)
        checks = [Check("the weight files are the source's", same, f"{len(pairs)} file(s), by size and header")]
    checks.append(config_check(outcome.config, folder))
    stock = source.meta_model()
    state, missing = set(stock.state_dict()), set(live_names(stock, source.tensors, computed=True).values())
    lacking = sorted(state - missing - set(stock.all_tied_weights_keys))
    if mode == "full" and not _fits(source):
        mode = "sample"
    if not all(check.passed for check in checks):
        return mode, checks
    if mode == "sample":
        return mode, [*checks, _names_check(outcome, written, lacking)]
    request = _request(source, plan, mixture, outcome, folder, lacking)
    request["parts"] = [] if made is None else sorted(set(made.parts.values()))
    return mode, [*checks, *run_child(_CHILD, request)]


def config_check(config: PreTrainedConfig, folder: Path) -> Check:
    """The config is what the plan makes of the source's, whatever version of Transformers wrote it."""
    name = "config.json is what the plan makes of the source's"
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
        ours, theirs = (_values(config, one) for one in (json.loads(config.to_json_string()), found))
    except Exception as error:  # a config class raises what its author chose
        return Check(name, False, first_line(error))
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return Check(name, not differing, f"{len(ours)} values" if not differing else f"differing: {', '.join(differing)}")


def _values(config: PreTrainedConfig, stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored config's values with today's defaults, without what says who wrote it."""
    values: dict[str, Any] = type(config).from_dict(stored).to_dict()
    kept = {key: value for key, value in values.items() if key not in _WRITERS}
    return json.loads(json.dumps(kept | {"meo": {**kept.get("meo", {}), "meo_hf_version": None}}, default=str))  # type: ignore[no-any-return]


def _fits(source: Source) -> bool:
    """Whether source and output fit in memory as fp32."""
    parameters = sum(ref.spec.numel for ref in source.tensors.values())
    return 8 * parameters + 2**30 < 0.8 * psutil.virtual_memory().available


def _names_check(outcome: Outcome, written: dict[str, Any], lacking: list[str]) -> Check:
    """Every tensor of the model is in the files, by headers alone."""
    model = meta_model(outcome.model_class, outcome.config)
    found = set(live_names(model, written, computed=True).values())
    lost = sorted(set(model.state_dict()) - found - set(model.all_tied_weights_keys) - set(lacking))
    detail = f"missing: {lost[:3]}" if lost else f"{len(written)} tensors; no model was loaded"
    detail += f"; the source lacks {len(lacking)} too, e.g. {lacking[0]}" if lacking else ""
    return Check("every tensor of the model is in the files", not lost, detail)


def _request(
    source: Source, plan: ReductionPlan, mixture: Mixture, outcome: Outcome, folder: Path, lacking: list[str]
) -> dict[str, Any]:
    family = moe_family(source)
    stock = source.model_class().__name__
    changed: dict[str, Any] = {}
    modules: dict[str, dict[int, str]] = {}
    for one in mixture.tensors.values():
        block = plan.blocks.get(one.block)
        name = one.kind or one.live
        if one.number is not None:
            modules.setdefault(one.kind, {})[one.number] = one.live
        if block is not None and (one.of_experts or block.router is not None):
            changed[name] = _change(one, block)
    codes = {ref.spec.dtype for ref in source.tensors.values()}
    return {
        "mode": "full",
        "source": str(source.loadable),
        "output": str(folder),
        "own": outcome.is_own,
        "kind": family.kind,
        "stock_class": stock,
        "auto_class": auto_class_of(source.config.model_type, stock),
        "missing": lacking,
        "changed": changed,
        "modules": {kind: [names[number] for number in sorted(names)] for kind, names in modules.items()},
        "stacks": {kind: stack_name(kind, family) for kind in modules},
        "parts": [],
        "rounding": max(_ROUNDING.get(code, 0.0) for code in codes),
    }


def _change(one: Counted, block: BlockPlan) -> dict[str, Any]:
    rows = block.experts if one.of_experts else block.router
    computed = one.of_experts and block.how != "mean"
    return {"rows": None if computed else rows, "experts": one.experts, "axis": one.axis, "per": one.per}
