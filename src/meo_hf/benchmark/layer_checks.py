"""Checks before the layer benchmarks time anything: that each variant computes what it claims to, in float64.

Legend: N sampled tokens, D hidden features, O output features, E experts, K selected.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from meo_hf.benchmark.decode_checks import relative_rms
from meo_hf.benchmark.layer_setup import Gates, Kind, Linear, Setup, Variant
from meo_hf.errors import CheckFailedError

TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""Relative root mean square by which results that should be equal may differ."""

GROUPS, TOKENS = 3, 3


class References:
    """What some tokens of some groups should become, computed the plain way in float64, once for all variants."""

    def __init__(self, setup: Setup, x: Tensor) -> None:
        self.setup, self.inputs = setup, x
        length = setup.cell.group_tokens
        self.groups = torch.tensor(_spread(setup.cell.groups, GROUPS), device=x.device)
        tokens = torch.tensor(_spread(length, TOKENS), device=x.device)
        self.places = (self.groups[:, None] * length + tokens).flatten()
        self.x = x.flatten(0, 1)[self.places].double()  # [N, D]
        self._known: dict[Kind, Tensor] = {}

    def check(self, variant: Variant, y: Tensor) -> float:
        """Return by how much outputs [B, T, D] differ at the sampled places.

        Raises CheckFailedError if that is too much, or if gates are not those of the router.
        """
        if y.shape != self.inputs.shape:
            raise CheckFailedError(f"{variant.name}: outputs are {list(y.shape)}, not {list(self.inputs.shape)}")
        found = y.flatten(0, 1)[self.places]
        return check_equal(f"{variant.name}: outputs", found, self.expected(variant.kind), self.setup.cell.dtype)

    def expected(self, kind: Kind) -> Tensor:
        """Return the outputs [N, D] of a dense expert, of a mixture of experts, or of merged ones."""
        if kind not in self._known:
            compute: dict[Kind, Callable[[], Tensor]] = {
                "dense": self._dense,
                "moe": self._mixture,
                "merged": self._merged,
            }
            self._known[kind] = compute[kind]()
        return self._known[kind]

    def _dense(self) -> Tensor:
        layer = self.setup.layer
        return _linear(layer.activate(_linear(self.x, layer.up, 0)), layer.down, 0)

    def _mixture(self) -> Tensor:
        layer = self.setup.layer
        logits = F.linear(self.x, self.setup.token_router.double())
        gates = self._gates("moe", self.setup.token_gates(self.inputs), logits, self.places)

        def token(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for expert, weight in zip(index.tolist(), weights.tolist(), strict=True):
                total += weight * _linear(layer.activate(_linear(x, layer.up, expert)), layer.down, expert)
            return total

        return torch.stack([token(*one) for one in zip(self.x, *gates, strict=True)])

    def _merged(self) -> Tensor:
        layer = self.setup.layer
        if self.setup.cell.level == "task":
            logits = layer.task_logits.double()
        else:
            pooled = self.setup.grouped(self.inputs)[self.groups].double().mean(1)
            logits = F.linear(pooled, self.setup.pooled_router.double())
        gates = self._gates("meo", self.setup.group_gates(self.inputs), logits, self.groups)
        made = []
        for x, index, weights in zip(self.x.split(len(self.x) // len(self.groups)), *gates, strict=True):
            hidden = layer.activate(_combined(x, layer.up, index, weights))
            made.append(_combined(hidden, layer.down, index, weights))
        return torch.cat(made)

    def _gates(self, name: str, gates: Gates, logits: Tensor, rows: Tensor) -> Gates:
        """Return sampled rows of gates, in float64, once they were found to be those of logits."""
        dtype = self.setup.cell.dtype
        index, weights = gates.top_k_index[rows], gates.top_k_weights[rows].double()
        check_equal(f"{name}: gates", weights, logits.gather(1, index).softmax(1), dtype)
        lowest = logits.gather(1, index).amin(1)
        left_out = logits.scatter(1, index, -torch.inf).amax(1)
        if not bool((lowest >= left_out - 10 * TOLERANCES[dtype]).all()):  # logits are about one; rounding tips some
            raise CheckFailedError(f"{name}: gates do not select the largest logits, so nothing was timed")
        return Gates(index, weights)


def _linear(x: Tensor, of: Linear, expert: int) -> Tensor:
    return F.linear(x, of.weight[expert].double(), None if of.bias is None else of.bias[expert].double())


def _combined(x: Tensor, of: Linear, index: Tensor, weights: Tensor) -> Tensor:
    """Return what merged experts make of tokens; no merged weight is needed for that."""
    outputs = [g * _linear(x, of, expert) for expert, g in zip(index.tolist(), weights.tolist(), strict=True)]
    return torch.stack(outputs).sum(0)


def _spread(count: int, wanted: int) -> list[int]:
    """Return some numbers below `count`, the first and the last among them."""
    return sorted({round(place * (count - 1) / max(1, wanted - 1)) for place in range(wanted)})


def check_equal(name: str, found: Tensor, expected: Tensor, dtype: str, factor: float = 1) -> float:
    """Return a relative RMS difference; raise CheckFailedError if it is above the type's tolerance times a factor."""
    difference, allowed = relative_rms(found, expected), factor * TOLERANCES[dtype]
    if not difference <= allowed:  # so that NaN fails too
        raise CheckFailedError(
            f"{name} differ from what they should be by {difference:.1e} (relative RMS; {allowed:.0e} is allowed), "
            "so nothing was timed"
        )
    return difference
