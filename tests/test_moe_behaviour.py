"""Mixtures of experts that merge, in the hands of their users: loading, copying, training, losses, checkpointing."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import assert_close, assert_differs
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_meo import GroupRouter
from moe_contracts import MoeCase
from moe_tiny import moe_class, tiny_moe
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GenerationConfig, Trainer, TrainingArguments

from meo_hf import convert

torch.set_num_threads(1)
LAYOUTS = ("mixtral", "olmoe", "dbrx", "jetmoe", "llama4_text", "switch_transformers", "nllb-moe")


def labelled(case: MoeCase) -> dict[str, Tensor]:
    inputs = case.inputs()
    return {**inputs, "labels": inputs.get("decoder_input_ids", inputs["input_ids"])}


def test_direct_loads_take_the_options_of_a_load(tmp_path: Path) -> None:
    case = MoeCase("mixtral")
    outer, inner = case.merged(case.stock()).float(), case.merged(tiny_moe("mixtral", seed=4)).float()
    outer.save_pretrained(tmp_path / "meo")
    inner.save_pretrained(tmp_path / "meo/inner")
    load = type(outer).from_pretrained
    assert torch.equal(load(tmp_path / "meo", subfolder="inner").lm_head.weight, inner.lm_head.weight)
    assert torch.equal(load(tmp_path / "meo").lm_head.weight, outer.lm_head.weight)
    assert load(tmp_path / "meo", dtype="auto").dtype == torch.float32
    assert load(tmp_path / "meo", dtype=torch.bfloat16, meo={"top_k": 3}).config.num_experts_per_tok == 3


@pytest.mark.parametrize("family", LAYOUTS)
def test_copies_and_pickles_compute_the_same(family: str) -> None:
    case = MoeCase(family)
    model, inputs, file = case.merged(case.stock()).float(), case.inputs(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(**inputs).logits, expected)
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(model(**inputs).logits, expected), "a copy shares what it should own"


@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_reach_routers_and_selected_experts(family: str) -> None:
    """Against a difference quotient along a random direction; norms and router logits are float32 inside."""
    case = MoeCase(family)
    model, inputs = case.merged(case.stock()).train(), case.inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "jitter_noise"):
            module.jitter_noise = 0.0
    parameters = {n: p for n, p in model.named_parameters() if "expert" in n or "router" in n or "gate" in n}
    generator = torch.Generator().manual_seed(0)
    steps = {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in parameters.items()}
    weights = torch.randn(model(**inputs).logits.shape, generator=generator).double()

    def value() -> Tensor:
        return (model(**inputs).logits.double() * weights).sum()

    value().backward()
    slope = sum(float((steps[n] * p.grad).sum()) for n, p in parameters.items() if p.grad is not None)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in parameters.items():
                parameter += sign * 1e-4 * steps[name]
            values.append(float(value()))
    assert abs(slope) > 1
    assert abs((values[0] - values[1]) / 2e-4 - slope) < 0.02 * abs(slope)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "dbrx", "switch_transformers", "nllb-moe"])
def test_the_family_s_own_losses_take_the_logits(family: str) -> None:
    """Router logits come per token, each with its group's: shapes are those of the stock model."""
    case = MoeCase(family)
    stock = case.stock().float()
    model, inputs = case.merged(stock).float(), labelled(case)
    inputs["attention_mask"][0, -2:] = 0
    with torch.no_grad():
        expected, found = (m(**inputs, output_router_logits=True) for m in (stock, model))
    names = [name for name in expected if "router_logits" in name and expected[name] is not None]
    assert names
    for name in names:
        assert [x.shape for x in found[name]] == [x.shape for x in expected[name]]
    assert torch.isfinite(found.loss)
    assert_differs(found[names[0]][-1], expected[names[0]][-1])


def test_jitter_does_not_add_up_over_the_layers_of_a_decoder() -> None:
    """All of them read one encoder state; the published router adds its noise in place."""
    case = MoeCase("switch_transformers", overrides=(("router_jitter_noise", 0.5),))
    model, inputs, read = case.merged(case.stock()).float().train(), labelled(case), []
    for path, module in model.decoder.named_modules():
        if isinstance(module, GroupRouter):
            original = module.route

            def route(x: Tensor, *args: Any, _route: Any = original, _path: str = path, **kwargs: Any) -> Any:
                read.append((_path, x.clone()))
                return _route(x, *args, **kwargs)

            module.route = route
    loss = model(**inputs).loss
    loss.backward()
    assert len(read) > 1
    for _, state in read[1:]:
        assert torch.equal(state, read[0][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    case = MoeCase("mixtral")
    model, inputs = case.merged(case.stock()).train(), labelled(case)
    model(**inputs).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-9)


def test_trainer_trains_evaluates_and_saves(tmp_path: Path) -> None:
    tiny_moe("qwen2_moe").save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "meo", verify="none", segment_length=4)
    model = meo_model_class(moe_class("qwen2_moe")).from_pretrained(tmp_path / "meo")
    rows = [{"input_ids": torch.randint(5, 99, (8,))} for _ in range(8)]
    rows = [{**row, "labels": row["input_ids"], "attention_mask": torch.ones(8, dtype=torch.long)} for row in rows]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    before = model.model.layers[1].mlp.experts.down_proj.clone()
    trainer.train()
    assert not torch.equal(model.model.layers[1].mlp.experts.down_proj, before)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model(str(tmp_path / "tuned"))
    again = type(model).from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        ids = rows[0]["input_ids"][None]
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_other_heads_open(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "meo", verify="none")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "meo", num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert [m for m in model.modules() if isinstance(m, GroupRouter)]
    assert torch.isfinite(model(**MoeCase("mixtral").inputs()).logits).all()


def test_a_reference_keeps_its_own_generation_config(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "meo", reference=True, verify="none")
    GenerationConfig(max_new_tokens=17).save_pretrained(tmp_path / "meo")
    model = meo_model_class(moe_class("mixtral")).from_pretrained(tmp_path / "meo")
    assert model.generation_config.max_new_tokens == 17


@pytest.mark.parametrize("level", ["segment", "sequence"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_generation_is_the_same_with_and_without_a_cache(family: str, level: str) -> None:
    case = MoeCase(family)
    model, inputs = case.merged(case.stock(), level=level).float(), case.inputs(rows=2, length=7)
    given = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "do_sample": False}
    if family != "qwen3_next":  # its stock model reorders no linear state for beams read without a cache
        beams = [model.generate(**given, num_beams=3, use_cache=cache) for cache in (True, False)]
        assert torch.equal(*beams)
    greedy = [model.generate(**given, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*greedy)
