"""The merged feed-forward: experts' weights, their router, and one dense pass through what the gates merge.

Legend: N groups that share a gate, W tokens per group, D hidden features, F intermediate features,
E experts, K selected experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import apply_chunking_to_forward

from .blocks_meo import (
    Block,
    find_blocks,
    meta_twin,
    oriented,
    take_activation,
    take_chunk_size,
    take_dropout,
)
from .configuration_meo import MeoSettings
from .errors_meo import MeoConfigError
from .families_meo import Family
from .groups_meo import Groups, TaskGroups
from .low_rank_meo import Adapted, Mark, mark_of
from .merger_meo import Linear, Merger, gated_at_once
from .parallel_meo import own_tensors
from .router_meo import Gates, MeoRouter
from .routing_meo import Call, RoutingContext
from .task_memory_meo import TaskMemory
from .wrapped_meo import HostsExperts, adapted_maps, chosen_in, innermost


class MergedExperts(Merger, nn.Module):
    """All experts of a feed-forward, stacked; same names and orientation as Transformers' MoE experts.

    `gate_up_proj` [E, 2F, D] (gate first) or `up_proj` [E, F, D], `down_proj` [E, D, F], and `..._bias`. They are
    read in its own forward alone: elsewhere they may lie on another device, or on disk. In format `lowrank` the weights
    hold one expert, biases all, and `low_rank` holds factors for each map that has a rank.
    """

    def __init__(self, block: Block, settings: MeoSettings, context: RoutingContext) -> None:
        super().__init__()
        self.combine, self.maps, self._context = settings.combine, block.maps, context
        whole = settings.expert_format == "full"
        hidden, intermediate = block.features
        self.gated = block.gated
        self.down_proj: nn.Parameter
        self.first = "gate_up_proj" if self.gated else "up_proj"
        width = intermediate * (2 if self.gated else 1)
        like = block.projection(block.up[0]).weight
        shapes = {self.first: (width, hidden), "down_proj": (hidden, intermediate)}
        for (name, shape), has_bias in zip(shapes.items(), block.has_bias, strict=True):
            kept = settings.num_experts if whole else 1
            parameter = nn.Parameter(torch.empty(kept, *shape, dtype=like.dtype, device=like.device))
            bias = nn.Parameter(torch.empty(settings.num_experts, shape[0], dtype=like.dtype, device=like.device))
            self.register_parameter(name, parameter)
            self.register_parameter(f"{name}_bias", bias if has_bias else None)
        if not whole:
            ranks = {name: settings.rank_of(f"{block.path}.{path}") for name, path in block.paths.items()}
            self.keep_parts(ranks, settings.num_experts)

    def forward(
        self,
        call: Call,
        groups: Groups,
        names: tuple[str, ...],
        gates: dict[str, Gates],
        pieces: bool,
        adapted: dict[str, Adapted] | None = None,
    ) -> dict[str, Linear]:
        """Return linear maps of the merged experts as functions of tokens [N, W, I]."""
        return self.merged_maps(call, groups, names, gates, pieces=pieces or self.is_lent(), adapted=adapted)

    def is_lent(self) -> bool:
        """Whether the weights are gone after this forward: FSDP2 units of their own, and DeepSpeed's ZeRO-3."""
        sharded = any(base.__name__ == "FSDPModule" for base in type(self).__mro__)
        return sharded or hasattr(self.down_proj, "ds_id")

    def adapted_map(self, adapted: Mapping[str, Adapted], name: str) -> Adapted | None:
        """Return what adapters make of a linear map."""
        if name not in ("gate_proj", "up_proj") or not self.gated:
            return adapted.get(name)
        fused = adapted.get(self.first)
        return None if fused is None else fused.half(0 if name == "gate_proj" else 1)

    def stack(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias stacks of a linear map; `gate_proj` and `up_proj` are halves of the fused one."""
        if name in ("gate_proj", "up_proj") and self.gated:
            half = 0 if name == "gate_proj" else 1
            weight, bias = self.stack(self.first)
            return weight.chunk(2, 1)[half], None if bias is None else bias.chunk(2, 1)[half]
        return getattr(self, name), getattr(self, f"{name}_bias")


class TokenAdapter(nn.Module):
    """Per-token bottleneck of level `token`: x + up(relu(down(x))), up zero-initialised."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(features, max(1, features // reduction))
        self.up = nn.Linear(max(1, features // reduction), features)

    def forward(self, x: Tensor) -> Tensor:
        """Adapt each token: [..., D] -> [..., D]."""
        return x + self.up(self.down(x.to(self.down.weight.dtype)).relu()).to(x.dtype)


class MeoFeedForward(HostsExperts, nn.Module):
    """One feed-forward whose weights are merged from experts for each group of tokens (arXiv 2310.09832)."""

    _z3_leaf = True  # tells DeepSpeed's ZeRO-3 to gather all of it at once: the experts return functions, not tensors

    def __init__(self, block: Block, settings: MeoSettings, context: RoutingContext) -> None:
        super().__init__()
        hidden, intermediate = block.features
        self.layer = block.layer
        self.level, self.scope = settings.level or "", settings.gate_scope
        self.balance_loss = settings.balance_loss if settings.num_experts > 1 else 0.0
        self.noisy = settings.router == "noisy_top_k"
        self.tasks = len(settings.tasks)
        self._task_memory = TaskMemory()
        context.task_memories.append(self._task_memory)
        self.reads_encoder = block.causal_partner
        self.maps = block.maps
        self.gated = block.gated
        self.activation = take_activation(block)
        self.dropout = nn.Dropout(take_dropout(block))
        self.chunk_size = take_chunk_size(block)
        self.experts = MergedExperts(block, settings, context)
        self.adapter = TokenAdapter(hidden, settings.token_reduction) if self.level == "token" else None
        self.sources = {"hidden": self.maps}  # gated input -> the linear maps whose gates read it
        if self.scope == "projection" and self.level != "task" and not self.reads_encoder:
            self.sources = {"hidden": self.maps[:-1], "intermediate": self.maps[-1:]}

        def router(features: int) -> MeoRouter:
            if self.level == "task":
                features = context.description_size or len(settings.tasks)
            biased = settings.expert_format == "lowrank" and self.level != "task"
            noisy = settings.router == "noisy_top_k"
            made = MeoRouter(features, settings.num_experts, settings.top_k, noisy, biased)
            return made.to(device=self.experts.down_proj.device, dtype=self.experts.down_proj.dtype)

        if self.scope == "ffn":
            self.router: nn.Module = router(hidden)
        else:
            inner = self.sources.get("intermediate", ())
            self.router = nn.ModuleDict({m: router(intermediate if m in inner else hidden) for m in self.maps})
        self._context = context
        self._twin = (meta_twin(block),)  # a tuple, so that the twin is no submodule

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run tokens [B, S, D] (or flattened [B * S, D]) through their merged experts; keeps the shape."""
        call = self._context.call()
        groups = call.groups(self.level, self.layer)
        if isinstance(groups, TaskGroups):
            self._share(call, groups, hidden_states)
        x = groups.split(call.grouped(hidden_states))  # [N, W, D]
        linear = self._linear_maps(call, groups, "hidden", x)
        x = x if self.adapter is None else self.adapter(x)
        h = x
        if "intermediate" in self.sources:  # the last gate reads the whole activation
            h = self._chunked(lambda part: self._activate(linear, part), x)
            linear |= self._linear_maps(call, groups, "intermediate", h)
            y = self._chunked(linear["down_proj"], h)
        else:
            y = self._chunked(lambda part: linear["down_proj"](self._activate(linear, part)), x)
        y = groups.join(y)
        groups.close()
        if call.causal is not None and call.causal.prompt_end is not None and call.causal.keeps:
            answer = call.causal.answer(self.layer)
            for source in self.sources:  # now, because a compiled step could not keep what it merges
                self._linear_maps(call, answer, source, x if source == "hidden" else h)
        return y.reshape(*hidden_states.shape[:-1], y.shape[-1])

    def _share(self, call: Call, groups: TaskGroups, hidden_states: Tensor) -> None:
        """Let rows of a task share its gate where nothing makes their gates differ, and their merged expert stay."""
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.router.modules())
        if hooked or (self.training and (self.noisy or self.balance_loss)):  # a hook may change what a router says
            return
        memory = None
        if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()) and self._has_own_weights():
            memory = self._task_memory
            closely = hidden_states.shape[:-1].numel() != call.rows  # steps look less
            described = () if call.embed is None else call.embed.parameters()
            memory.refresh((*self._own_parameters(), *described), closely=closely)
        groups.share(self.tasks, memory, hidden_states.device)

    def _mark(self, adapted: dict[str, Adapted] | None) -> Mark:
        """Return what merged experts would be merged with now."""
        if not self._wrapped():
            return Mark()
        if adapted is None:
            return Mark(object())  # nobody knows: what was merged before is not used
        values = [*innermost(self.experts).parameters(), *self.router.parameters()]  # adapters bring their own
        return mark_of(adapted, (chosen_in(self.experts), chosen_in(self.router)), values)

    def _wrapped(self) -> bool:
        """Whether an adapter, or a copy that is trained with one, is around experts or routers."""
        routers = self.router.values() if isinstance(self.router, nn.ModuleDict) else (self.router,)
        return not isinstance(self.experts, Merger) or not all(isinstance(router, MeoRouter) for router in routers)

    def _has_own_weights(self) -> bool:
        """Whether all weights are plain parameters: not a replica's, nor derived from others."""
        derived = any(hasattr(module, "parametrizations") for module in self.modules())
        kinds = {type(p) for p in self._own_parameters()}
        return bool(kinds) and kinds <= {Tensor, nn.Parameter} and not derived

    def _own_parameters(self) -> list[Tensor]:
        return list(self.parameters()) if innermost(self.experts).shards is None else own_tensors(self)

    def train(self, mode: bool = True) -> MeoFeedForward:
        """Set the mode; what was merged for tasks is forgotten."""
        self._task_memory.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MeoFeedForward:
        self._task_memory.forget()
        return super()._apply(fn, recurse)

    def _activate(self, linear: dict[str, Linear], x: Tensor) -> Tensor:
        if "gate_proj" in linear:
            h = self.activation(linear["gate_proj"](x)) * linear["up_proj"](x)
        elif self.gated:
            at_once = gated_at_once(linear["gate_up_proj"], x, self.activation)
            if at_once is not None:
                return self.dropout(at_once)
            gate, value = linear["gate_up_proj"](x).chunk(2, dim=-1)
            h = self.activation(gate) * value
        else:
            h = self.activation(linear["up_proj"](x))
        return self.dropout(h)

    def _chunked(self, function: Linear, x: Tensor) -> Tensor:
        return apply_chunking_to_forward(function, self.chunk_size, 1, x) if self.chunk_size else function(x)

    def _linear_maps(self, call: Call, groups: Groups, source: str, cells: Tensor) -> dict[str, Linear]:
        """Return the linear maps whose gates read `source`, as functions of tokens [N, W, I]."""
        names = self.sources[source]
        adapted = adapted_maps(self.experts)
        groups.adapt(self._mark(adapted))
        known = all(name in groups.kept() for name in names)
        gates: dict[str, Gates] = {}
        if not (known and groups.settled):
            inputs = groups.read(source, cells).to(cells.device)
            if not known or groups.changed:
                gates = self._gates(source, inputs, call, groups)
        if adapted:  # what its wrappers would find again
            return innermost(self.experts)(call, groups, names, gates, bool(self.chunk_size), adapted)
        return self.experts(call, groups, names, gates, bool(self.chunk_size))

    def _gates(self, source: str, inputs: Tensor, call: Call, groups: Groups) -> dict[str, Gates]:
        """Return the gates of the linear maps that read `source`; in scope `ffn` one router's serve all."""
        if self.scope == "ffn":
            return dict.fromkeys(self.maps, self._route(self.router, inputs, call, groups))
        routers: nn.ModuleDict = self.router  # type: ignore[assignment]
        return {name: self._route(routers[name], inputs, call, groups) for name in self.sources[source]}

    def _route(self, router: nn.Module, inputs: Tensor, call: Call, groups: Groups) -> Gates:
        if call.embed is not None:  # gates read their tasks' descriptions
            texts = self._context.settings.task_descriptions or []
            inputs = call.descriptions(texts, inputs.device)[inputs]
        real = groups.real() if self.training else None
        gates, balance = router(inputs) if real is None else router(inputs, real)
        if self.training and self.balance_loss:
            call.balance.append(balance * self.balance_loss)
        tally: Any = router.tally
        if self.training and tally is not None:
            tally.add(gates, real, groups.owner)
        return gates

    @torch.no_grad()
    def initialize(self, init_weights: Callable[[nn.Module], None]) -> None:
        """Initialise what no checkpoint filled: experts as the stock dense layers, each drawn on its own.

        `init_weights` is the model's own `_init_weights`. Loaded tensors carry a flag and stay as they are.
        """
        missing = [p for p in self.parameters() if not getattr(p, "_is_hf_initialized", False)]
        if not missing or getattr(self, "_meo_initialized", False):
            return
        if any(p is q for p in missing for q in self.experts.parameters()):
            self._initialize_experts(init_weights)
        for router in self.modules():
            if isinstance(router, MeoRouter):
                init.normal_(router.weight, std=0.02)
                for name in ("noise_weight", "bias"):
                    if getattr(router, name) is not None:
                        init.zeros_(getattr(router, name))
        if self.adapter is not None:
            init.kaiming_uniform_(self.adapter.down.weight, a=5**0.5)
            for zero in (self.adapter.down.bias, self.adapter.up.weight, self.adapter.up.bias):
                init.zeros_(zero)
        self._meo_initialized = True

    def _initialize_experts(self, init_weights: Callable[[nn.Module], None]) -> None:
        device = self.experts.down_proj.device
        for expert in range(self.experts.down_proj.shape[0]):
            twin, up, down = copy.deepcopy(self._twin[0])
            twin = twin.to_empty(device=device)
            twin.apply(init_weights)
            for name, paths in ((self.experts.first, up), ("down_proj", (down,))):
                linears = [cast(nn.Linear, twin.get_submodule(path)) for path in paths]
                weight, bias = getattr(self.experts, name), getattr(self.experts, f"{name}_bias")
                if not getattr(weight, "_is_hf_initialized", False):
                    weight[expert] = torch.cat([oriented(linear) for linear in linears])
                if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                    same = slice(None) if self.experts.bank() is not None else expert
                    bias[same] = torch.cat([linear.bias for linear in linears])


class Absorbed(nn.Identity):
    """What is left of a second projection; GPT-2 initialises the `weight` of its own."""

    weight = torch.empty(0)


def replace_blocks(model: nn.Module, family: Family, settings: MeoSettings, context: RoutingContext) -> None:
    """Put a merged feed-forward in the place of every dense one that the settings name.

    Raises MeoConfigError if the model has none, or lacks a layer that the settings name.
    """
    blocks = list(find_blocks(model, family))
    if not blocks:
        paths = " or ".join("/".join((*up, family.down)) for up in family.up)
        raise MeoConfigError(
            f"found no feed-forward in {type(model).__name__}: no module has {paths}; the row of "
            f"{family.model_type!r} in families_meo.py does not fit this version of transformers"
        )
    depth = max(block.index for block in blocks) + 1
    if settings.layers is not None and (beyond := [i for i in settings.layers if i >= depth]):
        raise MeoConfigError(f"layers {beyond} do not exist: the model has layers 0 to {depth - 1}")
    for block in blocks:
        if not converts(block, settings):
            continue
        merged = MeoFeedForward(block, settings, context)
        if family.hosted:
            model.set_submodule(block.slot, merged)
            model.set_submodule(f"{block.path}.{block.down}", Absorbed())
        else:
            model.set_submodule(block.slot, merged)


def converts(block: Block, settings: MeoSettings) -> bool:
    """Return whether a dense feed-forward becomes a merged one."""
    ranks = [settings.rank_of(f"{block.path}.{path}") for path in block.paths.values()]
    if settings.expert_format == "lowrank" and not any(ranks):
        return False
    return settings.layers is None or block.index in settings.layers


def merged_feed_forwards(model: nn.Module) -> Iterator[tuple[str, MeoFeedForward]]:
    """Yield path and module of every merged feed-forward of a model."""
    for path, module in model.named_modules():
        if isinstance(module, MeoFeedForward):
            yield path, module
