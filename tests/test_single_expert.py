"""A mixture with one expert per block becomes its dense sibling: the same outputs from the same bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_tiny import tiny_moe, tiny_moe_inputs
from reduction_tiny import apply, bench_of
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from meo_hf import extract, reduce, reduction_method
from meo_hf.conversion.extraction import extract_all
from meo_hf.conversion.single_expert import SIBLINGS
from meo_hf.errors import CheckFailedError, UnsupportedError, UsageError
from meo_hf.reduction.plan import BlockPlan, one_hot


def single(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a tiny mixture, and what the reduction to one expert per block leaves of it."""
    widths: dict[str, Any] = {"mlp_only_layers": [0], "intermediate_size": 24} if family == "qwen3_moe" else {}
    tiny_moe(family, **{**widths, **overrides}).save_pretrained(folder / "moe")
    blocks = {path: BlockPlan(one_hot([1]), one_hot([1])) for path in bench_of(folder / "moe").mixture.blocks}
    apply(folder / "moe", folder / "one", blocks, **({} if family == "switch_transformers" else {"top_k": 1}))
    return folder / "one"


@pytest.mark.parametrize("family", SIBLINGS)
def test_the_dense_sibling_computes_the_same(family: str, tmp_path: Path) -> None:
    source = single(family, tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        written = extract(source, tmp_path / "dense")
    assert ["expert_capacity" in str(one.message) for one in told] == [True] * (family == "switch_transformers")
    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    made, info = auto.from_pretrained(written, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    assert made.config.model_type == SIBLINGS[family].model_type
    stock = auto.from_pretrained(source, attn_implementation="eager")
    inputs = tiny_moe_inputs(family)
    torch.testing.assert_close(made(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert made.num_parameters() < stock.num_parameters()
    if family == "switch_transformers":
        labels = inputs.pop("decoder_input_ids")
        torch.testing.assert_close(made(**inputs, labels=labels).loss, stock(**inputs, labels=labels).loss)
    else:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(made.generate(**inputs, **options), stock.generate(**inputs, **options))


def test_windows_of_attention_stay(tmp_path: Path) -> None:
    source = single("qwen3_moe", tmp_path, use_sliding_window=True, sliding_window=3)
    extract(source, tmp_path / "dense")
    made, stock = (AutoModelForCausalLM.from_pretrained(place) for place in (tmp_path / "dense", source))
    inputs = tiny_moe_inputs("qwen3_moe", length=12)
    torch.testing.assert_close(made(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "error", "message"),
    [
        ("olmoe", {}, UnsupportedError, "no dense family .* mixtral"),
        ("switch_transformers", {"expert_capacity": 2}, CheckFailedError, "not every token gets its single expert"),
        ("qwen3_moe", {"intermediate_size": 40}, UnsupportedError, "differs in shape"),
    ],
)
def test_what_is_not_the_same_is_refused(
    family: str, overrides: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    source = single(family, tmp_path, **overrides)
    with pytest.raises(error, match=message):
        extract(source, tmp_path / "dense")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["moe", "one"]


def test_experts_must_be_single(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "moe")
    with pytest.raises(UsageError, match=r"has 6 experts .* --keep 1 --top-k 1"):
        extract(tmp_path / "moe", tmp_path / "dense")
    with pytest.raises(UsageError, match="without tasks: leave --task out"):
        extract(tmp_path / "moe", tmp_path / "dense", task="a")
    with pytest.raises(UsageError, match="without tasks: leave --all-tasks out"):
        extract_all(tmp_path / "moe", tmp_path / "dense")
    tiny_moe("switch_transformers").save_pretrained(tmp_path / "switch")
    with pytest.raises(UsageError, match="--keep 1 first"):
        extract(tmp_path / "switch", tmp_path / "dense")


def test_experts_that_run_one_by_one_are_no_dense_model(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "moe")
    reduce(tmp_path / "moe", tmp_path / "skips", reduction_method("skip", {"threshold": 0.5}), verify="none")
    with pytest.raises(UnsupportedError, match="run one by one: no dense model computes that"):
        extract(tmp_path / "skips", tmp_path / "dense")
    with pytest.raises(UnsupportedError, match=r"was reduced already, .* start from its source"):
        reduce(tmp_path / "skips", tmp_path / "more", reduction_method("skip", {"threshold": 0.4}))
