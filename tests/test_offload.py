"""Expert weights are read only inside their own module: models that do not fit run from CPU and disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contracts import Case, assert_close
from moe_contracts import MOE_FAMILIES, MoeCase
from moe_tiny import tiny_moe
from tiny import inputs_as
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from meo_hf import convert

torch.set_num_threads(1)
# one family per layout; stock JetMoE itself fails from disk, a bias of its own stays behind
FAMILIES = ("mixtral", "gpt_oss", "dbrx", "llama4_text", "deepseek_v3", "switch_transformers", "nllb-moe")
MIXTURES = [(name, level) for name in FAMILIES for level in MOE_FAMILIES[name].levels[MOE_FAMILIES[name].kind]]
DENSE = [("llama", level) for level in ("segment", "sequence", "token", "task")]
DENSE += [("bert", "sequence"), ("gpt2", "segment"), ("bart", "token"), ("t5", "task")]


def from_disk(model: PreTrainedModel, folder: Path, **options: object) -> PreTrainedModel:
    """Save a model, and load it with so little memory that experts stay on disk."""
    model.save_pretrained(folder / "meo")
    size = sum(parameter.nbytes for parameter in model.parameters())
    offloaded = type(model).from_pretrained(
        folder / "meo",
        device_map="auto",
        max_memory={"cpu": int(size * 0.35)},
        offload_folder=folder / "offload",
        **options,
    )
    assert "disk" in offloaded.hf_device_map.values()
    assert any(parameter.is_meta for name, parameter in offloaded.named_parameters() if ".experts." in name)
    return offloaded


def compare(model: PreTrainedModel, offloaded: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Compare logits and, where the model writes, its answers."""
    with torch.no_grad():
        assert_close(offloaded(**inputs).logits, model(**inputs).logits, 1e-5)
        if model.can_generate():
            given = {"max_new_tokens": 3, "do_sample": False}
            given |= {name: inputs[name] for name in ("task_ids",) if name in inputs}
            answers = [m.generate(inputs["input_ids"][:, :5], **given) for m in (offloaded, model)]
            assert torch.equal(*answers)


@pytest.mark.parametrize(("family", "level"), MIXTURES)
def test_mixtures_run_from_disk(family: str, level: str, tmp_path: Path) -> None:
    case = MoeCase(family)
    model, inputs = case.merged(case.stock(), level=level).float(), case.inputs()
    if level == "sequence" and case.causal:
        inputs["prompt_lengths"] = torch.tensor([5, 3, 2])
    compare(model, from_disk(model, tmp_path, attn_implementation="eager"), inputs)


@pytest.mark.parametrize(("family", "level"), DENSE)
def test_upcycled_models_run_from_disk(family: str, level: str, tmp_path: Path) -> None:
    case = Case(family, level)
    model = case.drawn().float()
    compare(model, from_disk(model, tmp_path), inputs_as(case.inputs(), torch.float))


def test_references_run_from_disk(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "out", reference=True, verify="none")
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "out")
    size = sum(parameter.nbytes for parameter in model.parameters())
    offloaded = load(
        tmp_path / "out", device_map="auto", max_memory={"cpu": int(size * 0.35)}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in offloaded.hf_device_map.values()
    compare(model, offloaded, MoeCase("mixtral").inputs())
