"""What calibration rows show of experts: one small class for each statistic, by the paths of blocks.

Sums are in float64 and over all batches.

Legend: T real tokens t with weights v_t, E experts e of a block, K that a token selects, D features, g_te the gate of e
for t, f_e(x_t) what e answers, unweighted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.observing import BlockView, ExpertView, Observer

State = dict[str, dict[str, Tensor]]
"""Tensors by name, by the path of a block."""


@dataclass
class Statistic(Observer):
    """A statistic with its options as fields; `state` is what it has seen, and all that has to be kept."""

    reads: ClassVar[str] = "gates"  # type: ignore[misc]
    state: State = field(default_factory=dict, init=False, repr=False)

    def add(self, block: BlockView, name: str, value: Tensor) -> None:
        """Add a value to one of a block's sums."""
        own = self.state.setdefault(block.path, {})
        own[name] = value.double() + own[name] if name in own else value.double()

    def place(self, block: BlockView, name: str, *shape: int) -> Tensor:
        """Return one of a block's sums to add to in place, zero at first."""
        own = self.state.setdefault(block.path, {})
        if name not in own:
            own[name] = torch.zeros(shape, dtype=torch.float64, device=block.x.device)
        return own[name]

    def value(self, path: str) -> Tensor:
        """Return the statistic of one block."""
        raise NotImplementedError

    def result(self) -> dict[str, Tensor]:
        """Return the statistic of every block, on the CPU."""
        return {path: self.value(path).cpu() for path in self.state}


@dataclass
class Frequency(Statistic):
    """How often each expert is selected [E]: the sum of v_t over tokens t that selected e."""

    def see(self, block: BlockView) -> None:
        """Count selections."""
        self.add(block, "count", _per_expert(block, torch.ones_like(block.gates, dtype=torch.float64)))

    def value(self, path: str) -> Tensor:
        """Return the counts [E]; their sum is K * T where all selected experts are real and tokens weigh 1."""
        return self.state[path]["count"]


@dataclass
class GateMass(Statistic):
    """How much of the gates each expert gets [E]: the sum of v_t g_te over tokens."""

    def see(self, block: BlockView) -> None:
        """Add gates."""
        self.add(block, "mass", _per_expert(block, block.gates.double()))

    def value(self, path: str) -> Tensor:
        """Return the sums [E]."""
        return self.state[path]["mass"]


@dataclass
class OutputNorm(Statistic):
    """How large an expert's answers are [E]: the mean of ||f_e(x_t)||_2 over tokens that selected e, by v_t.

    EAN of REAP's comparison (arXiv 2510.13999) is the sum: this times Frequency. Zero where no token selected e.
    """

    reads: ClassVar[str] = "routed"  # type: ignore[misc]

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        """Add norms of an expert's answers."""
        norms = expert.outputs.double().norm(dim=-1)
        self.place(block, "sum", block.count)[expert.number] += (expert.weights * norms).sum()
        self.place(block, "weight", block.count)[expert.number] += expert.weights.sum()

    def value(self, path: str) -> Tensor:
        """Return the means [E]."""
        return _mean(self.state[path]["sum"], self.state[path]["weight"])


@dataclass
class Reap(Statistic):
    """REAP's saliency [E] (arXiv 2510.13999): the mean of g_te ||f_e(x_t)||_2 over tokens that selected e, by v_t.

    `renormalise` first divides a token's gates by their sum, as the authors' code does; with one expert per token all
    gates are then 1. Where a family weights inputs (Llama 4), f_e reads the input without its weight. Zero where no
    token selected e.
    """

    renormalise: bool = True
    reads: ClassVar[str] = "routed"  # type: ignore[misc]

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        """Add weighted norms of an expert's answers."""
        gates = expert.gates.double()
        if self.renormalise:
            total = block.gates[expert.token].double().sum(-1)
            gates = gates / torch.where(total == 0, 1, total)
        found = expert.weights * gates * expert.outputs.double().norm(dim=-1)
        self.place(block, "sum", block.count)[expert.number] += found.sum()
        self.place(block, "weight", block.count)[expert.number] += expert.weights.sum()

    def value(self, path: str) -> Tensor:
        """Return the saliencies [E]."""
        return _mean(self.state[path]["sum"], self.state[path]["weight"])


@dataclass
class MeanOutput(Statistic):
    """An expert's mean answer [E, D] over all tokens, whether they selected it or not, by v_t.

    This is what HC-SMoE (arXiv 2410.08589) groups experts by. Every expert runs on every token.
    """

    reads: ClassVar[str] = "all"  # type: ignore[misc]

    def see(self, block: BlockView) -> None:
        """Count tokens."""
        self.add(block, "weight", block.weights.sum()[None])

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        """Add an expert's answers."""
        found = block.weights @ expert.answers().double()
        self.place(block, "sum", block.count, len(found))[expert.number] += found

    def value(self, path: str) -> Tensor:
        """Return the means [E, D]."""
        return self.state[path]["sum"] / self.state[path]["weight"]


@dataclass
class LogitSimilarity(Statistic):
    """How alike the router treats experts [E, E]: cosines of their logits l_e over all tokens.

    sum_t v_t l_te l_tf / sqrt(sum_t v_t l_te^2 * sum_t v_t l_tf^2); M-SMoE (arXiv 2310.01334) groups experts by it.
    """

    def see(self, block: BlockView) -> None:
        """Add inner products; raises UsageError for a router without logits."""
        if block.logits is None:
            raise UsageError(f"the router of {block.path} has no logits: group experts by their outputs instead")
        logits = block.logits[:, : block.count].double()
        self.add(block, "gram", logits.T @ (logits * block.weights[:, None]))

    def value(self, path: str) -> Tensor:
        """Return the cosines [E, E]; zero beside an expert whose logits are all zero."""
        gram = self.state[path]["gram"]
        norms = gram.diagonal().clamp(min=0).sqrt()
        scale = norms[:, None] * norms
        return torch.where(scale == 0, 0, gram / torch.where(scale == 0, 1, scale))


@dataclass
class TailRatio(Statistic):
    """How light the lighter half of a token's experts is: the median over tokens, by v_t, of one ratio per block.

    With a token's gates sorted, w_1 the largest, and h = ceil(K / 2), the ratio is (w_h+1 + ... + w_K) / (w_1 + ... +
    w_h); for K = 2 that is w_2 / w_1 of NAEE (arXiv 2402.14800, section 3.3), whose median is the threshold there.
    """

    def see(self, block: BlockView) -> None:
        """Keep each token's ratio; raises UsageError where a token selects one expert."""
        count = block.gates.shape[1]
        if count < 2:
            raise UsageError(f"each token of {block.path} selects one expert, so there is none to skip")
        ordered = block.gates.double().sort(dim=-1, descending=True).values
        half = (count + 1) // 2
        head, tail = ordered[:, :half].sum(-1), ordered[:, half:].sum(-1)
        self._keep(block, "ratio", torch.where(head == 0, 0, tail / torch.where(head == 0, 1, head)))
        self._keep(block, "weight", block.weights)

    def _keep(self, block: BlockView, name: str, values: Tensor) -> None:
        own = self.state.setdefault(block.path, {})
        own[name] = torch.cat([own[name], values.cpu()]) if name in own else values.cpu()

    def value(self, path: str) -> Tensor:
        """Return the median, a scalar."""
        return weighted_median(self.state[path]["ratio"], self.state[path]["weight"])


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """Return the value below which half of all weight lies, the middle of two where exactly half does."""
    values, order = values.sort()
    below = weights[order].cumsum(0)
    half, near = below[-1] / 2, below[-1] * 1e-12
    first = int((below >= half - near).nonzero()[0])
    return values[first : first + 1 + int(bool(abs(below[first] - half) <= near))].mean()


def untouched(frequency: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the experts that no token selected, of blocks that have some, by what `Frequency` found."""
    found = {path: (counts == 0).nonzero()[:, 0].tolist() for path, counts in frequency.items()}
    return {path: experts for path, experts in found.items() if experts}


def _per_expert(block: BlockView, values: Tensor) -> Tensor:
    """Sum values [T, K] of selections by experts [E], each times its token's weight."""
    made = torch.zeros(block.count, dtype=torch.float64, device=values.device)
    return made.index_add(0, block.index[block.chosen], (values * block.weights[:, None])[block.chosen])


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight == 0, 0, total / torch.where(weight == 0, 1, weight))


def check_state(statistic: Statistic, state: State) -> None:
    """Give a statistic what was kept of it; raises CheckpointError where that is not its own."""
    known = {path: {name: tensor.double() for name, tensor in own.items()} for path, own in state.items()}
    statistic.state = known
    try:
        finite = all(bool(torch.isfinite(value).all()) for value in statistic.result().values())
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"kept statistics are not those of {type(statistic).__name__} ({error!r})") from None
    if not finite:
        raise CheckpointError(f"kept statistics of {type(statistic).__name__} are not finite")
