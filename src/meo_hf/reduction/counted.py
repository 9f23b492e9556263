"""Which tensors of a mixture have a slice per expert: found by building it with twice as many.

Legend: E experts of a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.source import meta_model
from meo_hf.errors import CheckpointError
from meo_hf.modeling.fewer_meo import resized_config
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_layouts_meo import expert_owners, moe_blocks
from meo_hf.modeling.moe_settings_meo import num_experts_of
from meo_hf.reduction.plan import Row

_MODULE = re.compile(r"(.*\.experts\.expert_)(\d+)(\..*)")


@dataclass(frozen=True)
class Counted:
    """A live tensor that has slices for experts: E times `per` entries along `axis`, and `beyond` for no expert.

    `of_experts` says whether it is part of the experts or of the router. Where experts are modules of their own, it
    belongs to expert `number` alone, and `kind` is its name without that.
    """

    live: str
    block: str
    of_experts: bool
    experts: int
    axis: int = 0
    per: int = 1
    beyond: int = 0
    number: int | None = None
    kind: str = ""

    def select(self, tensor: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return the tensor with a slice for each row; sums are made in float32.

        Raises CheckpointError for a tensor of another number of experts.
        """
        moved = tensor.movedim(self.axis, 0)
        if len(moved) != self.experts * self.per + self.beyond:
            raise CheckpointError(f"{self.live} has {len(moved)} entries for {self.experts} experts: download it again")
        own = moved[: self.experts * self.per].unflatten(0, (self.experts, self.per))
        if all(len(row) == 1 and row[0][1] == 1.0 for row in rows):
            made = own[[row[0][0] for row in rows]]
        else:
            made = torch.stack([combined(own, row) for row in rows]).to(tensor.dtype)
        whole = torch.cat([made.flatten(0, 1), moved[self.experts * self.per :]])
        return whole.movedim(0, self.axis).contiguous()

    def resized(self, shape: Sequence[int], count: int) -> tuple[int, ...]:
        """Return a tensor's shape with so many experts."""
        return (*shape[: self.axis], count * self.per + self.beyond, *shape[self.axis + 1 :])


def combined(own: Tensor | Mapping[int, Tensor], row: Row) -> Tensor:
    """Return the sum of old experts' tensors that a row says, made in float32."""
    return torch.stack([own[old].float() * weight for old, weight in row]).sum(0)


@dataclass(frozen=True)
class Mixture:
    """A mixture's MoE blocks with their numbers of experts, and its counted tensors by name.

    `outside` are counted tensors of no MoE block, such as attention's experts in JetMoE; `by_token` are blocks whose
    router looks experts up by the token's number.
    """

    blocks: dict[str, int]
    tensors: dict[str, Counted]
    outside: tuple[str, ...] = ()
    by_token: tuple[str, ...] = ()

    def of(self, block: str) -> list[Counted]:
        """Return the counted tensors of a block."""
        return [one for one in self.tensors.values() if one.block == block]


def mixture_of(model: PreTrainedModel, family: MoeFamily) -> Mixture:
    """Read a stock model (on the meta device): its blocks, and what has a slice per expert."""
    config = model.config
    count = num_experts_of(config, family)
    twice = _state(meta_model(type(model), resized_config(config, family, 2 * count)))
    blocks = dict(moe_blocks(model, family.layout))
    found, outside, by_token = {}, [], []
    for name, tensor in _state(model).items():
        block = next((path for path in blocks if name.startswith(f"{path}.")), None)
        one = _counted(name, block or "", tensor, twice[name], count, blocks.get(block or ""))
        if one is not None and block is None:
            outside.append(name)
        elif one is not None:
            found[name] = one
        elif block is not None and not tensor.is_floating_point() and tensor.dim() > 1:
            by_token.append(block)
    return Mixture(dict.fromkeys(blocks, count), found, tuple(outside), tuple(dict.fromkeys(by_token)))


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _counted(name: str, block: str, tensor: Tensor, twice: Tensor, count: int, module: Any) -> Counted | None:
    if (split := _MODULE.fullmatch(name)) is not None and module is not None:
        return Counted(name, block, True, count, number=int(split[2]), kind=split[1] + split[3])
    axes = [at for at, (one, two) in enumerate(zip(tensor.shape, twice.shape, strict=True)) if one != two]
    if not axes:
        return None
    axis = axes[0]
    per = (twice.shape[axis] - tensor.shape[axis]) // count
    whole = Counted(name, block, False, count, axis, per, tensor.shape[axis] - per * count)
    if module is None:
        return whole
    owners = tuple(f"{block}.{owner}." for owner in expert_owners(module))
    return replace(whole, of_experts=name.startswith(owners))
