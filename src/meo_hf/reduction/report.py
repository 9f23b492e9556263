"""What a reduction did, as data: `meo_report.json` beside the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from meo_hf.conversion.report import REPORT_NAME, Check
from meo_hf.errors import CheckpointError
from meo_hf.reduction.plan import ReductionPlan

KIND = "reduction"


@dataclass
class ReductionReport:
    """What was reduced, how, and what was checked.

    `blocks` holds per block the numbers of experts before and after; sizes are bytes, times seconds. `why_own` is the
    reason why the result needs code of ours, None where it is an ordinary checkpoint of its family. `factorised` holds
    per linear map that is kept as parts their size, and the relative error of its experts. `files` are the weights,
    `code` the Python files beside them, by their sha256. `plan` is what was applied; it lies in a file of its own.
    """

    source: dict[str, Any]
    output: str
    family: str
    model_class: str
    method: dict[str, Any]
    options: dict[str, Any]
    blocks: dict[str, list[int]]
    top_k: list[int]
    why_own: str | None
    parameters_before: int
    parameters_after: int
    bytes_to_write: int
    weights: str = "rewrite"
    skip: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)
    untouched: dict[str, list[int]] = field(default_factory=dict)
    factorised: list[dict[str, Any]] = field(default_factory=list)
    decide_seconds: float | None = None
    write_seconds: float | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, dict[str, Any]] = field(default_factory=dict)
    verification: str = "none"
    checks: list[Check] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    licenses: dict[str, str | None] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    kind: str = KIND
    plan: ReductionPlan | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(check.passed for check in self.checks)

    def save(self, folder: Path) -> None:
        """Write `meo_report.json`."""
        values = {key: value for key, value in asdict(replace(self, plan=None)).items() if key != "plan"}
        (folder / REPORT_NAME).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> ReductionReport:
        """Read `meo_report.json`; raises CheckpointError if it is damaged or of something else."""
        path = folder / REPORT_NAME
        try:
            values = json.loads(path.read_text("utf-8"))
            if values["kind"] != KIND:
                raise ValueError(f"it is of a {values['kind']}")
            str(values["source"]["id"]), values["source"]["commit"], dict(values["files"]).items()
            bool(values["options"]["trust_remote_code"]), bool(values["options"]["allow_pickle"])
            values["checks"] = [Check(**check) for check in values["checks"]]
            return cls(**{key: values[key] for key in values.keys() & {f.name for f in fields(cls)}})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no report of meo-hf reduce ({error})") from None


def is_reduction(folder: Path) -> bool:
    """Return whether a folder was written by `meo-hf reduce`."""
    try:
        return json.loads((folder / REPORT_NAME).read_text("utf-8")).get("kind") == KIND
    except (OSError, ValueError, AttributeError):
        return False
