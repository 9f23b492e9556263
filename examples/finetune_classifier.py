"""Fine-tune a MEO model as a classifier with the stock Trainer.

python examples/finetune_classifier.py OUT data.csv FINETUNED [STEPS]     # columns: text, label
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

Example = dict[str, list[int] | int]


class Rows(Dataset):
    """A CSV file with the columns `text` and `label`, tokenised."""

    def __init__(self, path: str, tokenizer: AutoTokenizer) -> None:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        self.labels = sorted({row["label"] for row in rows})
        self.examples: list[Example] = [
            {**tokenizer(row["text"], truncation=True, max_length=128), "label": self.labels.index(row["label"])}
            for row in rows
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)


def main(model: str, data: str, output: str, steps: int = 100) -> None:
    """Train all weights, experts and routers included, and save a model that loads anywhere."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    rows = Rows(data, tokenizer)
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model, trust_remote_code=True, num_labels=len(rows.labels)
    )
    arguments = TrainingArguments(
        output, max_steps=steps, per_device_train_batch_size=16, learning_rate=5e-5, report_to=[], logging_steps=10
    )
    trainer = Trainer(classifier, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    trainer.save_model(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:4], steps=int(sys.argv[4]) if len(sys.argv) > 4 else 100)
