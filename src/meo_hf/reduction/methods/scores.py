"""What experts are scored by: the higher, the more they are worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from meo_hf.conversion.source import open_source
from meo_hf.errors import UsageError
from meo_hf.reduction.statistics import Frequency, GateMass, OutputNorm, Reap
from meo_hf.reduction.workbench import Workbench

if TYPE_CHECKING:
    from meo_hf.reduction.methods.prune import Prune

Scores = dict[str, list[float]]


def random_scores(work: Workbench, method: Prune) -> Scores:
    """Draw a score for every expert."""
    draw = torch.Generator().manual_seed(method.seed)
    return {path: torch.rand(one.experts, generator=draw).tolist() for path, one in work.limits.items()}


def router_norm_scores(work: Workbench, method: Prune) -> Scores:
    """Score experts by how much the norm of their router row has grown since pre-training (arXiv 2405.16646).

    That is ||w_s after|| - ||w_s before||, signed. Raises UsageError for a checkpoint of another model.
    """
    before = open_source(str(method.pretrained), replace(work.reading, revision=None, trust_remote_code=False))
    try:
        other = Workbench(before, work.layers, work.top_k)
        old, new = other.router_weights(), work.router_weights()
    finally:
        before.close()
    if old.keys() != new.keys() or any(old[path].shape != new[path].shape for path in new):
        raise UsageError(f"--pretrained {method.pretrained} has other blocks or routers than {work.source.name}")
    return {path: (new[path].norm(dim=1) - old[path].norm(dim=1)).tolist() for path in new}


def _observed(make: type) -> Callable[[Workbench, Prune], Scores]:
    def scores(work: Workbench, method: Prune) -> Scores:
        observer = make()
        work.observe(observer)
        found = observer.result()
        return {path: found[path].tolist() for path in work.limits}

    return scores


SCORES: dict[str, Callable[[Workbench, Prune], Scores]] = {
    "reap": _observed(Reap),
    "output-norm": _observed(OutputNorm),
    "frequency": _observed(Frequency),
    "gate-mass": _observed(GateMass),
    "router-norm": router_norm_scores,
    "random": random_scores,
}
