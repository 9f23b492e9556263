"""New experts that are more than a sum of old ones: made from a block's linear maps, in the family's own tensors.

Legend: E experts of a block, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from meo_hf.conversion.safetensors_files import DTYPES
from meo_hf.conversion.source import Source
from meo_hf.conversion.stored import stored_tensors
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.reduction.counted import Mixture
from meo_hf.reduction.joining import Stack, join
from meo_hf.reduction.loading import unmerged_model
from meo_hf.reduction.plan import BlockPlan


def linear_maps(experts: Any) -> dict[str, Stack]:
    """Return the linear maps of a block's experts in the order of their use: weights [E, O, I] and biases [E, O]."""
    if experts.maps:
        return {name: experts.stack(name) for name in experts.maps}
    return {name: getattr(experts, name).stack("weight") for name in ("input_linear", "output_linear")}


def blocks_of(model: PreTrainedModel, mixture: Mixture) -> dict[str, tuple[str, Any]]:
    """Return path and module of the experts of every block, by the block's path."""
    found = dict(merged_moe(model))
    return {
        block: next((path, module) for path, module in found.items() if path == block or path.startswith(f"{block}."))
        for block in mixture.blocks
    }


class JoinedBlocks:
    """The experts that plans make of blocks, computed when the first of a block's tensors is asked for.

    `given` holds down projections [O, I] by block and new expert. Two blocks are kept at a time.
    """

    def __init__(self, source: Source, family: MoeFamily, mixture: Mixture, given: Mapping[str, Tensor]) -> None:
        self._model = unmerged_model(source, family, mixture)
        self._stock, self._family, self._mixture, self._given = source.meta_model(), family, mixture, given
        self._stored = stored_tensors(source, self._stock)
        self._experts = blocks_of(self._model, mixture)
        self._made: dict[str, dict[str, Tensor]] = {}
        self._lock = Lock()

    def tensor(self, block: str, plan: BlockPlan, live: str) -> Tensor:
        """Return a live tensor of a block's new experts, by its name; stacked where they are modules of their own."""
        with self._lock:
            if block not in self._made:
                while len(self._made) > 1:
                    self._made.pop(next(iter(self._made)))
                self._made[block] = self._join(block, plan)
            return self._made[block][live]

    def experts_of(self, block: str) -> tuple[str, Any]:
        """Return path and module of a block's old experts, on the meta device."""
        return self._experts[block]

    def dtype_of(self, live: str) -> torch.dtype:
        """Return the type on disk of a live tensor, stacked where experts are modules of their own."""
        return DTYPES[self._stored[self._stored_names(live)[0]].dtype]

    def _join(self, block: str, plan: BlockPlan) -> dict[str, Tensor]:
        path, module = self._experts[block]
        counted = [one for one in self._mixture.of(block) if one.of_experts]
        own = {stack_name(one.kind, self._family) if one.kind else one.live: one for one in counted}
        loaded = {live: self._load(live) for live in own}
        maps = linear_maps(self._filled(module, path, loaded))
        interleaved = not getattr(module, "is_concatenated", True)
        how = "mean" if plan.how == "given" else plan.how
        fresh = {}
        for live, one in own.items():
            old = loaded[live]
            tail = old[one.experts * one.per :]
            fresh[live] = torch.cat([old.new_zeros(plan.count * one.per, *old.shape[1:]), tail])
        made, last = linear_maps(self._filled(module, path, fresh)), [*maps][-1]
        for new, row in enumerate(plan.experts):
            joined = join(maps, row, how, interleaved)
            for name, (weight, bias) in made.items():
                given = self._given.get(f"{block}.{new}") if name == last and plan.how == "given" else None
                weight.data[new].copy_(joined[name][0] if given is None else given)
                if bias is not None and (own_bias := joined[name][1]) is not None:
                    bias.data[new].copy_(own_bias)
        return fresh

    def _load(self, live: str) -> Tensor:
        loaded = [self._stored[name].load(self._stock) for name in self._stored_names(live)]
        return loaded[0] if live in self._stored else torch.stack(loaded)

    def _stored_names(self, live: str) -> list[str]:
        """Return the stock model's tensors that a live tensor is made of, in the order of their experts."""
        if live in self._stored:
            return [live]
        kinds = sorted(
            (one.number or 0, name)
            for name, one in self._mixture.tensors.items()
            if one.kind and stack_name(one.kind, self._family) == live
        )
        return [name for _, name in kinds]

    def _filled(self, module: Any, path: str, values: dict[str, Tensor]) -> Any:
        """Return a copy of a module on the meta device with these parameters, by their live names."""
        made = copy.deepcopy(module)
        for live, value in values.items():
            owner, _, name = live.removeprefix(f"{path}.").rpartition(".")
            target: Any = made.get_submodule(owner)
            target._parameters[name] = nn.Parameter(value, requires_grad=False)
        return made


def stack_name(kind: str, family: MoeFamily) -> str:
    """Return the stack in which our class keeps a tensor of experts that are modules, by its name without a number."""
    path, _, rest = kind.rpartition(".expert_.")
    linear, _, suffix = rest.rpartition(".")
    stack = ("up_proj", "down_proj")[family.linears.index(linear)]
    return f"{path}.{stack}" + ("_bias" if suffix == "bias" else "")
