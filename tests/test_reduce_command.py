"""The command `meo-hf reduce`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import listing, run_cli
from compare_tiny import words, words_tokenizer
from moe_tiny import tiny_moe
from safetensors.torch import load_file, save_file

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
