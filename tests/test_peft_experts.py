"""Stock PEFT adapters of experts: they are computed from their factors, and equal what they stand for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import contracts
import pytest
import torch
from contracts import Case, assert_close, assert_differs, logits_of
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.merger_meo import Merger
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from moe_contracts import KEPT, MoeCase
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize

SCOPES = contracts.SCOPES
DENSE = [Case(family, row.default_level, SCOPES[n % 2]) for n, (family, row) in enumerate(FAMILIES.items())]
MIXTURES = [MoeCase(family, MOE_FAMILIES[family].poolings[0]) for family in KEPT if family != "dbrx"]
ALL: list[Case | MoeCase] = [*DENSE, *MIXTURES]
LAYOUTS = [case for case in MIXTURES if case.family in ("mixtral", "gpt_oss", "llama4", "jetmoe", "nllb-moe", "olmoe")]
SOME: list[Case | MoeCase] = [Case("llama", "segment"), Case("bert", "token", "projection"), MoeCase("mixtral")]


def every(some: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", some, ids=lambda c: f"{c.family}-{getattr(c, 'scope', 'moe')}")


@pytest.fixture(autouse=True)
def nothing_is_materialised(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail where PEFT would add its deltas to the stacks of experts."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a delta of all experts was built")

    monkeypatch.setattr(parametrize, "register_parametrization", refuse)


def model_of(case: Case | MoeCase) -> nn.Module:
    return case.drawn() if isinstance(case, Case) else case.merged(case.stock())


def inputs_of(case: Case | MoeCase) -> dict[str, Tensor]:
    return case.inputs()


def stacks(model: nn.Module) -> list[str]:
    """Return the names of all stacks of experts."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, Merger) and parameter.dim() == 3
    ]


def adapted(model: nn.Module, seed: int = 5, **options: Any) -> PeftModel:
    """Wrap a model in adapters of all its experts that change what it says."""
    torch.manual_seed(seed)
    names = stacks(model)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=names, init_lora_weights=False)
    made = get_peft_model(model, config, **options)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                parameter.mul_(2)
    return made


def wrappers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "parameter_name"))


@torch.no_grad()
def add_deltas(model: nn.Module, adapter: str = "default") -> None:
    """Add each expert's delta to its weights, one by one, from the layout that PEFT documents."""
    for wrapper in wrappers(model):
        stack = wrapper.get_param()
        down, up = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        experts, rank = stack.shape[0], wrapper.r[adapter]
        for expert in range(experts):
            delta = up[:, expert::experts] @ down[expert * rank : (expert + 1) * rank] * wrapper.scaling[adapter]
            stack[expert] += delta if delta.shape == stack[expert].shape and not transposed(wrapper) else delta.t()


def transposed(wrapper: Any) -> bool:
    return bool(getattr(wrapper.get_base_layer(), "is_transposed", False))


@every(ALL)
def test_experts_with_adapters_are_experts_with_their_deltas(case: Case | MoeCase) -> None:
    model, inputs = model_of(case), inputs_of(case)
    base = logits_of(model, inputs)
    peft = adapted(model)
    found = logits_of(peft, inputs)
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft, inputs), base)
        plain = copy.deepcopy(peft)
        add_deltas(plain)
        with plain.disable_adapter():
            expected = logits_of(plain, inputs)
    assert_differs(expected, base)
    assert_close(found, expected, 2e-5 if isinstance(case, MoeCase) else 1e-6)
    peft.merge_adapter()
    assert_close(logits_of(peft, inputs), expected, 2e-5 if isinstance(case, MoeCase) else 1e-6)
    peft.unmerge_adapter()
    assert_close(logits_of(peft, inputs), found, 2e-5 if isinstance(case, MoeCase) else 1e-6)
    assert_close(logits_of(peft.merge_and_unload(), inputs), expected, 2e-5 if isinstance(case, MoeCase) else 1e-6)


@every([*DENSE, *LAYOUTS])
def test_gradients_reach_the_adapters_alone(case: Case | MoeCase) -> None:
    peft, inputs = adapted(model_of(case)).train(), inputs_of(case)
    peft(**inputs).logits.square().sum().backward()
    for name, parameter in peft.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    rows = {name for name, parameter in peft.named_parameters() if parameter.grad is not None}
    twin = adapted(model_of(case))
    twin.train()
    expected = gradients_by_deltas(twin, inputs)
    assert rows == set(expected)
    for name, parameter in peft.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], 1e-4 if isinstance(case, MoeCase) else 1e-6)


def gradients_by_deltas(peft: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return gradients of the factors through stacks that hold the deltas."""
    values, leaves = {}, {}
    for wrapper in wrappers(peft):
        down = wrapper.lora_A["default"].weight.unflatten(0, (wrapper.num_experts, -1))
        up = wrapper.lora_B["default"].weight.unflatten(1, (-1, wrapper.num_experts)).permute(2, 0, 1)
        delta = up @ down * wrapper.scaling["default"]
        base = wrapper.get_base_layer()
        stack = wrapper.get_param().detach() + (delta.transpose(1, 2) if transposed(wrapper) else delta)
        leaves[base, wrapper.parameter_name] = stack
    for (base, name), stack in leaves.items():
        values[base, name] = base._parameters.pop(name)
        setattr(base, name, stack)
    with peft.disable_adapter():
        for wrapper in wrappers(peft):
            wrapper.requires_grad_(True)
        peft(**inputs).logits.square().sum().backward()
    for (base, name), parameter in values.items():
        delattr(base, name)
        base._parameters[name] = parameter
    return {name: p.grad for name, p in peft.named_parameters() if ".lora_" in name and p.grad is not None}


@every(SOME)
def test_several_adapters(case: Case | MoeCase) -> None:
    model, inputs = model_of(case), inputs_of(case)
    alone = []
    for seed in (5, 6):
        alone.append(logits_of(adapted(copy.deepcopy(model), seed), inputs))
    peft = adapted(model)
    first = peft.peft_config["default"]
    torch.manual_seed(6)
    peft.add_adapter("second", LoraConfig(**{k: getattr(first, k) for k in ("r", "lora_alpha", "target_modules")},
                     target_parameters=first.target_parameters, init_lora_weights=False))  # fmt: skip
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".second." in name:
                parameter.mul_(2)
    assert_close(logits_of(peft, inputs), alone[0])
    peft.set_adapter("second")
    assert_close(logits_of(peft, inputs), alone[1])
    assert_differs(alone[0], alone[1])
    peft.base_model.set_adapter(["default", "second"])
    both = logits_of(peft, inputs)
    with peft.disable_adapter():
        plain = copy.deepcopy(peft)
        add_deltas(plain)
        add_deltas(plain, "second")
        with plain.disable_adapter():
            assert_close(both, logits_of(plain, inputs))
    peft.delete_adapter("default")
    peft.set_adapter("second")
    assert_close(logits_of(peft, inputs), alone[1])


@every(SOME)
def test_copies_and_pickles_keep_adapters(case: Case | MoeCase) -> None:
    peft, inputs = adapted(model_of(case)), inputs_of(case)
    expected = logits_of(peft, inputs)
    twin = copy.deepcopy(peft)
    assert type(twin) is PeftModel
    assert torch.equal(logits_of(twin, inputs), expected)
    assert twin.base_model.model._meo_context is not peft.base_model.model._meo_context
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(peft)), inputs), expected)
