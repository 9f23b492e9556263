"""Low-rank parts of experts: W_i + scale * B_i A_i, merged by the same gates and never multiplied out.

Legend: N groups of W tokens, G gates, E experts (1 for a part that all share), K selected experts, R rank,
I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .router_meo import Gates

FEW_TOKENS = 6
"""To gather a gate's factors costs about as much as this many tokens' products with them."""


class LowRank(NamedTuple):
    """What one adapter adds to a linear map of experts: `down` A [E, R, I], `up` B [E, O, R], `bias` [E, O]."""

    down: Tensor
    up: Tensor
    scale: float | Tensor
    bias: Tensor | None = None
    dropout: Callable[[Tensor], Tensor] | None = None


class Factors(nn.Module):
    """Parts of experts that are kept as factors; a new one adds nothing.

    `A` is [E, R, I], and `B` [E, R, O], transposed: a product with the factors of all experts reads both as they lie.
    """

    def __init__(self, experts: int, rank: int, like: Tensor) -> None:
        super().__init__()
        outputs, inputs = like.shape[-2:]
        self.A = nn.Parameter(torch.empty(experts, rank, inputs, dtype=like.dtype, device=like.device))
        self.B = nn.Parameter(torch.empty(experts, rank, outputs, dtype=like.dtype, device=like.device))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return A [E, R, I] and B [E, O, R]: a call, so that hooks which bring them here see it."""
        return self.A, self.B.transpose(1, 2)

    @torch.no_grad()
    def initialize(self) -> None:
        """Fill what no checkpoint did."""
        if not getattr(self.A, "_is_hf_initialized", False):
            init.normal_(self.A, std=self.A.shape[-1] ** -0.5)
        if not getattr(self.B, "_is_hf_initialized", False):
            init.zeros_(self.B)


def part_of(factors: nn.Module) -> LowRank:
    """Return what kept factors add."""
    down, up = factors()
    return LowRank(down, up, 1.0)


class Adapted(NamedTuple):
    """What adapters make of a linear map: they add `parts`, and scale each expert's weight by `rows` [E, O].

    `mark` tells one choice of adapters from another, `made_of` are the parameters of those chosen.
    """

    parts: tuple[LowRank, ...] = ()
    rows: Tensor | None = None
    mark: tuple[Any, ...] = ()
    made_of: tuple[Tensor, ...] = ()

    def half(self, number: int) -> Adapted:
        """Return what becomes of the first or second half of the outputs."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.chunk(2, 1)[number]

        parts = (part._replace(up=part.up.chunk(2, 1)[number], bias=cut(part.bias)) for part in self.parts)
        return Adapted(tuple(parts), cut(self.rows), self.mark, self.made_of)

    def scaled(self, stack: Tensor) -> Tensor:
        """Return the weights [E, O, I] with their rows scaled."""
        return stack if self.rows is None else stack * self.rows[..., None].to(stack.dtype)


class Version:
    """A tensor as it is now: equal to a later look at it unless it was written to, or has other memory."""

    __slots__ = ("memory", "tensor", "writes")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # which also keeps its memory from being another's
        self.memory = tensor.data_ptr() if type(tensor.data) is Tensor else 0  # others may have none of their own
        self.writes = None if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Version) or self.tensor is not other.tensor:
            return False
        return (self.memory, self.writes) == (other.memory, other.writes)

    __hash__ = None  # type: ignore[assignment]


class Mark(NamedTuple):
    """What merged experts were merged with: who was `chosen`, and `values` at that time, which a graph cannot hold."""

    chosen: Any = ()
    values: tuple[Version, ...] = ()

    def is_stale(self, now: Mark) -> bool:
        """Whether something else would be merged now."""
        return self.chosen != now.chosen if torch.compiler.is_compiling() else self != now


def mark_of(adapted: Mapping[str, Adapted], also: Any = (), others: Iterable[Tensor] = ()) -> Mark:
    """Return the mark of adapters, of what is `also` chosen, and of `others` that are merged or decide about it."""
    chosen = tuple((name, each.mark) for name, each in adapted.items())
    if torch.compiler.is_compiling():
        return Mark((chosen, also))
    return Mark((chosen, also), tuple(map(Version, [*(p for each in adapted.values() for p in each.made_of), *others])))


def low_rank_linear(x: Tensor, part: LowRank, gates: Gates, owner: Tensor | None) -> Tensor:
    """Apply a part of each group's merged expert: x [N, W, I] -> [N, W, O], at a cost of K * R * (I + O) per token."""
    index, weights = gates if owner is None else Gates(gates.top_k_index[owner], gates.top_k_weights[owner])
    down, up = part.down.to(x.dtype), part.up.to(x.dtype)
    h = x if part.dropout is None else part.dropout(x)
    experts = down.shape[0]
    scaled = weights if isinstance(part.scale, float) and part.scale == 1 else weights * part.scale
    if experts == 1:  # the gates sum to one
        y = F.linear(F.linear(h, down[0]), up[0]) * part.scale
    elif x.shape[1] * experts <= (x.shape[1] + FEW_TOKENS) * index.shape[1] and index.shape[0] > 1:
        y = _by_all(h, down, up, _dense(index, scaled, experts))
    else:
        y = _by_selected(h, down, up, index, scaled)
    if part.bias is None:
        return y
    bias = part.bias if experts == 1 else (weights[..., None] * part.bias[index]).sum(1)  # [N, O]
    return y + bias[:, None].to(y.dtype)


def merged_part(part: LowRank, gates: Gates) -> tuple[Tensor, Tensor | None]:
    """Multiply a part out for each gate: what it adds to merged weights [G, O, I] and biases [G, O]."""
    index, weights = gates
    wide = torch.promote_types(part.down.dtype, torch.float32)
    down, up, bias = part.down.to(wide), part.up.to(wide), part.bias
    if down.shape[0] == 1:
        delta = (up @ down * part.scale).expand(len(index), -1, -1)
        return delta, None if bias is None else bias.expand(len(index), -1)
    weights = weights.to(wide)
    scaled = up[index] * (weights * part.scale)[..., None, None]  # [G, K, O, R]
    delta = scaled.transpose(1, 2).flatten(2) @ down[index].flatten(1, 2)
    return delta, None if bias is None else (weights[..., None] * bias[index]).sum(1)


def _by_selected(h: Tensor, down: Tensor, up: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Multiply by the factors of the experts that each group selected."""
    rank = down.shape[1]
    narrow = torch.bmm(h, down[index].flatten(1, 2).transpose(1, 2)).unflatten(2, (-1, rank))  # [N, W, K, R]
    narrow = narrow * weights[:, None, :, None].to(h.dtype)
    return torch.bmm(narrow.flatten(2), up.transpose(1, 2)[index].flatten(1, 2))


def _by_all(h: Tensor, down: Tensor, up: Tensor, dense: Tensor) -> Tensor:
    """Multiply all groups by the factors of all experts at once, and let the gates [N, E] choose between."""
    narrow = F.linear(h, down.flatten(0, 1)).unflatten(-1, down.shape[:2])  # [N, W, E, R]
    chosen = torch.where(dense[:, None, :, None] != 0, narrow, 0) * dense[:, None, :, None].to(h.dtype)
    return F.linear(chosen.flatten(2), up.transpose(0, 1).flatten(1))


def _dense(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    return torch.zeros(len(index), experts, dtype=weights.dtype, device=index.device).scatter_add(1, index, weights)
