"""A few rows for each example, tiny dense models that read them, and the examples as modules."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tiny import spread, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import BertForMaskedLM, LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {path.stem: path for path in sorted(EXAMPLES.glob("*/run_*.py"))}
PLACES = {"anna": "rome", "bert": "oslo", "carl": "lima", "dora": "bern", "emil": "kyiv", "fred": "nice"}
CLASSES = {
    "mood": {"good": "a lovely film about", "bad": "a boring film about"},
    "topic": {"city": "streets and houses of", "food": "bread and soup in", "song": "music and dance from"},
}


def rows_of(kind: str) -> list[dict[str, Any]]:
    """Make the rows of `mood` or `topic` (classes), `qa` or `summaries`."""
    if kind in CLASSES:
        classes = CLASSES[kind].items()
        return [{"text": f"{text} {place}", "label": label} for place in PLACES.values() for label, text in classes]
    rows = []
    for name, place in PLACES.items():
        text = f"today {name} is in {place} with friends and a lovely film"
        asked = {"question": f"where is {name}", "context": text, "answers": {"text": [place, f"in {place}"]}}
        rows.append(asked if kind == "qa" else {"document": text, "gist": f"{name} is in {place}"})
    return rows


def write_data(folder: Path) -> None:
    """Write the rows as jsonl, the classes also as csv, a text, and files that are refused."""
    for kind in ("mood", "topic", "qa", "summaries"):
        rows = rows_of(kind)
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if kind in CLASSES:
            lines = ["text,label", *(f"{row['text']},{row['label']}" for row in rows)]
            (folder / f"{kind}.csv").write_text("\n".join(lines) + "\n")
    (folder / "broken.json").write_text("{")
    (folder / "empty.csv").write_text("text,label\n")
    (folder / "gaps.csv").write_text("text,label\na film,1\na film,\na film,0\n")
    (folder / "years.csv").write_text("text,label\n1999,a\n2001,a\n")
    rows = [{"question": "q", "context": "c", "answers": {"text": texts}} for texts in (["a"], [])]
    (folder / "noanswer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("\n".join(row["text"] for row in rows_of("topic")) + "\n")


def write_models(folder: Path) -> PreTrainedTokenizerFast:
    """Write a dense BERT, T5 and Llama with a tokenizer that knows all words; returns the tokenizer."""
    tokenizer = _tokenizer()
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    dense = {
        "bert": BertForMaskedLM(tiny_config("bert", every_dropout=0.1, **sizes)),
        "t5": T5ForConditionalGeneration(tiny_config("t5", **sizes, eos_token_id=1, decoder_start_token_id=0)),
        "llama": LlamaForCausalLM(tiny_config("llama", **sizes, bos_token_id=None, eos_token_id=1)),
    }
    for name, model in dense.items():
        spread(model).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return tokenizer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = " ".join(str(row.values()) for kind in ("mood", "topic", "qa", "summaries") for row in rows_of(kind))
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["question: context:", *re.findall("[a-z]+", words)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def write_glue(folder: Path) -> None:
    """Write `mood` as a data set with the names, columns and class labels of GLUE's sst2, hidden in its test split."""
    home = folder / "nyu-mll" / "glue"
    (home / "sst2").mkdir(parents=True)
    numbers = {"bad": 0, "good": 1}
    for split in ("train", "validation", "test"):
        rows = [
            {"sentence": row["text"], "label": -1 if split == "test" else numbers[row["label"]]}
            for row in rows_of("mood")
        ]
        (home / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - split: {s}\n    path: sst2/{s}.jsonl\n" for s in ("train", "validation", "test"))
    (home / "README.md").write_text(
        f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{files}dataset_info:\n- config_name: sst2\n  features:\n"
        "  - name: sentence\n    dtype: string\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
        "          '0': bad\n          '1': good\n---\n"
    )


def script(name: str) -> ModuleType:
    """Import an example."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS[name])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run(name: str, *arguments: object) -> None:
    """Run an example in this process."""
    script(name).main([str(argument) for argument in arguments])


def generated(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return tokens as the Trainer hands them over: after a start token, and filled up."""
    tokens = tokenizer(texts, padding=True, return_tensors="np")["input_ids"]
    return np.pad(tokens, ((0, 0), (1, 2)), constant_values=((0, 0), (0, -100)))


# What users get wrong: the example, options with {d} for the folder of the data, and what the message says.
BAD: list[tuple[str, str, str]] = [
    ("run_glue", "--do_train", "no data: give either the name of a data set, or --train_file"),
    ("run_glue", "--do_train --dataset_name x --train_file {d}/mood.csv", "both a data set and files"),
    ("run_glue", "--train_file {d}/mood.csv", "nothing to do: give --do_train"),
    ("run_glue", "--do_train --train_file {d}/text.txt", "text.txt: give a file that ends in .csv, .json, .jsonl"),
    ("run_glue", "--do_train --train_file {d}/none.csv", "none.csv does not exist"),
    ("run_glue", "--do_train --train_file {d}/broken.json", "broken.json has no rows that can be read as json"),
    ("run_glue", "--do_train --train_file {d}/empty.csv", "empty.csv has no rows"),
    ("run_glue", "--do_train --do_eval --train_file {d}/mood.csv", "--do_eval needs rows of validation .*found: train"),
    ("run_glue", "--do_train --train_file {d}/qa.jsonl", "no column 'text', found: question, .*--text_column"),
    ("run_glue", "--do_train --train_file {d}/mood.csv --label_column y", "no column 'y', found: text, label"),
    ("run_glue", "--do_train --train_file {d}/gaps.csv", "1 of 3 rows of train have no 'label'"),
    ("run_glue", "--do_train --train_file {d}/years.csv", "'text' of train holds int64, no text"),
    ("run_glue", "--do_train --train_file {d}/years.csv --text_column label", "all rows of train have the label 'a'"),
    ("run_glue", "--do_train --do_eval --train_file {d}/mood.csv --validation_file {d}/topic.csv", "label city, food"),
    ("run_glue", "--do_eval --validation_file {d}/mood.csv", "but the model knows LABEL_0, LABEL_1"),
    ("run_glue", "--do_train --task_name sst3", "--task_name 'sst3' is unknown: give one of cola"),
    ("run_glue", "--do_train --task_name sst2 --train_file {d}/mood.csv", "both a data set and files"),
    ("run_glue", "--do_train --task_name sst2 --text_column text", "leave --dataset_... and --text_... out"),
    ("run_glue", "--do_train --train_file {d}/mood.csv --num_expert 4 --experts 2", "--experts"),
    ("run_glue", "--do_train --train_file {d}/mood.csv --resume_from_checkpoint true", "no checkpoint there"),
    ("run_glue", "--do_train --train_file {d}/mood.csv --num_experts 2 --level segment", "level 'segment'"),
    ("run_seq2seq_qa", "--do_predict --test_file {d}/qa.jsonl", "add --predict_with_generate"),
    ("run_seq2seq_qa", "--do_train --train_file {d}/noanswer.jsonl", "row 1 of train has the answers .*SQuAD"),
    ("run_summarization", "--do_train --train_file {d}/summaries.jsonl --text_column document", "no column 'summary'"),
    ("run_multitask", "--do_train", "no tasks: give --task NAME=TRAIN_FILE,VALIDATION_FILE"),
    ("run_multitask", "--do_train --task mood={d}/mood.csv", "give NAME=TRAIN_FILE,VALIDATION_FILE"),
    ("run_multitask", "--do_train --task a=x.csv,y.csv --task a=x.csv,y.csv", "does not exist"),
    ("run_multitask", "--do_train --task a/b=x.csv,y.csv", "by a name of letters"),
    ("run_multitask", "--do_eval --task mood={d}/mood.csv,{d}/mood.csv", "known are none"),
    ("run_multitask", "--do_train --level token --task mood={d}/mood.csv,{d}/mood.csv", "this example is about level"),
]
