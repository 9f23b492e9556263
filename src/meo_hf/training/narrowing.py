"""Make the routers of a stock mixture choose among some of their experts only, as if there were no others.

Parameters, optimiser and checkpoints keep all experts: the family's own router of a smaller model (its code, without
its weights) reads the rows that are kept, and its answer is told in the numbers of the whole block.

Legend: T tokens, E experts of a block, E' kept ones, K selected experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from meo_hf.conversion.source import meta_model
from meo_hf.errors import UnsupportedError
from meo_hf.modeling.fewer_meo import resized_config
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_layouts_meo import moe_blocks, router_of
from meo_hf.modeling.moe_settings_meo import set_top_k, top_k_of
from meo_hf.reduction.counted import Counted, mixture_of
from meo_hf.reduction.plan import one_hot
from meo_hf.training.routers import GIVES_SHARES


class Narrowing:
    """Which experts the blocks of a model choose among.

    A block with fewer experts than it selects selects all of them, so that with one expert its gate is what the family
    gives to a single selected expert.
    """

    def __init__(self, model: PreTrainedModel, family: MoeFamily) -> None:
        self.mixture = mixture_of(model, family)
        self.kept = {path: list(range(count)) for path, count in self.mixture.blocks.items()}
        self._model, self._family = model, family
        self._blocks = dict(moe_blocks(model, family.layout))
        self._own: dict[str, dict[str, int]] = {}  # what blocks know themselves of how many are selected
        self._twins: dict[int, PreTrainedModel] = {}

    def keep(self, path: str, kept: Sequence[int]) -> None:
        """Let a block choose among these experts.

        Raises UnsupportedError for a router that looks experts up by the token's number, or is wrapped by an adapter.
        """
        if path in self.mixture.by_token:
            raise UnsupportedError(f"the router of {path} looks experts up by the token's number: none can be left out")
        block, experts = self._blocks[path], self.mixture.blocks[path]
        self._free(path)
        self.kept[path] = sorted(kept)
        if len(kept) == experts:
            return
        twin = self._twin(len(kept)).get_submodule(path)
        if router_of(twin) is None:
            raise UnsupportedError(f"{path} would be dense with {len(kept)} experts, without a router: keep more")
        if type(router_of(twin)) is not type(router_of(block)):
            found = type(router_of(block)).__name__
            raise UnsupportedError(f"the router of {path} is wrapped ({found}): train it whole, without an adapter")
        self._own[path] = _selected(block, twin, experts, top_k_of(self._model.config, self._family), len(kept))
        _narrow(block, twin, self.mixture.of(path), self.kept[path], path, self._family)

    def release(self) -> None:
        """Let all blocks choose among all their experts again."""
        for path, experts in self.mixture.blocks.items():
            self._free(path)
            self.kept[path] = list(range(experts))

    def _free(self, path: str) -> None:
        block = self._blocks[path]
        router_of(block).__dict__.pop("forward", None)
        block.__dict__.pop("route_tokens_to_experts", None)
        block.__dict__.update(self._own.pop(path, {}))

    def _twin(self, count: int) -> PreTrainedModel:
        if count not in self._twins:
            config = resized_config(self._model.config, self._family, count)
            if count < top_k_of(config, self._family):
                set_top_k(config, self._family, count)
            self._twins[count] = meta_model(type(self._model), config)
        return self._twins[count]


def _selected(block: Any, twin: Any, experts: int, top_k: int, count: int) -> dict[str, int]:
    """Tell a block, which may scale by it, that its router selects fewer; returns what it knew before."""
    if not count < top_k < experts:
        return {}
    had, has = vars(block), vars(twin)
    own = {name: top_k for name, value in has.items() if type(value) is int and (value, had[name]) == (count, top_k)}
    had.update(dict.fromkeys(own, count))
    return own


def _narrow(block: Any, twin: Any, counted: list[Counted], kept: list[int], path: str, family: MoeFamily) -> None:
    """Let a block's router run as its twin's, with the rows of what is kept."""
    router, twin_router, rows = router_of(block), router_of(twin), one_hot(kept)
    experts, beyond = counted[0].experts, max(one.beyond for one in counted if not one.of_experts)
    place = next(name for name, module in block.named_children() if module is router)
    own = {one.live.removeprefix(f"{path}.{place}."): one for one in counted if one.live.startswith(f"{path}.{place}.")}
    fill = 0.0 if family.model_type in GIVES_SHARES else float("-inf")
    lookup = torch.tensor([*kept, *range(experts, experts + beyond)])

    def argument(value: Any) -> Any:
        """Choose the entries of what a block hands its router with one per expert, as a bias is."""
        fits = isinstance(value, Tensor) and value.dim() == 1 and len(value) == experts
        return value[kept] if fits else value

    def forward(*args: Any, **kwargs: Any) -> Any:
        state = {**dict(router.named_parameters()), **dict(router.named_buffers())}
        chosen = {name: own[name].select(value, rows) if name in own else value for name, value in state.items()}
        twin_router.train(router.training)
        args, kwargs = tuple(map(argument, args)), {name: argument(value) for name, value in kwargs.items()}
        return WIDEN[family.layout](functional_call(twin_router, chosen, args, kwargs), kept, experts, fill, lookup)

    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = twin.route_tokens_to_experts(logits[:, kept])
        return weights, lookup.to(index.device)[index]

    router.forward = forward
    if family.layout == "dbrx":
        block.route_tokens_to_experts = route


def _wide(x: Tensor, kept: list[int], experts: int, fill: float) -> Tensor:
    """Put entries of the last axis [E' + beyond] where they belong among all [E + beyond]."""
    beyond = x.shape[-1] - len(kept)
    places = torch.tensor([*kept, *range(experts, experts + beyond)], device=x.device)
    return x.new_full((*x.shape[:-1], experts + beyond), fill).index_copy(-1, places, x)


def _stacked(output: Any, kept: list[int], experts: int, fill: float, lookup: Tensor) -> tuple[Any, ...]:
    """Logits, weights, indices, in Granite's case up to 5.17 the other way round, and what else there is."""
    *found, = output  # fmt: skip
    logits, index = (0, 2) if found[0].is_floating_point() else (2, 0)
    found[logits] = _wide(found[logits], kept, experts, fill)
    found[index] = lookup.to(found[index].device)[found[index]]
    return tuple(found)


def _llama4(output: Any, kept: list[int], experts: int, fill: float, _: Tensor) -> tuple[Any, ...]:
    """Gates for every expert, and logits."""
    return _wide(output[0], kept, experts, 0.0), _wide(output[1], kept, experts, fill)


def _modules(output: Any, kept: list[int], experts: int, fill: float, _: Tensor) -> tuple[Any, ...]:
    """What is selected, one-hot, its weight, and logits."""
    return _wide(output[0], kept, experts, 0), output[1], _wide(output[2], kept, experts, fill)


def _jetmoe(output: Any, kept: list[int], experts: int, fill: float, _: Tensor) -> tuple[Any, ...]:
    """Tokens sorted by expert, how many each has, and logits."""
    *order, sizes, logits = output
    counts = dict(zip(kept, sizes, strict=True))
    return *order, [counts.get(expert, 0) for expert in range(experts)], _wide(logits, kept, experts, fill)


def _dbrx(output: Any, kept: list[int], experts: int, fill: float, _: Tensor) -> Tensor:
    """Logits alone: the block selects."""
    return _wide(output, kept, experts, fill)


WIDEN: dict[str, Callable[..., Any]] = {
    "stacked": _stacked,
    "llama4": _llama4,
    "modules": _modules,
    "jetmoe": _jetmoe,
    "dbrx": _dbrx,
}
"""By layout: what a router with fewer experts returned, in the numbers of the whole block; dropped ones get no gate."""
