"""Mixtures of experts of all families convert with their files untouched, and load where meo_hf is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import sha256, tensors
from fresh import Fresh, Values
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.remote_meo import heads_of
from moe_contracts import KEPT
from moe_tiny import moe_class, tiny_moe, tiny_moe_inputs
from safetensors.torch import load_file, save_file

from meo_hf import convert

pytestmark = pytest.mark.xdist_group("moe-roundtrip")  # one worker: the fixtures are made once
torch.set_num_threads(1)
LOSES_BUFFERS = {"zaya": ("balancing_biases",)}  # stock initialises them anew after loading


def check_family(folder: str, auto: str, batch: str, again: str) -> dict[str, Any]:
    """Load through the Auto class, run, save, and say what was missing and how far off the logits are."""
    load = getattr(transformers, auto).from_pretrained
    model, info = load(folder, trust_remote_code=True, output_loading_info=True, attn_implementation="eager")
    stored = load_file(batch)
    expected = stored.pop("logits")
    logits = model.eval()(**stored).logits
    model.save_pretrained(again)
    return {
        "class": f"{type(model).__module__}.{type(model).__name__}",
        "keys": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
        "error": float((logits - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()),
    }


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny stock model of every family and convert it."""
    folder = tmp_path_factory.mktemp("mixtures")
    for family in KEPT:
        tiny_moe(family).save_pretrained(folder / family / "stock")
        convert(folder / family / "stock", folder / family / "meo", verify="none")
        local = meo_model_class(moe_class(family)).from_pretrained(folder / family / "meo", attn_implementation="eager")
        inputs = tiny_moe_inputs(family)
        with torch.no_grad():
            logits = local.eval()(**inputs).logits
        save_file({**inputs, "logits": logits.contiguous()}, folder / family / "batch.safetensors")
    return folder


@pytest.fixture(scope="module")
def outcomes(converted: Path) -> Values:
    """Check all families in one process without meo_hf."""
    fresh = Fresh()
    for family in KEPT:
        heads = {name: auto for auto, name in heads_of(family).items()}
        folder = converted / family
        fresh.add(
            family,
            check_family,
            folder=folder / "meo",
            auto=heads[moe_class(family).__name__],
            batch=folder / "batch.safetensors",
            again=folder / "again",
        )
    return fresh.run(converted)


@pytest.mark.parametrize("family", KEPT)
def test_weight_files_are_the_source_s_own(converted: Path, family: str) -> None:
    folder = converted / family
    files = sorted(path.name for path in (folder / "stock").glob("*.safetensors"))
    assert files
    for name in files:
        assert (folder / "meo" / name).samefile(folder / "stock" / name)
    report = json.loads((folder / "meo/meo_report.json").read_text())
    assert report["weights"] == "link"
    assert report["bytes_to_write"] == 0


@pytest.mark.parametrize("family", KEPT)
def test_loads_without_meo_hf(outcomes: Values, family: str) -> None:
    found = outcomes[family]
    assert found["class"].startswith("transformers_modules.")
    assert found["class"].endswith(f"modeling_meo.Meo{moe_class(family).__name__}")
    assert found["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert found["error"] <= 1e-5


@pytest.mark.parametrize("family", KEPT)
def test_saves_the_family_s_layout(outcomes: Values, converted: Path, family: str) -> None:
    assert outcomes[family]
    stock, again = tensors(converted / family / "stock"), tensors(converted / family / "again")
    assert stock.keys() == again.keys()
    differing = [name for name in stock if not torch.equal(stock[name], again[name])]
    assert differing == [name for name in sorted(stock) if name.endswith(LOSES_BUFFERS.get(family, ("\0",)))]


def test_saving_leaves_the_source_as_it_was(converted: Path) -> None:
    folder = converted / "mixtral"
    before = sha256(folder / "stock/model.safetensors")
    model = meo_model_class(transformers.MixtralForCausalLM).from_pretrained(folder / "meo")
    model.model.norm.weight.data.fill_(7.0)
    (folder / "meo/adapter_model.safetensors").hardlink_to(folder / "batch.safetensors")
    model.save_pretrained(folder / "meo")
    assert (folder / "meo/adapter_model.safetensors").samefile(folder / "batch.safetensors")
    (folder / "meo/adapter_model.safetensors").unlink()
    assert sha256(folder / "stock/model.safetensors") == before
    assert float(tensors(folder / "meo")["model.norm.weight"][0]) == 7.0
