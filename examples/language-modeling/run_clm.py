"""Train a MEO or dense decoder on text: a data set of the Hub, or txt, csv and json files.

python examples/language-modeling/run_clm.py --model_name_or_path MODEL --num_experts 8 --top_k 2 \
    --train_file train.txt --validation_file validation.txt --block_size 512 --do_train --do_eval --output_dir OUT
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
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
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"keep_linebreaks": True}),
    ".csv": ("csv", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
SPLITS = {"train": "train", "validation": "eval"}  # each split, and what options call its use
ROWS = 10_000  # cut into blocks at a time; what then fills no block is left out


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
    train_file: str | None = field(default=None, metadata={"help": "A txt, csv, json or jsonl file."})
    validation_file: str | None = field(default=None, metadata={"help": "A txt, csv, json or jsonl file."})
    text_column: str = field(default="text", metadata={"help": "Column of the text; a txt file's lines are `text`."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per row; what the model can take, at most 1024, if not given."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first blocks."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate, as the options say."""
    model_args, data, training = parse(argv, ModelArguments, DataArguments, TrainingArguments)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logger.setLevel(logging.INFO if training.should_log else logging.ERROR)
    checkpoint = checkpoint_of(training)
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    if any(limit is not None and limit < 1 for limit in limits.values()):
        raise UsageError("--max_train_samples and --max_eval_samples count blocks: give at least 1")
    data.max_train_samples = data.max_eval_samples = None  # the splits are rows, not yet blocks
    if training.do_predict:
        raise UsageError("--do_predict has no effect here: load the model and call `generate`")
    splits = load_splits(data, training, {})
    check_columns(splits, {data.text_column: "text_column"}, text=True)
    block = check_model(model_args, data)

    set_seed(training.seed)
    start = starting_model(model_args, training)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or start, **model_args.loading)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=model_args.dtype, **model_args.loading)

    lines = (data.train_file or data.validation_file or "").endswith(".txt")
    end = [] if lines or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Put the tokens of many rows one after another, documents closed by their end, and cut them in blocks."""
        texts = tokenizer(rows[data.text_column], verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([*text, *end] for text in texts))
        blocks = [tokens[i : i + block] for i in range(0, len(tokens) - block + 1, block)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = {}
    for split, rows in splits.items():
        with training.main_process_first(desc="tokenisation"):
            found = rows.map(
                encode, batched=True, batch_size=ROWS, remove_columns=rows.column_names, desc=f"blocks of {split}"
            )
        logger.info(f"{split}: {len(found)} blocks of {block} tokens")
        if not len(found):
            raise UsageError(f"{split} has less than {block} tokens: give more text, or a smaller --block_size")
        blocks[split] = found.select(range(min(limits[split] or len(found), len(found))))
    trainer = Trainer(
        model,
        training,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    if model.config.model_type.startswith("meo_"):
        watch(trainer)
    if training.do_train:
        train(trainer, checkpoint)
    if training.do_eval:
        metrics = {**trainer.evaluate(), "eval_samples": len(blocks["validation"])}
        metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700))
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    publish(trainer, model_args, data, "text-generation")


def check_model(model: ModelArguments, data: DataArguments) -> int:
    """Return the tokens per row; raises UsageError where the model cannot take so many, or its gates need a prompt."""
    config = AutoConfig.from_pretrained(model.model_name_or_path, **model.loading)
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    block = min(most or 1024, 1024) if data.block_size is None else data.block_size
    if block < 2 or (most is not None and block > most):
        raise UsageError(f"--block_size {block}: give at least 2, and at most the model's {most} positions")
    meo = getattr(config, "meo", None) or {}
    level, segment = model.level or meo.get("level") or "segment", meo.get("segment_length", 256)
    if level in ("sequence", "token") and meo.get("routing") != "segment":
        raise UsageError(f"at level {level!r} a decoder's gates read the prompt, and plain text has none: use segment")
    if level == "segment" and block <= segment and (meo or model.conversion):
        logger.warning(
            f"a segment has {segment} tokens, so the gates of a block of {block} read its first token only: give a "
            "longer --block_size, or a model with a shorter segment_length"
        )
    return block


# What follows is the same in the other examples, so that each is one file to copy.


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
