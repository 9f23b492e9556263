"""Dense feed-forwards as they are found in a model: who owns them, their projections, activation and dropout."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .families_meo import Family


@dataclass(frozen=True)
class Block:
    """A dense feed-forward found in a model: the module that owns it, its path, and its projections."""

    path: str
    index: int
    layer: int  # its place in a KV cache
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

    @property
    def paths(self) -> dict[str, str]:
        """Paths on the owner by the names of linear maps."""
        return dict(zip(self.maps, (*self.up, self.down), strict=True))

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
    rows, columns = getattr(linear.weight, "ds_shape", linear.weight.shape)  # DeepSpeed's ZeRO-3 has emptied the weight
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
        yield Block(path, index, cache_layer(model, path, index), owner, up, family.down, family, decoder)


def cache_layer(model: nn.Module, path: str, index: int) -> int:
    """Return the place in a KV cache of the layer that a feed-forward belongs to.

    It is that of the attention nearest to it; `index` where its layer has none.
    """
    while path and not path.rpartition(".")[2].isdigit():
        path = path.rpartition(".")[0]
    if not path:
        return index
    found = [getattr(module, "layer_idx", None) for module in model.get_submodule(path).modules()]
    places = [place for place in found if isinstance(place, int)]
    return min(places) if places else index


def _has_projections(module: nn.Module, paths: tuple[str, ...]) -> bool:
    for path in paths:
        try:
            found = module.get_submodule(path)
        except AttributeError:
            return False
        if not isinstance(found, (nn.Linear, Conv1D)):
            return False
    return True


def meta_twin(block: Block) -> tuple[nn.Module, tuple[str, ...], str]:
    """Copy the dense feed-forward alone to the meta device: families initialise it by its module class."""
    linears = {path: block.projection(path) for path in (*block.up, block.down)}
    own = sum(len(list(linear.parameters())) for linear in linears.values())
    if own == len(list(block.owner.parameters())):
        return copy.deepcopy(block.owner).to("meta"), block.up, block.down
    names = {path: f"projection_{i}" for i, path in enumerate(linears)}
    loose = nn.ModuleDict({names[path]: copy.deepcopy(linear) for path, linear in linears.items()})
    return loose.to("meta"), tuple(names[path] for path in block.up), names[block.down]


def take_activation(block: Block) -> nn.Module:
    """Return the activation; a hosted feed-forward leaves `Identity` in its place."""
    parent, _, name = block.family.activation.rpartition(".")
    holder = block.owner.get_submodule(parent)
    activation = getattr(holder, name)
    if block.family.hosted:
        setattr(holder, name, nn.Identity())
    return activation


def take_dropout(block: Block) -> float:
    """Return the rate of the dropout between the projections; it moves inside with them."""
    if block.family.dropout is None:
        return 0.0
    dropout = getattr(block.owner, block.family.dropout)
    if isinstance(dropout, nn.Dropout):
        return dropout.p
    setattr(block.owner, block.family.dropout, 0.0)  # it would act on the output now
    return float(dropout)


def take_chunk_size(block: Block) -> int:
    """Chunk after gating: the layer's own chunks would hide the rest of the sequence from the gate."""
    size = getattr(block.owner, "chunk_size_feed_forward", 0)
    if size:
        block.owner.chunk_size_feed_forward = 0  # type: ignore[assignment]
    return int(size or 0)


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
