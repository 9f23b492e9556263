"""Mixture-of-experts blocks that merge: the family's own router reads each group's pooled state, and the selected
experts' weights become one expert.

Block and modules stay the family's: routers and experts get made subclasses of their classes, so parameter names,
initialisation and shared experts are inherited. Gates need not sum to one: with s = sum_i g_i the block computes
y = s * f(x; sum_i (g_i / s) W_i), because raw gates would scale an expert's gate, up and down projections alike.

Legend: B rows, S positions, N groups that share a gate, W tokens per group, T = B * S tokens, D features,
E experts, K selected experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from .errors_meo import RoutingError
from .groups_meo import Groups
from .low_rank_meo import Adapted, Mark, mark_of
from .merger_meo import Linear, Merger, bank_key, gated_at_once
from .parts_meo import Parts, PartSizes
from .router_meo import Gates
from .routing_meo import Call, RoutingContext
from .unmerged_meo import chosen, expert_linear, run_pairs, run_sorted


@dataclass
class Site:
    """Where an MoE block sits: its path, its place in a KV cache, what its gates read; for DBRX also the block."""

    path: str
    layer: int
    reads_encoder: bool
    block: Any = None


@dataclass
class Routed:
    """What a router leaves for its experts in one call: the groups, and the gates of an answer that follows."""

    groups: Groups
    router: Any = None
    answer: Groups | None = None
    answer_gates: tuple[Tensor, Tensor] | None = None


class GroupRouter:
    """What a family's router adds to route groups: it reads what they pool, or pools what it says of their tokens.

    `places` are those of logits, weights and indices in what it returns.
    """

    _meo: Site
    _context: RoutingContext
    training: bool
    places: ClassVar[tuple[int, int, int]] = (0, 1, 2)

    def route(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return logits [T, E], weights and indices [T, K] of the family's own router, and what else it returns."""
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Route tokens [T, D] or [B, S, D]; gates come per group [N, K], all else per token.

        Where nothing is merged, gates come per token too.
        """
        if self._context.settings.level == "unmerged":
            return self._in_order(*self._sorted(self.route(hidden_states, *args, **kwargs)))
        call = self._context.call()
        settings = self._context.settings
        groups = call.groups(settings.level or "", self._meo.layer)
        if settings.pooling == "hidden":
            cells = groups.split(call.grouped(hidden_states))
            read = groups.read("hidden", cells)
            choose = functools.partial(self._route_pooled, hidden_states, args, kwargs)
            places, (logits, weights, index, *rest) = self._sorted(choose(read))
            logits, *rest = (_spread(x, groups, cells.shape[1]) for x in (logits, *rest))
        else:
            places, (logits, weights, index, *rest) = self._sorted(self.route(hidden_states, *args, **kwargs))
            dense = _dense_gates(logits, weights, index)
            read = groups.read("hidden", groups.split(call.grouped(dense)))
            choose = functools.partial(_route_mean, weights.shape[-1])
            _, weights, index = choose(read)
        groups.close()
        routed = Routed(groups, self)
        causal = call.causal
        if causal is not None and causal.prompt_end is not None and causal.keeps:
            routed.answer = causal.answer(self._meo.layer)
            _, (_, *answered) = self._sorted(choose(routed.answer.read("hidden", hidden_states)))
            routed.answer_gates = (answered[0], answered[1])
        call.routed[self._meo.path] = routed
        return self._in_order(places, (logits, weights, index, *rest))

    def _in_order(self, places: tuple[int, int, int], found: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return logits, weights, indices and what else there is where a router's outputs belong."""
        outputs = dict(zip(places, found[:3], strict=True))
        return (*(outputs.get(place) for place in range(max(places) + 1)), *found[3:])

    def _sorted(self, outputs: tuple[Any, ...]) -> tuple[tuple[int, int, int], tuple[Any, ...]]:
        """Return where a router's outputs belong, and logits, weights, indices and what else it returned.

        Raises RoutingError for a router that returns no logits, as some did in older versions of Transformers.
        """
        if len(outputs) < 3:
            raise RoutingError(
                f"{type(self).__mro__[2].__name__} returned {len(outputs)} values; logits, weights and indices are "
                f"needed: use a newer Transformers than {transformers.__version__}"
            )
        if outputs[0] is None or outputs[0].is_floating_point():
            return self.places, outputs
        return (2, 1, 0), (outputs[2], outputs[1], outputs[0], *outputs[3:])  # Granite's order up to 5.17

    def _route_pooled(self, like: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], read: Tensor) -> Any:
        """Route one pooled state per group [N, D], shaped as the tokens are."""
        shape = (read.shape[0], *[1] * (like.dim() - 2), read.shape[-1])
        state = read.to(like.device, like.dtype, copy=self.training)  # some routers add jitter in place
        return self.route(state.reshape(shape), *args, **kwargs)


def _spread(x: Tensor, groups: Groups, width: int) -> Tensor:
    """Give each token what its group has: [N, ...] -> [T, ...]."""
    tokens = groups.join(x.reshape(x.shape[0], 1, -1).expand(-1, width, -1))
    return tokens.reshape(-1, *x.shape[1:])


def _dense_gates(logits: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """Return each token's gate for every expert, zero for those that it did not select: [T, E]."""
    weights, index = weights.reshape(-1, weights.shape[-1]), index.reshape(-1, index.shape[-1])
    dense = torch.zeros(len(weights), logits.shape[-1], dtype=torch.float32, device=weights.device)
    return dense.scatter_add(1, index, weights.to(dense.dtype))


def _route_mean(top_k: int, inputs: Tensor) -> tuple[None, Tensor, Tensor]:
    """Keep the experts that a group's tokens weigh most [N, E], renormalised to the tokens' mean total."""
    weights, index = inputs.topk(top_k, dim=-1)
    total = weights.sum(-1, keepdim=True)
    return None, weights * (inputs.sum(-1, keepdim=True) / torch.where(total == 0, 1, total)), index


class MergedExpertsMixin(Merger):
    """What a family's experts module adds to run one merged expert per group."""

    _meo: Site
    act_fn: Any
    post_expert_norm: Any
    is_transposed: bool = False
    zero_expert_num: int = 0
    training: bool
    tally: Any = None  # counts what is selected, where somebody watches the training
    _stands_for: Tensor | None = None
    part_sizes: Mapping[str, PartSizes] = MappingProxyType({})  # of linear maps that are kept as parts
    runs_alone: ClassVar[bool] = True  # whether the family's own forward takes tokens, indices and weights

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        adapted: Mapping[str, Adapted] | None = None,
    ) -> Tensor:
        """Run tokens [T, D] or [B, S, D] through the experts that their groups' gates [N, K] merge.

        Where nothing is merged, gates [T, K] are each token's own.
        """
        if self._context.settings.level == "unmerged":
            stock = super().forward if self.runs_alone and not self.part_sizes else None  # type: ignore[misc]
            return self._run_each(stock, hidden_states, top_k_index, top_k_weights)
        call = self._context.call()
        routed: Routed = call.routed.pop(self._meo.path)
        x = routed.groups.split(call.grouped(hidden_states))  # [N, W, D]
        gates, scale, identity = self._normalise(top_k_index, top_k_weights)
        if self.training and self.tally is not None:
            self.tally.add(gates, routed.groups.real(), None)
        mark = self._mark(adapted or {}, routed.router)
        for formed in (routed.groups, routed.answer):
            if formed is not None:
                formed.adapt(mark)
        y = self._weigh(x, self._run(call, routed.groups, gates, adapted), scale[:, None, None])
        if identity is not None:
            y = y + identity[:, None, None] * x
        y = routed.groups.join(y.to(hidden_states.dtype))
        if routed.answer is not None and routed.answer_gates is not None:
            weights, index = routed.answer_gates
            answer, _, _ = self._normalise(index, weights)
            self._prepare(call, routed.answer, answer, adapted)
        return y.reshape(*hidden_states.shape[:-1], y.shape[-1])

    def _mark(self, adapted: Mapping[str, Adapted], router: Any) -> Mark:
        """Return what experts are merged with: copies of a router or of experts that adapters train are others."""
        values = [*self.parameters(), *router.parameters()] if adapted else ()  # type: ignore[attr-defined]
        return mark_of(adapted, (id(self), id(router)), values)

    @property
    def skips(self) -> tuple[str, float] | None:
        """The rule by which selected experts are skipped, and its threshold here."""
        return self._context.settings.skip_of(self._meo.path)

    def stands_for(self, device: torch.device) -> Tensor | None:
        """Return the expert that runs in the place of each that the router knows, None where all do themselves."""
        known = (self._context.settings.expert_maps or {}).get(self._meo.path)
        if known is None or (self._stands_for is not None and self._stands_for.device == device):
            return self._stands_for
        count = self.count()
        self._stands_for = torch.tensor([*known, *range(count, count + self.zero_expert_num)], device=device)
        return self._stands_for

    def _run_each(
        self, stock: Callable[..., Tensor] | None, hidden_states: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """Run tokens [T, D] or [B, S, D] through the experts that they selected [T, K], but for those skipped."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        index, weights = index.reshape(len(x), -1), weights.reshape(len(x), -1)
        index, weights, runs = chosen(index, weights, self.stands_for(index.device), self.skips)
        if self.training and self.tally is not None:
            gates, _, _ = self._normalise(index, weights if runs is None else weights * runs)
            mask = getattr(self._context.current, "mask", None)
            real = mask.reshape(-1) != 0 if isinstance(mask, Tensor) and mask.numel() == len(x) else None
            self.tally.add(gates, real, None)
        if runs is not None and not hasattr(self, "_apply_gate"):  # LongCat's own forward wants two experts per token
            stock = None
        return run_pairs(self, stock, x, index, weights, runs).reshape(hidden_states.shape)

    def run_sorted(self, x: Tensor, sizes: list[int], weights: Tensor) -> Tensor:
        """Run tokens [P, D] that are sorted by their experts, `sizes` of each, with their gates [P, 1]."""
        return run_sorted(self, x, sizes, weights)

    def expert(self, number: int, x: Tensor) -> Tensor:
        """Run tokens [P, D] through one expert."""
        y = self._compute({name: expert_linear(self, name, number) for name in self.maps}, x)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    @property
    def maps(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the linear maps in the order of their use."""
        first = "gate_up_proj" if hasattr(self, "gate_up_proj") else "up_proj"
        return first, "down_proj"

    def _normalise(self, index: Tensor, weights: Tensor) -> tuple[Gates, Tensor, Tensor | None]:
        """Return gates that sum to one, their sum [N], and the share of experts that return their input."""
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        identity = None
        if self.zero_expert_num:
            experts = self.count()
            identity = torch.where(index >= experts, wide, 0).sum(-1)
            wide, index = torch.where(index >= experts, 0, wide), index.clamp(max=experts - 1)
        total = wide.sum(-1, keepdim=True)
        return Gates(index, wide / torch.where(total == 0, 1, total)), total[:, 0], identity

    def _weigh(self, x: Tensor, y: Callable[[Tensor], Tensor], scale: Tensor) -> Tensor:
        """Apply the sum of the gates [N, 1, 1] to the merged expert `y`."""
        return y(x) * scale

    def _run(
        self, call: Call, groups: Groups, gates: Gates, adapted: Mapping[str, Adapted] | None
    ) -> Callable[[Tensor], Tensor]:
        """Return the merged expert as a function of tokens [N, W, D]."""

        def run(x: Tensor) -> Tensor:
            linear = self.merged_maps(call, groups, self.maps, dict.fromkeys(self.maps, gates), adapted=adapted)
            y = self._compute(linear, x)
            return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

        return run

    def _compute(self, linear: dict[str, Linear], x: Tensor) -> Tensor:
        first, last = self.maps
        apply_gate = getattr(self, "_apply_gate", None)  # which Transformers gives to experts that have none
        if first == "gate_up_proj" and getattr(apply_gate, "__name__", "_default_apply_gate") == "_default_apply_gate":
            at_once = gated_at_once(linear[first], x, self.act_fn)
            if at_once is not None:
                return linear[last](at_once)
        return linear[last](self._activate(linear[first](x)))

    def _prepare(self, call: Call, groups: Groups, gates: Gates, adapted: Mapping[str, Adapted] | None) -> None:
        """Merge what an answer will need now, because a compiled step could not keep it."""
        self.merged_maps(call, groups, self.maps, dict.fromkeys(self.maps, gates), adapted=adapted)

    def _activate(self, h: Tensor) -> Tensor:
        if not hasattr(self, "gate_up_proj"):
            return self.act_fn(h)
        if hasattr(self, "_apply_gate"):
            return self._apply_gate(h)
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def stack(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return weights [E, O, I], a view where the family stores them transposed, and biases [E, O].

        Of a map that is kept as parts there is one weight, W_0, which is without memory where experts share none.
        """
        weight, bias = getattr(self, self.held_in(name)), getattr(self, f"{name}_bias", None)
        return weight.transpose(1, 2) if self.is_transposed else weight, bias

    def held_in(self, name: str) -> str:
        """Return the name of the parameter that holds a linear map."""
        return name

    def count(self) -> int:
        """Return the number of experts."""
        sizes = self.part_sizes.get(self.maps[-1])
        return super().count() if sizes is None else len(sizes.ranks)

    def parts_of(self, name: str) -> Any:
        """Return the parts that a linear map is kept as; an adapter may wrap them."""
        return self.parts[bank_key(name)]

    def keep_apart(self, sizes: Mapping[str, PartSizes]) -> None:
        """Make room for parts of some linear maps in the place of whole experts."""
        made = {}
        for name, one in sizes.items():
            view, held = self.stack(name)[0], self.held_in(name)
            made[bank_key(name)] = Parts(one, view)
            whole = self._parameters.pop(held)  # type: ignore[attr-defined]
            kept = whole.detach()[: view.shape[1] * view.shape[2] // whole[0].numel()]  # some stacks have idle rows
            if one.shared:
                setattr(self, held, nn.Parameter(kept.clone()))
            else:
                setattr(self, held, torch.empty_like(kept, device="meta"))
        self.parts, self.part_sizes = nn.ModuleDict(made), dict(sizes)


@functools.cache
def merging_class(mixin: type, base: Any) -> Any:
    """Return the class that a family's module gets, made once; its instances are pickled by what it is made of."""

    def reduce(self: Any) -> Any:
        return _unpickled, (mixin, base), self.__dict__

    members = {"__module__": __name__, "__doc__": base.__doc__, "__reduce__": reduce}
    return type(f"Meo{base.__name__}", (mixin, base), members)


def _unpickled(mixin: type, base: type) -> Any:
    return object.__new__(merging_class(mixin, base))


def merge_module(module: nn.Module, mixin: type, site: Site, context: RoutingContext, combine: str) -> None:
    """Make a live module merge: it keeps its parameters and gets a made subclass of its class."""
    module.__class__ = merging_class(mixin, type(module))  # type: ignore[arg-type]
    place_module(module, site, context, combine)


def place_module(module: nn.Module, site: Site, context: RoutingContext, combine: str) -> None:
    """Tell a merging module where it sits."""
    module._meo, module._context, module.combine = site, context, combine  # type: ignore[assignment]


def merged_moe(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of everything that merges the experts of an MoE block."""
    for path, module in model.named_modules():
        if isinstance(module, MergedExpertsMixin):
            yield path, module
