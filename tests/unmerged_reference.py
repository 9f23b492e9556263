"""What mixtures with fewer, joint or skipped experts should compute, by plain loops over stock modules."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_settings_meo import num_experts_of
from moe_contracts import MoeCase, experts_of, moe_modules, router_of, stock_gates
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def case_of(family: str, **overrides: Any) -> MoeCase:
    """Return a case whose router selects from all experts at once."""
    from moe_tiny import SIZES

    inside = "text_config." if "text_config" in SIZES[family] else ""
    config = MoeCase(family).stock().config
    text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    plain = {"n_group": 1, "topk_group": 1} if (getattr(text, "n_group", None) or 1) > 1 else {}
    return MoeCase(family, overrides=tuple((inside + key, value) for key, value in {**plain, **overrides}.items()))


def meo_config(stock: PreTrainedModel, **meo: Any) -> Any:
    values = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = meo_config_class(type(stock.config)).from_dict({**values, "meo": {"level": "unmerged", **meo}})
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return config


def reduced(case: MoeCase, stock: PreTrainedModel, kept: dict[str, list[int]], **meo: Any) -> PreTrainedModel:
    """Return the MEO model that keeps some experts of a stock model's blocks, with the settings given."""
    counts = {path: len(each) for path, each in kept.items()}
    model = meo_model_class(type(stock))(meo_config(stock, **({"expert_counts": counts} if counts else {}), **meo))
    model.to(case.dtype).eval().load_state_dict(fitting(stock, model.state_dict(), kept))
    return model


def fitting(stock: PreTrainedModel, target: dict[str, Tensor], kept: dict[str, list[int]]) -> dict[str, Tensor]:
    """Return a stock model's state with those rows of each tensor that its kept experts have."""
    state, experts = stacked(stock), count_of(stock)
    made = {}
    for name, like in target.items():
        value = state[name]
        rows = next((rows for path, rows in kept.items() if name.startswith(f"{path}.")), list(range(experts)))
        fewer = len(target.get(name.replace("tid2eid", "weight"), ())) == len(rows) < experts
        if name.endswith("tid2eid") and fewer:  # a table of experts, not a row for each
            value = torch.tensor([(rows.index(old) if old in rows else old % len(rows)) for old in value.flatten()])
            value = value.view_as(like)
        if value.shape != like.shape:
            at = next(i for i, (a, b) in enumerate(zip(value.shape, like.shape, strict=True)) if a != b)
            width = (value.shape[at] - like.shape[at]) // (experts - len(rows))
            places = [row * width + i for row in rows for i in range(width)]
            places += range(experts * width, value.shape[at])  # experts that only return their input
            value = value.index_select(at, torch.tensor(places))
        made[name] = value
    return made


def stacked(stock: PreTrainedModel) -> dict[str, Tensor]:
    """Return a stock model's state with experts that are modules stacked by the names of the MEO model."""
    state = dict(stock.state_dict())
    for path, block in moe_modules(stock).items():
        if isinstance(getattr(block, "experts", None), nn.ModuleDict):
            each = [[m for m in one.children() if isinstance(m, nn.Linear)] for one in experts_of(block.experts)]
            for at, name in enumerate(("up_proj", "down_proj")):
                state[f"{path}.experts.{name}"] = torch.stack([pair[at].weight for pair in each])
                if each[0][at].bias is not None:
                    state[f"{path}.experts.{name}_bias"] = torch.stack([pair[at].bias for pair in each])
    return state


def count_of(stock: PreTrainedModel) -> int:
    return num_experts_of(stock.config, MoeCase(stock.config.model_type).row)


def stock_with_fewer(stock: PreTrainedModel, kept: dict[str, list[int]]) -> PreTrainedModel:
    """Return a stock model of which some blocks are those of stock models with fewer experts."""
    made = copy.deepcopy(stock)
    for path, rows in kept.items():
        config = copy.deepcopy(stock.config)
        holder = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
        for name in NUMBERS:
            for owner in (holder, getattr(holder, "ffn_config", holder)):
                old = getattr(owner, name, None)
                if old is not None:
                    setattr(owner, name, [len(rows)] * len(old) if isinstance(old, list) else len(rows))
        block = type(stock)(config).to(stock.dtype).get_submodule(path)
        target = {f"{path}.{name}": value for name, value in block.state_dict().items()}
        modules = {name for name in target if re.search(r"\.expert_\d+\.", name)}
        found = fitting(stock, {k: v for k, v in target.items() if k not in modules}, {path: rows})
        for name in modules:
            head, _, tail = name.partition(".expert_")
            new, _, rest = tail.partition(".")
            found[name] = stock.state_dict()[f"{head}.expert_{rows[int(new)]}.{rest}"]
        block.load_state_dict({name.removeprefix(f"{path}."): value for name, value in found.items()})
        made.set_submodule(path, block)
    return made.eval()


def expert_output(block: nn.Module, number: int, x: Tensor, scale: Tensor) -> Tensor:
    """Run tokens [P, D] through one expert of a stock block, weighted [P]."""
    experts, weight = getattr(block, "experts", None), scale[:, None].to(x.dtype)
    if isinstance(experts, nn.ModuleDict):
        return experts_of(experts)[number](x) * weight * (1 - getattr(experts, "moe_token_dropout", 0.0))
    if hasattr(block, "input_linear"):
        gate, up = F.linear(x, block.input_linear.weight[number]).chunk(2, -1)
        return F.linear(block.activation(gate) * up, block.output_linear.weight[number]) * weight
    if hasattr(getattr(experts, "mlp", None), "w1"):
        mlp = experts.mlp
        parts = [getattr(mlp, n).view(-1, mlp.ffn_hidden_size, mlp.hidden_size)[number] for n in ("w1", "v1", "w2")]
        return mlp(x, *parts) * weight
    if "Llama4" in type(block).__name__:
        gate, up = (x * weight @ experts.gate_up_proj[number]).chunk(2, -1)
        return (up * experts.act_fn(gate)) @ experts.down_proj[number]
    index = torch.tensor([number, 1 - min(number, 1)]).expand(len(x), -1)  # LongCat wants two: the second weighs 0
    return experts(x, index, torch.cat([weight, torch.zeros_like(weight)], 1))


def block_output(block: nn.Module, gates: Tensor, x: Tensor, experts: list[int]) -> Tensor:
    """Return what tokens [T, D] get from a stock block's experts by gates [T, N], column j being `experts`[j]."""
    y = torch.zeros_like(x)
    for column, number in enumerate(experts):
        own = gates[:, column] > 0
        if bool(own.any()):
            y[own] += expert_output(block, number, x[own], gates[own, column])
    identity = gates[:, len(experts) :].sum(1, keepdim=True)  # LongCat's experts that return their input
    return y + identity.to(x.dtype) * x + (block.bias if hasattr(block, "input_linear") else 0)


def grouped(gates: Tensor, stands_for: list[int], count: int) -> Tensor:
    """Sum gates [T, E] of experts that one stands for [T, count], and leave those of no experts beside them."""
    columns = [sum(gates[:, old] for old, new in enumerate(stands_for) if new == one) for one in range(count)]
    columns = [torch.zeros(len(gates), dtype=gates.dtype) if isinstance(c, int) else c for c in columns]
    return torch.cat([torch.stack(columns, 1), gates[:, len(stands_for) :]], 1)


def after_ratio(weights: list[float], beta: float) -> int:
    """Return how many of weights, heaviest first, run: a tail lighter than beta times what is before it does not."""
    for first in range(1, len(weights)):
        if sum(weights[first:]) < beta * sum(weights[:first]):
            return first
    return len(weights)


def after_cumulative(weights: list[float], threshold: float) -> int:
    """Return how many of weights, heaviest first, run: the fewest whose share reaches a threshold."""
    for first in range(1, len(weights)):
        if sum(weights[:first]) / sum(weights) >= threshold:
            return first
    return len(weights)


def skipped(gates: Tensor, rule: str, threshold: float) -> Tensor:
    """Return gates [T, E] with what a rule skips at zero, and the rest scaled to the sum that they had."""
    made = torch.zeros_like(gates)
    for token, row in enumerate(gates):
        order = sorted((i for i in range(len(row)) if row[i] > 0), key=lambda i: -float(row[i]))
        weights = [float(row[i]) for i in order]
        running = order[: (after_ratio if rule == "ratio" else after_cumulative)(weights, threshold)]
        kept = sum(float(row[i]) for i in running)
        for i in running:
            made[token, i] = row[i] * sum(weights) / kept
    return made


def gates_of(stock_block: nn.Module, seen: Any) -> Tensor:
    """Return the gates [T, E] that a stock router gives the tokens that a block saw."""
    assert router_of(stock_block) is not None
    return stock_gates(stock_block, seen.tokens, seen.arguments)
