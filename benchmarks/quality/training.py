"""Fine-tune and score a classifier with the stock Trainer, and nothing of ours in between."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from data import Row
from gates import recorded
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from meo_hf.errors import CheckFailedError

Example = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """How every arm is trained: AdamW, a linear schedule after a warm-up of a tenth.

    `sampling` is the Trainer's: batches of similar length, or `random`.
    """

    rate: float
    epochs: int
    seed: int
    batch: int = 32
    sampling: str = "group_by_length"


def encoded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int, **columns: Any) -> list[Example]:
    """Tokenise rows; `columns` are added to each example."""
    texts = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)
    return [
        {**{name: values[i] for name, values in texts.items()}, "labels": label, **columns}
        for i, (_, label) in enumerate(rows)
    ]


def batches(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], size: int) -> list[dict[str, Tensor]]:
    """Collate examples in their order into padded batches."""
    collate = DataCollatorWithPadding(tokenizer)
    return [dict(collate(list(examples[i : i + size]))) for i in range(0, len(examples), size)]


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    schedule: Schedule,
    folder: str,
) -> Trainer:
    """Return a stock Trainer; nothing is saved or logged."""
    steps = -(-len(train) // schedule.batch) * schedule.epochs
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=schedule.rate,
        num_train_epochs=schedule.epochs,
        warmup_steps=steps // 10,
        weight_decay=0.01,
        per_device_train_batch_size=schedule.batch,
        per_device_eval_batch_size=128,
        train_sampling_strategy=schedule.sampling,
        seed=schedule.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=list(train),  # type: ignore[arg-type]
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def fine_tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: Sequence[Example], schedule: Schedule
) -> tuple[Trainer, dict[str, float]]:
    """Train a model; returns its trainer and the mean training loss, the steps and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, tokenizer, train, schedule, folder)
        done = trainer.train()
    return trainer, {
        "loss": round(done.training_loss, 4),
        "steps": done.global_step,
        "train_seconds": round(done.metrics["train_runtime"], 1),
    }


def logits_of(trainer: Trainer, examples: Sequence[Example]) -> np.ndarray:
    """Return the logits [N, classes] that `Trainer.predict` gives, in the order of the examples."""
    trainer.args.train_sampling_strategy = "random"  # grouped by length, prediction too would shuffle the rows
    found = trainer.predict(list(examples))  # type: ignore[arg-type]
    if list(found.label_ids) != [example["labels"] for example in examples]:  # type: ignore[arg-type]
        raise CheckFailedError("the Trainer predicted the rows in another order than they were given")
    return found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions


def scores(trainer: Trainer, dev: Sequence[Example], test: Sequence[Example]) -> dict[str, Any]:
    """Score on both parts; `right` holds a bit per test row, as a hexadecimal number that begins with row 0."""
    dev_right, dev_loss = right_rows(logits_of(trainer, dev), [example["labels"] for example in dev])
    with recorded(trainer.model) as record:  # type: ignore[arg-type]
        test_right, _ = right_rows(logits_of(trainer, test), [example["labels"] for example in test])
    return {
        "dev": round(float(dev_right.mean()), 5),
        "dev_loss": round(dev_loss, 5),
        "test": round(float(test_right.mean()), 5),
        "rows": len(test_right),
        "right": packed(test_right),
        "gates": record.statistics(),
    }


def right_rows(logits: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, float]:
    """Return which rows are right, and the mean cross entropy."""
    expected = np.array(labels)
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(expected))
    return logits.argmax(-1) == expected, float(loss)


def packed(right: np.ndarray) -> str:
    """Return a bit per row as a hexadecimal string."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, rows: int) -> np.ndarray:
    """Return the bits of a hexadecimal string as booleans."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:rows].astype(bool)
