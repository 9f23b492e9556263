"""The merged feed-forward: experts' weights, their router, and one dense pass through what the gates merge.

Legend: G groups that share a gate, T tokens per group, D hidden features, F intermediate features,
E experts, K selected experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D, apply_chunking_to_forward

from .configuration_meo import MeoSettings
from .errors_meo import MeoConfigError, RoutingError
from .families_meo import Family
from .merging_meo import combine_outputs, grouped_linear, merge_experts
from .routing_meo import Call, Gates, MeoRouter, RoutingContext


@dataclass(frozen=True)
class Block:
    """A dense feed-forward found in a model: the module that owns it, its path, and its projections."""

    path: str
    index: int
    owner: nn.Module
    up: tuple[str, ...]
    down: str
    family: Family
    causal_partner: bool  # the decoder of an encoder-decoder, gated by the encoder's output

    @property
    def slot(self) -> str:
        """Path of the module that the merged feed-forward takes the place of."""
        return f"{self.path}.{self.up[0]}" if self.family.hosted else self.path

    @property
    def gated(self) -> bool:
        """Whether the first projection is a gate times a value."""
        return self.family.fused or len(self.up) == 2

    @property
    def maps(self) -> tuple[str, ...]:
        """Names of the linear maps, first projections then `down_proj`; each has a gate in scope `projection`."""
        if len(self.up) == 2:
            return ("gate_proj", "up_proj", "down_proj")
        return ("gate_up_proj" if self.gated else "up_proj", "down_proj")

    def projection(self, path: str) -> nn.Linear:
        """Return a projection by its path on the owner; GPT-2's Conv1D passes for a linear map here."""
        return cast(nn.Linear, self.owner.get_submodule(path))

    @property
    def features(self) -> tuple[int, int]:
        """Hidden features D and intermediate features F."""
        down = _weight_shape(self.projection(self.down))
        return down[0], down[1]

    @property
    def has_bias(self) -> tuple[bool, bool]:
        """Whether first and second projection carry a bias."""
        return self.projection(self.up[0]).bias is not None, self.projection(self.down).bias is not None


def _weight_shape(linear: nn.Linear) -> tuple[int, int]:
    """Shape [out, in] of a projection; GPT-2's Conv1D stores [in, out]."""
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def oriented(linear: nn.Linear) -> Tensor:
    """Return a projection's weight as [out, in]."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight  # type: ignore[operator]


def find_blocks(model: nn.Module, family: Family) -> Iterator[Block]:
    """Yield every dense feed-forward of a model, numbered within its stack."""
    counts: dict[bool, int] = {}
    for path, owner in model.named_modules():
        up = next((u for u in family.up if _has_projections(owner, (*u, family.down))), None)
        if up is None:
            continue
        decoder = family.kind == "encoder-decoder" and "decoder" in path.split(".")
        index = counts.get(decoder, 0)
        counts[decoder] = index + 1
        yield Block(path, index, owner, up, family.down, family, decoder)


def _has_projections(module: nn.Module, paths: tuple[str, ...]) -> bool:
    for path in paths:
        try:
            found = module.get_submodule(path)
        except AttributeError:
            return False
        if not isinstance(found, (nn.Linear, Conv1D)):
            return False
    return True


class MergedExperts(nn.Module):
    """All experts of a feed-forward, stacked; same names and orientation as Transformers' MoE experts.

    `gate_up_proj` [E, 2F, D] (gate first) or `up_proj` [E, F, D], `down_proj` [E, D, F], and `..._bias`.
    """

    def __init__(self, block: Block, num_experts: int) -> None:
        super().__init__()
        hidden, intermediate = block.features
        self.gated = block.gated
        self.down_proj: nn.Parameter
        self.first = "gate_up_proj" if self.gated else "up_proj"
        width = intermediate * (2 if self.gated else 1)
        like = block.projection(block.up[0]).weight
        shapes = {self.first: (width, hidden), "down_proj": (hidden, intermediate)}
        for (name, shape), has_bias in zip(shapes.items(), block.has_bias, strict=True):
            parameter = nn.Parameter(torch.empty(num_experts, *shape, dtype=like.dtype, device=like.device))
            bias = nn.Parameter(torch.empty(num_experts, shape[0], dtype=like.dtype, device=like.device))
            self.register_parameter(name, parameter)
            self.register_parameter(f"{name}_bias", bias if has_bias else None)

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


class MeoFeedForward(nn.Module):
    """One feed-forward whose weights are merged from experts for each group of tokens (arXiv 2310.09832)."""

    def __init__(self, block: Block, settings: MeoSettings, context: RoutingContext) -> None:
        super().__init__()
        hidden, intermediate = block.features
        self.level, self.combine, self.scope = settings.level, settings.combine, settings.gate_scope
        self.num_tasks = len(settings.tasks)
        self.balance_loss = settings.balance_loss if settings.num_experts > 1 else 0.0
        self.reads_encoder = block.causal_partner
        self.maps = block.maps
        self.gated = block.gated
        self.activation = _take_activation(block)
        self.dropout = nn.Dropout(_take_dropout(block))
        self.chunk_size = _take_chunk_size(block)
        self.experts = MergedExperts(block, settings.num_experts)
        self.adapter = TokenAdapter(hidden, settings.token_reduction) if self.level == "token" else None

        def router(features: int) -> MeoRouter:
            if self.level == "task":
                features = self.num_tasks
            made = MeoRouter(features, settings.num_experts, settings.top_k, settings.router == "noisy_top_k")
            return made.to(device=self.experts.down_proj.device, dtype=self.experts.down_proj.dtype)

        if self.scope == "ffn":
            self.router: nn.Module = router(hidden)
        else:
            inner = hidden if self.reads_encoder else intermediate
            widths = {name: inner if name == "down_proj" else hidden for name in self.maps}
            self.router = nn.ModuleDict({name: router(width) for name, width in widths.items()})
        self._context = context
        self._twin = (_meta_twin(block),)  # a tuple, so that the twin is no submodule

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run tokens [B, S, D] (or flattened [B * S, D]) through their merged expert; keeps the shape."""
        call = self._context.call()
        x = call.grouped(hidden_states)  # [B, S, D]
        fixed = self._fixed_task(call)
        if fixed is not None:
            x = x.reshape(1, -1, x.shape[-1])  # one gate for the whole batch
        gates = self._gates(call, x, fixed, self.maps[:-1])
        if self.adapter is not None:
            x = self.adapter(x)
        first = [self._linear(name, gates[name]) for name in self.maps[:-1]]
        shared = self._linear("down_proj", gates["down_proj"]) if "down_proj" in gates else None

        if shared is None and self.chunk_size:  # the last gate reads the whole activation
            h = self._chunked(lambda part: self._activate(first, part), x)
            shared = self._linear("down_proj", self._gates(call, h, fixed, ("down_proj",))["down_proj"])
            y = self._chunked(shared, h)
        elif shared is None:
            h = self._activate(first, x)
            y = self._linear("down_proj", self._gates(call, h, fixed, ("down_proj",))["down_proj"])(h)
        else:
            y = self._chunked(lambda part: shared(self._activate(first, part)), x)
        return y.reshape(*hidden_states.shape[:-1], y.shape[-1])

    def _activate(self, first: list[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        if len(first) == 2:
            h = self.activation(first[0](x)) * first[1](x)
        elif self.gated:
            gate, value = first[0](x).chunk(2, dim=-1)
            h = self.activation(gate) * value
        else:
            h = self.activation(first[0](x))
        return self.dropout(h)

    def _chunked(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return apply_chunking_to_forward(function, self.chunk_size, 1, x) if self.chunk_size else function(x)

    def _fixed_task(self, call: Call) -> int | None:
        if call.task_ids is not None:
            self._check_task_ids(call.task_ids)
            return None
        if self.level != "task":
            return None
        if self._context.task is not None:
            return self._context.task
        if self.num_tasks == 1:
            return 0
        raise RoutingError(
            f"this model has {self.num_tasks} tasks: pass `task_ids` [batch], or call model.set_task(name) first"
        )

    def _check_task_ids(self, task_ids: Tensor) -> None:
        if self.level != "task":
            raise RoutingError(f"`task_ids` have no effect at level {self.level!r}: leave them out")
        on_cpu = task_ids.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look would wait
        if on_cpu and not bool(((task_ids >= 0) & (task_ids < self.num_tasks)).all()):
            raise RoutingError(f"`task_ids` are {task_ids.tolist()}, but the tasks are 0 to {self.num_tasks - 1}")

    def _gates(self, call: Call, x: Tensor, fixed: int | None, maps: tuple[str, ...]) -> dict[str, Gates]:
        """Gates of the given linear maps; in scope `ffn` one router's gates serve all maps."""
        if self.level == "task":
            inputs = call.task_ids
            if inputs is None:
                inputs = torch.full((1,), fixed or 0, dtype=torch.long, device=x.device)
        else:
            inputs = call.encoder_mean() if self.reads_encoder else call.mean(x)
        if self.scope == "ffn":
            gates = self._route(self.router, inputs, call)
            return dict.fromkeys(self.maps, gates)
        return {name: self._route(self.router[name], inputs, call) for name in maps}  # type: ignore[index]

    def _route(self, router: nn.Module, inputs: Tensor, call: Call) -> Gates:
        gates, balance = router(inputs)
        if self.training and self.balance_loss:
            call.balance.append(balance * self.balance_loss)
        return gates

    def _linear(self, name: str, gates: Gates) -> Callable[[Tensor], Tensor]:
        """Return one linear map of the merged expert as a function of tokens [G, T, I]."""
        stack, bias = self.experts.stack(name)
        if self.combine == "outputs":
            return lambda x: combine_outputs(x.to(stack.dtype), stack, bias, *gates)
        weight = merge_experts(stack, *gates)
        merged_bias = None if bias is None else merge_experts(bias, *gates)
        return lambda x: grouped_linear(x, weight, merged_bias)

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
                if router.noise_weight is not None:
                    init.zeros_(router.noise_weight)
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
                    bias[expert] = torch.cat([linear.bias for linear in linears])


def _meta_twin(block: Block) -> tuple[nn.Module, tuple[str, ...], str]:
    """Copy the dense feed-forward alone to the meta device: families initialise it by its module class."""
    linears = {path: block.projection(path) for path in (*block.up, block.down)}
    own = sum(len(list(linear.parameters())) for linear in linears.values())
    if own == len(list(block.owner.parameters())):
        return copy.deepcopy(block.owner).to("meta"), block.up, block.down
    names = {path: f"projection_{i}" for i, path in enumerate(linears)}
    loose = nn.ModuleDict({names[path]: copy.deepcopy(linear) for path, linear in linears.items()})
    return loose.to("meta"), tuple(names[path] for path in block.up), names[block.down]


def _take_activation(block: Block) -> nn.Module:
    parent, _, name = block.family.activation.rpartition(".")
    holder = block.owner.get_submodule(parent)
    activation = getattr(holder, name)
    if block.family.hosted:
        setattr(holder, name, nn.Identity())
    return activation


def _take_dropout(block: Block) -> float:
    if block.family.dropout is None:
        return 0.0
    dropout = getattr(block.owner, block.family.dropout)
    if isinstance(dropout, nn.Dropout):
        return dropout.p
    setattr(block.owner, block.family.dropout, 0.0)  # it would act on the output now
    return float(dropout)


def _take_chunk_size(block: Block) -> int:
    """Chunk after gating: the layer's own chunks would hide the rest of the sequence from the gate."""
    size = getattr(block.owner, "chunk_size_feed_forward", 0)
    if size:
        block.owner.chunk_size_feed_forward = 0  # type: ignore[assignment]
    return int(size or 0)


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
        if settings.layers is not None and block.index not in settings.layers:
            continue
        merged = MeoFeedForward(block, settings, context)
        if family.hosted:
            model.set_submodule(block.slot, merged)
            model.set_submodule(f"{block.path}.{block.down}", Absorbed())
        else:
            model.set_submodule(block.slot, merged)


def merged_feed_forwards(model: nn.Module) -> Iterator[tuple[str, MeoFeedForward]]:
    """Yield path and module of every merged feed-forward of a model."""
    for path, module in model.named_modules():
        if isinstance(module, MeoFeedForward):
            yield path, module


def describe_unknown(model: nn.Module) -> list[dict[str, Any]]:
    """Propose family rows for a model without one: modules that own two or three linear maps with an activation."""
    proposals = []
    for path, module in model.named_modules():
        linears = [n for n, m in module.named_children() if isinstance(m, (nn.Linear, Conv1D))]
        if len(linears) in (2, 3):
            shapes = {n: _weight_shape(cast(nn.Linear, module.get_submodule(n))) for n in linears}
            ins = {shape[1] for shape in shapes.values()}
            outs = {shape[0] for shape in shapes.values()}
            if len(ins) == 2 and len(outs) == 2:
                down = next(n for n, s in shapes.items() if s[1] == max(ins))
                proposals.append({"path": path, "up": [n for n in linears if n != down], "down": down})
    return proposals
