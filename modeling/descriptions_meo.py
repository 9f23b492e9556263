"""Tasks by what a text says of them: gates read the embedded description of a task instead of its number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .errors_meo import MeoConfigError


@torch.no_grad()
def describe(embed: nn.Module, descriptions: Sequence[Sequence[int]], device: torch.device | None = None) -> Tensor:
    """Return what gates read of each task [tasks, D]: the mean embedding of its description's tokens, normalised.

    Embeddings get no gradient from it: a description is given, not learned. `device` is where tokens go if the
    embeddings are elsewhere until they are asked.
    """
    weight: Any = embed.weight
    device = weight.device if device is None or weight.device.type != "meta" else device
    texts = [torch.tensor(tokens, device=device) for tokens in descriptions]
    means = torch.stack([embed(text).float().mean(0) for text in texts])
    return F.layer_norm(means, means.shape[-1:], eps=1e-12)


def description_size(model: PreTrainedModel, descriptions: Sequence[Sequence[int]]) -> int:
    """Return the features of an embedded description; raises MeoConfigError where the model cannot embed it."""
    embed: Any = model.get_input_embeddings()
    weight = getattr(embed, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise MeoConfigError(f"{type(model).__name__} has no token embeddings, so tasks cannot have descriptions")
    highest = max(token for tokens in descriptions for token in tokens)
    if highest >= weight.shape[0]:
        raise MeoConfigError(f"a task description has token {highest}, but the model has {weight.shape[0]} tokens")
    return weight.shape[1]
