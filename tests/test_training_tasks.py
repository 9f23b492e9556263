"""Batches of several tasks: the collator that hands over `task_ids`, and mixing data sets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from test_trainer import arguments
from tiny import recorded_gates
from training_rows import classifier, labelled_rows, word_tokenizer
from transformers import DataCollatorWithPadding, Trainer

from meo_hf.training import TaskCollator, mix

TASKS = ("a", "b", "c")


def collator(**options: Any) -> TaskCollator:
    return TaskCollator(DataCollatorWithPadding(word_tokenizer()), TASKS, **options)


def rows_with(tasks: list[Any], column: str = "task_ids") -> list[dict[str, Any]]:
    return [{"input_ids": [5] * (3 + i), "attention_mask": [1] * (3 + i), column: t} for i, t in enumerate(tasks)]


@pytest.mark.parametrize("tasks", [["c", "a", "b"], [2, 0, 1]])
def test_names_and_numbers_become_task_ids(tasks: list[Any]) -> None:
    batch = collator(column="task")(rows_with(tasks, "task"))
    assert batch["task_ids"].tolist() == [2, 0, 1]
    assert batch["task_ids"].dtype == torch.long
    assert batch["input_ids"].shape == (3, 5)
    assert "task" not in batch


@pytest.mark.parametrize(
    ("tasks", "column", "message"),
    [
        (["d"], "task_ids", "unknown task 'd'; this model has: a, b, c"),
        ([3], "task_ids", "task 3 does not exist; this model has tasks 0 to 2"),
        ([-1], "task_ids", "task -1 does not exist"),
        ([1.5], "task_ids", "task 1.5 does not exist"),
        ([None], "task_ids", "task None does not exist"),
        (["a"], "kind", "no column 'kind'.*remove_unused_columns=False"),
    ],
)
def test_a_row_without_a_task_is_refused(tasks: list[Any], column: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator(column=column)(rows_with(tasks))


def numbered(count: int, name: str) -> Dataset:
    return Dataset.from_list([{"text": f"{name}{i}"} for i in range(count)])


def test_every_row_is_there_once() -> None:
    mixed = mix({"b": numbered(3, "b"), "a": numbered(5, "a")}, TASKS)
    assert sorted(mixed["text"]) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
    assert all(TASKS[task] == text[0] for task, text in zip(mixed["task_ids"], mixed["text"], strict=True))


def test_temperature_repeats_small_data_sets() -> None:
    sets = {"a": numbered(400, "a"), "b": numbered(25, "b")}
    mixed = mix(sets, TASKS, temperature=2, seed=1)
    counts = Counter(mixed["task_ids"])
    assert counts[1] / len(mixed) == pytest.approx(25**0.5 / (400**0.5 + 25**0.5), abs=0.05)
    assert len(set(mixed["text"])) == 425
    assert mix(sets, TASKS, temperature=2, seed=1)["text"] == mixed["text"]
    assert mix(sets, TASKS, temperature=2, seed=2)["text"] != mixed["text"]


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        ({"d": 3}, {}, "unknown task"),
        ({"a": 0}, {}, "no rows for task"),
        ({"a": 3}, {"temperature": 0.5}, "temperature is 0.5"),
        ({}, {}, "0 data sets"),
    ],
)
def test_senseless_mixes_are_refused(sets: dict[str, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix({name: numbered(count, name) for name, count in sets.items()}, TASKS, **options)


def test_data_sets_with_other_columns_are_refused() -> None:
    other = numbered(3, "b").add_column("more", [1, 2, 3])
    with pytest.raises(ValueError, match="columns differ: a has text; b has more, text"):
        mix({"a": numbered(3, "a"), "b": other}, TASKS)


def test_the_trainer_hands_each_row_s_task_to_the_gates(tmp_path: Path) -> None:
    """The column of a mix survives the Trainer's cleaning, whatever the collator does."""
    model = classifier(level="task", tasks=list(TASKS), router="top_k", balance_loss=0.1)
    mixed = mix({"a": labelled_rows(8, 1), "c": labelled_rows(8, 2)}, TASKS)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=1, learning_rate=0.0), train_dataset=mixed, data_collator=collator()
    )
    batches: list[Any] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: batches.append(collate(rows)) or batches[-1]
    with recorded_gates(model) as gates:
        trainer.train()
    tasks = batches[0]["task_ids"]
    assert set(tasks.tolist()) == {0, 2}
    chosen = set()
    for path, seen in gates.items():
        router = model.get_submodule(path)
        expected = [router.weight[:, task].topk(2).indices.tolist() for task in tasks.tolist()]
        assert seen[0].top_k_index.tolist() == expected
        chosen |= {tuple(experts) for experts in expected}
    assert len(chosen) > 2
