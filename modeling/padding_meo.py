"""Which tokens of a call are real, and which of them begin a document of their own.

Legend: B rows, S new positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors_meo import RoutingError


def padding_mask(
    mask: Any, shape: tuple[int, int], device: torch.device, name: str = "attention_mask"
) -> Tensor | None:
    """Return the padding mask of new tokens of `shape` [B, S] as booleans, or raise RoutingError."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise RoutingError(
            f"`{name}` is {found}; the gates need to know which tokens are padding: pass a 2-D mask "
            "[batch, sequence] of ones and zeros, as `routing_mask` where attention needs another"
        )
    if mask.shape != shape:
        raise RoutingError(f"`{name}` is {tuple(mask.shape)}, but the tokens are {shape}")
    return mask.to(device=device, dtype=torch.bool)


def of_new_tokens(mask: Any, cache: Any, length: int) -> Any:
    """Return the part of a mask that speaks of the new tokens: it may cover cached ones, and room for later ones."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] <= length or cache is None:
        return mask
    if torch.compiler.is_compiling() and cache.is_compileable:
        if mask.shape[1] < cache.get_max_length():
            return mask[:, -length:]
        begin = cache.get_seq_length()
        return mask.gather(1, (begin + torch.arange(length, device=mask.device)).expand(len(mask), -1))
    past = int(cache.get_seq_length())
    return mask[:, past : past + length] if mask.shape[1] >= past + length else mask


def refusal(name: str) -> str:
    """Say why rows that were packed by means of an argument cannot be gated."""
    return (
        f"`{name}` packs several sequences into one row, and this level gates each row by its mean: pass one sequence "
        "per row, or use level 'task'"
    )


def document_starts(position_ids: Any, mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Return the first tokens [B, S] of packed documents, whose positions begin anew; None for one per row."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or shape[1] == 1:
        return None
    position_ids = position_ids[:, -shape[1] :].expand(shape)
    real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask.to(position_ids.device)
    index = torch.arange(shape[1], device=position_ids.device)
    newest = torch.where(real, index, -1).cummax(1).values
    before = torch.cat([newest.new_full((shape[0], 1), -1), newest[:, :-1]], 1)  # [B, S] the real token before
    previous = torch.where(before >= 0, position_ids.gather(1, before.clamp(min=0)), position_ids.new_tensor(-1))
    starts = real & ((before < 0) | (position_ids <= previous))
    several = (starts.sum(1) > 1).any()
    if torch.compiler.is_compiling():
        torch._assert_async(~several, "position_ids restart within a row: packed rows cannot be compiled")
        return None
    return starts if bool(several) else None
