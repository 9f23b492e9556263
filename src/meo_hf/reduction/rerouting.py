"""What a block's router would say if some experts were not there: the family's own router, built for fewer.

Legend: T tokens, E experts, K selected experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meo_hf.conversion.source import meta_model
from meo_hf.modeling.fewer_meo import resized_config
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_layouts_meo import router_of
from meo_hf.reduction.counted import Counted, Mixture
from meo_hf.reduction.plan import one_hot


class SubsetRouters:
    """Routers of a loaded model of level `unmerged`, with the rows of some experts only."""

    def __init__(self, model: PreTrainedModel, family: MoeFamily, mixture: Mixture) -> None:
        self._model, self._family, self._mixture = model, family, mixture
        self._sizes: dict[int, PreTrainedModel] = {}

    def gates(self, block: str, kept: Sequence[int], x: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return the gates [T, E] of tokens, zero for experts that are not selected; `args` are the router's others."""
        counted = {one.live: one for one in self._mixture.of(block) if not one.of_experts}
        values = {live: _value(self._model, live) for live in counted}
        fewer = {live: one.select(values[live], one_hot(list(kept))) for live, one in counted.items()}
        known = {id(values[live]): fewer[live] for live in counted}
        swap = lambda each: known.get(id(each), each)  # noqa: E731
        router = self._router(block, len(kept), fewer, counted)
        outputs = router.route(x, *map(swap, args), **{name: swap(each) for name, each in kwargs.items()})
        _, (_, weights, index, *_) = router._sorted(outputs)
        found = torch.zeros(len(x.reshape(-1, x.shape[-1])), self._mixture.blocks[block], dtype=torch.float32)
        weights, index = weights.reshape(len(found), -1).float(), index.reshape(len(found), -1)
        real = index < len(kept)  # LongCat's experts without weights are no columns here
        numbers = torch.tensor(list(kept))[torch.where(real, index, 0)]
        return found.scatter_add(1, numbers, torch.where(real, weights, 0))

    def _router(self, block: str, count: int, fewer: dict[str, Tensor], counted: dict[str, Counted]) -> Any:
        """Return the router of a block with other rows; everything that counts no experts is the model's own."""
        path, _ = router_path(self._model, block)
        if count not in self._sizes:
            config = resized_config(self._model.config, self._family, count)
            config.meo = self._model.config.meo
            _ungroup(config, count)
            self._sizes[count] = meta_model(type(self._model), config)
        made: Any = copy.deepcopy(self._sizes[count].get_submodule(path))
        for name, value in [*made.named_parameters(), *made.named_buffers()]:
            live = f"{path}.{name}"
            owner, _, own = name.rpartition(".")
            target: Any = made.get_submodule(owner)
            new = fewer[live] if live in counted else _value(self._model, live)
            if isinstance(value, nn.Parameter):
                target._parameters[own] = nn.Parameter(new, requires_grad=False)
            else:
                target._buffers[own] = new
        return made.eval()


def _ungroup(config: Any, count: int) -> None:
    """Let a router choose among all experts where groups of them would differ: only a search goes through that."""
    text = config.get_text_config(decoder=True)
    groups = getattr(text, "n_group", None) or 1
    if count % groups or count < 2 * groups:
        text.n_group = text.topk_group = 1


@contextmanager
def rerouted(model: PreTrainedModel, routers: SubsetRouters, block: str, kept: Sequence[int]) -> Iterator[None]:
    """Within this context a block's router chooses among some experts only."""
    _, router = router_path(model, block)
    own = router.route

    def route(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        places, (logits, weights, index, *rest) = router._sorted(own(hidden_states, *args, **kwargs))
        gates = routers.gates(block, kept, hidden_states, args, kwargs)
        chosen = gates.topk(min(index.shape[-1], len(kept)), dim=-1)
        shape = (*index.shape[:-1], -1)
        found = (logits, chosen.values.to(weights).reshape(shape), chosen.indices.to(index).reshape(shape), *rest)
        return router._in_order(places, found)

    router.route = route
    try:
        yield
    finally:
        del router.route


def router_path(model: PreTrainedModel, block: str) -> tuple[str, Any]:
    """Return path and module of a block's router."""
    router = router_of(model.get_submodule(block))
    return next((path, module) for path, module in model.named_modules() if module is router)


def _value(model: PreTrainedModel, live: str) -> Tensor:
    owner, _, name = live.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), name)
    return found
