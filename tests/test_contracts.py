"""Run every contract on every family, level and gate scope, and the dense equivalence on every config switch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import contracts
import pytest
import torch
import transformers
from contracts import SCOPES, Case, cases, cv_squared, logits_of, stock_inputs
from meo_hf.modeling.errors_meo import MeoConfigError
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.levels_meo import LEVELS
from tiny import inputs_as, labels_for, main_class, merged_of, recorded_gates, tiny_inputs
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

ALL = cases()
DEFAULTS = [Case(family, row.default_level, scope) for family, row in FAMILIES.items() for scope in SCOPES]
# one scope for each family and level, in turns: for what does not depend on both
TURNS = [*FAMILIES]
COVER = [
    case
    for case in ALL
    if (TURNS.index(case.family) + LEVELS[case.kind].index(case.level) + SCOPES.index(case.scope)) % 2
]
TASK = [case for case in ALL if case.level == "task"]
DECODING = [case for case in COVER if case.kind != "encoder"]
SWITCHES = [(family, name) for family, row in FAMILIES.items() for name in row.switches]


def every(some: list[Case]) -> pytest.MarkDecorator:
    """Parametrise a test over cases."""
    return pytest.mark.parametrize("case", some, ids=lambda c: f"{c.family}-{c.level}-{c.scope}")


@every(ALL)
def test_identical_experts_are_dense(case: Case) -> None:
    contracts.identical_experts_are_dense(case, False, 0.0)


@every(COVER)
def test_identical_experts_are_dense_with_dropout(case: Case) -> None:
    contracts.identical_experts_are_dense(case, True, 0.1)


@pytest.mark.parametrize(("family", "switch"), SWITCHES)
def test_identical_experts_are_dense_whatever_the_config_says(family: str, switch: str) -> None:
    row = FAMILIES[family]
    for value in row.switches[switch]:
        ffn, projection = (Case(family, row.default_level, scope, ((switch, value),)) for scope in SCOPES)
        contracts.identical_experts_are_dense(ffn)
        contracts.identical_experts_are_dense(ffn, train=True)
        contracts.identical_experts_are_dense(projection, train=True, combine="outputs")


@pytest.mark.parametrize(("family", "switch"), SWITCHES)
def test_merged_feed_forward_is_reference_whatever_the_config_says(family: str, switch: str) -> None:
    for value in FAMILIES[family].switches[switch]:
        contracts.merged_feed_forward_is_reference(
            Case(family, FAMILIES[family].default_level, overrides=((switch, value),))
        )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", [family for family, switch in SWITCHES if switch == "chunk_size_feed_forward"])
def test_chunks_change_the_memory_alone(family: str, scope: str) -> None:
    level = FAMILIES[family].default_level
    whole = Case(family, level, scope)
    chunked = replace(whole, overrides=(("chunk_size_feed_forward", 2),))
    model, inputs, widths = chunked.drawn(), whole.inputs(), []
    for module in merged_of(model).values():
        module.activation.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    contracts.assert_close(logits_of(model, inputs), logits_of(whole.drawn(), inputs))
    assert set(widths) == {2}


@pytest.mark.parametrize(("family", "switch"), SWITCHES)
def test_switches_switch_something(family: str, switch: str) -> None:
    row, seen = FAMILIES[family], []
    for value in row.switches[switch]:
        dense = Case(family, row.default_level, overrides=((switch, value),)).dense().train()
        chunks = [getattr(module, "chunk_size_feed_forward", None) for module in dense.modules()]
        torch.manual_seed(0)
        seen.append((sorted(dense.state_dict()), chunks, logits_of(dense, tiny_inputs(family)).tolist()))
    assert seen[0] != seen[1], f"{switch} has no effect on {family}"


@every(ALL)
def test_one_expert_is_dense(case: Case) -> None:
    contracts.one_expert_is_dense(case)


@every(COVER)
def test_permuted_experts_change_nothing(case: Case) -> None:
    contracts.permuted_experts_change_nothing(case)


@every(COVER)
def test_weights_combined_are_outputs_combined(case: Case) -> None:
    contracts.weights_combined_are_outputs_combined(case)


@every(ALL)
def test_merged_feed_forward_is_reference(case: Case) -> None:
    contracts.merged_feed_forward_is_reference(case)


@every(COVER)
def test_gates_differ_between_inputs(case: Case) -> None:
    contracts.gates_differ_between_inputs(case)


@every(DEFAULTS)
def test_every_layer_is_merged(case: Case) -> None:
    contracts.every_layer_is_merged(case)


@pytest.mark.parametrize(
    ("case", "side"),
    [pytest.param(c, s, id=f"{c.family}-{c.level}-{c.scope}-{s}") for c in COVER for s in contracts.sides(c)],
)
def test_padding_changes_nothing(case: Case, side: str) -> None:
    contracts.padding_changes_nothing(case, side)


@every(COVER)
def test_rows_do_not_meet(case: Case) -> None:
    contracts.rows_do_not_meet(case)


@every(DECODING)
def test_later_tokens_change_nothing(case: Case) -> None:
    contracts.later_tokens_change_nothing(case)


@every(COVER)
def test_gradients_reach_what_was_selected(case: Case) -> None:
    contracts.gradients_reach_what_was_selected(case)
    contracts.gradients_reach_what_was_selected(case, combine="outputs")


@every(COVER)
def test_underflowing_gates_stay_finite(case: Case) -> None:
    contracts.underflowing_gates_stay_finite(case)


@every(TASK)
def test_task_ids_are_tasks_one_by_one(case: Case) -> None:
    contracts.task_ids_are_tasks_one_by_one(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_not_named_stay_dense(family: str) -> None:
    groups = (("num_hidden_groups", 2),) if family == "albert" else ()  # whose layers share one feed-forward
    case = Case(family, FAMILIES[family].default_level, overrides=groups)
    dense = case.dense()
    model, whole = case.identical(dense, layers=[1]), case.identical(dense)
    assert len(merged_of(model)) == len(merged_of(whole)) / 2
    inputs = inputs_as(case.inputs(), torch.float)
    contracts.assert_close(logits_of(model, inputs), logits_of(dense, stock_inputs(inputs)))


@every(DEFAULTS)
def test_bfloat16_keeps_identical_experts_dense(case: Case) -> None:
    dense = case.dense()
    model = case.identical(dense, **{"segment_length": 64} if case.causal else {}).to(torch.bfloat16)
    dense = copy.deepcopy(dense).to(torch.bfloat16)
    inputs = {name: value[:1] for name, value in inputs_as(case.inputs(), torch.bfloat16).items()}
    expected = logits_of(dense, stock_inputs(inputs))
    actual = logits_of(model, inputs)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_float16_t5_keeps_its_second_projection_in_float32(scope: str, tmp_path: Path) -> None:
    dense = Case("t5", "sequence").dense()
    model = Case("t5", "sequence", scope).identical(dense)
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "meo")
    dense = type(dense).from_pretrained(tmp_path / "dense", dtype=torch.float16)
    model = type(model).from_pretrained(tmp_path / "meo", dtype=torch.float16)
    assert dense.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    for module in merged_of(model).values():
        assert module.experts.up_proj.dtype == torch.float16
        assert module.experts.down_proj.dtype == torch.float32
    inputs = tiny_inputs("t5", rows=1)
    contracts.assert_close(logits_of(model, inputs), logits_of(dense, inputs), 1e-3)


@pytest.mark.parametrize(
    "case", [Case("bert", "sequence")] + [Case("llama", level) for level in ("segment", "sequence", "task")]
)
def test_compiled_without_a_break_is_eager(case: Case) -> None:
    torch.compiler.reset()
    model = case.drawn(router="top_k")
    inputs = contracts.padded(case, "right")[0]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    contracts.assert_close(logits_of(compiled, inputs), logits_of(model, inputs))
    inputs = {**inputs, "labels": labels_for(case.family, inputs)}
    compiled.train()
    loss = compiled(**inputs).loss
    contracts.assert_close(loss.detach(), model(**inputs).loss.detach())
    compare_gradients(model, loss, lambda: model(**inputs).loss)


CHECKPOINTED = [
    Case(family, row.default_level, scope)
    for family, row in FAMILIES.items()
    for scope in SCOPES
    if main_class(family).supports_gradient_checkpointing
]


@every(CHECKPOINTED)
def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    """Two forwards with different masks and tasks, then one backward, as in a contrastive loss."""
    model = case.drawn(balance_loss=1.0).train()
    batches = [case.inputs(seed=5), case.inputs(seed=6)]
    if case.level == "task":
        batches[1]["task_ids"] = batches[1]["task_ids"].flip(0)
    if "attention_mask" in batches[1]:
        batches[1]["attention_mask"][:, 5:] = 0

    def loss() -> torch.Tensor:
        torch.manual_seed(4)  # the routers' noise
        return sum(model(**batch, labels=labels_for(case.family, batch)).loss for batch in batches)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    compare_gradients(model, loss(), loss)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_copies_are_independent(family: str) -> None:
    case = Case(family, FAMILIES[family].default_level)
    model, inputs = case.drawn(), case.inputs()
    expected = logits_of(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hook = next(iter(merged_of(model).values())).register_forward_pre_hook(
            lambda *_, copied=copied: contracts.assert_close(logits_of(copied, inputs), expected)
        )
        assert torch.equal(logits_of(model, inputs), expected), "a call of the copy disturbed the original's"
        hook.remove()


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_autocast_keeps_identical_experts_dense(family: str) -> None:
    case = Case(family, FAMILIES[family].default_level)
    model, inputs = case.identical(case.dense()), case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = logits_of(case.dense(), stock_inputs(inputs)), logits_of(model, inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
    contracts.assert_close(actual, expected, 1e-2)


def compare_gradients(model: PreTrainedModel, loss: torch.Tensor, again: Callable[[], torch.Tensor]) -> None:
    """Compare the gradients of a loss with those of the same loss without checkpoints or compilation."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_disable()
    again().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert all(found[name].abs().max() > 0 for name in found if ".router." in name)
    for name, gradient in expected.items():
        if gradient.abs().max() > 1e-12:
            contracts.assert_close(found[name], gradient)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_reentrant_checkpointing_is_refused_or_right(family: str) -> None:
    case = Case(family, FAMILIES[family].default_level)
    with pytest.raises(MeoConfigError, match=r"use_reentrant.*False"):
        case.drawn().gradient_checkpointing_enable({"use_reentrant": True})
    model, inputs = case.drawn(balance_loss=0, router="top_k").train(), case.inputs()
    inputs["labels"] = labels_for(family, inputs)
    if family == "t5":  # the decoder's gates read the encoder past the checkpointed layer's arguments
        with pytest.raises(MeoConfigError, match=r"use_reentrant.*False"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        return
    model.gradient_checkpointing_enable({"use_reentrant": True})
    compare_gradients(model, model(**inputs).loss, lambda: model(**inputs).loss)


@every(DEFAULTS)
def test_balance_loss_is_added_once_in_training(case: Case) -> None:
    dense, inputs = case.dense(), inputs_as(case.inputs(), torch.float)
    model = case.identical(dense, router="top_k", balance_loss=0.5).train()
    labels = labels_for(case.family, inputs)
    task_loss = dense(**stock_inputs(inputs), labels=labels).loss.item()
    with recorded_gates(model) as gates:
        outputs = model(**inputs, labels=labels)
    expected = 0.0
    for index, weights in (g for found in gates.values() for g in found):
        dense_gates = torch.zeros(len(index), 6).scatter(1, index, weights.detach())
        expected += cv_squared(dense_gates.sum(0).tolist()) + cv_squared((dense_gates > 0).sum(0).tolist())
    assert outputs.aux_loss.item() == pytest.approx(0.5 * expected, rel=1e-4)
    assert outputs.loss.item() == pytest.approx(task_loss + outputs.aux_loss.item(), rel=1e-5)
    assert model(**inputs, labels=labels, return_dict=False)[0].item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    unlabelled = model(**inputs)
    assert "loss" not in unlabelled
    assert unlabelled.aux_loss.requires_grad
    assert unlabelled.aux_loss.item() == pytest.approx(0.5 * expected, rel=1e-4)
    outputs = model.eval()(**inputs, labels=labels)
    assert "aux_loss" not in outputs
    assert outputs.loss.item() == pytest.approx(task_loss, rel=1e-5)


@pytest.mark.parametrize("off", [{"num_experts": 1, "top_k": 1}, {"balance_loss": 0}], ids=["one expert", "zero"])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_no_balance_loss_where_there_is_nothing_to_balance(family: str, off: dict[str, Any]) -> None:
    case = Case(family, FAMILIES[family].default_level)
    inputs = case.inputs()
    model = case.drawn(**off, router="top_k")
    labels = labels_for(family, inputs)
    outputs = model.train()(**inputs, labels=labels)
    assert "aux_loss" not in outputs
    contracts.assert_close(outputs.loss.detach(), model.eval()(**inputs, labels=labels).loss.detach())


@every(DEFAULTS[::2])
def test_balance_loss_does_not_depend_on_accumulation(case: Case) -> None:
    """Two equal micro-batches weigh as much as the batch that holds both, whoever divides by their number."""
    model, half = case.drawn(router="top_k").train(), case.inputs()
    half["labels"] = labels_for(case.family, half).clone()
    if half["labels"].dim() > 1:
        half["labels"][0, :2] = -100
    whole = {name: torch.cat([value, value]) for name, value in half.items()}
    alone = model(**whole).aux_loss
    contracts.assert_close(model(**half).aux_loss, alone)
    shifts = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss and not model.config.is_encoder_decoder
    counted = whole["labels"][..., 1:] if shifts else whole["labels"]  # as the Trainer counts
    items = counted.ne(-100).sum()
    contracts.assert_close(model(**whole, num_items_in_batch=items).aux_loss, alone)
    contracts.assert_close(2 * model(**half, num_items_in_batch=items).aux_loss, alone)


def test_trainer_steps_alike_with_and_without_accumulation(tmp_path: Path) -> None:
    """The Trainer keeps the task column, and takes one step whose size does not depend on accumulation."""
    case = Case("llama", "task")
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "task_ids": 1}
    after = []
    for steps in (1, 2):
        model = case.drawn(router="top_k", balance_loss=5.0)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        transformers.Trainer(model=model, args=arguments, train_dataset=[row] * 4).train()
        after.append({name: (p - before[name]).detach() for name, p in model.named_parameters()})
    routers = [name for name in after[0] if ".router." in name]
    assert all(after[0][name].abs().max() > 1e-4 for name in routers)
    for name, step in after[0].items():
        if step.abs().max() > 1e-9:
            contracts.assert_close(after[1][name], step)
