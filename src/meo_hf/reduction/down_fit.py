"""The down projection with which an average of experts answers most like them: MergeMoE (arXiv 2510.14436).

Legend: T tokens, D features, F hidden neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meo_hf.reduction.joined import linear_maps
from meo_hf.reduction.joining import Stack, join, solve_down
from meo_hf.reduction.observing import BlockView
from meo_hf.reduction.plan import Row
from meo_hf.reduction.statistics import Statistic


@dataclass
class DownFit(Statistic):
    """Products from which `solve` finds the W with the least sum_t v_t ||W p_t - y_t||^2, for each group of experts.

    p_t [F] is what the hidden neurons of the group's average answer: its gate and up projections are weighted means.
    y_t = sum_i a_i W_i h_it [D] are the members' answers by weights a_i, h_it [F] their hidden neurons'. Biases of the
    down projections are left out, because that of the average is their weighted mean, and so is a norm behind it.
    `groups` are rows of a plan by block; a row of one expert needs no fit. With `routed`, only tokens count that
    selected a member. A block's sums are as large as F * F float64 numbers for each group.
    """

    groups: Mapping[str, Sequence[Row]]
    routed: bool = False

    def __post_init__(self) -> None:
        self._means: tuple[str, dict[int, dict[str, Stack]]] = ("", {})

    def see(self, block: BlockView) -> None:
        """Add a batch's products: pp [F, F] and yp [D, F] of each group."""
        rows = self.groups.get(block.path, ())
        maps = linear_maps(block.experts)
        *_, last = maps
        for number, mean in self._means_of(block.path, maps, rows).items():
            x, weights = block.x, block.weights
            if self.routed:
                members = torch.tensor([old for old, _ in rows[number]], device=block.index.device)
                own = torch.isin(torch.where(block.chosen, block.index, -1), members).any(-1)
                x, weights = x[own], weights[own]
            wanted = torch.zeros(len(x), maps[last][0].shape[1], dtype=torch.float64, device=x.device)
            for old, share in rows[number]:
                one = {name: (w[old], None if b is None else b[old]) for name, (w, b) in maps.items()}
                wanted += share * F.linear(hidden(block.experts, one, x), one[last][0]).double()
            found = hidden(block.experts, mean, x).double()
            weighted = found * weights[:, None]
            self.add(block, f"pp.{number}", found.T @ weighted)
            self.add(block, f"yp.{number}", wanted.T @ weighted)
            self.state[block.path].setdefault(f"mean.{number}", mean[last][0].detach())

    def _means_of(self, path: str, maps: dict[str, Stack], rows: Sequence[Row]) -> dict[int, dict[str, Stack]]:
        """Return the groups' averages, kept for one block: layer by layer they are made once."""
        if self._means[0] != path:
            self._means = path, {n: join(maps, row, "mean") for n, row in enumerate(rows) if len(row) > 1}
        return self._means[1]

    def value(self, path: str) -> Tensor:
        """Return how many groups of a block were fitted."""
        return torch.tensor(sum(name.startswith("pp.") for name in self.state[path]))

    def solve(self, path: str, number: int, start: Tensor | None = None) -> Tensor:
        """Return W [D, F] of one group; what tokens say nothing of stays as in `start`, by default the average's."""
        own = {name: self.state[path][f"{name}.{number}"].cpu() for name in ("yp", "pp", "mean")}
        return solve_down(own["yp"], own["pp"], own["mean"] if start is None else start)


def hidden(experts: Any, maps: Mapping[str, Stack], x: Tensor) -> Tensor:
    """Return what one expert's last linear map reads [T, F], for an expert that is given by its linear maps."""
    linear: dict[str, Any] = {name: partial(_linear, weight=w, bias=b) for name, (w, b) in maps.items()}
    *_, last = maps
    if experts.maps:
        return experts._compute({**linear, last: lambda h: h}, x)
    gate, up = linear["input_linear"](x).chunk(2, dim=-1)  # JetMoE's maps are modules of their own
    return experts.activation(gate) * up


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.to(weight.dtype), weight, bias)
