"""Static merging: experts that are alike become one, for good.

Legend: E experts of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from meo_hf.conversion.alignment import solver
from meo_hf.errors import UsageError
from meo_hf.reduction.budget import BUDGETS, Limits, parse_keep, uniform_counts
from meo_hf.reduction.down_fit import DownFit
from meo_hf.reduction.grouping import (
    Groups,
    adaptive_counts,
    by_agglomeration,
    by_dominant,
    by_k_means,
    row_of_group,
    stands_for,
)
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, hash_of
from meo_hf.reduction.statistics import Frequency, LogitSimilarity, MeanOutput
from meo_hf.reduction.workbench import Workbench

GROUPINGS = ("outputs", "logits", "clusters")
HOWS = {"mean": "mean", "aligned": "aligned", "joint-svd": "joint-svd", "least-squares": "given"}
ROUTERS = ("merge", "map")


@dataclass(frozen=True)
class Merge:
    """Group a block's experts, and let each group become one, weighted by how often its members are selected.

    `group_by` takes experts together by the mean of their `outputs` (agglomerative, HC-SMoE, arXiv 2410.08589), by
    router `logits` around the most frequent ones (M-SMoE, arXiv 2310.01334), or by k-means on mean outputs
    (`clusters`, Sub-MoE, arXiv 2506.23266). `join` averages weights as they are (`mean`) or with neurons `aligned`
    (M-SMoE), keeps what members share (`joint-svd`, Sub-MoE), or fits the down projection to what members answer
    (`least-squares`, MergeMoE, arXiv 2510.14436). The router's rows are averaged too (`merge`), or it stays and a map
    says who runs (`map`).
    """

    name: ClassVar[str] = "merge"
    keep: str
    group_by: str = "outputs"
    join: str = "aligned"
    router: str = "merge"
    budget: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        for option, known in (("group_by", GROUPINGS), ("join", HOWS), ("router", ROUTERS), ("budget", BUDGETS)):
            if getattr(self, option) not in known:
                name = option.replace("_", "-")
                raise UsageError(f"--{name} {getattr(self, option)!r} is unknown: give one of {', '.join(known)}")

    def decide(self, work: Workbench) -> ReductionPlan:
        """Group experts by what calibration text shows of them."""
        if self.router == "merge" and (grouped := [p for p, one in work.limits.items() if one.groups > 1]):
            raise UsageError(
                f"the router of {grouped[0]} chooses groups of experts first, and merged ones belong to several: "
                "pass --router map, which leaves the router as it is"
            )
        if self.join == "aligned" or self.group_by == "outputs":
            solver()  # before anything costs time
        frequency, alike = Frequency(), LogitSimilarity() if self.group_by == "logits" else MeanOutput()
        work.observe(frequency, alike)
        often, likeness = frequency.result(), alike.result()
        counts = self._counts(work, often)
        groups = {path: self._groups(likeness[path], often[path], counts[path]) for path in work.limits}
        blocks = {path: self._block(own, often[path]) for path, own in groups.items()}
        matrices = {}
        if self.join == "least-squares":
            fit = DownFit({path: block.experts for path, block in blocks.items()})
            work.observe(fit)
            matrices = {
                f"{path}.{new}": fit.solve(path, new).float()
                for path, block in blocks.items()
                for new, row in enumerate(block.experts)
                if len(row) > 1
            }
        return work.planned(self, blocks, matrices=matrices, given=hash_of(matrices))

    def _counts(self, work: Workbench, frequency: dict[str, Tensor]) -> dict[str, int]:
        free = {path: Limits(one.experts) for path, one in work.limits.items()}  # of routers that stay as they are
        if self.budget == "uniform":
            return uniform_counts(self.keep, free if self.router == "map" else work.limits)
        total = sum(parse_keep(self.keep, one.experts) for one in work.limits.values())
        least = 1 if self.router == "map" else max(one.least for one in work.limits.values())
        return adaptive_counts({path: frequency[path] for path in work.limits}, total, least)

    def _groups(self, alike: Tensor, frequency: Tensor, count: int) -> Groups:
        if self.group_by == "logits":
            return by_dominant(alike, frequency, count)
        if self.group_by == "outputs":
            return by_agglomeration(alike, frequency, count)
        return by_k_means(alike, frequency, count, self.seed)

    def _block(self, groups: Groups, frequency: Tensor) -> BlockPlan:
        rows = tuple(row_of_group(group, frequency) for group in groups)
        if self.router == "map":
            return BlockPlan(rows, stands_for=stands_for(groups), how=HOWS[self.join])
        return BlockPlan(rows, rows, how=HOWS[self.join])
