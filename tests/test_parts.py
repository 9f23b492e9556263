"""Experts that are kept as parts equal whole ones, in every layout, beside fewer, joint and skipped experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from contracts import assert_close, assert_differs
from meo_hf.modeling.configuration_meo import MeoSettings
from meo_hf.modeling.errors_meo import MeoConfigError
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.parts_meo import Parts
from moe_contracts import MoeCase, moe_modules
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from unmerged_reference import case_of, count_of, reduced

torch.set_num_threads(1)
STACKED = ("olmoe", "gpt_oss", "longcat_flash", "dbrx", "llama4", "nllb-moe")


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def ragged(model: PreTrainedModel, shared: bool, columns: bool = True) -> dict[str, Any]:
    """Return sizes that differ between blocks, maps and experts; some experts have nothing of their own."""
    made: dict[str, Any] = {}
    for block, (path, module) in enumerate(merged_moe(model)):
        for at, name in enumerate(module.maps):
            numbers = range(block + at, block + at + module.count())
            made[f"{path}.{name}"] = {
                "shared": shared,
                "ranks": [number % 4 for number in numbers],
                **({"columns": [number * 2 % 3 for number in numbers]} if columns else {}),
            }
    return made


@torch.no_grad()
def in_parts(full: PreTrainedModel, sizes: dict[str, Any]) -> PreTrainedModel:
    """Return a model whose experts are drawn parts, and give the other one their products."""
    config = copy.deepcopy(full.config)
    config.meo = {**config.meo, "expert_format": "parts", "expert_parts": sizes}
    model = type(full)(config).to(full.dtype).eval()
    own, generator = full.state_dict(), torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(".index"):
            continue
        if ".parts." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        else:
            tensor.copy_(own[name][: len(tensor)] if tensor.dim() else own[name])
    for path, module in merged_moe(full):
        mine = dict(merged_moe(model))[path]
        for name in module.maps:
            parts = mine.parts[name.removesuffix("_proj")]
            if hasattr(parts, "index"):
                _spread(parts, generator)
            module.stack(name)[0][: module.count()].copy_(products(mine, name, sizes[f"{path}.{name}"]))
    return model


def _spread(parts: Any, generator: torch.Generator) -> None:
    start = 0
    for count in parts.sizes.columns:
        parts.index[start : start + count] = torch.randperm(parts.inputs, generator=generator)[:count]
        start += count


def products(module: Any, name: str, sizes: dict[str, Any]) -> Tensor:
    """Multiply parts out by the definition [E, O, I]."""
    parts, whole = module.parts[name.removesuffix("_proj")], []
    columns = sizes.get("columns", [0] * len(sizes["ranks"]))
    rank = place = 0
    for own, count in zip(sizes["ranks"], columns, strict=True):
        weight = module.stack(name)[0][0].clone() if sizes["shared"] else torch.zeros(parts.outputs, parts.inputs)
        weight = weight.to(next(parts.parameters()).dtype)
        for at in range(rank, rank + own):
            weight = weight + torch.outer(parts.B[at], parts.A[at])
        for at in range(place, place + count):
            weight = weight + torch.outer(parts.S[at], F.one_hot(parts.index[at], parts.inputs).to(weight.dtype))
        whole.append(weight)
        rank, place = rank + own, place + count
    return torch.stack(whole)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", STACKED)
def test_parts_are_whole_experts(family: str, shared: bool, tmp_path: Path) -> None:
    case = case_of(family)
    full = case.merged(case.stock(), level="unmerged")
    sizes = ragged(full, shared)
    model, inputs = in_parts(full, sizes), case.inputs()
    expected = logits(full, inputs)
    assert_close(logits(model, inputs), expected, case.tolerance)
    less = sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in model.parameters())
    assert less == saved(full, sizes)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, dtype=case.dtype, output_loading_info=True)
    assert not any(info.values()), info
    state, found = model.state_dict(), again.state_dict()
    assert state.keys() == found.keys()
    assert not [name for name in state if not torch.equal(state[name], found[name])]
    for name in ("A", "S", "index"):
        changed = copy.deepcopy(model)
        for parts in (module for module in changed.modules() if isinstance(module, Parts)):
            getattr(parts, name).data = getattr(parts, name).data.roll(1, 0)
        assert_differs(logits(changed, inputs), expected, 1e-4)


def saved(full: PreTrainedModel, sizes: dict[str, Any]) -> int:
    """Return how many parameters whole experts have more than their parts."""
    total = 0
    for path, module in merged_moe(full):
        for name in module.maps:
            one, (experts, outputs, inputs) = sizes[f"{path}.{name}"], module.stack(name)[0].shape  # LongCat: idle too
            kept = one["shared"] * outputs * inputs
            kept += sum(one["ranks"]) * (outputs + inputs) + sum(one["columns"]) * outputs
            total += experts * outputs * inputs - kept
    return total


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_fewer_joint_and_skipped_experts_in_parts(family: str) -> None:
    case = MoeCase(family)
    stock, inputs = case.stock(), case.inputs()
    experts = count_of(stock)
    kept = {path: [3, 1] for path in list(moe_modules(stock))[:2]}
    maps = {path: [i % 2 for i in range(experts)] for path in kept}
    full = reduced(case, stock, kept, expert_maps=maps, skip={"rule": "cumulative", "threshold": 0.6})
    sizes = ragged(full, True)
    whole = [path for path in sizes if path.endswith("down_proj")][1]
    model = in_parts(full, sizes)
    assert_close(logits(model, inputs), logits(full, inputs), case.tolerance)
    partly = copy.deepcopy(full.config)
    partly.meo = {**full.config.meo, "expert_format": "parts", "expert_parts": {**sizes}}
    partly.meo["expert_parts"].pop(whole)
    mixed = type(full)(partly).to(full.dtype).eval()
    state = {**model.state_dict(), whole: full.state_dict()[whole]}
    mixed.load_state_dict({name: state[name] for name in mixed.state_dict()})
    assert [len(module.parts) for _, module in merged_moe(mixed)].count(1) == 1
    assert_close(logits(mixed, inputs), logits(full, inputs), case.tolerance)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_the_products(shared: bool) -> None:
    full = case_of("gpt_oss").merged(case_of("gpt_oss").stock(), level="unmerged").double()
    sizes = ragged(full, shared)
    path, module = next(merged_moe(in_parts(full, sizes)))
    x = torch.randn(5, module.stack("gate_up_proj")[0].shape[2], dtype=torch.float64)
    wholes = {name: products(module, name, sizes[f"{path}.{name}"]) for name in module.maps}

    def by_products(number: int) -> Tensor:
        first = F.linear(x, wholes["gate_up_proj"][number], module.gate_up_proj_bias[number])
        return F.linear(module._apply_gate(first), wholes["down_proj"][number], module.down_proj_bias[number])

    parameters = dict(module.named_parameters())
    outputs = [torch.stack([run(e) for e in range(6)]) for run in (lambda e: module.expert(e, x), by_products)]
    assert_close(outputs[0].detach(), outputs[1].detach(), 1e-10)
    grads = [torch.autograd.grad(y.square().sum(), parameters.values(), retain_graph=True) for y in outputs]
    for name, mine, theirs in zip(parameters, *grads, strict=True):
        assert mine.abs().sum() > 0, name
        assert_close(mine, theirs, 1e-9)


def test_a_new_model_trains() -> None:
    case = case_of("mixtral")
    config = copy.deepcopy(case.merged(case.stock(), level="unmerged").config)
    sizes = {"gate_up_proj": {"shared": True, "ranks": 2, "columns": 1}, "down_proj": {"shared": False, "ranks": 3}}
    config.meo = {**config.meo, "expert_format": "parts", "expert_parts": sizes}
    model = type(case.merged(case.stock(), level="unmerged"))(config)
    for parts in (module for module in model.modules() if isinstance(module, Parts)):
        assert parts.A.abs().sum() > 0
        assert not parts.B.any()
        assert not hasattr(parts, "S") or (not parts.S.any() and parts.index.max() < parts.inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    inputs = case.inputs()
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_stored_sizes_cannot_be_overridden(tmp_path: Path) -> None:
    full = case_of("olmoe").merged(case_of("olmoe").stock(), level="unmerged")
    in_parts(full, ragged(full, True)).save_pretrained(tmp_path)
    for meo, message in (
        ({"expert_parts": {"down_proj": {"shared": True, "ranks": 1}}}, "cannot be overridden on loading"),
        ({"expert_format": "full"}, "cannot be overridden on loading"),
        ({"layers": [0]}, "cannot be overridden on loading"),
        ({"level": "sequence"}, "take level 'unmerged'"),
    ):
        with pytest.raises(MeoConfigError, match=message):
            type(full).from_pretrained(tmp_path, meo=meo)


def test_the_longest_ending_gives_the_sizes() -> None:
    sizes = {"down_proj": {"shared": True, "ranks": 1}, "1.mlp.experts.down_proj": {"shared": True, "ranks": 2}}
    settings = MeoSettings(level="unmerged", expert_format="parts", expert_parts=sizes)
    paths = ("layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj", "layers.1.mlp.experts.up_proj")
    assert [(settings.parts_of(path) or {}).get("ranks") for path in paths] == [1, 2, None]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "give the sizes of each linear map's parts"),
        ({}, "give the sizes of each linear map's parts"),
        ({"down_proj": 3}, "give `shared`, `ranks`"),
        ({"down_proj": {"shared": True}}, "give `shared`, `ranks`"),
        ({"down_proj": {"shared": True, "ranks": 1, "rank": 1}}, "give `shared`, `ranks`"),
        ({"down_proj": {"shared": 1, "ranks": 1}}, "give true or false"),
        ({"down_proj": {"shared": True, "ranks": -1}}, "ranks is -1; give a whole number"),
        ({"down_proj": {"shared": True, "ranks": [1, True]}}, "one for each expert"),
        ({"down_proj": {"shared": True, "ranks": 1, "columns": [0.5]}}, "columns is"),
        ({"down_proj": {"shared": False, "ranks": [0, 0]}}, "keeps nothing"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(parts: Any, message: str) -> None:
    with pytest.raises(MeoConfigError, match=message):
        MeoSettings.from_dict({"level": "unmerged", "expert_format": "parts", "expert_parts": parts})


def test_sizes_that_do_not_fit_are_refused() -> None:
    sizes = {"down_proj": {"shared": True, "ranks": [1, 2]}}
    with pytest.raises(MeoConfigError, match="2 ranks, but it has 6 experts"):
        case_of("mixtral").merged(
            case_of("mixtral").stock(), level="unmerged", expert_format="parts", expert_parts=sizes
        )
    with pytest.raises(MeoConfigError, match="is not known for"):
        case_of("jetmoe").merged(case_of("jetmoe").stock(), level="unmerged", expert_format="parts", expert_parts=sizes)
    for block in ({"expert_parts": sizes}, {"expert_format": "lowrank", "expert_parts": sizes}):
        with pytest.raises(MeoConfigError, match="expert_parts has no effect"):
            MeoSettings.from_dict(block)
    with pytest.raises(MeoConfigError, match="take level 'unmerged'"):
        MeoSettings.from_dict({"expert_format": "parts", "expert_parts": sizes})


@pytest.mark.parametrize("shared", [True, False])
def test_offloaded_parts_are_brought_back(shared: bool) -> None:
    case = case_of("mixtral")
    full = case.merged(case.stock(), level="unmerged")
    model, inputs = in_parts(full, ragged(full, shared)), case.inputs()
    expected = logits(model, inputs)
    assert torch.equal(logits(cpu_offload(model, execution_device=torch.device("cpu")), inputs), expected)


@pytest.mark.parametrize("target", ["experts.gate_up_proj", "parts.down.A"])
def test_an_adapter_adapts_what_experts_share_or_their_parts(target: str) -> None:
    case = case_of("mixtral")
    full = case.merged(case.stock(), level="unmerged")
    model, inputs = in_parts(full, ragged(full, True)), case.inputs()
    plain = logits(model, inputs)
    config = LoraConfig(r=2, target_parameters=[target])
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found = logits(adapted, inputs)
    assert_differs(found, plain, 1e-3)
    assert_close(logits(adapted.merge_and_unload(), inputs), found, case.tolerance)
