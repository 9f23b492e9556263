"""Train a MEO or dense encoder-decoder to summarise texts: a data set of the Hub, or csv and json files.

python examples/summarization/run_summarization.py --model_name_or_path MODEL --num_experts 8 --top_k 2 \
    --train_file train.json --validation_file validation.json --text_column document --summary_column summary \
    --do_train --do_eval --predict_with_generate --output_dir OUT
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from meo_hf import ConversionReport, convert
from meo_hf.errors import MeoError, UsageError
from meo_hf.training import watch

logger = logging.getLogger(__name__)
READERS: dict[str, tuple[str, dict[str, Any]]] = {".csv": ("csv", {}), ".json": ("json", {}), ".jsonl": ("json", {})}
SPLITS = {"train": "train", "validation": "eval", "test": "predict"}  # each split, and what options call its use


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
    """The data: a data set of the Hub, or files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder of a data set."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file."})
    validation_file: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file."})
    test_file: str | None = field(default=None, metadata={"help": "A csv, json or jsonl file; needs no summaries."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    summary_column: str = field(default="summary", metadata={"help": "Column of the summary."})
    source_prefix: str = field(default="", metadata={"help": "Put before each text, like T5's 'summarize: '."})
    max_source_length: int = field(default=512, metadata={"help": "Longer texts are cut to so many tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longer summaries are cut to so many tokens."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad to these, not to a batch's longest."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and summarise, as the options say."""
    model_args, data, training = parse(argv, ModelArguments, DataArguments, Seq2SeqTrainingArguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logger.setLevel(logging.INFO if training.should_log else logging.ERROR)
    checkpoint = checkpoint_of(training)
    if training.do_predict and not training.predict_with_generate:
        raise UsageError("--do_predict writes what the model generates: add --predict_with_generate")
    splits = load_splits(data, training, {})
    check_columns(splits, {data.text_column: "text_column"}, text=True)
    labelled = {split: rows for split, rows in splits.items() if split != "test"}
    check_columns(labelled, {data.summary_column: "summary_column"}, text=True)
    summaries = {split: list(rows[data.summary_column]) for split, rows in labelled.items()}

    set_seed(training.seed)
    start = starting_model(model_args, training)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or start, **model_args.loading)
    model = AutoModelForSeq2SeqLM.from_pretrained(start, dtype=model_args.dtype, **model_args.loading)
    training.generation_max_length = training.generation_max_length or data.max_target_length + 1  # and the start token

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [data.source_prefix + text for text in rows[data.text_column]]
        return tokenizer(texts, max_length=data.max_source_length, truncation=True, padding=padding)

    padding = "max_length" if data.pad_to_max_length else False
    with training.main_process_first(desc="tokenisation"):
        encoded = {
            split: rows.map(encode, batched=True, remove_columns=rows.column_names, desc=f"tokens of {split}")
            for split, rows in splits.items()
        }
    for split, rows in encoded.items():
        warn_of_cuts(f"texts of {split}", rows["attention_mask"], data.max_source_length)
        if split in summaries:
            labels = label_tokens(tokenizer, summaries[split], data.max_target_length, padding)
            warn_of_cuts(f"summaries of {split}", ([i >= 0 for i in ids] for ids in labels), data.max_target_length)
            encoded[split] = rows.add_column("labels", labels)
    score = Score(tokenizer, encoded["validation"], summaries["validation"]) if "validation" in encoded else None
    training.include_for_metrics = ["inputs"]  # which text a summary belongs to
    trainer = Seq2SeqTrainer(
        model,
        training,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=score if training.predict_with_generate else None,
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
        trainer.data_collator = DataCollatorWithPadding(tokenizer)  # the other one adds labels that are None
        found = decode(tokenizer, trainer.predict(encoded["test"]).predictions)
        if trainer.is_world_process_zero():
            with open(Path(training.output_dir) / "predictions.jsonl", "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"index": i, "summary": a}, ensure_ascii=False) + "\n" for i, a in enumerate(found)
                )
    publish(trainer, model_args, data, "summarization")


class Score:
    """ROUGE in percent: the mean F measures of stemmed words, against the whole summaries as the data have them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Dataset, summaries: list[str]) -> None:
        self.tokenizer = tokenizer
        self.rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        keys = row_keys(tokenizer, rows["input_ids"], rows["labels"])
        self.summaries = dict(zip(keys, summaries, strict=True))

    def __call__(self, result: EvalPrediction) -> dict[str, float]:
        """Score what was generated."""
        right = [self.summaries[key] for key in row_keys(self.tokenizer, result.inputs, result.label_ids)]
        found = decode(self.tokenizer, result.predictions)
        scores = [self.rouge.score(summary, text) for summary, text in zip(right, found, strict=True)]
        return {kind: 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in scores[0]}


# What follows is the same in both examples that generate text.


def label_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int, padding: str | bool
) -> list[list[int]]:
    """Return what the model is trained to write, cut to a length and, with padding, filled to it by -100."""
    found = tokenizer(text_target=texts, max_length=limit, truncation=True)["input_ids"]
    return [ids + [-100] * (limit - len(ids)) for ids in found] if padding else found


def row_keys(tokenizer: PreTrainedTokenizerBase, inputs: Iterable[Any], labels: Iterable[Any]) -> list[Any]:
    """Return what tells a row by its tokens: the Trainer pads them, and may evaluate rows in another order."""
    filled = (-100, tokenizer.pad_token_id)
    rows = zip(inputs, labels, strict=True)
    return [tuple(tuple(int(i) for i in ids if i not in filled) for ids in row) for row in rows]


def decode(tokenizer: PreTrainedTokenizerBase, outputs: Any) -> list[str]:
    """Return generated texts; the Trainer fills short ones with -100."""
    tokens = outputs[0] if isinstance(outputs, tuple) else outputs
    texts = tokenizer.batch_decode(np.where(tokens < 0, tokenizer.pad_token_id, tokens), skip_special_tokens=True)
    return [text.strip() for text in texts]


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
