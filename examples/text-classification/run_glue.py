"""Fine-tune a MEO or dense model as a classifier of texts: a GLUE task, a data set of the Hub, or csv and json files.

python examples/text-classification/run_glue.py --model_name_or_path MODEL --num_experts 8 --top_k 2 \
    --train_file train.csv --validation_file validation.csv --do_train --do_eval --output_dir OUT
"""

from __future__ import annotations

import csv
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from meo_hf import ConversionReport, convert
from meo_hf.errors import MeoError, UsageError
from meo_hf.training import watch

logger = logging.getLogger(__name__)
READERS: dict[str, tuple[str, dict[str, Any]]] = {".csv": ("csv", {}), ".json": ("json", {}), ".jsonl": ("json", {})}
SPLITS = {"train": "train", "validation": "eval", "test": "predict"}  # each split, and what options call its use
GLUE = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


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
    """The data, by one of three ways: a GLUE task, a data set of the Hub, or files."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(GLUE)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file."})
    validation_file: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file."})
    test_file: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file; needs no labels."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the text; `text` if not given."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Column of a second text."})
    label_column: str = field(
        default="label", metadata={"help": "Column of the label: a name, a number of a class, or a float to regress."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut to so many tokens."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to that length, not to a batch's longest."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and predict, as the options say."""
    model_args, data, training = parse(argv, ModelArguments, DataArguments, TrainingArguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logger.setLevel(logging.INFO if training.should_log else logging.ERROR)
    checkpoint = checkpoint_of(training)
    texts = text_columns(data)
    matched = {"validation": "validation_matched", "test": "test_matched"} if data.task_name == "mnli" else {}
    splits = load_splits(data, training, matched)
    check_columns(splits, dict.fromkeys(texts, "text_column"), text=True)
    labelled = {split: rows for split, rows in splits.items() if split != "test"}
    check_columns(labelled, {data.label_column: "label_column"})
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.loading)
    names = class_names(labelled, data.label_column, config)

    set_seed(training.seed)
    start = starting_model(model_args, training)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or start, **model_args.loading)
    head = {"num_labels": 1, "problem_type": "regression"}
    if names is not None:
        head = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = AutoModelForSequenceClassification.from_pretrained(
        start, dtype=model_args.dtype, **head, **model_args.loading
    )
    if tokenizer.pad_token is None:  # as in most decoders
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        padding = "max_length" if data.pad_to_max_length else False
        return tokenizer(*(rows[c] for c in texts), max_length=data.max_seq_length, truncation=True, padding=padding)

    with training.main_process_first(desc="tokenisation"):
        encoded = {
            split: rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"tokens of {split}")
            for split, rows in splits.items()
        }
    for split, rows in encoded.items():
        warn_of_cuts(f"texts of {split}", rows["attention_mask"], data.max_seq_length)
    for split, rows in labelled.items():
        encoded[split] = encoded[split].add_column("label", label_numbers(rows, data.label_column, names))
    trainer = Trainer(
        model,
        training,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        data_collator=default_data_collator if data.pad_to_max_length else DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=scorer(data.task_name, names is None),
    )
    if model.config.model_type.startswith("meo_"):
        watch(trainer)
    if training.do_train:
        train(trainer, checkpoint)
    if training.do_eval:
        metrics = {**trainer.evaluate(), "eval_samples": len(encoded["validation"])}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.do_predict:
        training.train_sampling_strategy = "random"  # grouped by length, rows would come back in another order
        outputs = trainer.predict(encoded["test"]).predictions
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        found = [names[i] for i in outputs.argmax(1)] if names is not None else outputs[:, 0].tolist()
        if trainer.is_world_process_zero():
            with open(Path(training.output_dir) / "predictions.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("index", "prediction"), *enumerate(found)])
    publish(trainer, model_args, data, "text-classification")


def text_columns(data: DataArguments) -> tuple[str, ...]:
    """Return the columns of one or two texts; where a GLUE task is asked for, point to its data set."""
    own = tuple(column for column in (data.text_column, data.text_pair_column) if column is not None)
    if data.task_name is None:
        return own if data.text_column is not None else ("text", *own)
    if data.task_name not in GLUE:
        raise UsageError(f"--task_name {data.task_name!r} is unknown: give one of {', '.join(GLUE)}")
    if own or data.dataset_name or data.dataset_config_name:
        raise UsageError("--task_name says the data set and its columns: leave --dataset_... and --text_... out")
    data.dataset_name, data.dataset_config_name = "nyu-mll/glue", data.task_name
    return GLUE[data.task_name]


def class_names(splits: dict[str, Dataset], column: str, config: PreTrainedConfig) -> list[str] | None:
    """Return the classes of the training rows, else of the model, in the model's order if it knows just these.

    None means regression. Raises UsageError for a single class, and for classes that are not among the names.
    """
    own = [config.id2label[number] for number in sorted(config.id2label)]
    if any("float" in str(rows.features[column]) for rows in splits.values()) or (not splits and len(own) == 1):
        return None
    names = own
    if "train" in splits:
        kind = splits["train"].features[column]
        names = kind.names if isinstance(kind, ClassLabel) else [str(v) for v in sorted(set(splits["train"][column]))]
        names = own if set(own) == set(names) else names
        if len(names) < 2:
            raise UsageError(f"all rows of train have the {column} {names[0]!r}: a classifier needs two or more")
    for split, rows in splits.items():
        if unknown := sorted({*label_texts(rows, column)} - {*names}):
            known = f"{'the rows of train have' if 'train' in splits else 'the model knows'} {', '.join(names)}"
            raise UsageError(f"{split} has the {column} {', '.join(unknown)}, but {known}")
    return names


def label_texts(rows: Dataset, column: str) -> list[str]:
    """Return the name of each row's class."""
    kind, values = rows.features[column], list(rows[column])
    return kind.int2str(values) if isinstance(kind, ClassLabel) else [str(value) for value in values]


def label_numbers(rows: Dataset, column: str, names: list[str] | None) -> list[float] | list[int]:
    """Return what the model is trained to say for each row."""
    if names is None:
        return [float(value) for value in rows[column]]
    return [names.index(text) for text in label_texts(rows, column)]


def scorer(task: str | None, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the metrics: those of the GLUE task, else accuracy and macro F1, or correlations for a regression."""

    def score(result: EvalPrediction) -> dict[str, float]:
        outputs = result.predictions[0] if isinstance(result.predictions, tuple) else result.predictions
        if regression:
            truth, found = result.label_ids.ravel(), outputs.ravel()
            return {"pearson": float(pearsonr(truth, found)[0]), "spearman": float(spearmanr(truth, found)[0])}
        truth, found = result.label_ids, np.argmax(outputs, axis=1)
        if task == "cola":
            return {"matthews_correlation": float(matthews_corrcoef(truth, found))}
        average = "binary" if task in ("mrpc", "qqp") else "macro"
        return {"accuracy": float(accuracy_score(truth, found)), "f1": float(f1_score(truth, found, average=average))}

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


def load_splits(data: Any, training: TrainingArguments, names: dict[str, str]) -> dict[str, Dataset]:
    """Return the rows that the run uses of train, validation and test; `names` are a data set's other names of these.

    Raises UsageError where there is no data or too much of it, and for a split that is not there or empty.
    """
    uses = {split: use for split, use in SPLITS.items() if getattr(training, f"do_{use}")}
    files = {split: file for split in SPLITS if (file := getattr(data, f"{split}_file", None))}
    if not uses:
        raise UsageError("nothing to do: give --do_train, --do_eval or --do_predict")
    if bool(files) == bool(data.dataset_name) or (data.dataset_config_name and files):
        wrong = "both a data set and files" if files else "no data"
        raise UsageError(f"{wrong}: give either the name of a data set, or --train_file and --validation_file")
    if files:
        found = {split: read_file(files[split]) for split in uses if split in files}
    else:
        try:
            found = load_dataset(data.dataset_name, data.dataset_config_name)
        except (DatasetNotFoundError, ValueError, ConnectionError) as error:
            raise UsageError(f"{data.dataset_name} cannot be loaded: {error}") from error
    for split, use in uses.items():
        if names.get(split, split) not in found:
            there = ", ".join(found) or "none"
            raise UsageError(f"--do_{use} needs rows of {split} (--{split}_file, if from files); found: {there}")
    chosen = {}
    for split, use in uses.items():
        rows, limit = found[names.get(split, split)], getattr(data, f"max_{use}_samples")
        chosen[split] = rows if limit is None else rows.select(range(min(max(limit, 0), len(rows))))
        if not len(chosen[split]):
            raise UsageError(f"no rows of {split}: {len(rows)} were found, and --max_{use}_samples is {limit}")
    return chosen


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
