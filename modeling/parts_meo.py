"""Experts that are kept as parts, W_e = W_0 + B_e A_e + S_e, and run without multiplying them out.

Each expert has a rank R_e (MoE-I2, arXiv 2411.01016) and a number C_e of dense columns S_e (MC-SMoE, arXiv 2310.01334)
of its own. All experts' lie one after the other, so that memory holds no more than they need.

Legend: P tokens, E experts, R all ranks together, C all columns together, I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .errors_meo import MeoConfigError


@dataclass(frozen=True)
class PartSizes:
    """What a linear map of experts keeps: W_0 if `shared`, and each expert's rank and number of columns."""

    shared: bool
    ranks: tuple[int, ...]
    columns: tuple[int, ...]


def check_parts(parts: Any) -> None:
    """Raise MeoConfigError for values of `expert_parts` that make no sense in any model."""
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) and name for name in parts):
        form = "{'down_proj': {'shared': true, 'ranks': 16}}"
        raise MeoConfigError(f"expert_parts is {parts!r}; give the sizes of each linear map's parts, like {form}")
    for name, one in parts.items():
        if not isinstance(one, dict) or not {"shared", "ranks"} <= set(one) <= {"shared", "ranks", "columns"}:
            raise MeoConfigError(f"expert_parts[{name!r}] is {one!r}; give `shared`, `ranks` and perhaps `columns`")
        if not isinstance(one["shared"], bool):
            raise MeoConfigError(f"expert_parts[{name!r}]: shared is {one['shared']!r}; give true or false")
        numbers: list[int] = []
        for key in ("ranks", "columns"):
            value = one.get(key, 0)
            each = value if isinstance(value, (list, tuple)) else [value]
            if not each or not all(type(number) is int and number >= 0 for number in each):
                raise MeoConfigError(
                    f"expert_parts[{name!r}]: {key} is {value!r}; give a whole number >= 0, or one for each expert"
                )
            numbers += each
        if not one["shared"] and not any(numbers):
            raise MeoConfigError(f"expert_parts[{name!r}] keeps nothing: share a weight, or give ranks or columns")


def sizes_of(one: dict[str, Any], experts: int, path: str) -> PartSizes:
    """Return the sizes of a linear map's parts; raises MeoConfigError for lists of another length than `experts`."""
    lists = []
    for key in ("ranks", "columns"):
        value = one.get(key, 0)
        each = tuple(value) if isinstance(value, (list, tuple)) else (value,) * experts
        if len(each) != experts:
            raise MeoConfigError(f"expert_parts gives {path} {len(each)} {key}, but it has {experts} experts")
        lists.append(each)
    return PartSizes(one["shared"], *lists)


class Parts(nn.Module):
    """The experts' own parts of a linear map; a new one adds nothing.

    `A` is [R, I], `B` [R, O] and `S` [C, O], transposed, with the input that each column reads in `index` [C].
    """

    index: Tensor

    def __init__(self, sizes: PartSizes, like: Tensor) -> None:
        super().__init__()
        self.sizes = sizes
        self.outputs, self.inputs = like.shape[-2:]
        self._ranks = list(pairwise(accumulate(sizes.ranks, initial=0)))
        self._columns = list(pairwise(accumulate(sizes.columns, initial=0)))
        rank, columns = sum(sizes.ranks), sum(sizes.columns)
        if rank:
            self.A = nn.Parameter(like.new_empty(rank, self.inputs))
            self.B = nn.Parameter(like.new_empty(rank, self.outputs))
        if columns:
            self.S = nn.Parameter(like.new_empty(columns, self.outputs))
            self.register_buffer("index", torch.zeros(columns, dtype=torch.long, device=like.device))

    def forward(self, number: int, x: Tensor, shared: Tensor | None, bias: Tensor | None) -> Tensor:
        """Map tokens [P, I] by one expert [P, O]; `shared` [1, O, I] is W_0, None where there is none."""
        x = x.to(next(self.parameters()).dtype if shared is None else shared.dtype)
        if shared is not None:
            y = F.linear(x, shared[0], bias)
        else:
            y = x.new_zeros(*x.shape[:-1], self.outputs) if bias is None else bias.expand(*x.shape[:-1], -1)
        start, end = self._ranks[number]
        if end > start:
            y = y + F.linear(x, self.A[start:end]) @ self.B[start:end]
        start, end = self._columns[number]
        if end > start:
            y = y + x.index_select(-1, self.index[start:end]) @ self.S[start:end]
        return y

    @torch.no_grad()
    def initialize(self) -> None:
        """Fill what no checkpoint did."""
        for name, value in (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)):
            if getattr(value, "_is_hf_initialized", False):
                continue
            if name == "A":
                init.normal_(value, std=self.inputs**-0.5)
            elif name == "index":
                init.copy_(value, torch.cat([torch.arange(count) for count in self.sizes.columns]))
            else:
                init.zeros_(value)
