"""Low-rank experts: all stay, and each is kept as what they share, a low-rank part and perhaps a few columns.

Legend: E experts, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from meo_hf.errors import UsageError
from meo_hf.reduction.decomposing import heaviest_columns
from meo_hf.reduction.joined import JoinedBlocks
from meo_hf.reduction.parted import PartedBlocks, expert_maps
from meo_hf.reduction.plan import BlockPlan, MapParts, ReductionPlan, one_hot
from meo_hf.reduction.rank_budget import apportion, map_budget, smoothed
from meo_hf.reduction.statistics import Frequency, Reap, Statistic
from meo_hf.reduction.workbench import Workbench

CENTERS = ("none", "mean")
IMPORTANCE: dict[str, type[Statistic]] = {"frequency": Frequency, "reap": Reap}
RANKS_BY = ("uniform", *IMPORTANCE)


@dataclass(frozen=True)
class LowRank:
    """Keep a `share` of the parameters of each linear map of each block's experts: W_e = W_0 + B_e A_e + S_e.

    W_0 is nothing, or the experts' mean (`center`), which pays where experts come from one. Ranks are `uniform`, or say
    how important experts are, as MoE-I2's second stage does (arXiv 2411.01016): by the `frequency` with which text
    selects them, or by `reap` (arXiv 2510.13999). How importance becomes ranks is ours: half of the budget is divided
    equally, the rest in proportion to importance, and no expert gets a rank at which it would be larger than whole. A
    share `columns` of what W_0 leaves goes to S_e, whole columns of the expert, after MC-SMoE (arXiv 2310.01334, step
    5), divided in the same way. Which columns is ours too: those in which the low-rank part misses most of the weight.
    MC-SMoE ranks them by |s * gradient| and trains afterwards; no gradient and no text is read here. `after` names a
    plan.json, of merging or pruning, that is applied before: the budget is then a share of what it leaves, and an
    expert's importance that of all whom it is made of, or for whom it stands.
    """

    name: ClassVar[str] = "low-rank"
    share: float
    center: str = "none"
    ranks_by: str = "uniform"
    columns: float = 0.0
    after: str | None = None

    def __post_init__(self) -> None:
        for option, known in (("center", CENTERS), ("ranks_by", RANKS_BY)):
            if getattr(self, option) not in known:
                name = option.replace("_", "-")
                raise UsageError(f"--{name} {getattr(self, option)!r} is unknown: give one of {', '.join(known)}")
        if not 0 < self.share < 1:
            raise UsageError(f"--share is {self.share}: give a number above 0, below 1")
        if not 0 <= self.columns < 1:
            raise UsageError(f"--columns is {self.columns}: give a number from 0, below 1")

    def decide(self, work: Workbench) -> ReductionPlan:
        """Divide the budget, and find columns."""
        before = self._before(work)
        joined = JoinedBlocks(work.source, work.family, work.mixture, before.matrices)
        equal = {path: [1.0] * before.blocks[path].count for path in work.limits}
        self._sizes(joined, before, equal)  # before anything costs time
        shares = equal if self.ranks_by == "uniform" else self._shares(work, before)
        sizes = self._sizes(joined, before, shares)
        chosen = {path: replace(before.blocks[path], parts=own) for path, own in sizes.items()}
        blocks = {**before.blocks, **chosen}
        if self.columns:
            blocks |= self._with_columns(work, joined, chosen, shares)
        planned = work.planned(self, blocks)
        if self.after is None:
            return planned
        read = planned.calibration or before.calibration
        return replace(before, method=planned.method, blocks=blocks, calibration=read, notes={"after": before.method})

    def _before(self, work: Workbench) -> ReductionPlan:
        """Return the plan whose experts are decomposed; raises UsageError for one that does not fit."""
        kept = {path: one_hot([*range(one.experts)]) for path, one in work.limits.items()}
        whole = {path: BlockPlan(rows, rows) for path, rows in kept.items()}
        if self.after is None:
            return ReductionPlan({}, {}, whole)
        found = ReductionPlan.load(Path(self.after).expanduser(), "--after")
        if found.source.get("fingerprint") != work.fingerprint:
            raise UsageError(f"--after {self.after} was made for other weights than {work.source.name}'s")
        if work.top_k is not None:
            raise UsageError("--top-k has no effect with --after, whose plan says what is selected: leave it out")
        if any(block.parts for block in found.blocks.values()):
            raise UsageError(f"--after {self.after} keeps experts as parts already: give the plan before it")
        return replace(found, blocks={**whole, **found.blocks})

    def _shares(self, work: Workbench, before: ReductionPlan) -> dict[str, list[float]]:
        """Return what each new expert of each block gets of a budget, by its importance."""
        observer = IMPORTANCE[self.ranks_by]()
        work.observe(observer)
        found = observer.result()
        made = {}
        for path in work.limits:
            block, scores = before.blocks[path], found[path].tolist()
            own = [[old for old, _ in row] for row in block.experts]
            if block.stands_for is not None:
                own = [[old for old, new in enumerate(block.stands_for) if new == at] for at in range(block.count)]
            made[path] = smoothed([sum(scores[old] for old in members) for members in own])
        return made

    def _sizes(
        self, joined: JoinedBlocks, before: ReductionPlan, shares: dict[str, list[float]]
    ) -> dict[str, dict[str, MapParts]]:
        """Return ranks by block and linear map."""
        made: dict[str, dict[str, MapParts]] = {}
        for path, own in shares.items():
            place, module = joined.experts_of(path)
            for name, (_, outputs, inputs) in expert_maps(module, place).items():
                shape = (before.blocks[path].count, outputs, inputs)
                budget = map_budget(name, shape, self.share, self.center == "mean", self.columns)
                ranks = apportion(budget.ranks, own, budget.largest_rank)
                made.setdefault(path, {})[name] = MapParts(self.center == "mean", tuple(ranks), ((),) * shape[0])
        return made

    def _with_columns(
        self, work: Workbench, joined: JoinedBlocks, blocks: dict[str, BlockPlan], shares: dict[str, list[float]]
    ) -> dict[str, BlockPlan]:
        """Return the blocks with columns, by what their experts' low-rank parts miss."""
        parted = PartedBlocks(joined, blocks)
        work.progress.stage("choosing columns", len(parted.maps))
        made = {}
        for path, block in blocks.items():
            parts = {}
            for name, own in block.parts.items():
                one = parted.maps[name]
                experts = one.experts()
                budget = map_budget(name, experts.shape, self.share, own.shared, self.columns)  # type: ignore[arg-type]
                counts = apportion(budget.columns, shares[path], budget.largest_columns)
                found = heaviest_columns(experts, one.shared(), own.ranks, counts)
                parts[name] = replace(own, columns=tuple(map(tuple, found)))
                work.progress.advance(1)
            made[path] = replace(block, parts=parts)
        return made
