"""What a conversion did, as data: `meo_report.json` beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from meo_hf.conversion.adapter_bank import AdapterBank
from meo_hf.conversion.factorise import Factorised
from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.plan import Plan
from meo_hf.conversion.source import Source
from meo_hf.errors import CheckpointError
from meo_hf.version import versions

REPORT_NAME = "meo_report.json"


@dataclass
class Check:
    """One check of a conversion: what was compared, how far apart it was, and what is allowed."""

    name: str
    passed: bool
    detail: str


@dataclass
class ConversionReport:
    """What was converted, how, and what was checked.

    Sizes are bytes, times seconds. FLOPs are per token, of all linear maps (attention scores left out), for
    groups of `tokens_per_merge` tokens with merging charged as top_k * |W| per group. `weights` says how they came to
    the output: `rewrite`, or for a mixture of experts also `link`, `copy` or `reference`; `alignment` holds, per layer,
    the experts' distance before and after, `factorised`, per linear map, what a low rank left out of them, `routed`,
    where routers are made of examples, the share of held-out pieces that the model sends to their own expert.
    """

    source: dict[str, Any]
    output: str
    family: str
    model_class: str
    meo: dict[str, Any]
    options: dict[str, Any]
    layers: list[int]
    parameters_before: int
    parameters_after: int
    flops_dense: int
    flops_meo: int
    bytes_read: int
    bytes_to_write: int
    working_memory: int
    tensors: dict[str, Any]
    experts: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_merge: int = 128
    write_seconds: float | None = None
    weights: str = "rewrite"
    alignment: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    factorised: list[dict[str, Any]] = field(default_factory=list)
    routed: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    verification: str = "none"
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    licenses: dict[str, str | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether the source was a mixture of experts, which keeps its experts and its router."""
        return "gate_scope" not in self.meo

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)

    def save(self, folder: Path) -> None:
        """Write `meo_report.json`."""
        (folder / REPORT_NAME).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> ConversionReport:
        """Read `meo_report.json`; raises CheckpointError if there is none or it is damaged."""
        path = folder / REPORT_NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {REPORT_NAME}: it was not written by meo-hf convert")
        try:
            values = json.loads(path.read_text("utf-8"))
            values["checks"] = [Check(**check) for check in values["checks"]]
            return cls(**{key: values[key] for key in values.keys() & {f.name for f in fields(cls)}})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error})") from None


def report_of(plan: Plan, output: Path, options: dict[str, Any]) -> ConversionReport:
    """Describe a plan that was not applied yet."""
    before, after = plan.parameters
    return ConversionReport(
        source=source_entry(plan.source),
        output=str(output),
        family=plan.source.family.model_type,
        model_class=plan.model_class.__name__,
        meo=dict(plan.settings),
        options=options,
        layers=plan.layers,
        parameters_before=before,
        parameters_after=after,
        flops_dense=plan.dense_flops,
        flops_meo=plan.dense_flops + plan.part_flops + plan.merge_flops // plan.tokens_per_merge,
        tokens_per_merge=plan.tokens_per_merge,
        bytes_read=plan.source.nbytes,
        bytes_to_write=plan.nbytes,
        working_memory=plan.working_memory,
        tensors={
            "copied": len(plan.copied),
            "expert_stacks": len(plan.expanded),
            "new": len(plan.created),
            "carried_unknown": plan.carried,
            "ignored_by_design": plan.ignored,
            "newly_initialised_on_load": plan.missing,
        },
        experts=[{"id": one.lasting_name, "commit": one.commit} for one in plan.experts],
        adapters=[] if plan.adapters is None else [adapter_entry(one) for one in plan.adapters.adapters],
        warnings=[
            *warnings_of(plan.missing, plan.carried, plan.source.model_class().__name__),
            *([] if plan.adapters is None else adapter_warnings(plan.adapters, plan.source)),
            *([] if plan.bank is None else size_warnings(plan.bank.maps)),
        ],
        versions=versions(),
    )


def source_entry(source: Source) -> dict[str, Any]:
    """Return what a report says of a source."""
    return {"id": source.lasting_name, "commit": source.commit, "format": source.format}


def adapter_entry(adapter: LoraSource) -> dict[str, Any]:
    """Return what a report says of an adapter."""
    return {
        "id": adapter.lasting_name,
        "commit": adapter.commit,
        "task": adapter.task,
        "base": adapter.base,
        "ranks": adapter.ranks,
        "linear_maps": len(adapter.parts),
    }


def adapter_warnings(bank: AdapterBank, source: Source) -> list[str]:
    """Return remarks on adapters of another base, and on parts that do not stay apart."""
    warnings = []
    for adapter in bank.adapters:
        known = Path(adapter.base or "").name
        if known and known.lower() != source.public_name.rpartition("/")[2].lower():
            warnings.append(
                f"adapter {adapter.public_name} says that it was trained on {known}, not on {source.public_name}"
            )
    if bank.merged:
        warnings.append(
            f"{len(bank.merged)} linear maps outside of the feed-forwards got the mean of the adapters' parts: no row "
            "computes what one adapter alone does"
        )
    return warnings


def size_warnings(maps: Mapping[str, Factorised]) -> list[str]:
    """Return a remark on linear maps whose parts are larger than whole experts would be."""
    shapes = [(one.rank, *one.shape) for one in maps.values()]
    large = [
        1 for rank, count, rows, columns in shapes if count * rank * (rows + columns) > (count - 1) * rows * columns
    ]
    if not large:
        return []
    return [f"{len(large)} of {len(maps)} linear maps take more memory as parts than as whole experts: lower the rank"]


def losses_of(maps: Mapping[str, Factorised]) -> list[dict[str, Any]]:
    """Return per linear map what its rank left out."""
    return [{"map": path, **asdict(one.loss)} for path, one in maps.items() if one.loss is not None]


def warnings_of(missing: list[str], carried: list[str], model_class: str) -> list[str]:
    """Return a report's remarks on tensors that have no partner."""
    warnings = []
    if missing:
        warnings.append(
            f"{len(missing)} tensors are in no source file and will be newly initialised on load, as stock does "
            f"with this source: {_some(missing)}"
        )
    if carried:
        warnings.append(f"{len(carried)} tensors unknown to {model_class} were carried over: {_some(carried)}")
    return warnings


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
