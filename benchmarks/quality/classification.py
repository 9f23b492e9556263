"""Classification: dense, mixtures of experts, MEO and two controls, by one protocol, resumable.

    python benchmarks/quality/classification.py --sets rotten_tomatoes bbc

Each arm is trained with three learning rates on seed 0 (plan `adapters`: four); the rate with the best dev accuracy is
kept for the other seeds. Test accuracy is reported, and never chosen by.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arms import (
    ADAPTERS,
    DENSE,
    EMBEDDINGS,
    MAIN,
    NUM_EXPERTS,
    SMALL,
    SYMMETRY,
    Arm,
    build,
    dense_start,
    expert_distance,
    parameter_count,
)
from data import CACHE, MODELS, SOURCES, TextSet, fetch, load
from ledger import Ledger
from lora_arms import adapted, merged, trained_count
from training import Example, Schedule, batches, encoded, fine_tune, scores
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

RATES = {"bert-tiny": (1e-4, 3e-4, 1e-3), "minilm": (2e-5, 5e-5, 1e-4)}
ADAPTER_RATES = {"bert-tiny": (3e-4, 1e-3, 3e-3, 1e-2), "minilm": (5e-5, 2e-4, 5e-4, 1e-3)}
LEDGER = Path(__file__).with_name("classification.jsonl")
PLANS = {
    "main": MAIN,
    "symmetry": SYMMETRY,
    "all": MAIN + SYMMETRY,
    "small": SMALL,
    "adapters": ADAPTERS,
    "embeddings": EMBEDDINGS,
}


@dataclass(frozen=True)
class Study:
    """One model on one set: everything that its runs share."""

    model: str
    text_set: TextSet
    epochs: int
    rates: tuple[float, ...]
    rows: int | None
    cache: Path
    ledger: Ledger

    def key(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """The ledger key of a run."""
        shared = {"set": self.text_set.name, "model": self.model, "rows": self.rows, "epochs": self.epochs}
        return {**shared, **arm.key(), "rate": rate, "seed": seed}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(fetch(MODELS[self.model], self.cache))

    def part(self, tokenizer: PreTrainedTokenizerBase, name: str) -> list[Example]:
        """A tokenised part of the set."""
        return encoded(tokenizer, getattr(self.text_set, name), self.text_set.max_length)

    def best_rate(self, arm: Arm) -> float:
        """Return the rate with the best dev accuracy on seed 0, by dev loss among equals; measures what is missing."""
        return min(self.rates, key=lambda rate: _badness(self.run(arm, rate, 0)))

    def run(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """Return the measurement of one run, from the ledger where it is there."""
        expert_rate = self.best_rate(DENSE) if arm.birth == "fine-tunes" else None
        return self.ledger.measure(self.key(arm, rate, seed), lambda: self._measure(arm, rate, seed, expert_rate))

    def _measure(self, arm: Arm, rate: float, seed: int, expert_rate: float | None) -> dict[str, Any]:
        tokenizer = self.tokenizer()
        train = self.part(tokenizer, "train")
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            checkpoint = fetch(MODELS[self.model], self.cache)
            start = dense_start(checkpoint, len(self.text_set.labels), seed, scratch / "start")
            began = time.perf_counter()
            experts = []
            if expert_rate is not None:
                shards = [train[i::NUM_EXPERTS] for i in range(NUM_EXPERTS)]
                schedules = [Schedule(expert_rate, self.epochs, 1000 * (seed + 1) + i) for i in range(NUM_EXPERTS)]
                experts = _fine_tunes(start, tokenizer, shards, schedules, scratch)
            extra = {"extra_seconds": round(time.perf_counter() - began, 1)} if experts else {}
            model = build(arm, start, scratch, seed, batches(tokenizer, train[:256], 32), experts=experts)
            if arm.adapter is not None:
                model = adapted(model, arm.adapter, seed)
                extra |= {"trained": trained_count(model)}
            trainer, how = fine_tune(model, tokenizer, train, Schedule(rate, self.epochs * arm.length, seed))
        scored = scores(trainer, self.part(tokenizer, "dev"), self.part(tokenizer, "test"))
        model = merged(model)
        distance = expert_distance(model)
        return {**scored, **how, **extra, "parameters": parameter_count(model), "expert_distance": distance}


def _badness(result: dict[str, Any]) -> tuple[float, float]:
    return -result["dev"], result["dev_loss"]


def _fine_tunes(
    start: Path,
    tokenizer: PreTrainedTokenizerBase,
    shards: Sequence[Sequence[Example]],
    schedules: Sequence[Schedule],
    scratch: Path,
) -> list[Path]:
    """Fine-tune the start on each shard: together as many steps as one dense run."""
    folders = []
    for number, (shard, schedule) in enumerate(zip(shards, schedules, strict=True)):
        model = build(DENSE, start, scratch, schedule.seed)
        fine_tune(model, tokenizer, shard, schedule)
        model.save_pretrained(scratch / f"expert-{number}")
        folders.append(scratch / f"expert-{number}")
    return folders


def run_all(study: Study, arms: Sequence[Arm], seeds: int) -> Iterator[tuple[Arm, float, int, dict[str, Any]]]:
    """Run all arms: the sweep on seed 0 first, then the other seeds at the chosen rate."""
    for arm in arms:
        for rate in study.rates:
            yield arm, rate, 0, study.run(arm, rate, 0)
        best = study.best_rate(arm)
        for seed in range(1, seeds):
            yield arm, best, seed, study.run(arm, best, seed)


def rates_of(plan: str, model: str) -> tuple[float, ...]:
    """Return the rates that a plan's arms are swept over."""
    if plan == "adapters":
        return ADAPTER_RATES[model]
    return ADAPTER_RATES[model][:3] if plan == "embeddings" else RATES[model]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SOURCES), default=["rotten_tomatoes", "bbc"])
    parser.add_argument("--model", choices=list(MODELS), default="bert-tiny")
    parser.add_argument("--arms", choices=list(PLANS), default="all", help="small: dense, moe, sequence, task, k=2")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="keep this many training rows (default: all)")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates (default: by the model and the arms)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where fetched packages are kept")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arms = PLANS[options.arms]
    rates = tuple(options.rates or rates_of(options.arms, options.model))
    total, done = len(options.sets) * len(arms) * (len(rates) + options.seeds - 1), 0
    for name in options.sets:
        text_set = load(name, options.cache).limited(options.rows)
        study = Study(
            options.model, text_set, options.epochs, rates, options.rows, options.cache, Ledger(options.ledger)
        )  # fmt: skip
        for arm, rate, seed, result in run_all(study, arms, options.seeds):
            done += 1
            line = f"[{done}/{total}] {name} {arm.name} rate {rate:g} seed {seed}"
            print(f"{line}: dev {result['dev']:.4f} test {result['test']:.4f}, {result['train_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
