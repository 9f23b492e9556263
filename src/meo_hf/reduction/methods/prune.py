"""Pruning: each expert gets a score, and those with the lowest go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.budget import BUDGETS, global_counts, highest, uniform_counts
from meo_hf.reduction.methods.scores import SCORES
from meo_hf.reduction.methods.subset_scores import SUBSETS
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, one_hot
from meo_hf.reduction.workbench import Workbench


@dataclass(frozen=True)
class Prune:
    """Keep the best experts, `keep` of each block, or of all together.

    Most scores judge each expert: `reap` (arXiv 2510.13999), `output-norm`, `frequency` and `gate-mass` (SEER-MoE,
    arXiv 2404.05089), `router-norm` (arXiv 2405.16646) and `random`. `reconstruction` (NAEE, arXiv 2402.14800)
    judges what is left as a whole, `progressive`ly if later blocks are to see what earlier ones lost, with a `beam`
    (of width 4) where there are too many subsets.
    """

    name: ClassVar[str] = "prune"
    keep: str
    score: str = "reap"
    budget: str = "uniform"
    pretrained: str | None = None
    progressive: bool = False
    beam: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        known = (*SCORES, *SUBSETS)
        if self.score not in known:
            raise UsageError(f"--score {self.score!r} is unknown: give one of {', '.join(known)}")
        if self.budget not in BUDGETS:
            raise UsageError(f"--budget {self.budget!r} is unknown: give one of {', '.join(BUDGETS)}")
        if self.budget == "global" and self.score in SUBSETS:
            raise UsageError(f"--score {self.score} gives no scores that could be compared: leave --budget global out")
        for option in ("progressive", "beam"):
            if getattr(self, option) not in (None, False) and self.score not in SUBSETS:
                raise UsageError(f"--{option} has no effect on --score {self.score}: leave it out")
        if (self.pretrained is None) == (self.score == "router-norm"):
            needs = "needs --pretrained, the checkpoint before fine-tuning" if self.pretrained is None else ""
            raise UsageError(
                f"--score {self.score} {needs or 'does not read --pretrained: leave it out, or take router-norm'}"
            )

    def decide(self, work: Workbench) -> ReductionPlan:
        """Keep the best experts."""
        if self.score in SUBSETS:
            counts = uniform_counts(self.keep, work.limits)
            kept, notes = SUBSETS[self.score](work, self, counts)
            return work.planned(self, _blocks(kept), notes=notes)
        uniform = self.budget == "uniform"
        counts = uniform_counts(self.keep, work.limits) if uniform else {}  # before anything costs time
        scores = SCORES[self.score](work, self)
        for path, own in scores.items():
            if wrong := [expert for expert, score in enumerate(own) if not math.isfinite(score)]:
                raise CheckpointError(
                    f"--score {self.score} of experts {wrong} of {path} is not finite: check the weights"
                )
        counts = counts or global_counts(self.keep, scores, work.limits)
        kept = {path: highest(scores[path], counts[path], work.limits[path]) for path in work.limits}
        return work.planned(self, _blocks(kept), scores=scores)


def _blocks(kept: dict[str, list[int]]) -> dict[str, BlockPlan]:
    return {path: BlockPlan(one_hot(own), one_hot(own)) for path, own in kept.items()}
