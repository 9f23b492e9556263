"""Checks of a conversion pass on good ones and fail on spoilt ones, each check on its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from checkpoints import edit_json, listing, run_cli, saved
from safetensors.torch import load_file, save_file

from meo_hf import convert, verify_output
from meo_hf.conversion import births, dense_convert, verification
from meo_hf.conversion.births import Stacked
from meo_hf.conversion.safetensors_files import raw_bytes
from meo_hf.errors import CheckFailedError, CheckpointError

BYTES = "every tensor holds the bytes that the sources give"
LOADS = "loads without meo_hf"
LAYERS = "each layer equals its definition"


@pytest.mark.own_process
@pytest.mark.parametrize(
    ("family", "options", "checks"),
    [
        (
            "bert",
            {"level": "token", "layers": "odd"},
            ["logits equal the source's, gates as saved", "logits equal the source's, gates spread"],
        ),
        (
            "mt5",
            {"expert_init": "drop-upcycle", "gate_scope": "projection", "dtype": "float16"},
            ["logits with only expert 0", "logits with only expert 2"],
        ),
        (
            "gpt2",
            {"expert_init": "noise", "level": "task", "tasks": ["a", "b"], "dtype": "bfloat16"},
            ["logits with only expert 0", "logits with only expert 2"],
        ),
        (
            "llama",
            {"level": "sequence", "segment_length": 5},
            ["logits equal the source's, gates as saved", "logits equal the source's, gates spread"],
        ),
    ],
)
def test_full_check_passes(family: str, options: dict[str, object], checks: list[str], tmp_path: Path) -> None:
    report = convert(saved(family, tmp_path / "dense"), tmp_path / "meo", num_experts=3, **options)
    assert report.verification == "full"
    names = {check.name: check.passed for check in report.checks}
    assert names.keys() >= {BYTES, LOADS, *checks}
    assert all(names.values())
    assert not report.warnings


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mt5", {"level": "token", "gate_scope": "projection", "dtype": "float16"}),
        ("phi3", {"expert_init": "noise"}),
    ],
)
def test_sample_check_passes(family: str, options: dict[str, object], tmp_path: Path) -> None:
    report = convert(saved(family, tmp_path / "dense"), tmp_path / "meo", num_experts=3, verify="sample", **options)
    assert [check.name for check in report.checks] == [BYTES, "every tensor of the model is in the files", LAYERS]
    assert report.passed
    assert report.verification == "sample"


def test_models_that_do_not_fit_are_checked_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the choice: what `sample` then checks is tested above."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr(dense_convert, "verify_files", lambda plan, folder, mode, *_: [])
    report = convert(saved("bert", tmp_path / "dense"), tmp_path / "meo", num_experts=2)
    assert report.verification == "sample"
    assert "do not fit in memory" in report.warnings[0]


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a written file, as a broken disk or writer would."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def flip(stored: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(stored) if n.endswith("experts.down_proj"))
    stored[name][1, 0, 0] *= -1


def drop_bias(stored: dict[str, torch.Tensor]) -> None:
    stored[next(n for n in sorted(stored) if n.endswith("experts.up_proj_bias"))].zero_()


def lose_bias(stored: dict[str, torch.Tensor]) -> None:
    stored.pop(next(n for n in sorted(stored) if n.endswith("experts.up_proj_bias")))


@pytest.mark.parametrize("change", [flip, drop_bias, lose_bias])
@pytest.mark.parametrize("mode", ["full", "sample"])
def test_spoilt_bytes_are_found(
    change: Callable[[dict[str, torch.Tensor]], None], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the sources; the child process is not asked, it has tests of its own below."""
    source = saved("bert", tmp_path / "dense")
    written, write = [], dense_convert.write_tensors

    def write_badly(targets: object, folder: Path, *rest: object) -> object:
        shards = write(targets, folder, *rest)
        spoil(folder, change)
        written.append(folder)
        return shards

    monkeypatch.setattr(dense_convert, "write_tensors", write_badly)
    monkeypatch.setattr(verification, "run_child", lambda *_: [])
    before = listing(tmp_path)
    done = run_cli("convert", source, tmp_path / "meo", "--num-experts", "3", "--verify", mode)
    assert done.code == 1
    assert "a check failed" in done.err
    assert f"kept as {tmp_path / 'meo.failed'}" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert written
    assert {name.split("/")[0] for name in listing(tmp_path).keys() - before} == {"meo.failed"}
    assert (tmp_path / "meo.failed/meo_report.json").is_file()


def swap_gate_and_up(self: Stacked, target: object) -> Iterator[memoryview]:
    for parts in self.experts:
        for part in reversed(parts):
            yield raw_bytes(part.load())


def forget_to_transpose(self: Stacked, target: object) -> Iterator[memoryview]:
    for parts in self.experts:
        yield from (raw_bytes(part.load()) for part in parts)


def zero_biases(self: Stacked, target: object) -> Iterator[memoryview]:
    for parts in self.experts:
        yield from (raw_bytes(part.load() * (len(part.spec.shape) > 1)) for part in parts)


@pytest.mark.parametrize(
    ("family", "recipe", "mode"),
    [
        ("llama", swap_gate_and_up, "full"),
        ("llama", swap_gate_and_up, "sample"),
        ("gpt2", forget_to_transpose, "sample"),
        ("bert", zero_biases, "full"),
    ],
)
def test_wrong_recipe_is_found_without_meo_hf(
    family: str,
    recipe: Callable[[Stacked, object], Iterator[memoryview]],
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mistake of the converter that its own comparison of bytes repeats shows in the child process."""
    monkeypatch.setattr(births.Stacked, "chunks", recipe)
    with pytest.raises(CheckFailedError, match="kept as") as caught:
        convert(saved(family, tmp_path / "dense"), tmp_path / "meo", num_experts=2, verify=mode)
    assert BYTES not in str(caught.value)
    assert not (tmp_path / "meo").exists()
    assert (tmp_path / "meo.failed/config.json").is_file()


def test_failed_output_replaces_an_earlier_one_but_never_the_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("bert", tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none")
    good = listing(tmp_path / "meo")
    failed = [verification.Check("made to fail", False, "by a test")]
    monkeypatch.setattr(dense_convert, "verify_files", lambda *_: failed)
    for seed in (1, 2):
        with pytest.raises(CheckFailedError, match="made to fail"):
            convert(source, tmp_path / "meo", num_experts=2, seed=seed, overwrite=True)
    assert listing(tmp_path / "meo") == good
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "meo", "meo.failed"}
    assert "made to fail" in (tmp_path / "meo.failed/README.md").read_text()


def test_verify_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another folder than the one the conversion was started in."""
    saved("llama", tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    convert("dense", "meo", num_experts=2, verify="none", dtype="bfloat16", layers="odd", level="task", tasks=["a"])
    monkeypatch.chdir("/")
    report = verify_output(tmp_path / "meo", "full")
    assert report.passed
    assert [check.name for check in report.checks][:2] == ["files are as recorded", BYTES]
    assert "logits equal the source's, gates spread" in [check.name for check in report.checks]


def test_verify_notices_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "run_child", lambda *_: [])
    source = saved("bert", tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none")
    shutil.copytree(tmp_path / "meo", tmp_path / "spoilt")
    spoil(tmp_path / "spoilt", flip)
    assert verify_output(tmp_path / "spoilt").checks[0].detail == "changed or missing: model.safetensors"
    (tmp_path / "spoilt/model.safetensors").unlink()
    done = run_cli("verify", tmp_path / "spoilt")
    assert done.code == 1
    assert "FAILED" in done.out
    assert "make it again" in done.err
    spoil(source, lambda stored: next(iter(stored.values())).neg_())
    report = verify_output(tmp_path / "meo", "sample")
    assert [check.name for check in report.checks if not check.passed] == [BYTES]


def test_verify_without_a_report_or_a_source(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=2, verify="none")
    shutil.rmtree(source)
    gone = run_cli("verify", tmp_path / "meo")
    assert gone.code == 2
    assert "does not exist" in gone.err
    edit_json(tmp_path / "meo/meo_report.json", options=None)
    with pytest.raises(CheckpointError, match="damaged"):
        verify_output(tmp_path / "meo")
    (tmp_path / "meo/meo_report.json").unlink()
    with pytest.raises(CheckpointError, match="was not written by meo-hf convert"):
        verify_output(tmp_path / "meo")
