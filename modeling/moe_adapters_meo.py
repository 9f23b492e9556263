"""Adapters for mixture-of-experts blocks that are built in a way of their own.

Legend: N groups that share a gate, W tokens per group, T tokens, D features, F intermediate features, E experts,
K selected experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.core_model_loading import MergeModulelist, WeightConverter

from .groups_meo import Groups
from .low_rank_meo import Adapted, Mark
from .merger_meo import Linear, Merger
from .moe_families_meo import MoeFamily
from .moe_meo import GroupRouter, MergedExpertsMixin, Site
from .router_meo import Gates
from .routing_meo import Call
from .wrapped_meo import HostsExperts, adapted_maps


class DbrxRouting(GroupRouter):
    """DBRX selects in its block, by the router's logits."""

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return logits, weights and indices."""
        logits = super().route(hidden_states)
        return logits, *self._meo.block.route_tokens_to_experts(logits)


class DbrxGLU(MergedExpertsMixin):
    """DBRX stores each linear map of all experts as one matrix [E * F, D]."""

    moe_num_experts: Any
    ffn_hidden_size: Any
    hidden_size: Any
    activation_fn: Any
    runs_alone = False

    maps = ("gate_proj", "up_proj", "down_proj")

    def held_in(self, name: str) -> str:
        """Return the name of the parameter that holds a linear map."""
        return {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}[name]

    def stack(self, name: str) -> tuple[Tensor, None]:
        """Return weights [E, O, I]."""
        weight = getattr(self, self.held_in(name))
        stacked = weight.view(-1, self.ffn_hidden_size, self.hidden_size)
        return stacked.transpose(1, 2) if name == "down_proj" else stacked, None

    def _compute(self, linear: dict[str, Linear], x: Tensor) -> Tensor:
        return linear["down_proj"](self.activation_fn(linear["gate_proj"](x)) * linear["up_proj"](x))


class DbrxBlock(HostsExperts):
    """DBRX's block, whose router now selects."""

    router: Any
    experts: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run tokens [B, S, D]."""
        _, weights, index = self.router(hidden_states)
        return self.experts.mlp(hidden_states, index, weights)


class Llama4Routing(GroupRouter):
    """Llama 4 returns a score for every expert, zero for those not selected."""

    top_k: Any

    places = (1, 0, 2)

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return logits, weights and indices."""
        scores, logits = super().route(hidden_states)
        return logits, *scores.topk(self.top_k, dim=-1)


class Llama4Experts(MergedExpertsMixin):
    """Llama 4 weights an expert's input, not its output: y = f(s * x; W)."""

    is_transposed = True
    runs_alone = False

    def _weigh(self, x: Tensor, y: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        return y((x * scale).to(x.dtype))


class Llama4Block(HostsExperts):
    """Llama 4's block without its copy of every token for every expert."""

    router: Any
    experts: Any
    shared_expert: Any

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Run tokens [B, S, D]; returns [T, D] and the logits."""
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, logits, index = self.router(hidden_states)
        routed = self.experts(hidden_states, index, weights)
        return self.shared_expert(hidden_states) + routed, logits


class JetMoeRouting(GroupRouter):
    """JetMoE's router sorts tokens by expert; groups need no order."""

    layer: Any
    top_k: Any

    places = (4, 1, 0)

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return logits, weights and indices."""
        logits = self.layer(hidden_states).float()
        top, index = logits.topk(self.top_k, dim=-1)
        return logits, top.softmax(-1).type_as(hidden_states), index


class JetMoeLinear(Merger):
    """One linear map of all JetMoE experts, [E, O, I]."""

    _meo: Site
    weight: Any

    maps = ("weight",)

    def stack(self, name: str) -> tuple[Tensor, None]:
        """Return the weights."""
        return self.weight, None

    def adapted_map(self, adapted: Mapping[str, Adapted], name: str) -> Adapted | None:
        """Return what adapters make of the weights."""
        return adapted.get("weight")

    def forward(self, *args: Any, adapted: Mapping[str, Adapted] | None = None) -> Tensor | None:
        """Map tokens by the experts that their groups merge; at level `unmerged` sorted ones, as the family does."""
        if self._context.settings.level == "unmerged":
            return super().forward(*args)  # type: ignore[misc, no-any-return]
        return self._merged(*args, adapted=adapted)

    def _merged(
        self, call: Call, groups: Groups, gates: Gates, x: Tensor | None, *, adapted: Mapping[str, Adapted] | None
    ) -> Tensor | None:
        """Map tokens [N, W, I] -> [N, W, O]; without tokens only merge."""
        name = self._meo.path
        linear = self.merged_maps(call, groups, (name,), {name: gates}, adapted=adapted)
        return None if x is None else linear[name](x)


class JetMoeBlock(HostsExperts, MergedExpertsMixin):
    """JetMoE's feed-forward experts; its attention experts stay as they are."""

    router: Any
    bias: Any
    activation: Any
    input_linear: Any
    output_linear: Any
    runs_alone = False

    maps = ()  # they are its linear modules'

    def count(self) -> int:
        """Return the number of experts."""
        return len(self.input_linear.weight)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """Run tokens [P, D] through one expert."""
        gate, up = F.linear(x, self.input_linear.weight[number]).chunk(2, dim=-1)
        return F.linear(self.activation(gate) * up, self.output_linear.weight[number])

    def run_sorted(self, x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
        """Run sorted tokens [P, D] through its linear modules, which an adapter may wrap."""
        gate, up = self.input_linear(x, sizes).chunk(2, dim=-1)
        return self.output_linear(self.activation(gate) * up, sizes) * weights

    def _mark(self, adapted: Mapping[str, Adapted], router: Any) -> Mark:
        found = {f"{name}.{path}": each for name in ("input_linear", "output_linear")
                 for path, each in (adapted_maps(getattr(self, name)) or {}).items()}  # fmt: skip
        return super()._mark(found, router)

    def forward(self, layer_input: Tensor) -> Tensor:  # type: ignore[override]
        """Run tokens [B, S, D]."""
        flat = layer_input.reshape(-1, layer_input.shape[-1])
        index, weights, *_ = self.router(flat)
        return super().forward(flat, index, weights).view_as(layer_input) + self.bias

    def _run(
        self, call: Call, groups: Groups, gates: Gates, adapted: Mapping[str, Adapted] | None
    ) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            gate, up = self.input_linear(call, groups, gates, x).chunk(2, dim=-1)
            return self.output_linear(call, groups, gates, self.activation(gate) * up)

        return run

    def _prepare(self, call: Call, groups: Groups, gates: Gates, adapted: Mapping[str, Adapted] | None) -> None:
        for linear in (self.input_linear, self.output_linear):
            linear(call, groups, gates, None)


class Top1Routing(GroupRouter):
    """Switch Transformers' router; a group is never over an expert's capacity, so none of its tokens is dropped.

    Where nothing is merged, those of a row that come when an expert is full are dropped, as the family does.
    """

    dtype: Any
    classifier: Any
    jitter_noise: float
    expert_capacity: int

    places = (2, 1, 0)

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return logits, weights and indices."""
        x = hidden_states.to(self.dtype)
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        self.classifier = self.classifier.to(self.dtype)
        logits = self.classifier(x)
        weights, index = logits.flatten(0, -2).softmax(-1, dtype=self.dtype).max(-1, keepdim=True)
        if self._context.settings.level == "unmerged":
            taken = F.one_hot(index.view(logits.shape[:-1]), logits.shape[-1]).cumsum(-2).flatten(0, -2)
            weights = weights.masked_fill(taken.gather(-1, index) > self.expert_capacity, 0)
        return logits, weights.to(hidden_states.dtype), index

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Route tokens [B, S, D]; the family's losses take logits per row."""
        index, weights, logits, *rest = super().forward(hidden_states, *args, **kwargs)
        return index, weights, logits.reshape(*hidden_states.shape[:-1], -1), *rest


class Top2Routing(GroupRouter):
    """NLLB-MoE's router; a group is never over an expert's capacity, so none of its tokens is dropped."""

    dtype: Any
    num_experts: Any
    classifier: Any
    _cast_classifier: Any

    places = (2, 1, 0)

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return logits, weights and indices."""
        self._cast_classifier()
        logits = self.classifier(hidden_states.to(self.dtype)).reshape(-1, self.num_experts)
        weights, index = logits.softmax(-1, dtype=self.dtype).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        return logits, weights.to(hidden_states.dtype), index


class StackedExperts(MergedExpertsMixin, nn.Module):
    """Experts that were modules of their own, stacked: `up_proj` [E, F, D], `down_proj` [E, D, F] and biases."""

    runs_alone = False

    def __init__(self, experts: Any) -> None:
        super().__init__()
        each = _experts_of(experts)
        first, down = _linears(each[0])
        self.act_fn, self.dropout = each[0].act, each[0].dropout
        self.token_dropout = getattr(experts, "token_dropout", nn.Identity())
        for name, linear in (("up_proj", first), ("down_proj", down)):
            for suffix, one in (("", linear.weight), ("_bias", linear.bias)):
                made = None if one is None else nn.Parameter(one.new_empty(len(each), *one.shape))
                self.register_parameter(name + suffix, made)

    def _activate(self, h: Tensor) -> Tensor:
        return self.dropout(self.act_fn(h))

    def _weigh(self, x: Tensor, y: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        out = y(x) * scale
        if isinstance(self.token_dropout, nn.Dropout):  # NLLB-MoE's own: drops in training, scales in evaluation
            return self.token_dropout(out) if self.training else out * (1 - self.token_dropout.p)
        return out


class SparseBlock(HostsExperts, nn.Module):
    """The block around stacked experts."""

    def __init__(self, block: Any, like: Any = None) -> None:
        """Take over a block; `like` is one that the family initialises, if it has another number of experts."""
        super().__init__()
        self.router = block.router
        self.experts = StackedExperts(block.experts)
        self._twin = (copy.deepcopy(like or block).to("meta"),)  # a tuple, so that the twin is no submodule

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Run tokens [B, S, D]."""
        index, weights, _ = self.router(hidden_states)
        return self.experts(hidden_states, index, weights)

    @torch.no_grad()
    def initialize(self, init_weights: Callable[[nn.Module], None]) -> None:
        """Initialise what no checkpoint filled as the family's own block does."""
        twin = copy.deepcopy(self._twin[0]).to_empty(device=next(self.experts.parameters()).device)
        twin.apply(init_weights)
        own = dict(self.named_parameters())
        for name, value in stacked_state(twin).items():
            parameter = own.get(name)  # None where experts are kept as parts and share no weight
            if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
                init.copy_(parameter, value[: len(parameter)])  # there may be fewer; of low-rank experts one is shared


def _experts_of(experts: Any) -> list[Any]:
    return [module for name, module in experts.items() if name.startswith("expert_")]


def _linears(expert: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    first, down = (module for module in expert.children() if isinstance(module, nn.Linear))
    return first, down


def stacked_state(block: Any) -> dict[str, Tensor]:
    """Return the parameters of a block with one module per expert by their names in a `SparseBlock`."""
    state = {f"router.{name}": value for name, value in block.router.state_dict().items()}
    pairs = [_linears(expert) for expert in _experts_of(block.experts)]
    for at, name in enumerate(("up_proj", "down_proj")):
        state[f"experts.{name}"] = torch.stack([pair[at].weight for pair in pairs])
        if pairs[0][at].bias is not None:
            state[f"experts.{name}_bias"] = torch.stack([pair[at].bias for pair in pairs])
    return state


def stacking_conversions(family: MoeFamily) -> list[WeightConverter]:
    """Return how one module per expert on disk becomes `StackedExperts`, and back; empty for other layouts."""
    stacks = dict(zip(family.linears, ("up_proj", "down_proj"), strict=False))
    names = {f"{linear}.bias": f"{stack}_bias" for linear, stack in stacks.items()}
    names |= {f"{linear}.weight": stack for linear, stack in stacks.items()}
    return [
        WeightConverter(f".experts.expert_*.{name}", f".experts.{stack}", [MergeModulelist(dim=0)])
        for name, stack in names.items()
    ]
