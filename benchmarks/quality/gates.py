"""What the routers of a trained model do: how sharp their gates are, and which experts they leave out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from meo_hf.modeling.router_meo import MeoRouter
from torch import Tensor, nn


class GateRecord:
    """Gates [N, E] of every router of a model, over all rows (or tokens) that it read."""

    def __init__(self) -> None:
        self.gates: dict[str, list[Tensor]] = {}
        self.top_k = 0

    def statistics(self) -> dict[str, float]:
        """Return means over routers, empty without routers.

        `entropy`: of a gate, in nats; `entropy_share`: relative to log k, 1 where it is equal for all selected experts.
        `load_distance`: half of the sum of |load - 1/n|, 0 where all experts are used alike. `input_share`: how far
        a gate is, by the same measure, from the mean gate; 0 where the input does not matter. `dead`: the share of
        experts that were never selected.
        """
        rows = [_statistics(torch.cat(parts), self.top_k) for parts in self.gates.values()]
        return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in rows[0]} if rows else {}


@contextmanager
def recorded(model: nn.Module) -> Iterator[GateRecord]:
    """Record the gates of all routers within this context."""
    record = GateRecord()

    def hook(path: str) -> Any:
        def note(router: MeoRouter, inputs: Any, output: Any) -> None:
            index, weights = output[0]
            record.top_k = router.top_k
            dense = torch.zeros(len(index), len(router.weight)).scatter(1, index.cpu(), weights.detach().cpu())
            record.gates.setdefault(path, []).append(dense)

        return note

    routers = [(path, module) for path, module in model.named_modules() if isinstance(module, MeoRouter)]
    hooks = [router.register_forward_hook(hook(path)) for path, router in routers]
    try:
        yield record
    finally:
        for one in hooks:
            one.remove()


def _statistics(gates: Tensor, top_k: int) -> dict[str, float]:
    entropy = float(-torch.special.xlogy(gates, gates).sum(1).mean())
    load = gates.mean(0)
    return {
        "entropy": entropy,
        "entropy_share": entropy / math.log(top_k) if top_k > 1 else 1.0,
        "load_distance": float((load - 1 / len(load)).abs().sum() / 2),
        "input_share": float((gates - load).abs().sum(1).mean() / 2),
        "dead": float((gates.sum(0) == 0).float().mean()),
    }
