"""Statistics that are kept on disk: found again, never mistaken for others, made anew where they are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observed import batches_of, every_statistic, prepared
from reduction_tiny import bench_of, source_of

from meo_hf.reduction.kept_statistics import (
    ENVIRONMENT,
    read_statistics,
    statistics_folder,
    statistics_key,
    write_statistics,
)
from meo_hf.reduction.observing import observe
from meo_hf.reduction.statistics import Frequency, Reap, Statistic

torch.set_num_threads(1)


def test_kept_statistics_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, model, rows, weights = prepared("mixtral")
    found = every_statistic("mixtral")
    observe(model, batches_of(rows, weights, 2), found)
    path, again = tmp_path / "deep" / "kept.safetensors", every_statistic("mixtral")
    assert not read_statistics(path, again)
    write_statistics(path, found)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert read_statistics(path, again)
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(value, other.result()[block]) for block, value in one.result().items())
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "elsewhere"))
    assert statistics_folder() == tmp_path / "elsewhere"
    assert statistics_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match="cannot be kept"):
        write_statistics(tmp_path / "file" / "kept.safetensors", found)


@pytest.mark.parametrize("damage", ["cut", "text", "others", "nan"])
def test_damaged_statistics_are_made_anew(damage: str, tmp_path: Path) -> None:
    _, _, model, rows, weights = prepared("mixtral")
    found: list[Statistic] = [Frequency(), Reap()]
    observe(model, batches_of(rows, weights, 2), found)
    path = tmp_path / "kept.safetensors"
    if damage == "nan":
        next(iter(found[1].state.values()))["sum"][0] = float("nan")
    write_statistics(path, found)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "text":
        path.write_text("{}")
    again: list[Statistic] = [Reap(), Frequency()] if damage == "others" else [Frequency(), Reap()]
    with pytest.warns(UserWarning, match="damaged"):
        assert not read_statistics(path, again)
    assert not any(one.state for one in again)


def test_the_key_is_of_all_that_statistics_depend_on(tmp_path: Path) -> None:
    work = bench_of(source_of("olmoe", tmp_path / "a"))
    key = statistics_key(work.source, "rows", [Reap()], {"batch": 4})
    assert key == statistics_key(work.source, "rows", [Reap()], {"batch": 4})
    others = [
        statistics_key(work.source, "other rows", [Reap()], {"batch": 4}),
        statistics_key(work.source, "rows", [Reap(renormalise=False)], {"batch": 4}),
        statistics_key(work.source, "rows", [Reap(), Frequency()], {"batch": 4}),
        statistics_key(work.source, "rows", [Reap()], {"batch": 8}),
    ]
    weights = tmp_path / "a" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a value changes, and neither header nor size
    weights.unlink()
    weights.write_bytes(content)
    others.append(statistics_key(work.source, "rows", [Reap()], {"batch": 4}))
    assert len({key, *others}) == len(others) + 1
