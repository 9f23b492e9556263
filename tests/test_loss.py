"""Every head's loss is its batch's share of the items, however the stock class computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.remote_meo import heads_of
from tiny import meo_config, spread, tiny_config, tiny_inputs
from torch import Tensor

KINDS = ("MaskedLM", "Seq2SeqLM", "CausalLM", "SequenceClassification", "TokenClassification", "MultipleChoice")


def heads() -> list[tuple[str, str]]:
    """Return family and head of every kind, for a few families each."""
    found: dict[str, list[tuple[str, str]]] = {}
    for family, row in FAMILIES.items():
        for auto, name in heads_of(family).items():
            alone = auto == "AutoModelForCausalLM" and row.kind == "encoder-decoder"  # its decoder has no encoder
            if auto.endswith(KINDS) and not alone:
                found.setdefault(f"{auto}-{row.kind}", []).append((family, name))
    return [pair for pairs in found.values() for pair in (*pairs[:3], *pairs[3::6])]


def batch_for(family: str, name: str) -> dict[str, Tensor]:
    inputs = tiny_inputs(family)
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    if "SequenceClassification" in name:
        inputs.pop("decoder_input_ids", None)
        inputs["input_ids"][:, -1] = 3  # T5 and BART classify at the end token
        return {**inputs, "labels": torch.tensor([0, 1, 0])}
    if "TokenClassification" in name:
        inputs.pop("decoder_input_ids", None)
        return {**inputs, "labels": inputs["input_ids"] % 2}
    if "MultipleChoice" in name:
        choices = {key: value[None].expand(3, -1, -1).contiguous() for key, value in inputs.items()}
        return {**choices, "labels": torch.tensor([0, 1, 0])}
    return {**inputs, "labels": ids.masked_fill(ids % 3 == 0, -100)}


@pytest.mark.parametrize(("family", "name"), heads(), ids=lambda value: value)
def test_a_batch_contributes_its_share(family: str, name: str) -> None:
    """Twice as many items in the step halve this batch's loss, balance loss included."""
    stock = getattr(transformers, name)
    config = meo_config(tiny_config(family), balance_loss=0.5, router="top_k")
    model = spread(meo_model_class(stock)(config)).train()
    batch = batch_for(family, name)

    def loss(**options: Any) -> float:
        torch.manual_seed(0)  # heads have dropout of their own
        return model(**batch, **options).loss.item()

    count = model._label_count(batch["labels"])
    assert loss(num_items_in_batch=2 * count) == pytest.approx(loss(num_items_in_batch=count) / 2, rel=1e-5)
    if getattr(model, "loss_type", None) is not None:  # else Transformers does not know that it shifts labels
        assert loss(num_items_in_batch=count) == pytest.approx(loss(), rel=1e-5)
    outputs = model(**batch, num_items_in_batch=2 * count, return_dict=False)
    assert outputs[0].item() > 0


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_losses_that_ignore_items_are_scaled(problem: str, family: str) -> None:
    name = heads_of(family)["AutoModelForSequenceClassification"]
    config = meo_config(tiny_config(family, num_labels=2, problem_type=problem), balance_loss=0.5, router="top_k")
    model = spread(meo_model_class(getattr(transformers, name))(config)).train()
    batch = {**batch_for(family, name), "labels": torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])}
    whole = model(**batch).loss.item()
    assert model(**batch, num_items_in_batch=12).loss.item() == pytest.approx(whole / 2, rel=1e-5)


def test_evaluation_has_the_task_s_loss_alone() -> None:
    model = meo_model_class(transformers.BertForMaskedLM)(meo_config(tiny_config("bert"), balance_loss=9.0)).eval()
    batch = batch_for("bert", "BertForMaskedLM")
    outputs = model(**batch)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert "aux_loss" not in outputs


def test_a_loss_function_of_one_s_own_is_used() -> None:
    model = meo_model_class(transformers.LlamaForCausalLM)(meo_config(tiny_config("llama"), balance_loss=0.0)).train()
    batch = batch_for("llama", "LlamaForCausalLM")
    model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
    assert model(**batch).loss.item() == 7
    count = model._label_count(batch["labels"])
    assert model(**batch, num_items_in_batch=count).loss.item() == 7
