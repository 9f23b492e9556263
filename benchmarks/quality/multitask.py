"""Several classification sets at once: one shared dense encoder, one dense encoder each, and MEO at level `task`.

    python benchmarks/quality/multitask.py

All arms have one head over the union of labels; a row is scored among the labels of its own set. All arms see the same
rows equally often. Of every trained MEO model each task is extracted and scored as a plain dense model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import DENSE, Arm, build, dense_start, parameter_count
from data import CACHE, MODELS, SOURCES, TextSet, fetch, load
from gates import recorded
from ledger import Ledger
from training import Example, Schedule, encoded, fine_tune, logits_of, make_trainer, packed, right_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from meo_hf import extract

MAX_LENGTH = 64
"""Tokens of a text, for all sets. Batches are drawn at random: grouped by length, each would hold one set's rows."""
RATES = (1e-4, 3e-4, 1e-3)
LEDGER = Path(__file__).with_name("multitask.jsonl")
SHARED, EACH = "shared dense", "dense each"
MEO = (Arm("task", 2, "copy"), Arm("task", 4, "copy"))


@dataclass(frozen=True)
class Task:
    """A set whose labels are a range of the common head's."""

    number: int
    text_set: TextSet
    labels: slice

    def part(self, tokenizer: PreTrainedTokenizerBase, name: str, with_id: bool) -> list[Example]:
        """Tokenise a part; MEO is told the task of each row by a column."""
        columns = {"task_ids": self.number} if with_id else {}
        first = self.labels.start
        rows = [(text, first + label) for text, label in getattr(self.text_set, name)]
        return encoded(tokenizer, rows, MAX_LENGTH, **columns)


@dataclass(frozen=True)
class Study:
    """What all runs share."""

    tasks: tuple[Task, ...]
    epochs: int
    rows: int
    cache: Path
    ledger: Ledger

    def key(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """The ledger key of a run."""
        names = [task.text_set.name for task in self.tasks]
        return {"sets": names, "rows": self.rows, "epochs": self.epochs, "arm": arm, "rate": rate, "seed": seed}

    def shared(self, rate: float, seed: int) -> dict[str, Any]:
        """One dense model for all tasks."""
        return self.ledger.measure(
            self.key(SHARED, rate, seed), lambda: self._train(DENSE, self.tasks, rate, seed)
        )  # fmt: skip

    def each(self, task: Task, rate: float, seed: int) -> dict[str, Any]:
        """A dense model for one task."""
        key = {**self.key(EACH, rate, seed), "task": task.text_set.name}
        return self.ledger.measure(key, lambda: self._train(DENSE, (task,), rate, seed))

    def meo(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """A MEO model for all tasks, and what is extracted from it."""
        return self.ledger.measure(
            self.key(arm.name, rate, seed), lambda: self._train(arm, self.tasks, rate, seed)
        )  # fmt: skip

    def _train(self, arm: Arm, tasks: Sequence[Task], rate: float, seed: int) -> dict[str, Any]:
        checkpoint = fetch(MODELS["bert-tiny"], self.cache)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        names = [task.text_set.name for task in self.tasks]
        is_meo = arm.kind == "task"
        train = [example for task in tasks for example in task.part(tokenizer, "train", is_meo)]
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            start = dense_start(checkpoint, self.tasks[-1].labels.stop, seed, scratch / "start")
            model = build(arm, start, scratch, seed, tasks=names)
            trainer, how = fine_tune(model, tokenizer, train, Schedule(rate, self.epochs, seed, sampling="random"))
            scored: dict[str, Any] = {}
            for task in tasks:
                with recorded(model) as record:
                    logits = {
                        name: logits_of(trainer, task.part(tokenizer, name, is_meo)) for name in ("dev", "test")
                    }  # fmt: skip
                scored[task.text_set.name] = _scored(task, logits) | {"gates": record.statistics()}
                if is_meo:
                    model.save_pretrained(scratch / "trained")
                    compared = _extracted(task, tokenizer, scratch, logits["test"])
                    scored[task.text_set.name]["extracted"] = compared
        return {"tasks": scored, **how, "parameters": parameter_count(model)}


def _scored(task: Task, logits: dict[str, np.ndarray]) -> dict[str, Any]:
    rights, losses = {}, {}
    for name, found in logits.items():
        labels = [label for _, label in getattr(task.text_set, name)]
        rights[name], losses[name] = right_rows(found[:, task.labels], labels)
    return {
        "dev": round(float(rights["dev"].mean()), 5),
        "dev_loss": round(losses["dev"], 5),
        "test": round(float(rights["test"].mean()), 5),
        "rows": len(rights["test"]),
        "right": packed(rights["test"]),
    }


def _extracted(
    task: Task, tokenizer: PreTrainedTokenizerBase, scratch: Path, expected: np.ndarray
) -> dict[str, Any]:  # fmt: skip
    """Extract a task as a plain dense model, and compare its test logits with the MEO model's."""
    folder = extract(scratch / "trained", scratch / "extracted", task=task.text_set.name, overwrite=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    trainer: Trainer = make_trainer(model, tokenizer, [], Schedule(1.0, 1, 0), str(scratch / "none"))
    logits = logits_of(trainer, task.part(tokenizer, "test", with_id=False))
    own = [found[:, task.labels].argmax(-1) for found in (logits, expected)]
    return {
        "class": type(model).__name__,
        "parameters": parameter_count(model),
        "differing_predictions": int((own[0] != own[1]).sum()),
        "max_logit_difference": float(np.abs(logits - expected).max()),
    }


def _best(rates: Sequence[float], run: Callable[[float], dict[str, Any]], tasks: Sequence[Task]) -> float:
    """Return the rate with the best mean dev accuracy over tasks, by dev loss among equals."""

    def badness(rate: float) -> tuple[float, float]:
        found = [run(rate)["tasks"][task.text_set.name] for task in tasks]
        return -sum(one["dev"] for one in found), sum(one["dev_loss"] for one in found)

    return min(rates, key=badness)


def make_tasks(names: Sequence[str], rows: int, cache: Path) -> tuple[Task, ...]:
    """Load sets, up to `rows` training rows of each, with their places in the common head."""
    tasks: list[Task] = []
    for number, name in enumerate(names):
        text_set = load(name, cache).limited(rows)
        first = tasks[-1].labels.stop if tasks else 0
        tasks.append(Task(number, text_set, slice(first, first + len(text_set.labels))))
    return tuple(tasks)


def run_all(study: Study, rates: Sequence[float], seeds: int) -> None:
    """Run every arm: the sweep on seed 0, then the other seeds at the chosen rate (of `dense each`: per task)."""
    arms: list[tuple[str, Sequence[Task], Callable[[float, int], dict[str, Any]]]] = [
        (SHARED, study.tasks, study.shared),
        (MEO[0].name, study.tasks, lambda rate, seed: study.meo(MEO[0], rate, seed)),
        *((EACH, (t,), lambda rate, seed, t=t: study.each(t, rate, seed)) for t in study.tasks),
        (MEO[1].name, study.tasks, lambda rate, seed: study.meo(MEO[1], rate, seed)),
    ]
    total, done = len(arms) * (len(rates) + seeds - 1), 0
    for name, tasks, run in arms:
        planned = [(rate, 0) for rate in rates]
        for number in range(len(rates) + seeds - 1):
            if number == len(rates):
                best = _best(rates, lambda rate: run(rate, 0), tasks)  # noqa: B023
                planned += [(best, seed) for seed in range(1, seeds)]
            rate, seed = planned[number]
            found = run(rate, seed)["tasks"]
            done += 1
            accuracy = ", ".join(f"{task} {one['test']:.4f}" for task, one in found.items())
            print(f"[{done}/{total}] {name} rate {rate:g} seed {seed}: test {accuracy}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SOURCES), default=["rotten_tomatoes", "bbc", "tweets"])
    parser.add_argument("--rows", type=int, default=3000, help="keep up to this many training rows of each set")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where fetched packages are kept")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tasks = make_tasks(options.sets, options.rows, options.cache)
    study = Study(tasks, options.epochs, options.rows, options.cache, Ledger(options.ledger))
    run_all(study, options.rates, options.seeds)


if __name__ == "__main__":
    main()
