"""Train one MEO model on several classification tasks, and extract a dense model of each task.

python examples/multitask/run_multitask.py --model_name_or_path MODEL --num_experts 8 --top_k 2 \
    --task mood=mood/train.csv,mood/validation.csv --task topic=topic/train.csv,topic/validation.csv \
    --do_train --do_eval --output_dir OUT
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from meo_hf import ConversionReport, convert, extract
from meo_hf.errors import MeoError, UsageError
from meo_hf.training import TaskCollator, mix, watch

logger = logging.getLogger(__name__)
READERS: dict[str, tuple[str, dict[str, Any]]] = {".csv": ("csv", {}), ".json": ("json", {}), ".jsonl": ("json", {})}
Splits = dict[str, Dataset]


@dataclass
class ModelArguments:
    """The model, and how it becomes a MEO model first: by any of the last four options."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a MEO model, a dense one, or a mixture."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder or Hub id, if not the model's."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run Python files that come with the model: read them and pin --model_revision first. MEO models "
            "do not need it here, because the installed meo_hf knows them."
        },
    )
    dtype: str = field(default="float32", metadata={"help": "Type of the trained weights; --bf16 computes in less."})
    num_experts: int | None = field(default=None, metadata={"help": "Make a MEO model with so many experts first."})
    top_k: int | None = field(default=None, metadata={"help": "How many experts a gate merges."})
    level: str | None = field(default=None, metadata={"help": "What shares a gate: segment, sequence, token or task."})
    expert_init: str | None = field(default=None, metadata={"help": "copy, noise or drop-upcycle."})

    @property
    def conversion(self) -> dict[str, Any]:
        """What was asked of a conversion; nothing if the model is taken as it is."""
        asked = {name: getattr(self, name) for name in ("num_experts", "top_k", "level", "expert_init")}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def loading(self) -> dict[str, Any]:
        """What `from_pretrained` takes."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class DataArguments:
    """The tasks, each a classification of texts by names or numbers of classes."""

    task: list[str] = field(
        default_factory=list,
        metadata={"action": "extend", "help": "NAME=TRAIN_FILE,VALIDATION_FILE (csv, json or jsonl); one or more."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    label_column: str = field(default="label", metadata={"help": "Column of the class."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    mixing_temperature: float = field(
        default=1.0, metadata={"help": "1: each row once per epoch; above, small tasks' rows are repeated."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows of each task."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows of each task."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate each task, and extract each task, as the options say."""
    model_args, data, training = parse(argv, ModelArguments, DataArguments, TrainingArguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logger.setLevel(logging.INFO if training.should_log else logging.ERROR)
    checkpoint = checkpoint_of(training)
    if training.do_predict or not (training.do_train or training.do_eval):
        raise UsageError("give --do_train or --do_eval, and no --do_predict: there is no test set")
    splits = read_tasks(data, training)
    for folder in (folder_of(training, task) for task in splits):
        if training.do_train and checkpoint is None and folder.exists():
            raise UsageError(f"{folder} exists, where a task's dense model will be: give another --output_dir")
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.loading)
    tasks = tasks_of(config, splits, model_args)
    names = class_names(splits, data.label_column, config)

    set_seed(training.seed)
    start = starting_model(model_args, training, level="task", tasks=tasks)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or start, **model_args.loading)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        start, dtype=model_args.dtype, **labels, **model_args.loading
    )
    if tokenizer.pad_token is None:  # as in most decoders
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    encoded: dict[str, Splits] = {"train": {}, "validation": {}}
    for task, parts in splits.items():
        for split, rows in parts.items():
            with training.main_process_first(desc="tokenisation"):
                found = rows.map(
                    lambda some: tokenizer(some[data.text_column], max_length=data.max_seq_length, truncation=True),
                    batched=True,
                    remove_columns=rows.column_names,
                    desc=f"tokens of {task}, {split}",
                )
            warn_of_cuts(f"texts of {task}, {split}", found["attention_mask"], data.max_seq_length)
            numbers = [names.index(f"{task}/{value}") for value in rows[data.label_column]]
            encoded[split][task] = found.add_column("label", numbers)
    validation = {task: mix({task: rows}, tasks) for task, rows in encoded["validation"].items()}  # each on its own
    mixed = (
        mix(encoded["train"], tasks, temperature=data.mixing_temperature, seed=training.seed)
        if encoded["train"]
        else None
    )
    is_meo = model.config.model_type.startswith("meo_")
    padded = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(
        model,
        training,
        train_dataset=mixed,
        eval_dataset=validation or None,
        data_collator=TaskCollator(padded, tasks) if is_meo else padded,
        processing_class=tokenizer,
        compute_metrics=scorer(names),
    )
    if is_meo:
        watch(trainer)
    if training.do_train:
        train(trainer, checkpoint)
    if training.do_eval:
        metrics = {**trainer.evaluate(), "eval_samples": sum(map(len, validation.values()))}
        metrics["eval_accuracy"] = float(np.mean([metrics[f"eval_{task}_accuracy"] for task in validation]))
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    publish(trainer, model_args, data, "text-classification")
    if is_meo and training.do_train and trainer.is_world_process_zero():
        for task in splits:
            extract(training.output_dir, folder_of(training, task), task=task, overwrite=checkpoint is not None)
            logger.info(f"{folder_of(training, task)} holds the dense model of {task}")


def read_tasks(data: DataArguments, training: TrainingArguments) -> dict[str, Splits]:
    """Return the rows of each task that the run uses; raises UsageError for what is missing, unclear or empty."""
    splits: dict[str, Splits] = {}
    for text in data.task:
        name, _, files = text.partition("=")
        paths = files.split(",")
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or name in splits:
            raise UsageError(f"--task {text}: give each task once, by a name of letters, digits, _ and -")
        if len(paths) != 2 or not all(paths):
            raise UsageError(f"--task {text}: give NAME=TRAIN_FILE,VALIDATION_FILE")
        splits[name] = {}
        for split, use, path in (("train", "train", paths[0]), ("validation", "eval", paths[1])):
            if getattr(training, f"do_{use}"):
                rows, limit = read_file(path), getattr(data, f"max_{use}_samples")
                splits[name][split] = rows if limit is None else rows.select(range(min(max(limit, 0), len(rows))))
                if not len(splits[name][split]):
                    raise UsageError(f"no rows in {path}: {len(rows)} were found, --max_{use}_samples is {limit}")
        check_columns(splits[name], {data.text_column: "text_column"}, text=True)
        check_columns(splits[name], {data.label_column: "label_column"})
    if not splits:
        raise UsageError("no tasks: give --task NAME=TRAIN_FILE,VALIDATION_FILE for each")
    return splits


def folder_of(training: TrainingArguments, task: str) -> Path:
    """Return where the dense model of a task goes: beside the output folder, which is loaded and pushed as a whole."""
    return Path(f"{os.path.abspath(training.output_dir)}-{task}")


def tasks_of(config: Any, splits: dict[str, Splits], model: ModelArguments) -> list[str]:
    """Return the tasks in the model's order; raises UsageError where the model does not know them."""
    if model.level not in (None, "task"):
        raise UsageError(f"--level {model.level}: this example is about level task, leave the option out")
    if not config.model_type.startswith("meo_"):
        return list(splits)
    level, known = config.meo.get("level"), config.meo.get("tasks")
    if level != "task" or not set(splits) <= set(known):
        raise UsageError(
            f"{model.model_name_or_path} has level {level} and the tasks {', '.join(known)}: give a MEO model of level "
            f"task that knows {', '.join(splits)}, or a dense model and --num_experts"
        )
    return list(known)


def class_names(splits: dict[str, Splits], column: str, config: Any) -> list[str]:
    """Return all classes as TASK/CLASS: those of the training rows, else the model's.

    One head has the classes of all tasks, so that Transformers' own models can be used; a row counts only those of its
    task when it is scored. Raises UsageError for a class that is in validation only.
    """
    names = [config.id2label[number] for number in sorted(config.id2label)]
    if all("train" in parts for parts in splits.values()):
        classes = {task: sorted(set(parts["train"][column])) for task, parts in splits.items()}
        found = [f"{task}/{value}" for task, values in classes.items() for value in values]
        names = names if set(names) == set(found) else found
    for task, parts in splits.items():
        for split, rows in parts.items():
            if unknown := {f"{task}/{value}" for value in rows[column]} - set(names):
                known = ", ".join(name for name in names if name.startswith(f"{task}/")) or "none"
                raise UsageError(f"{split} of {task} has {', '.join(sorted(unknown))}; known are {known}")
    return names


def scorer(names: list[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the metrics of one task: accuracy and macro F1, each row judged among the classes of its task."""
    tasks = np.array([name.split("/")[0] for name in names])

    def score(result: EvalPrediction) -> dict[str, float]:
        outputs = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
        truth = result.label_ids
        found = np.where(tasks[None] == tasks[truth][:, None], outputs, -np.inf).argmax(1)
        return {"accuracy": float(accuracy_score(truth, found)), "f1": float(f1_score(truth, found, average="macro"))}

    return score


# What follows is the same in the other examples, so that each is one file to copy.


def warn_of_cuts(what: str, masks: Iterable[Sequence[int]], limit: int) -> None:
    """Say how many texts fill a length, and so were probably cut."""
    full = [sum(mask) >= limit for mask in masks]
    if any(full):
        logger.warning(f"{sum(full)} of {len(full)} {what} have {limit} tokens or more and were cut to these")


def parse(argv: Sequence[str] | None, *kinds: type) -> tuple[Any, ...]:
    """Read the options, or one json file of options; raises UsageError for what is unknown or makes no sense."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(kinds)
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            return parser.parse_json_file(argv[0])
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, OSError, TypeError) as error:
        raise UsageError(f"{error}") from error


def checkpoint_of(training: TrainingArguments) -> str | None:
    """Return the checkpoint to go on from; raises UsageError rather than write over an earlier run."""
    folder, asked = Path(training.output_dir), str(training.resume_from_checkpoint or "false")
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if asked.lower() == "false":
        if training.do_train and (last or (folder / "config.json").exists()):
            raise UsageError(
                f"{folder} holds an earlier run: go on with --resume_from_checkpoint true, or give another --output_dir"
            )
        return None
    found = last if asked.lower() == "true" else asked
    if found is None or not Path(found).is_dir():
        raise UsageError(f"--resume_from_checkpoint {asked}: no checkpoint there; found in {folder}: {last or 'none'}")
    return found


def read_file(path: str) -> Dataset:
    """Read a file of rows; raises UsageError for one that is missing, of another kind or broken."""
    if Path(path).suffix not in READERS:
        raise UsageError(f"{path}: give a file that ends in {', '.join(READERS)}")
    if not Path(path).is_file():
        raise UsageError(f"{path} does not exist")
    kind, options = READERS[Path(path).suffix]
    try:
        return load_dataset(kind, data_files=os.path.abspath(path), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        raise UsageError(f"{path} has no rows that can be read as {kind}: {error.__cause__ or error}") from error


def check_columns(splits: dict[str, Dataset], columns: dict[str, str], text: bool = False) -> None:
    """Raise UsageError where a column is missing or has gaps, or is no text; `columns` says which option names it."""
    for split, rows in splits.items():
        for column, option in columns.items():
            if column not in rows.column_names:
                there = ", ".join(rows.column_names)
                raise UsageError(f"{split} has no column {column!r}, found: {there}; name yours with --{option}")
            if gaps := sum(value is None for value in rows[column]):
                raise UsageError(f"{gaps} of {len(rows)} rows of {split} have no {column!r}: fill or remove them")
            kind = getattr(rows.features[column], "dtype", "a list")
            if text and kind not in ("string", "large_string"):
                raise UsageError(f"the column {column!r} of {split} holds {kind}, no text: name yours with --{option}")


def starting_model(model: ModelArguments, training: TrainingArguments, **more: Any) -> str:
    """Return what to train: the model as it is, or where experts were asked for, the MEO model made from it.

    That stays in the output folder for a run that resumes, under a name that is never pushed to the Hub. `more` are
    options of the conversion. Raises UsageError for a MEO model, which has its experts, and for another start there.
    """
    options = dict(model.conversion)
    if not options:
        return model.model_name_or_path
    config = AutoConfig.from_pretrained(model.model_name_or_path, **model.loading)
    if config.model_type.startswith("meo_"):
        given = ", ".join(f"--{name}" for name in options)
        raise UsageError(f"{model.model_name_or_path} is a MEO model already: leave out {given}")
    options |= {"seed": training.seed, **more}
    folder, local = Path(training.output_dir) / "_meo-start", os.path.exists(model.model_name_or_path)
    with training.main_process_first(local=training.save_on_each_node, desc="conversion"):
        if folder.exists():
            made = ConversionReport.load(folder)
            source = os.path.abspath(model.model_name_or_path) if local else model.model_name_or_path
            if made.source["id"] != source or any(made.options[name] != value for name, value in options.items()):
                raise UsageError(f"{folder} was made from another model or with other options: remove it")
            return str(folder)
        logger.info(f"making a MEO model of {model.model_name_or_path} in {folder}")
        options |= {"source_revision": None if local else model.model_revision, "verify": "sample"}
        convert(model.model_name_or_path, folder, trust_remote_code=model.trust_remote_code, **options)
    return str(folder)


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, and write the model, its metrics and the Trainer's state."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def publish(trainer: Trainer, model: ModelArguments, data: Any, task: str) -> None:
    """Write the card of what was trained, and push the output folder where --push_to_hub says so."""
    card: dict[str, Any] = {"tasks": task}
    if trainer.model.config.model_type.startswith("meo_"):
        card["tags"] = ["meo", "merging-experts", "custom_code"]
    if not os.path.exists(model.model_name_or_path):
        card["finetuned_from"] = model.model_name_or_path
    if getattr(data, "dataset_name", None) and not os.path.exists(data.dataset_name):
        card |= {"dataset_tags": data.dataset_name, "dataset_args": data.dataset_config_name}
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    elif trainer.args.do_train:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    try:
        main()
    except MeoError as error:
        sys.exit(f"error: {error}")
