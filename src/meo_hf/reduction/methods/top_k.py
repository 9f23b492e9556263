"""Fewer selected experts: all stay, each token runs the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.reduction.plan import ReductionPlan
from meo_hf.reduction.workbench import Workbench


@dataclass(frozen=True)
class TopK:
    """Change how many experts each token selects, and nothing else."""

    name: ClassVar[str] = "top-k"

    def decide(self, work: Workbench) -> ReductionPlan:
        """Return a plan that changes the config alone."""
        if work.top_k is None:
            raise UsageError("--method top-k needs --top-k, how many experts each token is to select")
        if isinstance(work.family.top_k, int) or not work.family.chooses_top_k:
            raise UnsupportedError(
                f"--method top-k is not possible: the router of {work.family.model_type} fixes how many it selects"
            )
        if work.layers != "all":
            raise UsageError("--layers has no effect on --method top-k, which changes all blocks: leave it out")
        return work.planned(self, {})
