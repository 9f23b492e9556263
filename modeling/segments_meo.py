"""Segments of a causal stack: which group each token belongs to, and what each group's gate may read.

A gate reads only what is known before the first token it influences. Segment k of a text reads the mean of
segment k-1 (Lory, arXiv 2405.03133); the first reads its first token alone, where Lory looks ahead at its own
mean. Tokens of an answer read the mean of the whole prompt. Places count real tokens, so padding moves nothing.

Legend: B rows, S new positions, T tokens per segment, G groups per row that a call can touch, W cells per
group (tokens of one call in one segment), D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Pool:
    """What a row has left behind for its next gates, per gated input; all [B, D] in float32 or wider.

    `reads` is what the current segment's gate reads, `sum` that segment's tokens so far, `total` the whole text's.
    """

    reads: Tensor
    sum: Tensor
    total: Tensor

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> Pool:
        """Return the pool of rows that have seen no token; `like` gives features, dtype and device."""
        wide = torch.promote_types(like.dtype, torch.float32)
        zeros = like.new_zeros(rows, like.shape[-1], dtype=wide)
        return cls(zeros, zeros, zeros)


@dataclass
class Layout:
    """Where one call's tokens go: G groups of W cells per row, each group with one gate.

    `cells` [B, S] holds each token's cell (G * W for padding), None where tokens fill the cells in order.
    `occupied` [B, G, W] and `opening` [B, G] (the gate reads the group's own first token) are masks, and so is
    `answer` [B, G] (the gate reads the prompt's mean); None stands for all, first group, none. `last` [B] is the
    group that a next prompt token would join, `count` [B] the real prompt tokens after the call. Of a call with one
    token per row, `full` [B, 1] marks the rows whose segment it completes.
    """

    rows: int
    length: int
    groups: int
    width: int
    segment: int
    count: Tensor
    last: Tensor
    opening: Tensor
    cells: Tensor | None = None
    occupied: Tensor | None = None
    answer: Tensor | None = None
    prompt: Tensor | None = None
    full: Tensor | None = None

    def split(self, x: Tensor) -> Tensor:
        """Put tokens into their groups' cells: [B, S, D] -> [B * G, W, D]; empty cells are zero."""
        features = x.shape[-1]
        size = self.groups * self.width
        if self.cells is not None:
            index = self.cells.to(x.device)[..., None].expand(-1, -1, features)
            x = x.new_zeros(self.rows, size + 1, features).scatter(1, index, x)[:, :size]
        elif size > self.length:
            x = F.pad(x, (0, 0, 0, size - self.length))
        return x.reshape(self.rows * self.groups, self.width, features)

    def join(self, y: Tensor) -> Tensor:
        """Take tokens back out of their cells: [B * G, W, D] -> [B, S, D]; padding gets zeros."""
        features = y.shape[-1]
        y = y.reshape(self.rows, self.groups * self.width, features)
        if self.cells is None:
            return y[:, : self.length]
        index = self.cells.to(y.device)[..., None].expand(-1, -1, features)
        return F.pad(y, (0, 0, 0, 1)).gather(1, index)


def lay_out(
    count: Tensor,
    length: int,
    segment: int,
    mask: Tensor | None = None,
    *,
    fresh: bool = False,
    prompt: Tensor | None = None,
) -> Layout:
    """Lay out `length` new positions of rows that hold `count` [B] real prompt tokens.

    `mask` [B, S] marks real tokens. `fresh` says that no row holds any token. `prompt` [B] is the number of
    real tokens in each row's prompt, None where no answer can begin in this call. The number of groups depends
    on shapes only.
    """
    rows, width = count.shape[0], min(length, segment)
    if fresh and mask is None and prompt is None and length > 1:
        groups = -(-length // segment)
        places = torch.arange(groups * width, device=count.device).reshape(1, groups, width)
        return Layout(
            rows, length, groups, width, segment, count + length,
            last=torch.full_like(count, length // segment),
            opening=torch.arange(groups, device=count.device).expand(rows, -1) == 0,
            occupied=None if groups * width == length else (places < length).expand(rows, -1, -1),
        )  # fmt: skip
    groups = (-(-length // segment) if fresh else (length + segment - 2) // segment + 1) + (prompt is not None)
    real = torch.ones(rows, length, dtype=torch.bool, device=count.device) if mask is None else mask
    place = (count[:, None] + real.cumsum(1) - 1).clamp(min=0)  # [B, S] among the row's real tokens
    answer = torch.zeros_like(real) if prompt is None else place >= prompt[:, None]
    slot = place % segment if prompt is None else torch.where(answer, place - prompt[:, None], place) % segment
    if length > 1:
        return _arrange(count, real, slot, answer, groups, width, segment, prompt, _first_group(count, groups))
    asked = (real & ~answer)[:, 0]  # one token per row needs no cells: the way of every decoding step
    after = count + asked
    return Layout(
        rows, 1, 1, 1, segment, after,
        last=(full := asked & (after % segment == 0)).long(),
        full=full[:, None],
        opening=(count == 0)[:, None],
        occupied=None if mask is None else mask[..., None],
        answer=None if prompt is None else answer,
        prompt=prompt,
    )  # fmt: skip


def lay_out_documents(starts: Tensor, segment: int, mask: Tensor | None = None) -> Layout:
    """Lay out rows that hold several documents each; `starts` [B, S] marks their first tokens.

    Segments and gates begin anew with each document. Waits for the device once, to count the groups.
    """
    rows, length = starts.shape
    real = torch.ones_like(starts) if mask is None else mask
    place = (real.cumsum(1) - 1).clamp(min=0)
    begin = torch.where(starts & real, place, 0).cummax(1).values
    slot = (place - begin) % segment
    group = ((slot == 0) & real).cumsum(1) - 1
    groups = max(int(group.max()) + 1, 1)
    count = torch.zeros(rows, dtype=torch.long, device=starts.device)
    opening = _groups_of(starts & real, group, groups)
    return _arrange(count, real, slot, torch.zeros_like(real), groups, min(length, segment), segment, None, opening)


def _first_group(count: Tensor, groups: int) -> Tensor:
    """Mark the first group of rows that have no token yet."""
    return (torch.arange(groups, device=count.device) == 0) & (count == 0)[:, None]


def _arrange(
    count: Tensor, real: Tensor, slot: Tensor, answer: Tensor, groups: int, width: int, segment: int,
    prompt: Tensor | None, opening: Tensor,
) -> Layout:  # fmt: skip
    """Number the groups of each row from its first real token on, and give every token a cell."""
    rows, length = real.shape
    first = real & (real.cumsum(1) == 1)
    group = (real & ((slot == 0) | first)).cumsum(1) - 1  # [B, S]
    offset = torch.where(first, slot, 0).sum(1, keepdim=True)  # the first group may go on with a segment
    cell = group * width + slot - torch.where(group == 0, offset, 0)
    cells = torch.where(real, cell, groups * width)
    occupied = torch.zeros(rows, groups * width + 1, dtype=torch.bool, device=real.device).scatter(1, cells, True)
    asked = real & ~answer
    count = count + asked.sum(1)
    newest = torch.where(asked, group, 0).amax(1)
    layout = Layout(
        rows, length, groups, width, segment, count,
        last=newest + (asked.any(1) & (count % segment == 0)),
        opening=opening,
        cells=cells,
        occupied=occupied[:, :-1].reshape(rows, groups, width),
        prompt=prompt,
    )  # fmt: skip
    if prompt is not None:
        layout.answer = _groups_of(real & answer, group, groups)
    return layout


def _groups_of(tokens: Tensor, group: Tensor, groups: int) -> Tensor:
    """Mark the groups [B, G] that hold any of the given tokens [B, S]."""
    marks = torch.zeros(len(tokens), groups + 1, dtype=torch.bool, device=tokens.device)
    return marks.scatter(1, torch.where(tokens, group, groups), True)[:, :groups]


def advance(pool: Pool, layout: Layout, cells: Tensor) -> tuple[Tensor, Pool]:
    """Return what each group's gate reads [B * G, D], and the pool after the call.

    cells [B * G, W, D] are the gated input's tokens in the layout's cells.
    """
    if layout.full is not None:
        return _step(pool, layout, cells[:, 0].to(pool.sum.dtype), layout.full)
    device = cells.device
    x = cells.reshape(layout.rows, layout.groups, layout.width, -1).to(pool.sum.dtype)
    if layout.occupied is not None:
        x = torch.where(layout.occupied.to(device)[..., None], x, torch.zeros((), dtype=x.dtype, device=device))
    sums = x.sum(2)  # [B, G, D]
    asked = sums if layout.answer is None else sums.masked_fill(layout.answer.to(device)[..., None], 0)
    total = pool.total + asked.sum(1)
    whole = torch.cat([asked[:, :1] + pool.sum[:, None], asked[:, 1:]], 1)
    reads = torch.cat([pool.reads[:, None], whole / layout.segment], 1)  # [B, G + 1, D]
    own = torch.where(layout.opening.to(device)[..., None], x[:, :, 0], reads[:, :-1])
    reads = torch.cat([own, reads[:, -1:]], 1)

    last = layout.last.to(device)[:, None, None].expand(-1, 1, x.shape[-1])  # 0 .. G
    count = layout.count.to(device)[:, None]
    begun = torch.cat([whole, torch.zeros_like(whole[:, :1])], 1).gather(1, last)[:, 0]
    after = Pool(reads.gather(1, last)[:, 0], begun.masked_fill(count % layout.segment == 0, 0), total)

    inputs = reads[:, :-1]
    if layout.answer is not None and layout.prompt is not None:
        mean = total / layout.prompt.to(device).clamp(min=1)[:, None]
        inputs = torch.where(layout.answer.to(device)[..., None], mean[:, None], inputs)
    return inputs.reshape(layout.rows * layout.groups, -1), after


def _step(pool: Pool, layout: Layout, x: Tensor, full: Tensor) -> tuple[Tensor, Pool]:
    """Advance by one token per row, x [B, D]: the same as `advance`, with a third of its operations."""
    device = x.device
    if layout.occupied is not None:
        x = torch.where(layout.occupied[:, 0].to(device), x, torch.zeros((), dtype=x.dtype, device=device))
    asked = x if layout.answer is None else x.masked_fill(layout.answer.to(device), 0)
    whole, total = pool.sum + asked, pool.total + asked
    reads = torch.where(layout.opening.to(device), x, pool.reads)
    full = full.to(device)
    after = Pool(torch.where(full, whole / layout.segment, reads), whole.masked_fill(full, 0), total)
    if layout.answer is None or layout.prompt is None:
        return reads, after
    mean = total / layout.prompt.to(device).clamp(min=1)[:, None]
    return torch.where(layout.answer.to(device), mean, reads), after
