"""The command line: its options are frozen, its exit codes mean what the README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import listing, run_cli, saved, tensors
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from rich.console import Console
from safetensors.torch import save_file
from tiny import tiny_dense
from transformers import BertModel, DogeConfig

from meo_hf import __version__, cli, cli_convert, cli_progress, cli_reduce, convert, inspect

GOLDEN = Path(__file__).parent / "golden" / "help.txt"
COMMANDS = (
    "convert", "reduce", "inspect", "families", "verify", "extract", "flops", "demo", "compare", "recover", "bench",
)  # fmt: skip
BENCHES = ("layer", "prefill", "decode", "train-step", "convert", "calibrate")


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    for module in (cli, cli_convert, cli_progress, cli_reduce):
        monkeypatch.setattr(module, "out", Console(width=200, highlight=False))  # tables are not folded


def words(text: str) -> str:
    """Return a table's text without its frame and line breaks."""
    return re.sub(r"[\s│┃┏┓┗┛┡┩├┤┌┐└┘━─┬┴┼╇╈]+", " ", text)


def test_help_is_frozen() -> None:
    """Regenerate with MEO_UPDATE_GOLDEN=1, and look at the difference."""
    pages = []
    for command in ((), *((name,) for name in COMMANDS), *(("bench", name) for name in BENCHES)):
        done = run_cli(*command, "--help")
        assert done.code == 0
        pages.append(f"$ meo-hf {' '.join((*command, '--help'))}\n{done.out.strip()}\n")
    text = "\n".join(pages)
    if os.environ.get("MEO_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, "utf-8")
    assert text == GOLDEN.read_text("utf-8")
    listed = re.findall(r"^  (\w+)  ", pages[0].partition("Commands:")[2], re.MULTILINE)
    assert tuple(listed) == COMMANDS, "a command has no page here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "a", "b", "--bogus"), "No such option: --bogus"),
        (
            ("convert", "a", "b", "--level", "sentence"),
            "'sentence' is not one of 'segment', 'sequence', 'token', 'task'",
        ),
        (("convert", "a", "b", "--num-experts", "many"), "Invalid value for '--num-experts'"),
        (("convert", "a"), "OUT"),
        (("konvert",), "konvert"),
        (("extract", "a"), "DENSE"),
    ],
)
def test_usage_errors(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli(*arguments)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not listing(tmp_path)


def test_version_and_bare_call() -> None:
    assert run_cli("--version").out == f"meo-hf {__version__}\n"
    bare = run_cli()
    assert "Commands:" in bare.out + bare.err


def test_console_script_ends_with_the_exit_code(tmp_path: Path) -> None:
    """The installed entry point, in a process of its own; also the import that it needs starts no CUDA."""
    program = (
        "import sys, torch; from meo_hf.cli import main\ntry: main()\nfinally: assert not torch.cuda.is_initialized()"
    )
    command = [sys.executable, "-c", program, "convert", str(tmp_path / "nowhere/at/all"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("meo-hf: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "dense")
    before = listing(tmp_path)
    options = ("--num-experts", "3", "--layers", "odd", "--level", "task", "--task", "a", "--task", "b")
    done = run_cli("convert", source, tmp_path / "deep/meo", *options, "--dry-run")
    assert done.code == 0
    assert not done.err
    assert listing(tmp_path) == before
    report = convert(
        source, tmp_path / "meo", num_experts=3, layers="odd", level="task", tasks=["a", "b"], verify="none"
    )
    per_layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    dense = 2 * (2 * per_layer + 99 * 32)
    merged = 2 * 3 * 48 * 32 // 128
    data = sum(f["bytes"] for f in report.files.values()) - header_bytes(tmp_path / "meo/model.safetensors")
    shown = words(done.out)
    for line in (
        "Plan (dry run: nothing was written or pushed)",
        "class MeoLlamaForCausalLM",
        "level task (tasks: a, b)",
        "experts 3, 2 merged per gate, gate scope ffn",
        "born by copy",
        "layers 1 ",
        f"parameters {report.parameters_before:,} -> {report.parameters_after:,}",
        f"FLOPs per token {dense:,} -> {dense + merged:,}",
        f"would write {data:,} bytes",
        "memory needed about",
    ):
        assert line in shown, line


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_conversion_prints_its_report(tmp_path: Path) -> None:
    """Also a path that looks like markup is printed as it is."""
    folder = tmp_path / "[bold]odd[/bold]"
    source = saved("bert", folder / "dense")
    done = run_cli("convert", source, folder / "meo", "--num-experts", "2", "--verify", "none")
    assert done.code == 0
    report = json.loads((folder / "meo/meo_report.json").read_text())
    shown = words(done.out)
    assert report["files"]["model.safetensors"]["sha256"] in shown
    assert "checks not verified" in shown
    assert f"output {folder / 'meo'}" in shown
    assert report["output"] == str(folder / "meo")


def test_inspect_says_what_a_folder_is(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense", torch.bfloat16)
    done = run_cli("inspect", source)
    assert done.code == 0
    count = sum(t.numel() for t in BertModel.from_pretrained(source, add_pooling_layer=False).parameters())
    found = inspect(source)
    assert found.dtypes == {"BF16": found.parameters}
    assert found.parameters > count
    for line in (
        "model type bert",
        "architecture BertForMaskedLM",
        f"parameters {found.parameters:,}",
        "convertible yes, to level sequence or token or task",
        "layers 2",
    ):
        assert line in words(done.out), line
    convert(source, tmp_path / "meo", num_experts=3, top_k=1, verify="none")
    shown = words(run_cli("inspect", tmp_path / "meo").out)
    for line in ("model type meo_bert", "meo.level sequence", "meo.num_experts 3", "meo.top_k 1"):
        assert line in shown, line


def test_inspect_says_why_a_model_is_refused(tmp_path: Path) -> None:
    DogeConfig(num_hidden_layers=1, is_moe=True).save_pretrained(tmp_path / "moe")
    done = run_cli("inspect", tmp_path / "moe")
    assert done.code == 0
    assert "convertible no: " in words(done.out)
    assert "there are no weight matrices to merge" in words(done.out)
    assert "no safetensors" in words(done.out)
    (tmp_path / "moe/config.json").write_text("[]")
    assert run_cli("inspect", tmp_path / "moe").code == 2


def test_inspect_reads_headers_only(tmp_path: Path) -> None:
    """Weights that are not there at all do not matter: the file is as long as it says, and empty."""
    source = saved("llama", tmp_path / "dense")
    head = header_bytes(source / "model.safetensors")
    size = (source / "model.safetensors").stat().st_size
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(head)
        file.truncate(size)
    assert inspect(source).parameters == sum(p.numel() for p in tiny_dense("llama").parameters())


def test_families_lists_every_row_and_what_is_refused() -> None:
    done = run_cli("families")
    assert done.code == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in done.out.splitlines() if line.startswith("│")]
    kept = [name for name, row in MOE_FAMILIES.items() if row.refused is None]
    assert [row[1] for row in rows if row[1]] == [*FAMILIES, *kept]
    refused = [line for line in done.out.splitlines() if line.startswith("refused: ")]
    for name, row in MOE_FAMILIES.items():
        assert (row.refused is not None) == any(f"refused: {name}: " in line for line in refused)
    assert any("quantised" in line for line in refused)


def test_verify_and_extract_commands(tmp_path: Path) -> None:
    source = saved("gpt2", tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none", level="task", tasks=["sst2"])
    done = run_cli("verify", tmp_path / "meo", "--mode", "none")
    assert done.code == 0
    assert "files are as recorded" in words(done.out)
    done = run_cli("extract", tmp_path / "meo", tmp_path / "back", "--task", "sst2")
    assert done.code == 0
    assert "needs no remote code" in done.out
    assert done.out.startswith(f"wrote {tmp_path / 'back'}")


def test_notes_follow_the_report(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    save_file({**tensors(source), "odd": torch.zeros(1)}, source / "model.safetensors", {"format": "pt"})
    done = run_cli("convert", source, tmp_path / "meo", "--num-experts", "2", "--verify", "none")
    assert "note: 1 tensors unknown to BertForMaskedLM were carried over: odd" in done.out


def test_flops_needs_a_choice() -> None:
    done = run_cli("flops")
    assert done.code == 2
    assert "pass --paper" in done.err
