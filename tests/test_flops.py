"""Test the FLOPs counter against hand counts, and the paper's figure against counts of running models."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from tiny import main_class, tiny_config, tiny_inputs
from transformers import PreTrainedModel

from meo_hf.benchmark import flops_plot
from meo_hf.benchmark.flops import (
    PAPER_FIGURE,
    SIZES,
    TOLERANCE,
    Method,
    PaperPoint,
    beyond_tolerance,
    count_flops,
    flops_per_token,
    forward_flops,
    merge_flops,
    paper_point,
    paper_rich_table,
    write_results,
)

RECORDED = Path(__file__).parents[1] / "benchmarks" / "flops" / "results.json"
LAYERS, ROWS, LENGTH, HIDDEN, INTERMEDIATE, EXPERTS = 2, 3, 8, 32, 48, 4
MERGED = 2 * HIDDEN * INTERMEDIATE + HIDDEN + INTERMEDIATE  # values of one feed-forward, biases too
COUNTED = {"small": (1, 2, 4, 8, 16, 32), "base": (1, 2, 4), "large": (1, 2)}  # all 36 would take too long here

point = cache(paper_point)


def tiny(model_type: str, attention: str = "eager", device: str = "meta", **meo: object) -> PreTrainedModel:
    """Return a tiny model in evaluation mode, dense unless settings are given."""
    base, dense = main_class(model_type), tiny_config(model_type)
    config = meo_config_class(type(dense))(**dense.to_dict(), meo={"num_experts": EXPERTS, **meo}) if meo else dense
    config._attn_implementation = attention
    with torch.device(device):
        return (meo_model_class(base) if meo else base)(config).eval()


def recorded_points() -> dict[tuple[str, str, int], dict[str, float]]:
    points = json.loads(RECORDED.read_text(encoding="utf-8"))["points"]
    return {(p["size"], p["method"], p["top_k"]): p for p in points}


def test_every_recorded_point_is_within_tolerance_of_the_published_figure():
    recorded = recorded_points()
    assert len(recorded) == 36
    for (size, method, top_k), result in recorded.items():
        figure = PAPER_FIGURE[size][top_k][0 if method == "moe" else 1] * 1e9
        assert result["figure_flops"] == round(figure)
        assert result["flops_mac"] == pytest.approx(figure, rel=TOLERANCE), (size, method, top_k)


@pytest.mark.parametrize("method", ["moe", "meo"])
@pytest.mark.parametrize("size", SIZES)
def test_running_models_give_the_recorded_counts(size: str, method: Method):
    recorded = recorded_points()
    for top_k in COUNTED[size]:
        counted = point(size, method, top_k)
        assert not beyond_tolerance([counted])
        assert counted.count.total("mac") == recorded[size, method, top_k]["flops_mac"]
        assert counted.count.total("mul_add") == recorded[size, method, top_k]["flops_mul_add"]


@pytest.mark.parametrize("size", SIZES)
def test_recorded_counts_grow_by_one_feed_forward_or_one_merge_per_expert(size: str):
    recorded = recorded_points()
    for method in ("moe", "meo"):
        one, two = (point(size, method, m).count.total("mac") for m in (1, 2))  # type: ignore[arg-type]
        for top_k in PAPER_FIGURE[size]:
            assert recorded[size, method, top_k]["flops_mac"] == one + (top_k - 1) * (two - one)


@pytest.mark.parametrize(("top_k", "mac", "mul_add"), [(1, 10, 10), (2, 20, 30), (4, 40, 70)])
def test_merge_formula(top_k: int, mac: int, mul_add: int):
    assert merge_flops(top_k, 10, "mac") == mac
    assert merge_flops(top_k, 10, "mul_add") == mul_add


def test_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="allowed: mac, mul_add"):
        merge_flops(2, 10, "macs")  # type: ignore[arg-type]


@pytest.mark.parametrize("top_k", [1, 3])
def test_meo_costs_dense_plus_router_plus_one_merge_per_row(top_k: int):
    inputs = tiny_inputs("bert", rows=ROWS, length=LENGTH)
    dense = forward_flops(tiny("bert"), inputs)
    meo = tiny("bert", top_k=top_k)
    router = 2 * HIDDEN * EXPERTS * ROWS * LAYERS
    for convention, per_value in (("mac", top_k), ("mul_add", 2 * top_k - 1)):
        assert forward_flops(meo, inputs, convention) == dense + router + per_value * MERGED * ROWS * LAYERS


def test_one_merge_serves_the_batch_at_level_task():
    merges = count_flops(tiny("llama", top_k=2, level="task"), tiny_inputs("llama", rows=ROWS)).merges
    assert sum(numel for _, numel in merges) == 3 * HIDDEN * INTERMEDIATE * LAYERS


def test_overhead_over_the_dense_feed_forward_is_m_over_2s():
    feed_forward = point("base", "moe", 2).count.products - point("base", "moe", 1).count.products
    for top_k in (1, 4):
        merge = point("base", "meo", top_k).count
        overhead = (merge.total("mac") - merge.products) / feed_forward
        assert overhead == pytest.approx(top_k / (2 * 128), rel=1e-3)  # biases are merged too


def test_attention_scores_are_counted():
    layers, hidden = SIZES["base"]
    scores = 2 * 2 * 128 * 128 * hidden * layers
    feed_forward = 2 * 8 * hidden**2 * 128 * layers
    head = 2 * 128 * hidden * (30522 + hidden)
    router = 2 * hidden * 32 * layers
    assert scores == pytest.approx(0.604e9, rel=1e-3)
    assert point("base", "meo", 1).count.products == feed_forward // 2 * 3 + scores + head + router


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_attention_implementations_count_alike(model_type: str):
    counts = {count_flops(tiny(model_type, name, top_k=2), tiny_inputs(model_type)) for name in ("eager", "sdpa")}
    assert len(counts) == 1


def test_counting_leaves_a_loaded_model_as_it_was():
    model, inputs = tiny("bert", device="cpu", top_k=2), tiny_inputs("bert")
    with torch.no_grad():
        before = model(**inputs).logits
        counted = count_flops(model, inputs)
        assert torch.equal(model(**inputs).logits, before)
    assert counted == count_flops(tiny("bert", top_k=2), inputs)


def test_merging_works_again_after_a_failed_count():
    model, inputs = tiny("bert", device="cpu", top_k=2), tiny_inputs("bert")
    with pytest.raises(ValueError, match="input_ids"):
        count_flops(model, {})
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_flops_per_token_is_per_position():
    inputs = tiny_inputs("bert", rows=ROWS, length=LENGTH)
    model = tiny("bert", top_k=2)
    assert flops_per_token(model, inputs) == forward_flops(model, inputs) / (ROWS * LENGTH)


def fake_points() -> list[PaperPoint]:
    counted = count_flops(tiny("bert", top_k=2), tiny_inputs("bert"))
    methods: tuple[Method, ...] = ("moe", "meo")
    return [
        PaperPoint(size, method, top_k, 1e9, counted)
        for size, rows in PAPER_FIGURE.items()
        for top_k in rows
        for method in methods
    ]


def test_outputs_are_written(tmp_path: Path):
    points = fake_points()
    assert paper_rich_table(points).row_count == 18
    assert len(beyond_tolerance(points)) == 36
    write_results(points, tmp_path / "results.json")
    assert len(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["points"]) == 36
    pytest.importorskip("matplotlib")
    flops_plot.plot_paper(points, tmp_path / "paper.png")
    assert (tmp_path / "paper.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install meo_hf\[plot\]"):
        flops_plot.plot_paper([], tmp_path / "paper.png")
