"""Ways of pruning that judge what is left as a whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from meo_hf.errors import UsageError
from meo_hf.reduction.reconstruction import Reconstruction
from meo_hf.reduction.rerouting import SubsetRouters, rerouted
from meo_hf.reduction.subsets import SubsetSearch
from meo_hf.reduction.workbench import Workbench

if TYPE_CHECKING:
    from meo_hf.reduction.methods.prune import Prune

BEAM = 4
Kept = dict[str, list[int]]
Notes = dict[str, Any]


def reconstruction(work: Workbench, method: Prune, counts: dict[str, int]) -> tuple[Kept, Notes]:
    """Keep the experts with which each block's answers change least; later blocks may see what earlier ones lost."""
    if few := [path for path, count in counts.items() if count < 2]:
        raise UsageError(
            f"--score reconstruction reroutes tokens among at least 2 experts, {few[0]} would keep 1: keep more, or "
            "take another --score"
        )
    routers = SubsetRouters(work.model, work.family, work.mixture)
    batches, width = len(work.rows.batches()), BEAM if method.beam is None else method.beam
    rounds = [[path] for path in work.limits] if method.progressive else [list(work.limits)]
    found: dict[str, SubsetSearch] = {}
    with ExitStack() as stack:
        for paths in rounds:
            wanted = {path: counts[path] for path in paths}
            observer = Reconstruction(routers, work.limits, wanted, batches, width)
            work.observe(observer, blocks=paths)
            found |= observer.found
            if method.progressive:
                stack.enter_context(rerouted(work.model, routers, paths[0], found[paths[0]].kept))
    notes = {path: {"loss": one.loss, "how": one.how} for path, one in found.items()}
    return {path: list(found[path].kept) for path in work.limits}, notes


SUBSETS: dict[str, Callable[[Workbench, Prune, dict[str, int]], tuple[Kept, Notes]]] = {
    "reconstruction": reconstruction,
}
