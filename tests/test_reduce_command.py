"""The command `meo-hf reduce`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from checkpoints import listing, run_cli
from compare_tiny import words, words_tokenizer
from meo_hf.modeling.configuration_meo import SKIPS
from moe_tiny import tiny_moe
from safetensors.torch import load_file, save_file

from meo_hf.reduction.budget import BUDGETS
from meo_hf.reduction.methods import METHODS
from meo_hf.reduction.methods.low_rank import CENTERS, RANKS_BY
from meo_hf.reduction.methods.merge import GROUPINGS, HOWS, ROUTERS
from meo_hf.reduction.methods.scores import SCORES
from meo_hf.reduction.methods.subset_scores import SUBSETS
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, one_hot
from meo_hf.reduction.workbench import Workbench

torch.set_num_threads(1)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEO_HF_STATISTICS", str(tmp_path / "statistics"))
    tiny_moe("mixtral").save_pretrained(tmp_path / "source")
    words_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(words(300), "utf-8")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": words(9, n)}) + "\n" for n in range(5)), "utf-8")
    return tmp_path / "source"


def test_a_plan_is_printed_kept_applied_and_checked_again(source: Path, tmp_path: Path) -> None:
    text = ("--calibration", tmp_path / "text.txt", "--window", "16", "--samples", "8")
    prune = ("--method", "prune", "--score", "reap", "--keep", "4", *text)
    dry = run_cli("reduce", source, tmp_path / "out", *prune, "--dry-run", "--save-plan", tmp_path / "plan.json")
    assert dry.code == 0
    assert "dry run: nothing was written" in dry.out
    assert "6 -> 4" in dry.out
    assert not (tmp_path / "out").exists()
    assert run_cli("reduce", source, tmp_path / "out", "--plan", tmp_path / "plan.json").code == 0
    assert run_cli("reduce", source, tmp_path / "same", *prune, "--verify", "none").code == 0
    one, two = listing(tmp_path / "out"), listing(tmp_path / "same")
    assert {n for n in one if one[n] != two.get(n)} == {"meo_report.json", "README.md"}, "they tell of their checks"
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "out" / "plan.json").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `--score` | `reap` |" in card
    assert "text.txt (128 tokens)" in card
    assert "trust_remote_code" not in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "plan.json").read_text()
    verified = run_cli("verify", tmp_path / "out")
    assert verified.code == 0, verified.err
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert run_cli("verify", tmp_path / "out").code == 1


@dataclass(frozen=True)
class KeepFrom:
    """A method as somebody may add it: keep experts from one number on."""

    name: ClassVar[str] = "keep-from"
    first: int
    apart: bool = False

    def decide(self, work: Workbench) -> ReductionPlan:
        """Keep the last ones."""
        rows = {path: one_hot([*range(self.first, one.experts)]) for path, one in work.limits.items()}
        return work.planned(self, {path: BlockPlan(own, own) for path, own in rows.items()})


def test_a_new_method_is_a_dataclass(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields are options, the report's rows and the card's table; nothing else has to be told of it."""
    monkeypatch.setitem(METHODS, "keep-from", KeepFrom)
    command = ("reduce", source, tmp_path / "out", "--method", "keep-from")
    done = run_cli(*command, "--first", "2", "--apart=true", "--verify", "sample")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "meo_report.json").read_text())
    assert report["method"] == {"name": "keep-from", "first": 2, "apart": True, "layers": "all"}
    assert set(map(tuple, report["blocks"].values())) == {(6, 4)}
    assert "| `--first` | `2` |" in (tmp_path / "out" / "README.md").read_text()
    for arguments, message in {
        (): "--method keep-from needs --first",
        ("--first", "two"): "--first is 'two': give a whole number",
        ("--first", "2", "--keep", "4"): "--keep has no effect on --method keep-from",
        ("--first", "2", "--last", "4"): "no such option: --last",
        ("--first",): "--first lacks a value",
        ("--first", "2", "more"): "got an extra argument, more",
    }.items():
        done = run_cli(*command, *arguments, "--overwrite")
        assert (done.code, message in words_of(done.err)) == (2, True), done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methd", "prune", "--keep", "4"), "no such option: --methd (did you mean --method?)"),
        (("--method", "prune", "--batch_size", "4"), "no such option: --batch_size (did you mean --batch-size?)"),
        (("--method", "prune", "-v"), "no such option: -v"),
        (("--method", "skip", "--window", "4"), "--window has no effect without --calibration"),
        (("--method", "prune", "--keep", "4", "--device", "nowhere"), "--device nowhere cannot be used here"),
        (("--method", "prune", "--keep", "4", "--column", "a", "--calibration", "TEXT"), "no effect on plain text"),
        (("--plan", "none.json", "--seed", "4"), "--seed has no effect without --method"),
        (("--method", "low-rank", "--share", "0.5", "--after", "none.json"), "--after none.json cannot be read"),
        (("--method", "search", "--keep", "4", "--generations=-1,1", "--calibration", "TEXT"), "two numbers from 0"),
        (("--method", "search", "--keep", "4", "--population", "0", "--calibration", "TEXT"), "--population 0 is too"),
    ],
)
def test_options_that_are_wrong_or_idle(arguments: tuple[str, ...], message: str, source: Path, tmp_path: Path) -> None:
    given = [str(tmp_path / "text.txt") if one == "TEXT" else one for one in arguments]
    done = run_cli("reduce", source, tmp_path / "out", *given)
    assert (done.code, message in words_of(done.err)) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_what_had_no_effect_is_noted(source: Path, tmp_path: Path) -> None:
    done = run_cli("reduce", source, tmp_path / "one", "--method", "top-k", "--top-k", "1", "--max-shard-size", "1MB")
    assert "--max-shard-size had no effect" in words_of(done.out)
    random = ("--method", "prune", "--keep", "4", "--score", "random", "--verify", "none")
    done = run_cli("reduce", source, tmp_path / "two", *random, "--copy", "--device", "auto")
    assert "--copy had no effect" in words_of(done.out)
    assert "--device auto had no effect" in words_of(done.out)


def test_saved_plans_replace_nothing(source: Path, tmp_path: Path) -> None:
    random = ("reduce", source, tmp_path / "out", "--method", "prune", "--keep", "4", "--score", "random", "--dry-run")
    before = listing(source)
    done = run_cli(*random, "--overwrite", "--save-plan", source / "config.json")
    assert (done.code, "which is never written to" in words_of(done.err)) == (2, True)
    assert listing(source) == before
    (tmp_path / "notes.matrices").write_text("mine")
    done = run_cli(*random, "--save-plan", tmp_path / "notes.json")
    assert (done.code, "exists: name another file, or pass --overwrite" in words_of(done.err)) == (2, True)
    assert run_cli(*random, "--save-plan", tmp_path / "plan.json").code == 0
    assert run_cli(*random, "--save-plan", tmp_path / "plan.json").code == 2
    assert run_cli(*random, "--save-plan", tmp_path / "plan.json", "--overwrite").code == 0


def words_of(text: str) -> str:
    """Return a message on one line."""
    return " ".join(text.split())


def test_help_names_every_choice() -> None:
    shown = words_of(run_cli("reduce", "--help").out)
    choices = (*METHODS, *SCORES, *SUBSETS, *GROUPINGS, *HOWS, *ROUTERS, *CENTERS, *RANKS_BY, *SKIPS, *BUDGETS)
    assert [choice for choice in choices if choice not in shown] == []
    options = {field.name for method in METHODS.values() for field in fields(method)}
    assert [option for option in options if f"--{option.replace('_', '-')}" not in shown] == []


def test_every_text_is_read_and_weighed(source: Path, tmp_path: Path) -> None:
    texts = ("--calibration", f"{tmp_path}/text.txt=3", "--calibration", tmp_path / "other.jsonl", "--window", "16")
    done = run_cli("reduce", source, tmp_path / "out", "--method", "prune", "--keep", "4", *texts, "--verify", "none")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "meo_report.json").read_text())
    found = {one["name"]: (one["weight"], one["rows"], one["tokens"]) for one in report["calibration"]["domains"]}
    assert found == {"text.txt": (0.75, 18, 288), "other.jsonl": (0.25, 5, 45)}


def test_skipping_links_the_weights_and_stores_a_rule(source: Path, tmp_path: Path) -> None:
    text = ("--calibration", tmp_path / "text.txt", "--window", "16")
    done = run_cli("reduce", source, tmp_path / "out", "--method", "skip", *text)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["meo"]["skip"]["rule"] == "ratio"
    assert len(config["meo"]["skip"]["threshold"]) == 3
    assert (tmp_path / "out" / "model.safetensors").samefile(source / "model.safetensors")
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either a --method, or a --plan"),
        (("--method", "prune"), "--method prune needs --keep"),
        (("--method", "skip", "--keep", "3"), "--keep has no effect on --method skip"),
        (("--method", "prune", "--keep", "4"), "give --calibration FILE"),
        (("--method", "prune", "--keep", "4", "--calibration", "nowhere.txt"), "nowhere.txt"),
        (("--method", "merge", "--keep", "4", "--score", "reap"), "--score has no effect on --method merge"),
        (("--plan", "nowhere.json"), "cannot be read"),
        (("--plan", "nowhere.json", "--top-k", "1"), "--top-k has no effect on a --plan"),
        (("--method", "top-k"), "needs --top-k"),
        (("--method", "skip", "--rule", "cumulative"), "needs --threshold"),
        (("--method", "prune", "--keep", "4", "--score", "random", "--layers", "7"), "--layers 7"),
    ],
)
def test_bad_input_is_explained(source: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    before = listing(tmp_path)
    done = run_cli("reduce", source, tmp_path / "out", *options)
    assert done.code == 2
    assert message in " ".join((done.out + done.err).split())
    assert listing(tmp_path) == before
