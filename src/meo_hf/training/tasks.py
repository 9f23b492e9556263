"""Batches of several tasks: whose rows they are, and how data sets are mixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meo_hf.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

Feature = Mapping[str, Any]


class TaskCollator:
    """Wrap a data collator: take each row's task out of a column, and hand the model `task_ids` [batch].

    The column holds names of `tasks` (those of the model's config, in their order) or their numbers. The Trainer keeps
    a column named `task_ids`; any other it drops, unless `remove_unused_columns=False`.
    Raises UsageError for a row without a task, and for a task that the model does not have.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        tasks: Sequence[str],
        column: str = "task_ids",
    ) -> None:
        self.collator, self.tasks, self.column = collator, tuple(tasks), column

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        """Collate rows; returns the wrapped collator's batch and `task_ids`."""
        numbers = [self._number(row) for row in features]
        batch = self.collator([{k: v for k, v in row.items() if k != self.column} for row in features])
        batch["task_ids"] = torch.tensor(numbers)
        return batch

    def _number(self, row: Feature) -> int:
        if self.column not in row:
            kept = " (the Trainer drops it unless remove_unused_columns=False)" if self.column != "task_ids" else ""
            raise UsageError(f"a row has no column {self.column!r}{kept}; found: {', '.join(row)}")
        task = row[self.column]
        if isinstance(task, str):
            if task not in self.tasks:
                raise UsageError(f"unknown task {task!r}; this model has: {', '.join(self.tasks)}")
            return self.tasks.index(task)
        number = -1 if task is None or int(task) != task else int(task)
        if not 0 <= number < len(self.tasks):
            raise UsageError(f"task {task!r} does not exist; this model has tasks 0 to {len(self.tasks) - 1}")
        return number


def mix(datasets: Mapping[str, Dataset], tasks: Sequence[str], *, temperature: float = 1.0, seed: int = 0) -> Dataset:
    """Mix data sets of several tasks into one, with a column `task_ids`; their columns must agree.

    At `temperature` 1 every row is there once, data set by data set (the Trainer shuffles). Above it, rows are drawn
    with probabilities proportional to size ** (1 / temperature) until every row was drawn, so that small data sets are
    repeated. Raises UsageError for a name that is not one of `tasks`, an empty data set, or a temperature below 1.
    """
    try:
        from datasets import concatenate_datasets, interleave_datasets
    except ImportError as error:
        raise UsageError("mixing needs the package `datasets`: pip install datasets") from error
    if unknown := sorted(set(datasets) - set(tasks)):
        raise UsageError(f"unknown task(s) {', '.join(unknown)}; this model has: {', '.join(tasks)}")
    if empty := [name for name, rows in datasets.items() if not len(rows)]:
        raise UsageError(f"no rows for task(s) {', '.join(empty)}")
    if not datasets or not 1 <= temperature < float("inf"):
        raise UsageError(
            f"temperature is {temperature} for {len(datasets)} data sets; give at least one, and 1 or more"
        )
    columns = {name: sorted(set(rows.column_names) - {"task_ids"}) for name, rows in datasets.items()}
    if len({tuple(names) for names in columns.values()}) > 1:
        found = "; ".join(f"{name} has {', '.join(names)}" for name, names in columns.items())
        raise UsageError(f"the data sets' columns differ: {found}. Rename or remove what differs")
    numbered = [
        rows.remove_columns([c for c in ("task_ids",) if c in rows.column_names]).add_column(
            "task_ids", [list(tasks).index(name)] * len(rows)
        )
        for name, rows in datasets.items()
    ]
    if temperature == 1:
        return concatenate_datasets(numbered)
    sizes = [len(rows) ** (1 / temperature) for rows in numbered]
    shares = [size / sum(sizes) for size in sizes]
    shuffled = [rows.shuffle(seed=seed) for rows in numbered]
    return interleave_datasets(shuffled, shares, seed=seed, stopping_strategy="all_exhausted")
