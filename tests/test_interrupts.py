"""An interrupted run leaves nothing beside its output, and what stood there stays until the new one is complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from checkpoints import listing, run_cli, saved
from tiny import main_class, tiny_config

from meo_hf import convert
from meo_hf.errors import OutputError

PATIENCE = 60


class Run:
    """A conversion in a process of its own."""

    def __init__(self, folder: Path, source: Path, *options: str) -> None:
        folder.mkdir()
        self.folder, self.source = folder, source
        program = "from meo_hf.cli import main; main()"
        command = [sys.executable, "-c", program, "convert", str(source), str(folder / "deep/out"), *options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_until(self, happened: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"the run ended too early: {self.process.communicate()}"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.005)

    def is_writing(self) -> bool:
        """Say whether a weight file is half-written."""
        return any(file.stat().st_size > 2**20 for file in self.folder.glob("deep/.out.partial-*/*.safetensors"))

    def checkers(self) -> list[psutil.Process]:
        """Return the processes that check the output."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if any("verification_child" in part for part in child.cmdline())]

    def interrupt(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err.decode()


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a source that takes seconds to convert with noise."""
    config = tiny_config("llama", hidden_size=128, intermediate_size=16384, num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("big") / "dense"
    main_class("llama")(config).save_pretrained(folder)
    return folder


def test_signals_while_writing_and_checking(big: Path, tmp_path: Path) -> None:
    small = saved("bert", tmp_path / "small")
    before = listing(big), listing(small)
    slow = ("--num-experts", "48", "--expert-init", "noise", "--verify", "none")
    writing = Run(tmp_path / "write", big, *slow)
    writing.wait_until(writing.is_writing)
    code, err = writing.interrupt(signal.SIGINT)
    assert code == 130
    assert err.strip() == "interrupted: nothing half-done was kept"
    checking = Run(tmp_path / "check", small)
    checking.wait_until(lambda: bool(checking.checkers()))
    checkers = checking.checkers()
    assert checking.interrupt(signal.SIGTERM)[0] == 130
    _, alive = psutil.wait_procs(checkers, timeout=10)
    assert not alive, "the process that checked runs on"
    assert not listing(writing.folder)
    assert not listing(checking.folder)
    assert (listing(big), listing(small)) == before


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none", max_shard_size="20KB")
    (tmp_path / "meo/notes.txt").write_text("of the old model")
    (tmp_path / "empty").mkdir()
    for name in ("meo", "empty"):
        done = run_cli("convert", source, tmp_path / name, "--num-experts", "3", "--verify", "none", "--overwrite")
        assert done.code == 0
    assert listing(tmp_path / "meo").keys() == listing(tmp_path / "empty").keys()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "meo", "empty"}


def test_overwritten_model_stands_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("bert", tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none")
    before = listing(tmp_path)
    rename, seen = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            seen.append(target)
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match=r"Input/output error\): nothing was kept"):
        convert(source, tmp_path / "meo", num_experts=3, verify="none", overwrite=True)
    assert seen == [tmp_path / "meo"]
    assert listing(tmp_path) == before


def test_failure_in_a_writer_thread_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meo_hf.conversion import births

    def broken(self: births.Drawn, target: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(births.Drawn, "chunks", broken)
    source = saved("bert", tmp_path / "dense")
    done = run_cli("convert", source, tmp_path / "meo", "--max-shard-size", "20KB", "--verify", "none")
    assert done.code == 2
    assert "No space left on device): nothing was kept" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}
