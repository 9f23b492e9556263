"""The layer benchmarks: they refuse to time a wrong thing, continue a file, and their floors are plain arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import listing, run_cli
from meo_hf.modeling.plans_meo import PLANS
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from meo_hf import cli_progress
from meo_hf.benchmark import layer, layer_mixture, layer_variants, train_step
from meo_hf.benchmark.layer import LayerTimer, time_grid
from meo_hf.benchmark.layer_report import merging_note
from meo_hf.benchmark.layer_results import Results, Row, Timed
from meo_hf.benchmark.layer_setup import Setup, Variant, draw_layer
from meo_hf.benchmark.layer_shapes import SHAPES, Cell, LayerSettings, Shape, shape_of
from meo_hf.benchmark.layer_variants import dense, variants_of
from meo_hf.benchmark.machine import Machine
from meo_hf.benchmark.rates import Peak, floor_of
from meo_hf.benchmark.train_step import saved_bytes, time_train_step
from meo_hf.errors import CheckFailedError, UsageError

PLAIN, FULL = "16x24x4x2", "16x24x5x3xgatedxbiasesxtransposed"
TINY = {"shape": (PLAIN,), "batch": (3,), "tokens": (8,), "segment_length": 4, "rounds": 2}
SMALL = ("--shape", PLAIN, "--batch", "2", "--tokens", "4", "--rounds", "1")
PEAK = Peak(copy=1e9, matmul=1e10, dtype="float32")
MACHINE = Machine("a CPU", 2, 2, 0.1, {"torch": "0"})


@pytest.fixture(autouse=True)
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and long samples are for a quiet machine, not for tests."""
    monkeypatch.setattr(layer, "measure_peak", lambda dtype, device: dataclasses.replace(PEAK, dtype=dtype))
    monkeypatch.setattr(layer, "_MOST_CALLS", 1)


def setup_of(text: str = PLAIN, level: str = "sequence", top_k: int = 2, dtype: str = "float32") -> Setup:
    cell = Cell(shape_of(text), 3, 8, top_k, level, dtype, 4)
    return Setup(cell, draw_layer(cell.shape, dtype, torch.device("cpu"), 0))


def timed_cells(time_cell: Any, results: Results | None = None, **settings: Any) -> list[Timed]:
    made = LayerSettings(**{**TINY, **settings})
    found = list(time_grid(made, results or Results("layer", made, MACHINE), time_cell))
    assert all(isinstance(timed, Timed) for timed in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("text", [PLAIN, FULL])
@pytest.mark.parametrize("level", ["sequence", "segment", "task"])
def test_every_variant_is_checked_and_timed(text: str, level: str) -> None:
    (timed,) = timed_cells(LayerTimer(), shape=(text,), level=(level,))
    names = [row.name for row in timed.rows]
    assert {"dense", "moe eager", "moe batched_mm", "moe grouped_mm", "published", "meo"} <= set(names)
    assert names[0] == "dense"
    assert timed.checks.keys() == set(names)
    assert max(timed.checks.values()) < 1e-5
    for row in timed.rows:
        assert len(row.seconds) == 2 or any(note.startswith(f"{row.name}: slow") for note in timed.notes)
        if row.name.startswith("meo "):
            assert row.plans == (row.name.removeprefix("meo "),) * 2
    assert set(timed.rows[-1].plans) <= {*PLANS, "kept"}
    assert (timed.rows[-1].plans == ("kept", "kept")) == (level == "task")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_its_checks(dtype: str) -> None:
    (timed,) = timed_cells(LayerTimer(), dtype=(dtype,), rounds=1)
    assert {"dense", "published", "meo"} <= timed.checks.keys()


def test_gates_are_spread() -> None:
    for level in ("sequence", "segment"):
        setup = setup_of("64x96x16x2", level)
        x = setup.inputs(0)
        for gates in (setup.group_gates(x), setup.token_gates(x)):
            assert len(gates.top_k_index.unique()) > 4
            assert 0.5 < float(gates.top_k_weights[:, 0].mean()) < 0.95


def scaled(run: Callable[..., Tensor], by: float) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: run(*args, **kwargs) * by


@pytest.mark.parametrize(
    ("owner", "name", "broken", "message"),
    [
        (layer_variants, "merged_linear", scaled(layer_variants.merged_linear, 1.001), "meo accumulate: outputs"),
        (layer_variants, "merged_linear", lambda x, stack, *_, **__: x @ stack[0].t(), "meo accumulate: outputs"),
        (layer_mixture, "activate", lambda shape, hidden: F.relu(hidden), "moe eager: outputs"),
        (Setup, "group_gates", lambda self, x: gates_of_last(self, x), "meo: gates do not select"),
    ],
)
def test_a_wrong_variant_is_not_timed(
    owner: Any, name: str, broken: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, broken)
    monkeypatch.setattr(layer, "measure", lambda *_: pytest.fail("it was timed"))
    done = run_cli("bench", "layer", *SMALL, "--json", tmp_path / "r.json")
    assert done.code == 1
    assert done.err.startswith(f"meo-hf: {message}")
    assert "nothing was timed" in done.err
    assert not listing(tmp_path)


def gates_of_last(setup: Setup, x: Tensor) -> Any:
    logits = setup.group_logits(x)
    index = logits.topk(setup.cell.top_k, largest=False).indices
    return layer_variants.Gates(index, logits.gather(1, index).softmax(1))


@pytest.mark.parametrize("level", ["sequence", "segment", "task"])
@pytest.mark.parametrize("text", [PLAIN, FULL])
def test_train_step_checks_gradients(text: str, level: str) -> None:
    (timed,) = timed_cells(time_train_step, shape=(text,), level=(level,))
    names = ["dense", "moe grouped_mm", "published", "meo"]
    assert [row.name for row in timed.rows] == names
    assert timed.checks.keys() == {text for name in names for text in (name, f"{name}: gradients")}
    saved = {row.name: row.saved_bytes or 0 for row in timed.rows}
    assert 0 < saved["dense"] <= saved["meo"] < saved["published"]


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer_variants.merged_linear
    monkeypatch.setattr(
        layer_variants,
        "merged_linear",
        lambda x, stack, bias, index, gates, **options: (
            right(x, stack, bias, index, gates.detach(), **options) + 0 * gates.sum()
        ),
    )
    monkeypatch.setattr(layer, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(CheckFailedError, match="meo: gradients"):
        timed_cells(time_train_step)


def test_saved_memory_leaves_parameters_out() -> None:
    setup = setup_of()
    setup = Setup(setup.cell, setup.layer.trainable())
    x = setup.inputs(0).requires_grad_()
    tokens, shape = setup.cell.all_tokens, setup.cell.shape
    assert saved_bytes(dense(setup), x) == 4 * tokens * (shape.hidden + 2 * shape.intermediate)


def test_floors_are_plain_arithmetic() -> None:
    shape = Shape("s", 10, 20, 8, 2, gated=True, biases=True)
    assert (shape.first_outputs, shape.weights, shape.parameters) == (40, 600, 650)
    cell = Cell(shape, 2, 5, 2, "sequence", "bfloat16")
    floor = floor_of(cell, 3, Peak(copy=100.0, matmul=1000.0, dtype="bfloat16"))
    assert (floor.bytes, floor.flops) == (2 * (3 * 650 + 2 * 10 * 10), 2 * 10 * 600)
    assert floor.max == max(floor.bytes / 100, floor.flops / 1000) == 43.0
    assert floor.sum == 43.0 + 12.0


def test_floor_counts_experts_that_were_drawn() -> None:
    for level, groups in (("sequence", 3), ("segment", 6)):
        (timed,) = timed_cells(LayerTimer(), shape=("16x24x64x2",), level=(level,), rounds=1)
        setup = setup_of("16x24x64x2", level)
        assert timed.floor is not None
        assert timed.floor.experts == len(
            {e for g in setup.group_gates(setup.inputs(0)).top_k_index.tolist() for e in g}
        )
        assert 2 < timed.floor.experts <= 2 * groups
    (timed,) = timed_cells(LayerTimer(), level=("task",), rounds=1)
    assert timed.floor is not None
    assert timed.floor.experts == 1


def test_rounds_begin_in_turns_and_slow_rows_have_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = setup_of().cell
    timed = Timed(cell, [Row("dense"), Row("slow"), Row("fast")])
    costs = {"dense": 1.0, "slow": 21.0, "fast": 2.0}
    monkeypatch.setattr(layer, "measure", lambda call, times, device: costs[call()])
    said: list[str] = []
    calls = {name: lambda name=name: name for name in costs}
    layer.time_rows(timed, calls, 6, torch.device("cpu"), said.append)  # type: ignore[arg-type]
    turns = ("1: slow", "1: fast", "1: dense", "2: fast", "2: dense", "2: slow")
    rounds = [line for line in said if line.startswith("round")]
    assert rounds[:6] == [f"round {turn}" for turn in turns]
    assert [len(row.seconds) for row in timed.rows] == [6, 2, 6]
    assert timed.notes == ["slow: slow, so timed in 2 of 6 rounds"]
    assert [timed.ratio(row) for row in timed.rows] == [1.0, 21.0, 2.0]


def test_share_of_merging_calls() -> None:
    rows = [Row("dense"), Row("meo", plans=("accumulate", "combine"))]
    assert merging_note([Timed(setup_of().cell, rows)]).startswith("meo: 1 of 2 products merged weights (50 %)")


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LayerSettings(**TINY, top_k=(1, 2))
    setup = setup_of()
    rooms = {variant.name: variant.room for variant in variants_of(setup)}
    assert rooms["published"] > rooms["meo"] >= rooms["dense"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(layer, "_room", lambda device: rooms["published"] - 1)
        patch.setattr(layer, "bytes_of", lambda cell, weights: 0)
        timed = timed_cells(LayerTimer())[0]
    assert "published" not in [row.name for row in timed.rows]
    assert any(note.startswith("published: needs about ") for note in timed.notes)
    monkeypatch.setattr(layer, "free_bytes", lambda device: 1000)
    found = list(time_grid(settings, Results("layer", settings, MACHINE), LayerTimer()))
    assert len(found) == 2
    assert all(isinstance(line, str) and line.startswith("left out: ") for line in found)


def failing(*_: object) -> Tensor:
    raise RuntimeError("no such kernel\nat all")


def test_a_rival_that_fails_is_left_out_but_not_ours() -> None:
    notes: list[str] = []
    x = torch.ones(1)
    assert layer.first_output(Variant("theirs", "moe", failing, (), optional=True), x, notes) is None
    assert notes == ["theirs: cannot run here: no such kernel"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        layer.first_output(Variant("ours", "merged", failing, ()), x, notes)


def test_a_file_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    settings = LayerSettings(**{**TINY, "tokens": (4, 8), "top_k": (1, 2), "rounds": 1})
    first = list(time_grid(settings, Results("layer", settings, MACHINE, path), LayerTimer(), limit=3))
    assert len(first) == 3
    assert not path.with_name("r.json.tmp").exists()
    again = Results("layer", settings, dataclasses.replace(MACHINE, load_average=9.0), path)
    for read, written in zip(again.cells, first, strict=True):
        assert dataclasses.replace(read, rows=[]) == dataclasses.replace(written, rows=[])
        for row, its in zip(read.rows, written.rows, strict=True):
            assert row.seconds == pytest.approx(its.seconds, abs=1e-9)
            assert dataclasses.replace(row, seconds=[]) == dataclasses.replace(its, seconds=[])
    rest = list(time_grid(settings, again, LayerTimer()))
    assert [timed.cell for timed in (*first, *rest)] == settings.cells()
    stored = json.loads(path.read_text("utf-8"))["cells"]
    assert [cell["noisy"] for cell in stored] == [False, False, False, True]
    monkeypatch.setattr(layer, "draw_layer", lambda *_: pytest.fail("nothing was left to do"))
    assert not list(time_grid(settings, Results("layer", settings, MACHINE, path), LayerTimer()))


@pytest.mark.parametrize(
    ("benchmark", "settings", "machine", "message"),
    [
        ("train-step", {}, {}, "its benchmark is layer, here train-step"),
        ("layer", {"rounds": 3}, {}, "its rounds is 1, here 3"),
        ("layer", {"seed": 3}, {}, "its seed is 0, here 3"),
        ("layer", {}, {"device": "another CPU"}, "its device is a CPU, here another CPU"),
        ("layer", {}, {"versions": {"torch": "1"}}, "its versions is torch 0"),
    ],
)
def test_a_file_of_another_run_is_refused(
    benchmark: str, settings: dict[str, Any], machine: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    ours = LayerSettings(**{**TINY, "rounds": 1})
    Results("layer", ours, MACHINE, path).add(Timed(ours.cells()[0], [Row("dense", [1.0])]))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=message):
        Results(benchmark, dataclasses.replace(ours, **settings), dataclasses.replace(MACHINE, **machine), path)
    assert path.read_bytes() == before


def test_commands_print_write_and_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(cli_progress, "out", Console(width=200, highlight=False))
    for command, rows in (
        ("layer", ("dense", "moe eager", "published", "meo product", "meo", "floor (max)", "floor (sum)")),
        ("train-step", ("dense", "moe grouped_mm", "published", "meo")),
    ):
        files = ("--json", tmp_path / f"{command}.json", "--plot", tmp_path / f"{command}.png")
        done = run_cli("bench", command, *SMALL, "--top-k", "1,2", *files)
        assert done.code == 0, done.err
        lines = [" ".join(line.split()) for line in done.out.splitlines()]
        for row in rows:
            assert sum(line.startswith(f"{row} ") and line[len(row) + 1].isdigit() for line in lines) == 2, row
        assert "products merged weights" in done.out
        stored = json.loads((tmp_path / f"{command}.json").read_text("utf-8"))
        assert stored["command"].startswith(f"meo-hf bench {command} --shape {PLAIN} --batch 2 --tokens 4 --top-k 1,2 ")
        assert [cell["cell"]["top_k"] for cell in stored["cells"]] == [1, 2]
        assert (tmp_path / f"{command}.png").read_bytes().startswith(b"\x89PNG")
        done = run_cli("bench", command, *SMALL, "--top-k", "1", *files)
        assert done.code == 0, done.err
        assert "1 of 1 cells are in" in done.out
        assert not any(line.startswith("dense") for line in done.out.splitlines())
    assert len(listing(tmp_path)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shape", "bert-huge"), "give bert-base, olmoe, qwen3-30b-a3b, gpt-oss-20b, mixtral, or numbers"),
        (("--shape", "8x8x2x3"), "no higher top_k than experts"),
        (("--shape", "8x8x2x1xgated,8x8x2x1xgated"), "give each value once"),
        (("--batch", "2,two"), "--batch is '2,two'"),
        (("--batch", "0"), "--batch is 0"),
        (("--top-k", "17"), "--top-k 17 is more than the 16 experts of bert-base"),
        (("--level", "token"), "give one of sequence, segment, task"),
        (("--segment-length", "4"), "--segment-length has no effect at --level sequence"),
        (("--level", "segment", "--tokens", "10", "--segment-length", "4"), "no multiple of --segment-length 4"),
        (("--dtype", "float32,int8"), "give one of float32, bfloat16, float16"),
        (("--device", "toaster"), "--device 'toaster'"),
        (("--graphs",), "are for a CUDA device"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--cells", "0"), "--cells is 0"),
        (("--json", "nowhere/r.json"), "nowhere/r.json cannot be written"),
        (("--json", "odd.json"), "odd.json holds no timings"),
    ],
)
def test_bad_input(options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.json").write_text("[]")
    before = listing(tmp_path)
    done = run_cli("bench", "layer", *options)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("meo-hf: ")
    assert len(done.err.strip().splitlines()) == 1
    assert listing(tmp_path) == before


def test_shapes_are_those_of_their_models() -> None:
    assert shape_of("mixtral") is SHAPES["mixtral"]
    assert SHAPES["qwen3-30b-a3b"].weights == 3 * 2048 * 768
    assert shape_of(FULL) == Shape(FULL, 16, 24, 5, 3, gated=True, biases=True, transposed=True)
    up = draw_layer(shape_of(FULL), "float32", torch.device("cpu"), 0).up.weight
    assert up.shape == (5, 48, 16)
    assert up.stride() == (16 * 48, 1, 48)
    assert train_step.VARIANTS.keys() >= {"dense", "published", "meo"}
