"""A checkpoint of any head converts: classifiers, taggers, base models, half of an encoder-decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fresh import Fresh, Values
from safetensors.torch import load_file, save_file
from test_families_roundtrip import relative_rms
from tiny import tiny_dense, tiny_inputs

from meo_hf import convert
from meo_hf.conversion.source import auto_class_of

pytestmark = pytest.mark.xdist_group("heads")  # one worker: the costly fixtures are made once
HEADS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {},
    "BertForPreTraining": {},
    "BertModel": {},
    "RobertaForTokenClassification": {},
    "AlbertForQuestionAnswering": {},
    "ElectraForPreTraining": {},
    "ModernBertForSequenceClassification": {},
    "DebertaV2ForTokenClassification": {},
    "ViTModel": {},
    "T5EncoderModel": {},
    "T5ForSequenceClassification": {"level": "task"},
    "MT5ForTokenClassification": {"level": "task"},
    "BartForQuestionAnswering": {},
    "BartForCausalLM": {"level": "task"},
    "GPT2ForSequenceClassification": {},
    "OPTForQuestionAnswering": {},
    "LlamaForSequenceClassification": {},
    "LlamaForQuestionAnswering": {},
    "LlamaModel": {},
    "Qwen2ForTokenClassification": {},
    "Phi3ForSequenceClassification": {},
    "Gemma3TextForSequenceClassification": {},
    "Starcoder2ForTokenClassification": {},
}


def first_tensor(outputs: Any) -> Any:
    """Return logits, start logits or hidden states: whatever a head gives first."""
    return next(value for value in outputs.values() if isinstance(value, torch.Tensor))


def check_head(folder: str, auto: str, batch: str) -> dict[str, Any]:
    """Load a conversion under its own head, spread its routers and compare what it gives."""
    model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.data.normal_(0, 3)
    stored = load_file(batch)
    expected = stored.pop("expected")
    outputs = model.eval()(**{name.removeprefix("inputs."): value for name, value in stored.items()})
    return {
        "class": type(model).__name__,
        "keys": sorted(info["missing_keys"] | info["unexpected_keys"]),
        "error": relative_rms(first_tensor(outputs), expected),
    }


def batch_of(family: str, name: str) -> dict[str, torch.Tensor]:
    """Return inputs that a head takes."""
    inputs = tiny_inputs(family)
    if name in ("T5EncoderModel", "MT5ForTokenClassification", "BartForCausalLM"):
        inputs.pop("decoder_input_ids")
    if name in ("T5ForSequenceClassification", "BartForQuestionAnswering"):
        inputs.pop("decoder_input_ids")
        inputs["input_ids"][:, -1] = 3  # the sentence representation is taken where a row ends
    return inputs


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Values:
    folder, fresh = tmp_path_factory.mktemp("heads"), Fresh(relative_rms, first_tensor)
    for name, options in HEADS.items():
        stock = getattr(transformers, name)
        family, place = stock.config_class.model_type, folder / name
        tiny_dense(family, stock).save_pretrained(place / "dense")
        inputs = batch_of(family, name)
        stored = {f"inputs.{k}": v.contiguous() for k, v in inputs.items()}
        with torch.no_grad():
            expected = first_tensor(stock.from_pretrained(place / "dense").eval()(**inputs))
        save_file({**stored, "expected": expected.contiguous()}, place / "batch.safetensors")
        report = convert(place / "dense", place / "meo", num_experts=4, verify="none", **options)
        assert report.model_class == f"Meo{name}"
        assert not report.warnings, report.warnings
        auto = auto_class_of(family, name)
        fresh.add(name, check_head, folder=place / "meo", auto=auto, batch=place / "batch.safetensors")
    return fresh.run(folder)


@pytest.mark.parametrize("name", HEADS)
def test_head_converts_and_computes_what_it_did(outcomes: Values, name: str) -> None:
    found = outcomes[name]
    assert found["class"] == f"Meo{name}"
    assert found["keys"] == []
    assert found["error"] <= 1e-5


def test_decoder_classifier_is_checked_like_any_other(tmp_path: Path) -> None:
    """The whole tool, with its own check, on a head that builds its base model through `AutoModel`."""
    tiny_dense("qwen3", transformers.Qwen3ForSequenceClassification).save_pretrained(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "meo", num_experts=3, level="task", tasks=["a", "b"])
    assert report.passed
    assert report.verification == "full"
