"""The methods that make mixtures smaller, by name: each decides on a plan, and nothing else."""

from __future__ import annotations

from typing import ClassVar, Protocol

from meo_hf.reduction.methods.low_rank import LowRank
from meo_hf.reduction.methods.merge import Merge
from meo_hf.reduction.methods.prune import Prune
from meo_hf.reduction.methods.search import Search
from meo_hf.reduction.methods.skip import Skip
from meo_hf.reduction.methods.top_k import TopK
from meo_hf.reduction.plan import ReductionPlan
from meo_hf.reduction.workbench import Workbench


class Method(Protocol):
    """Options as fields, all of plain JSON values: the command's options, a plan's, a card's."""

    name: ClassVar[str]

    def decide(self, work: Workbench) -> ReductionPlan:
        """Return what should become of the source's experts."""
        ...


METHODS: dict[str, type] = {method.name: method for method in (Prune, Merge, LowRank, Search, Skip, TopK)}
