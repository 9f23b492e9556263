"""What the machine refuses: space, permission, network, damaged bytes: one line each, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from checkpoints import listing, run_cli, saved
from client import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meo_hf.conversion.safetensors_files import read_header
from meo_hf.errors import CheckpointError, UnsupportedError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("bert", tmp_path_factory.mktemp("sound") / "src")


def test_no_space(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = run_cli("convert", sound, tmp_path / "deep/out")
    assert done.code == 2
    assert "0.01 GB are free: make room, or give another output" in done.err
    assert not list(tmp_path.iterdir())


def test_disk_that_fills_up(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may not grow beyond what the system allows, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        done = run_cli("convert", sound, tmp_path / "deep/out", "--verify", "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 2
    assert "File too large): nothing was kept" in done.err
    assert not list(tmp_path.iterdir())


def as_nobody(function: Callable[[], Any]) -> Any:
    """Run a function in a process without root's rights, and return what it returns."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            value = function()
        except BaseException as error:
            value = error
        os.write(write, pickle.dumps(value))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        content = stream.read()
    os.waitpid(child, 0)
    return pickle.loads(content)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Give a folder that others may enter; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_no_permission(sound: Path, open_folder: Path) -> None:
    shutil.copytree(sound, open_folder / "src")
    (open_folder / "mine").mkdir(mode=0o755)
    (open_folder / "theirs").mkdir()
    (open_folder / "theirs").chmod(0o777)
    before = listing(open_folder)
    if os.geteuid():
        (open_folder / "mine").chmod(0o555)
    done = as_nobody(lambda: run_cli("convert", open_folder / "src", open_folder / "mine/deeper/out"))
    assert done.code == 2
    assert f"no permission to write in {open_folder / 'mine'}: give another output" in done.err
    (open_folder / "src/model.safetensors").chmod(0)
    done = as_nobody(lambda: run_cli("convert", open_folder / "src", open_folder / "theirs/out"))
    (open_folder / "src/model.safetensors").chmod(0o644)
    assert done.code == 2
    assert "cannot be read (Permission denied): check its files and their permissions" in done.err
    assert listing(open_folder) == before


def test_no_network_and_nothing_cached(sound: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_any"}
    environment.pop("HF_HUB_OFFLINE", None)
    client = Client(environment)
    lost = client.cli("convert", "tester/model", tmp_path / "out")
    push = client.cli("convert", sound, tmp_path / "out", "--push-to-hub", "tester/model")
    client.close()
    assert "tester/model is not in the cache and the Hub cannot be reached: connect, or give a folder" in lost.err
    assert "run `hf auth login` or give --token" in push.err
    for done in (lost, push):
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1, done.err
    assert not (tmp_path / "out").exists()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_headers_never_crash(data: st.DataObject, sound: Path, tmp_path: Path) -> None:
    """Whatever is wrong with a header, it is a damaged checkpoint and nothing else."""
    content = bytearray((sound / "model.safetensors").read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    keys = [key for key in header if key != "__metadata__"]
    entry = header[data.draw(st.sampled_from(keys[:5]))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=3), v))
    entry[field] = data.draw(values)
    path, text = tmp_path / "model.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with suppress(CheckpointError, UnsupportedError):  # what was drawn may be right by chance
        read_header(path)
