"""`load_state_dict` takes what a model's own files hold, as the Trainer does when it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_contracts import meo_of_moe
from moe_tiny import tiny_moe
from safetensors.torch import load_file
from tiny import meo_of, tiny_dense
from transformers import PreTrainedModel

# files of experts, of whole stacks under other names, of nested text models, and of stock names that are half live
MIXTURES = ("mixtral", "qwen2_moe", "switch_transformers", "nllb-moe", "qwen3_5_moe", "qwen4_exp", "dots3_note_text")


DENSE = ("vit", "bert", "marian")


def model_of(family: str) -> PreTrainedModel:
    return meo_of(tiny_dense(family), level="sequence") if family in DENSE else meo_of_moe(tiny_moe(family))


@pytest.mark.parametrize("family", [*MIXTURES, *DENSE])
def test_a_model_takes_its_own_files(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):  # Marian's positions are computed
            parameter.zero_()
    drawn = torch.get_rng_state()
    found = model.load_state_dict(stored, strict=False)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not found.unexpected_keys
    computed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert set(found.missing_keys) <= {*model.all_tied_weights_keys, *computed}
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_live_names_beside_those_of_files() -> None:
    model = model_of("mixtral")
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    found = model.load_state_dict({**wanted, "junk": torch.ones(1)}, strict=False)
    assert found.unexpected_keys == ["junk"]
    with pytest.raises(RuntimeError, match="junk"):
        model.load_state_dict({**wanted, "junk": torch.ones(1)})


@pytest.mark.parametrize("family", DENSE)
def test_dense_weights_leave_what_they_do_not_name_alone(family: str) -> None:
    """Names of the dense feed-forwards mean nothing here; positions that are computed, and tied weights, stay right."""
    dense, model = tiny_dense(family), model_of(family)
    model.load_state_dict(dense.state_dict(), strict=False)
    for name, value in dense.state_dict().items():
        if name in model.state_dict():
            assert torch.equal(model.state_dict()[name], value), name


def test_wide_weights_are_not_rounded(tmp_path: Path) -> None:
    model = model_of("mixtral")
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data = parameter.data.bfloat16()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
