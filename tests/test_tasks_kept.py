"""Merged experts of tasks stay between calls, and never longer than the weights that they come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from contracts import Case, logits_of, merged_of
from meo_hf.modeling import merger_meo
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

BERT = Case("bert", "task")
CASES = [Case("bert", "task"), Case("llama", "task"), Case("bart", "task")]


@contextmanager
def merges(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note how many gates each merge of a weight serves."""
    original, noted = merger_meo.merge_experts, list[int]()

    def merge(stack: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if stack.dim() == 3:
            noted.append(len(index))
        return original(stack, index, weights)

    with patch.context() as inside:
        inside.setattr(merger_meo, "merge_experts", merge)
        yield noted


def fresh(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a copy computes that remembers nothing."""
    return logits_of(copy.deepcopy(model), inputs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_each_task_is_merged_once(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    model, inputs = case.drawn(), case.inputs()
    tasks = sorted(model.config.meo["tasks"])
    maps = sum(len(module.maps) for module in merged_of(model).values())
    with merges(monkeypatch) as merged:
        first = logits_of(model, inputs)
        assert merged == [len(tasks)] * maps
        assert torch.equal(logits_of(model, inputs), first)
        turned = {**inputs, "task_ids": inputs["task_ids"].flip(0)}
        other = logits_of(model, turned)
        assert len(merged) == maps
        torch.testing.assert_close(other, fresh(model, turned))
    del inputs["task_ids"]
    model.set_task(tasks[0])
    with merges(monkeypatch) as merged:
        for _ in range(3):
            torch.testing.assert_close(logits_of(model, inputs), fresh(model, inputs))
        assert merged.count(1) == maps * 4  # once here, and once in each of the three copies


def in_place(parameter: Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def replaced(parameter: Parameter) -> None:
    parameter.data = parameter.data * 1.5


def behind_the_counters(parameter: Parameter) -> None:
    parameter.data.mul_(1.5)


def of_one_expert(parameter: Parameter) -> None:
    parameter.data[1].add_(1.0)


@pytest.mark.parametrize("change", [in_place, replaced, behind_the_counters, of_one_expert])
@pytest.mark.parametrize("where", ["experts", "router"])
def test_changed_weights_are_merged_anew(change: Callable[[Parameter], None], where: str) -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    before = logits_of(model, inputs)
    module = next(iter(merged_of(model).values()))
    change(module.experts.up_proj if where == "experts" else module.router.weight)
    after = logits_of(model, inputs)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh(model, inputs))


def test_a_hooked_router_is_asked_each_time() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    before = logits_of(model, inputs)
    module = next(iter(merged_of(model).values()))
    asked: list[Tensor] = []

    def turn(router: Any, arguments: Any, output: Any) -> Any:
        gates, balance = output
        asked.append(arguments[0])
        return type(gates)(gates.top_k_index, gates.top_k_weights.flip(1)), balance

    handle = module.router.register_forward_hook(turn)
    for _ in range(2):
        assert not torch.allclose(logits_of(model, inputs), before)
    assert len(asked) == 2
    assert torch.equal(asked[0], inputs["task_ids"])
    handle.remove()
    torch.testing.assert_close(logits_of(model, inputs), before)


def test_an_optimizer_step_is_seen() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    before = logits_of(model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**inputs).logits.pow(2).mean().backward()
    optimizer.step()
    after = logits_of(model, inputs)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh(model, inputs))


def test_a_change_between_steps_is_seen_by_the_next_text() -> None:
    """A step of one token per row compares no samples, but what it merges is sampled."""
    model, inputs = Case("llama", "task").drawn(), Case("llama", "task").inputs()
    step = {**inputs, "input_ids": inputs["input_ids"][:, :1], "attention_mask": inputs["attention_mask"][:, :1]}
    logits_of(model, step)
    behind_the_counters(next(iter(merged_of(model).values())).experts.down_proj)
    torch.testing.assert_close(logits_of(model, inputs), fresh(model, inputs))


def test_another_parameter_at_the_same_address_is_seen() -> None:
    model, inputs = Case("llama", "task").drawn(), Case("llama", "task").inputs()
    step = {**inputs, "input_ids": inputs["input_ids"][:, :1], "attention_mask": inputs["attention_mask"][:, :1]}
    experts = next(iter(merged_of(model).values())).experts
    before = logits_of(model, step)
    values = torch.randn_like(experts.down_proj)
    experts.down_proj = None
    experts.down_proj = Parameter(values)
    after = logits_of(model, step)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh(model, step))


def test_replicas_and_derived_weights_remember_nothing() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    module = next(iter(merged_of(model).values()))
    replica = module._replicate_for_data_parallel()
    for name in ("experts", "router"):
        replica._modules[name] = getattr(module, name)._replicate_for_data_parallel()
    assert module._has_own_weights()
    assert not replica._has_own_weights()
    torch.nn.utils.parametrize.register_parametrization(module.experts, "up_proj", torch.nn.Identity())
    assert not module._has_own_weights()
    torch.testing.assert_close(logits_of(model, inputs), logits_of(model, inputs))
    assert not module._task_memory.nbytes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_autocast(case: Case) -> None:
    model, inputs = case.drawn().float(), case.inputs()
    expected = logits_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits_of(model, inputs)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_a_forced_plan_keeps_nothing_that_it_would_not_use() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    expected = logits_of(copy.deepcopy(model), inputs)
    model.set_meo_plan("combine")
    torch.testing.assert_close(logits_of(model, inputs), expected)
    assert not any(memory.nbytes for memory in model._meo_context.task_memories)


def test_training_forgets() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    logits_of(model, inputs)
    memories = model._meo_context.task_memories
    assert all(memory.nbytes for memory in memories)
    model.train()
    assert not any(memory.nbytes for memory in memories)


def test_gradients_need_no_memory() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    logits_of(model, inputs)
    model(**inputs).logits.pow(2).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for module in merged_of(model).values():
        module._task_memory.forget()
    model(**inputs).logits.pow(2).mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


def test_a_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    expected = logits_of(copy.deepcopy(model), inputs)
    memories = model._meo_context.task_memories
    each = sum(t[0].nbytes for name, t in _experts(model)) * len(model.config.meo["tasks"])
    monkeypatch.setattr(model._meo_context.settings, "merged_cache_bytes", each)
    for _ in range(3):
        torch.testing.assert_close(logits_of(model, inputs), expected)
        assert [bool(memory.nbytes) for memory in memories] == [True, False]
    assert sum(memory.nbytes for memory in memories) <= each


def _experts(model: PreTrainedModel) -> list[tuple[str, Any]]:
    return list(next(iter(merged_of(model).values())).experts.named_parameters())


def test_copies_remember_nothing() -> None:
    model, inputs = BERT.drawn(), BERT.inputs()
    logits_of(model, inputs)
    twin = copy.deepcopy(model)
    assert not any(memory.nbytes for memory in twin._meo_context.task_memories)
    own = [module._task_memory for module in merged_of(twin).values()]
    assert all(a is b for a, b in zip(own, twin._meo_context.task_memories, strict=True))


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k"])
def test_training_shares_a_task_s_gate_unless_noise_or_balance_tells_rows_apart(
    monkeypatch: pytest.MonkeyPatch, router: str
) -> None:
    model = BERT.drawn(router=router, balance_loss=0.0).train()
    inputs = {name: value[:1].repeat_interleave(6, 0) for name, value in BERT.inputs().items()}
    noted: list[int] = []
    original = merger_meo.merged_linear

    def linear(x: Tensor, stack: Tensor, bias: Any, index: Tensor, *rest: Any) -> Tensor:
        noted.append(len(index))
        return original(x, stack, bias, index, *rest)

    monkeypatch.setattr(merger_meo, "merged_linear", linear)
    model(**inputs)
    assert set(noted) == ({len(model.config.meo["tasks"])} if router == "top_k" else {6})
