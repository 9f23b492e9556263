"""The README's code blocks and the examples do what they say."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

from real import ASSETS, bert_tiny, minilm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_python_blocks(tmp_path: Path) -> None:
    minilm()
    (tmp_path / "models").symlink_to(ASSETS)  # what the first block would download
    script = tmp_path / "blocks.py"
    docs = [
        (ROOT / "docs" / name).read_text("utf-8") for name in ("speed.md", "adapters.md", "training.md", "fewer.md")
    ]
    further = [block for text in docs for block in _blocks("python", text)]  # which go on with the README's models
    script.write_text("\n".join([*_blocks("python"), *further]))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([2, 13, 384])" in done.stdout
    for extracted in ("minilm-search", "two-mood"):
        assert (tmp_path / extracted / "config.json").is_file()
    assert (tmp_path / "tuned" / "expert_load.png").is_file()


def test_ci_runs_the_test_command() -> None:
    command = _blocks("bash")[-1].strip()
    assert command in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_setup_command_installs_and_runs_the_demo() -> None:
    command = _blocks("bash")[0]
    assert "-c constraints.txt ." in command
    assert (ROOT / "constraints.txt").is_file()
    assert command.strip().endswith("meo-hf demo")


def _run(program: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_examples(tmp_path: Path) -> None:
    printed = _run("convert_and_compare.py", bert_tiny(), tmp_path / "out", "One text.", "Another, longer text.")
    assert float(printed.rsplit(" ", 1)[1]) < 1e-4
    with open(tmp_path / "data.csv", "w", newline="") as file:
        rows = [("good film", "yes"), ("bad film", "no")] * 16
        csv.writer(file).writerows([("text", "label"), *rows])
    _run("finetune_classifier.py", tmp_path / "out", tmp_path / "data.csv", tmp_path / "tuned", 5)
    assert (tmp_path / "tuned" / "modeling_meo.py").is_file()
