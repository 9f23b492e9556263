"""How many experts a token really runs where nothing is merged, and where that depends on the text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.unmerged_meo import chosen


@dataclass
class PairTally:
    """Sums over the calls of one MoE block: its tokens, and the pairs of a token and an expert that ran."""

    tokens: int = 0
    pairs: int = 0


def each_runs(model: nn.Module) -> list[tuple[str, Any]]:
    """Return path and module of the experts that run one by one in a model of level `unmerged`."""
    return [(path, module) for path, module in merged_moe(model) if module._context.settings.level == "unmerged"]


def depends_on_text(model: nn.Module) -> bool:
    """Whether the number of experts that a token runs does: some are skipped, or one stands for several."""
    return any(
        module.skips is not None or module._meo.path in (module._context.settings.expert_maps or {})
        for _, module in each_runs(model)
    )


@contextmanager
def tallied_pairs(model: nn.Module) -> Iterator[dict[str, PairTally]]:
    """Within this context count what the experts of a model of level `unmerged` run, by their paths."""
    modules = dict(each_runs(model))
    tallies = {path: PairTally() for path in modules}
    for path, module in modules.items():
        module._run_each = _counting(module, tallies[path], module._run_each)
    try:
        yield tallies
    finally:
        for module in modules.values():
            del module._run_each


def _counting(module: Any, tally: PairTally, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run_and_count(stock: Any, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        selected, gates = (each.reshape(-1, each.shape[-1]) for each in (index, weights))
        found, _, runs = chosen(selected, gates, module.stands_for(index.device), module.skips)
        computes = found < module.count()  # LongCat's others return their input
        tally.tokens += len(found)
        tally.pairs += int((computes if runs is None else computes & runs).sum())
        return own(stock, hidden_states, index, weights)

    return run_and_count


def mean_pairs(tallies: Mapping[str, PairTally]) -> float | None:
    """Return how many experts a token runs per block on average, None where nothing was counted."""
    return statistics.fmean(tally.pairs / tally.tokens for tally in tallies.values()) if tallies else None
