"""The router: from what a group's gate reads to its selected experts and their weights.

Legend: G groups that share a gate, D features, E experts, K selected experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Gates(NamedTuple):
    """Selected experts and their weights, per group: both [G, K]; weights are float32 and sum to one."""

    top_k_index: Tensor
    top_k_weights: Tensor


class MeoRouter(nn.Module):
    """Noisy top-k router: keep the K largest logits and take their softmax (Shazeer et al. 2017, arXiv 1701.06538).

    Input is a pooled state [G, D], or task ids [G], for which column t of `weight` holds task t's logits. With a
    `bias` [E] the largest logit can tell the nearest of E points.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, noisy: bool, bias: bool = False) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, in_features)) if noisy else None
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.tally: Any = None  # counts what is selected, where somebody watches the training

    def forward(self, inputs: Tensor, real: Tensor | None = None) -> tuple[Gates, Tensor]:
        """Return the gates of each group and the unscaled balance loss of this router.

        `real` [G] marks groups that hold a token: others don't count in the loss.
        """
        with torch.autocast(inputs.device.type, enabled=False):
            clean = self._project(inputs, self.weight)  # [G, E]
            clean = clean if self.bias is None else clean + self.bias.to(clean.dtype)
            logits, std = clean, None
            if self.training and self.noise_weight is not None:
                std = F.softplus(self._project(inputs, self.noise_weight)) + 1e-2
                logits = clean + torch.randn_like(clean) * std
            top_logits, index = logits.topk(min(self.top_k + 1, logits.shape[1]), dim=1)
            gates = Gates(index[:, : self.top_k], top_logits[:, : self.top_k].softmax(1))
            return gates, self._balance(gates, clean, logits, top_logits, std, real)

    @staticmethod
    def _project(inputs: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        if inputs.is_floating_point():
            return F.linear(inputs.to(wide), weight.to(wide))
        return F.embedding(inputs.to(weight.device), weight.t()).to(wide)

    def _balance(
        self, gates: Gates, clean: Tensor, logits: Tensor, top_logits: Tensor, std: Tensor | None, real: Tensor | None
    ) -> Tensor:
        """CV squared of importance (summed gates) and of load (expected number of selections) per expert."""
        dense = torch.zeros_like(clean).scatter(1, gates.top_k_index, gates.top_k_weights)
        if std is None or self.top_k == clean.shape[1]:
            load = (dense > 0).to(clean.dtype)
        else:
            last_in, first_out = top_logits[:, self.top_k - 1, None], top_logits[:, self.top_k, None]
            selected = logits > first_out
            # an expert stays selected while its noisy logit beats the best logit outside of the other K
            threshold = torch.where(selected, first_out, last_in)
            load = torch.special.ndtr((clean - threshold) / std)
        if real is not None:
            dense, load = (torch.where(real.to(x.device)[:, None], x, 0) for x in (dense, load))
        return cv_squared(dense.sum(0)) + cv_squared(load.sum(0))


def cv_squared(x: Tensor) -> Tensor:
    """Squared coefficient of variation of x [E], unbiased; zero for a single expert."""
    if x.shape[0] == 1:
        return x.new_zeros(())
    return x.var() / (x.mean() ** 2 + 1e-10)
