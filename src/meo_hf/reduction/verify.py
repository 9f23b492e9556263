"""Run the checks of a reduction again."""

from __future__ import annotations

import os
from pathlib import Path

from meo_hf.conversion.convert import unchanged
from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.report import Check
from meo_hf.conversion.source import open_source
from meo_hf.reduction.outcome import outcome_of
from meo_hf.reduction.plan import ReductionPlan
from meo_hf.reduction.reduce import PLAN_NAME, application_of
from meo_hf.reduction.report import ReductionReport
from meo_hf.reduction.verification import verify_reduction
from meo_hf.reduction.workbench import Workbench


def verify_reduced(folder: str | os.PathLike[str], mode: str = "full", token: str | None = None) -> ReductionReport:
    """Return a reduction's report with fresh checks: files by their sha256, then the plan that lies beside them.

    Raises SourceError if the source is gone, CheckFailedError never: look at `report.passed`.
    """
    folder = Path(folder).expanduser().absolute()
    report = ReductionReport.load(folder)
    recorded = {**report.files, **report.code}
    wrong = [name for name, kept in recorded.items() if not unchanged(folder / name, kept)]
    detail = f"{len(recorded)} files" if not wrong else f"changed or missing: {', '.join(wrong)}"
    report.checks = [Check("files are as recorded", not wrong, detail)]
    if wrong:
        return report
    plan = ReductionPlan.load(folder / PLAN_NAME)
    reading = (report.options["trust_remote_code"], report.options["allow_pickle"])
    source = open_source(report.source["id"], SourceOptions(report.source["commit"], token, *reading))
    try:
        work = Workbench(source, top_k=plan.top_k)
        outcome = outcome_of(source, work.family, plan, work.mixture)
        made = application_of(work, plan, outcome)
        found = verify_reduction(source, plan, work.mixture, outcome, made, folder, mode)
        report.verification, checks = found
        report.checks += checks
    finally:
        source.close()
    return report
