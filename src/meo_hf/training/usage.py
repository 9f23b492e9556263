"""Count which experts a model's gates select while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meo_hf.errors import UsageError
from meo_hf.modeling.feedforward_meo import merged_feed_forwards
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.router_meo import Gates, MeoRouter
from meo_hf.modeling.routing_meo import RoutingContext


class Tally:
    """Sums over the groups that one router gated: gates per expert, entropy of the gates, and how many they were.

    Groups without a real token do not count. Legend: N groups, E experts, K selected experts.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_experts + 2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    @torch.no_grad()
    def add(self, gates: Gates, real: Tensor | None, owner: Tensor | None) -> None:
        """Add gates [N, K]; `real` [N] marks groups with tokens, `owner` [N] says which of the gates a group has."""
        index, weights = gates.top_k_index.detach(), gates.top_k_weights.detach().double()
        if owner is not None:
            index, weights = index[owner.to(index.device)], weights[owner.to(index.device)]
        counted = torch.ones_like(weights[:, 0]) if real is None else real.to(weights)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(1)
        counts = self.sums.shape[0] - 2
        self.sums[:counts].index_add_(0, index.flatten(), (weights * counted[:, None]).flatten())
        self.sums[counts].add_((entropy * counted).sum())
        self.sums[counts + 1].add_(counted.sum())


@dataclass(frozen=True)
class Load:
    """What one router did in some time: each expert's share of all gates, and the gates' mean entropy in nats."""

    layer: str
    shares: list[float]
    entropy: float
    groups: float

    @property
    def dead(self) -> int:
        """Experts that no group selected."""
        return sum(share == 0 for share in self.shares)


class Usage:
    """Tallies of all routers of a MEO model, and its balance losses."""

    def __init__(self, model: nn.Module) -> None:
        owner = next((m for m in model.modules() if isinstance(getattr(m, "_meo_context", None), RoutingContext)), None)
        if owner is None:
            raise UsageError(f"{type(model).__name__} has no merged feed-forward: give a MEO model")
        self.context: RoutingContext = owner._meo_context  # type: ignore[assignment]
        self._gated = dict(_gated(owner))
        self._tallies: dict[str, Tally] = {}
        self._balance: Tensor | None = None
        self._losses = 0

    def start(self) -> None:
        """Begin to count."""
        for layer, (module, experts) in self._gated.items():
            self._tallies[layer] = Tally(experts, next(module.parameters()).device)
            module.tally = self._tallies[layer]  # type: ignore[assignment]
        self.context.usage = self

    def stop(self) -> None:
        """Stop counting."""
        for module, _ in self._gated.values():
            module.tally = None  # type: ignore[assignment]
        self.context.usage = None

    def add_balance(self, loss: Tensor) -> None:
        """Note a batch's balance loss."""
        loss = loss.detach().double()
        self._balance = loss.clone() if self._balance is None else self._balance + loss
        self._losses += 1

    def read(self) -> tuple[list[Load], float | None]:
        """Return each router's load and the mean balance loss since the last reading, over all processes.

        Every process must call it.
        """
        loads = []
        for layer, tally in self._tallies.items():
            load = _load(layer, self._of_all(tally.sums))
            if load.groups or not (".original_module" in layer or ".modules_to_save." in layer):
                loads.append(load)  # of an adapter's copies those at work
            tally.sums.zero_()
        balance = None
        if self._balance is not None:
            losses = self._of_all(torch.stack([self._balance, self._balance.new_tensor(self._losses)]))
            balance = float(losses[0] / losses[1])
        self._balance, self._losses = None, 0
        return loads, balance

    @staticmethod
    def _of_all(sums: Tensor) -> Tensor:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return sums
        sums = sums.clone()
        torch.distributed.all_reduce(sums)
        return sums


def _load(layer: str, sums: Tensor) -> Load:
    *gates, entropy, groups = sums.tolist()
    total = sum(gates) or 1.0
    return Load(layer, [gate / total for gate in gates], entropy / max(groups, 1.0), groups)


def _gated(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Yield what has gates, by a name for its layer, with its number of experts."""
    for path, block in merged_feed_forwards(model):
        for name, module in block.router.named_modules():
            if isinstance(module, MeoRouter):
                yield f"{path}.{name}".rstrip("."), (module, module.weight.shape[0])
    for path, experts in merged_moe(model):
        yield path, (experts, experts._context.settings.count_of(experts._meo.path))
