"""Skipping: all experts stay, and those that weigh too little for a token do not run for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from meo_hf.errors import UsageError
from meo_hf.modeling.configuration_meo import SKIPS
from meo_hf.reduction.plan import ReductionPlan
from meo_hf.reduction.statistics import TailRatio
from meo_hf.reduction.workbench import Workbench


@dataclass(frozen=True)
class Skip:
    """Skip selected experts by a rule at run time; the weights stay as they are.

    Without a `threshold`, `ratio` takes each block's median on calibration text: about half of all tokens then skip
    the lighter half of their experts (NAEE, arXiv 2402.14800).
    """

    name: ClassVar[str] = "skip"
    rule: str = "ratio"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in SKIPS:
            raise UsageError(f"--rule {self.rule!r} is unknown: give one of {', '.join(SKIPS)}")
        if self.threshold is None and self.rule != "ratio":
            raise UsageError(f"--rule {self.rule} needs --threshold: the share of all gates that is enough, like 0.8")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold is {self.threshold}: give a number from 0 to 1")

    def decide(self, work: Workbench) -> ReductionPlan:
        """Return a plan that leaves all experts where they are."""
        limit: Any = self.threshold
        if limit is None:
            ratios = TailRatio()
            work.observe(ratios)
            found = ratios.result()
            limit = {path: float(found[path]) for path in work.limits}
        elif set(work.limits) != set(work.mixture.blocks):
            limit = dict.fromkeys(work.limits, limit)
        return work.planned(self, {}, skip={"rule": self.rule, "threshold": limit})
