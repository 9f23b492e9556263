"""The training examples run on a few rows: what they write and learn, how they resume, and what they refuse."""

from __future__ import annotations

import ast
import json
import math
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from checkpoints import same_tensors, tensors
from datasets import Dataset
from example_data import BAD, EXAMPLES, SCRIPTS, generated, rows_of, run, script, write_data, write_glue, write_models
from fresh import Fresh, Values
from hub_server import HubServer
from meo_hf.modeling.remote_meo import code_files
from tiny import spread
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

from meo_hf import convert
from meo_hf.errors import UsageError

pytestmark = pytest.mark.xdist_group("examples")  # one worker: the runs are made once
SHARED = {"ModelArguments", "parse", "checkpoint_of", "load_splits", "read_file", "check_columns", "starting_model"}
SHARED |= {"train", "publish", "warn_of_cuts", "label_tokens", "row_keys", "decode"}
QUIET = ("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--logging_steps", 1)
STEPS = (*QUIET, "--max_steps", 4, "--learning_rate", 0.01, "--per_device_train_batch_size", 4)
NOISY = ("--num_experts", 3, "--expert_init", "drop-upcycle")
GROUPED = ("--train_sampling_strategy", "group_by_length")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with data and models, where data sets are cached too."""
    folder = tmp_path_factory.mktemp("examples")
    write_data(folder)
    write_models(folder)
    for name in ("t5", "llama"):
        short = {"segment_length": 4} if name == "llama" else {}
        convert(
            folder / name, folder / f"{name}-meo", num_experts=3, expert_init="drop-upcycle", verify="none", **short
        )
    kept, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    yield folder
    datasets.config.HF_DATASETS_CACHE = kept


def glue_options(folder: Path, output: Path) -> list[object]:
    data = folder / "mood.csv"
    model = ["--model_name_or_path", folder / "bert", *NOISY, "--top_k", 2, "--level", "sequence"]
    files = ["--train_file", data, "--validation_file", data, "--test_file", folder / "mood.jsonl"]
    sizes = ["--max_train_samples", 10, "--max_eval_samples", 8, "--label_smoothing_factor", 0.1, *GROUPED]
    return [*model, *files, *sizes, *STEPS, "--save_steps", 2, "--output_dir", output, "--do_train"]


@pytest.fixture(scope="module")
def glue(folder: Path) -> Path:
    run("run_glue", *glue_options(folder, folder / "glue"), "--do_eval", "--do_predict")
    return folder / "glue"


@pytest.fixture(scope="module")
def clm(folder: Path) -> Path:
    """Run an example with a json file of options."""
    options = dict(zip((name[2:] for name in STEPS[::2]), STEPS[1::2], strict=True))
    options |= {"model_name_or_path": str(folder / "llama-meo"), "output_dir": str(folder / "clm"), "block_size": 16}
    options |= {"train_file": str(folder / "text.txt"), "validation_file": str(folder / "mood.csv")}
    options |= {"do_train": True, "do_eval": True, "disable_tqdm": True, "use_cpu": True, "max_eval_samples": 2}
    (folder / "clm.json").write_text(json.dumps(options))
    run("run_clm", folder / "clm.json")
    return folder / "clm"


@pytest.fixture(scope="module")
def qa(folder: Path) -> Path:
    data = folder / "qa.jsonl"
    files = ("--train_file", data, "--validation_file", data, "--test_file", data, "--output_dir", folder / "qa")
    actions = ("--do_train", "--do_eval", "--do_predict", "--predict_with_generate", "--pad_to_max_length")
    sizes = ("--max_seq_length", 24, "--max_answer_length", 6, *GROUPED)
    run("run_seq2seq_qa", "--model_name_or_path", folder / "t5-meo", *files, *actions, *sizes, *STEPS)
    return folder / "qa"


@pytest.fixture(scope="module")
def multitask(folder: Path) -> Path:
    tasks = [("--task", f"{name}={folder / name}.csv,{folder / name}.jsonl") for name in ("mood", "topic")]
    actions = ("--do_train", "--do_eval", "--mixing_temperature", 2, "--output_dir", folder / "multitask")
    run("run_multitask", "--model_name_or_path", folder / "bert", *NOISY, *tasks[0], *tasks[1], *actions, *STEPS)
    return folder / "multitask"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def summarization(folder: Path, hub: HubServer) -> Path:
    """Run an example as users do, in a process of its own, and push what it made."""
    output, data = folder / "summarization", folder / "summaries.jsonl"
    files = ("--train_file", data, "--validation_file", data, "--test_file", data, "--output_dir", output)
    columns = ("--text_column", "document", "--summary_column", "gist", "--source_prefix", "today ")
    actions = ("--do_train", "--do_eval", "--do_predict", "--predict_with_generate", "--max_target_length", 3)
    push = ("--push_to_hub", "true", "--hub_model_id", "tester/short", "--save_steps", 2)
    options = ("--model_name_or_path", folder / "t5", *NOISY, *files, *columns, *actions, *push, *STEPS)
    command = [sys.executable, str(SCRIPTS["run_summarization"]), *map(str, options)]
    done = subprocess.run(command, env=hub.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def results(output: Path) -> dict[str, float]:
    """Return the metrics of a run, after a look at its losses, its picture of the experts and its card."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) == 4
    assert all(math.isfinite(step["loss"]) and step["aux_loss"] > 0 for step in steps)
    assert steps[0]["loss"] != steps[-1]["loss"]
    assert (output / "expert_load.png").stat().st_size > 0
    assert "custom_code" in (output / "README.md").read_text()
    return json.loads((output / "all_results.json").read_text())


def assert_experts_learned(output: Path, start: Path) -> None:
    """Compare each expert of each feed-forward with how it was born."""
    trained, born = tensors(output), tensors(start)
    stacks = [name for name in trained if ".experts." in name]
    assert len(stacks) >= 4
    for name in stacks:
        assert all(not torch.equal(new, old) for new, old in zip(trained[name], born[name], strict=True)), name


def test_classification(folder: Path, glue: Path) -> None:
    found = results(glue)
    assert found.keys() >= {"train_loss", "eval_loss", "eval_accuracy", "eval_f1"}
    assert (found["train_samples"], found["eval_samples"]) == (10, 8)
    assert_experts_learned(glue, glue / "_meo-start")
    assert len((glue / "predictions.csv").read_text().split()) == 1 + len(rows_of("mood"))


def test_predictions_stay_in_order(folder: Path, tmp_path: Path) -> None:
    """Rows grouped by length would come back in another order; a dense model needs no experts."""
    labels = dict(enumerate("abcdefgh"))
    config = AutoConfig.from_pretrained(folder / "bert", id2label=labels, label2id={v: k for k, v in labels.items()})
    model = spread(transformers.BertForSequenceClassification(config)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": row["document"][: 6 + 7 * number]} for number, row in enumerate(rows_of("summaries"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--test_file", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    run("run_glue", "--model_name_or_path", tmp_path / "model", "--do_predict", *files, *GROUPED, *QUIET)
    logits = model(**tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")).logits
    expected = [f"{row},{labels[int(label)]}" for row, label in enumerate(logits.argmax(1))]
    assert len({line[2:] for line in expected}) > 2
    assert (tmp_path / "out" / "predictions.csv").read_text().split() == ["index,prediction", *expected]


def test_resumed_run_ends_the_same(folder: Path, glue: Path) -> None:
    output = folder / "resumed"
    for part in ("_meo-start", "checkpoint-2"):
        shutil.copytree(glue / part, output / part)
    options = glue_options(folder, output)
    with pytest.raises(UsageError, match="holds an earlier run: go on with --resume_from_checkpoint true"):
        run("run_glue", *options)
    with pytest.raises(UsageError, match="was made from another model or with other options"):
        run("run_glue", *options, "--resume_from_checkpoint", "true", "--top_k", 1)
    kept = (output / "checkpoint-2" / "model.safetensors").stat()
    run("run_glue", *options, "--resume_from_checkpoint", "true")
    assert (output / "checkpoint-2" / "model.safetensors").stat().st_mtime_ns == kept.st_mtime_ns  # not written again
    assert same_tensors(tensors(glue), tensors(output)) == []
    assert same_tensors(tensors(glue), tensors(glue / "checkpoint-2")) != []


def test_glue_task_by_name(folder: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_glue(tmp_path)
    monkeypatch.chdir(tmp_path)
    actions = ("--do_eval", "--do_predict", "--max_predict_samples", 3, *QUIET, "--output_dir", "out")
    run("run_glue", "--model_name_or_path", glue, "--task_name", "sst2", *actions)
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(glue).eval()
    assert set(model.config.id2label.values()) == {"bad", "good"}
    assert found["eval_samples"] == len(rows_of("mood"))
    assert len((tmp_path / "out" / "predictions.csv").read_text().split()) == 4
    assert not (tmp_path / "out" / "README.md").exists()


def test_language_model(folder: Path, clm: Path) -> None:
    found = results(clm)
    assert found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert found["eval_samples"] == 2
    tokens = AutoTokenizer.from_pretrained(clm)((folder / "text.txt").read_text().splitlines(True))["input_ids"]
    assert found["train_samples"] == sum(map(len, tokens)) // 16
    assert_experts_learned(clm, folder / "llama-meo")


def test_question_answering(folder: Path, qa: Path) -> None:
    found = results(qa)
    assert found.keys() >= {"train_loss", "eval_loss", "eval_exact_match", "eval_f1"}
    answers = [json.loads(line) for line in (qa / "predictions.jsonl").read_text().splitlines()]
    assert [answer["index"] for answer in answers] == list(range(len(rows_of("qa"))))
    assert_experts_learned(qa, folder / "t5-meo")


def test_summarization(folder: Path, summarization: Path, hub: HubServer) -> None:
    found = results(summarization)
    assert found.keys() >= {"train_loss", "eval_loss", "eval_rouge1", "eval_rouge2", "eval_rougeL"}
    assert len((summarization / "predictions.jsonl").read_text().splitlines()) == len(rows_of("summaries"))
    assert_experts_learned(summarization, summarization / "_meo-start")
    pushed = hub.files("tester/short")
    assert {"model.safetensors", "README.md", *(file.name for file in code_files())} <= pushed.keys()
    assert not [name for name in pushed if name.startswith(("_meo-start", "checkpoint-"))]


def test_multitask(multitask: Path) -> None:
    found = results(multitask)
    accuracies = [found["eval_mood_accuracy"], found["eval_topic_accuracy"]]
    assert found["eval_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert found["train_samples"] > len(rows_of("mood") + rows_of("topic"))  # rows of the small task are repeated
    assert_experts_learned(multitask, multitask / "_meo-start")
    texts = [row["text"] for row in rows_of("mood")]
    batch = AutoTokenizer.from_pretrained(multitask)(texts, padding=True, return_tensors="pt")
    meo = AutoModelForSequenceClassification.from_pretrained(multitask).eval()
    logits, wrong = {}, 0.0
    for number, task in enumerate(("mood", "topic")):
        dense = AutoModelForSequenceClassification.from_pretrained(f"{multitask}-{task}").eval()
        assert type(dense) is transformers.BertForSequenceClassification
        logits[task] = meo(**batch, task_ids=torch.full((len(texts),), number)).logits
        wrong = max(wrong, float((dense(**batch).logits - logits[task]).detach().abs().max()))
    assert wrong <= 1e-6
    assert float((logits["mood"] - logits["topic"]).detach().abs().max()) > 100 * wrong
    own = [i for i, name in meo.config.id2label.items() if name.startswith("mood/")]
    found_names = [meo.config.id2label[own[int(i)]] for i in logits["mood"][:, own].argmax(1)]
    right = [name == f"mood/{row['label']}" for name, row in zip(found_names, rows_of("mood"), strict=True)]
    assert accuracies[0] == pytest.approx(sum(right) / len(right))


def test_tasks_are_judged_among_their_own_classes() -> None:
    score = script("run_multitask").scorer(["mood/bad", "mood/good", "topic/city", "topic/food"])
    logits = np.array([[0.1, 0.2, 9.0, 0.0], [0.3, 0.2, 0.0, 9.0], [0.1, 0.2, 0.0, 0.0]])
    assert score(EvalPrediction(logits, np.array([1, 0, 0])))["accuracy"] == pytest.approx(2 / 3)


def load(folder: str, auto: str) -> dict[str, Any]:
    """Load what an example saved, where meo_hf is not installed."""
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    keys = sorted(info["missing_keys"] | info["unexpected_keys"])
    return {"class": type(model).__name__, "module": type(model).__module__, "keys": keys}


@pytest.fixture(scope="module")
def loaded(folder: Path, glue: Path, clm: Path, qa: Path, summarization: Path, multitask: Path) -> Values:
    fresh = Fresh()
    for path in (glue, multitask):
        fresh.add(path.name, load, folder=path, auto="AutoModelForSequenceClassification")
    fresh.add(clm.name, load, folder=clm, auto="AutoModelForCausalLM")
    for path in (qa, summarization):
        fresh.add(path.name, load, folder=path, auto="AutoModelForSeq2SeqLM")
    return fresh.run(folder)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("glue", "MeoBertForSequenceClassification"),
        ("multitask", "MeoBertForSequenceClassification"),
        ("clm", "MeoLlamaForCausalLM"),
        ("qa", "MeoT5ForConditionalGeneration"),
        ("summarization", "MeoT5ForConditionalGeneration"),
    ],
)
def test_saved_models_load_without_meo_hf(loaded: Values, name: str, model: str) -> None:
    assert loaded[name]["class"] == model
    assert loaded[name]["module"].startswith("transformers_modules.")
    assert loaded[name]["keys"] == []


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder / "t5")


@pytest.mark.parametrize("name", ["run_seq2seq_qa", "run_summarization"])
def test_scores_find_their_rows_in_any_order(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """The Trainer pads rows, and evaluates rows of similar length together."""
    texts: list[Any] = [row["gist"] for row in rows_of("summaries")]  # longer than the labels, which were cut
    references = texts if name == "run_summarization" else [["another answer", text] for text in texts]
    rows = {
        "input_ids": tokenizer([row["document"] for row in rows_of("summaries")])["input_ids"],
        "labels": tokenizer([text.split()[0] for text in texts])["input_ids"],
    }
    score = script(name).Score(tokenizer, Dataset.from_dict(rows), references)
    order = [3, 0, 5, 1, 2, 4]
    padded = {k: np.array([[*many[i], tokenizer.pad_token_id, -100] for i in order]) for k, many in rows.items()}

    def scores(found: list[str]) -> dict[str, float]:
        return score(EvalPrediction(generated(tokenizer, found), padded["labels"], padded["input_ids"]))

    assert set(scores([texts[i] for i in order]).values()) == {100.0}
    assert max(scores(texts).values()) < 70
    assert max(scores([texts[i].split()[0] for i in order]).values()) < 70


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_input_is_explained(folder: Path, tmp_path: Path, name: str, options: str, message: str) -> None:
    model = folder / ("t5" if "seq2seq" in name or "summar" in name else "bert")
    output = tmp_path / "out"
    with pytest.raises((UsageError, ValueError), match=message):
        run(name, "--model_name_or_path", model, *options.format(d=folder).split(), *QUIET, "--output_dir", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "model", "options", "message"),
    [
        (
            "run_glue",
            "glue",
            "--do_eval --validation_file {d}/mood.csv --num_experts 4",
            "is a MEO model already: leave",
        ),
        (
            "run_multitask",
            "glue",
            "--do_train --task mood={d}/mood.csv,{d}/mood.csv",
            "has level sequence and the",
        ),
        ("run_clm", "llama-meo", "--do_train --train_file {d}/text.txt --block_size 999", "at most the model's 64"),
        (
            "run_clm",
            "llama",
            "--do_train --train_file {d}/text.txt --level sequence",
            "plain text has none",
        ),
        ("run_clm", "llama", "--do_train --train_file {d}/text.txt --max_train_samples 0", "give at least 1"),
        ("run_clm", "llama", "--do_predict --train_file {d}/text.txt", "--do_predict has no effect"),
    ],
)
def test_models_that_do_not_fit_are_explained(
    folder: Path, glue: Path, tmp_path: Path, name: str, model: str, options: str, message: str
) -> None:
    output = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        run(
            name,
            "--model_name_or_path",
            folder / model,
            *options.format(d=folder).split(),
            *QUIET,
            "--output_dir",
            output,
        )
    assert not output.exists()


def test_a_user_sees_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(SCRIPTS["run_glue"])
    monkeypatch.setattr(sys, "argv", [path, "--model_name_or_path", str(folder / "bert"), "--output_dir", "out"])
    with pytest.raises(SystemExit, match=r"^error: nothing to do"):
        runpy.run_path(path, run_name="__main__")


def test_what_the_examples_share_is_the_same() -> None:
    """Each example is one file to copy, so they repeat some functions: these must not drift apart."""
    found = defaultdict(set)
    count: dict[str, int] = defaultdict(int)
    for path in SCRIPTS.values():
        text = path.read_text("utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in SHARED:
                found[node.name].add(ast.get_source_segment(text, node))
                count[node.name] += 1
    assert len(SCRIPTS) == 5
    assert {name for name in SHARED if count[name] < 2} == set()
    assert [name for name, sources in found.items() if len(sources) > 1] == []


def test_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    names = [path.relative_to(EXAMPLES).as_posix() for path in SCRIPTS.values()]
    assert [name for name in names if text.count(name) < 2] == []  # in the table and in a command
