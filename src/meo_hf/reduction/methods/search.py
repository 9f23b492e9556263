"""A search for the experts to keep or merge by what a user measures: EEP (arXiv 2407.00945)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from meo_hf.conversion.source import public_name
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.reduction.budget import uniform_counts
from meo_hf.reduction.candidates import Candidates, judged, metric_of
from meo_hf.reduction.evolution import Candidate, Evolution, Space, evolve, rows_of
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, one_hot
from meo_hf.reduction.workbench import Workbench
from meo_hf.texts import load_tokenizer


@dataclass(frozen=True)
class Search:
    """Evolve which experts each block keeps, then what is merged into them, by a `metric` of yours.

    `metric` is FILE.py:NAME of a function of (model, tokenizer), higher is better; without it, minus the loss on the
    calibration text. `generations` of pruning and of merging are tried, with `population` candidates each. A `state`
    file lets an interrupted search go on. Router rows are mixed as weights, not as gates after the softmax, so that the
    result is an ordinary checkpoint; for pruning both are the same.
    """

    name: ClassVar[str] = "search"
    keep: str
    metric: str | None = None
    generations: str = "40,160"
    population: int = 16
    state: str | None = None
    seed: int = 0

    def decide(self, work: Workbench) -> ReductionPlan:
        """Return the fittest plan."""
        how = self._evolution()
        if work.family.kind == "encoder-decoder" and self.metric is None:
            raise UnsupportedError("the loss of an encoder-decoder is not measured here: give a --metric")
        counts = uniform_counts(self.keep, work.limits)
        metric = metric_of(self.metric, work.rows.batches() if self.metric is None else [])
        tokenizer = load_tokenizer(work.source.folder, work.source.name)
        first = {path: one_hot(list(range(count))) for path, count in counts.items()}
        start = work.planned(self, {path: BlockPlan(rows, rows) for path, rows in first.items()})
        candidates = Candidates(work, start)
        spaces = {
            path: Space(one.experts, counts[path], self._groups(one.experts, one.groups))
            for path, one in work.limits.items()
        }
        total = (how.pruning + how.merging + 1) * how.population
        work.progress.stage("searching", total)

        def fitness(candidate: Candidate) -> float:
            value = judged(metric, candidates.fill(_blocks(candidate)), tokenizer)
            work.progress.advance(1)
            return value

        state = None if self.state is None else Path(self.state).expanduser()
        judge = None if self.metric is None else public_name(self.metric)
        of = {"weights": start.source["fingerprint"], "metric": judge, "text": start.calibration, "top_k": work.top_k}
        found = evolve(spaces, fitness, how, state, of=of)
        notes = {"fitness": found.fitness, "history": list(found.history), "evaluated": found.evaluated}
        return work.planned(self, _blocks(found.best), notes=notes)

    def _evolution(self) -> Evolution:
        try:
            pruning, merging = map(int, self.generations.split(","))
            if min(pruning, merging) < 0:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"--generations {self.generations!r} is not understood: give two numbers from 0, like 40,160"
            ) from None
        if self.population < 1:
            raise UsageError(f"--population {self.population} is too small: give at least 1")
        return Evolution(
            population=self.population,
            parents=max(2, self.population // 2),
            pruning=pruning,
            merging=merging,
            seed=self.seed,
        )

    def _groups(self, experts: int, groups: int) -> tuple[int, ...] | None:
        return None if groups == 1 else tuple(expert // (experts // groups) for expert in range(experts))


def _blocks(candidate: Candidate) -> dict[str, BlockPlan]:
    return {path: BlockPlan(rows_of(experts), rows_of(router)) for path, (experts, router) in candidate.items()}
