"""Groups of tokens that share a gate: how each level forms them, and what their gates read.

Legend: B rows, S positions, N groups of a call, W tokens per group, D features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache_meo import LayerRouting, Maps
from .low_rank_meo import Mark
from .segments_meo import Layout, Pool, advance
from .task_memory_meo import TaskMemory

if TYPE_CHECKING:
    from .causal_meo import CausalCall


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Average x [B, S, D] over the positions where mask [B, S] is true, in float32 or wider -> [B, D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        return x.to(wide).mean(1)
    mask = mask.to(x.device)
    kept = torch.where(mask[..., None], x.to(wide), x.new_zeros((), dtype=wide))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Groups:
    """The groups of one feed-forward in one call; here each row is a group and its gate reads the row's mean.

    `memory` outlives the call beside a KV cache; where a call `keeps`, merged experts may stay there, and of those
    already there `changed` rows must be merged anew. Gates that are `settled` need not be asked again. `owner` [N] says
    which gate each group has, None where each has its own.
    """

    memory: LayerRouting | None = None
    keeps = False
    settled = False
    changed: tuple[int, ...] = ()
    owner: Tensor | None = None

    def __init__(self, mask: Tensor | None = None) -> None:
        self._mask = mask

    def split(self, x: Tensor) -> Tensor:
        """Form the groups: [B, S, D] -> [N, W, D]."""
        return x

    def join(self, y: Tensor) -> Tensor:
        """Take the groups apart again: [N, W, D] -> [B, S, D]."""
        return y

    def read(self, name: str, cells: Tensor) -> Tensor:
        """Return what the groups' gates read of a gated input [N, W, D]: features [N, D] or task ids [N]."""
        return masked_mean(cells, self._mask)

    def real(self) -> Tensor | None:
        """Mark the groups that hold a token which is no padding [N]; None where all do."""
        return None if self._mask is None else self._mask.any(1)

    def kept(self) -> Maps:
        """Return the merged experts that the memory holds for these groups."""
        return self.memory.merged if self.memory is not None and self.keeps else {}

    def adapt(self, mark: Mark) -> None:
        """Forget what was merged with other adapters, or other values of them."""
        store = self.store
        if store is not None and store.mark.is_stale(mark):
            store.merged, store.mark = {}, mark

    @property
    def store(self) -> Any:
        """What holds merged experts, and whether they do not fit; None without a memory."""
        return self.memory

    def close(self) -> None:
        """Leave the memory as the next call should find it."""


class TaskGroups(Groups):
    """Level `task`: the gate reads the task; one task for the whole batch is one group."""

    settled = True

    def __init__(self, task: int | None, task_ids: Tensor | None) -> None:
        super().__init__()
        self._task, self._ids = task, task_ids
        self._rows = 0
        self._tasks: int | None = None
        self._remembered: TaskMemory | None = None

    def share(self, tasks: int, memory: TaskMemory | None, device: torch.device) -> None:
        """Let rows of one task share a gate, and keep what is merged in a memory if there is one."""
        self._tasks, self._remembered, self.keeps = tasks, memory, memory is not None
        if self._ids is not None:
            self.owner = self._ids.to(device)

    def split(self, x: Tensor) -> Tensor:
        """One group for the batch, or one per row."""
        self._rows = x.shape[0]
        return x if self._ids is not None else x.reshape(1, -1, x.shape[-1])

    def join(self, y: Tensor) -> Tensor:
        """Give the rows back."""
        return y.reshape(self._rows, -1, y.shape[-1])

    def read(self, name: str, cells: Tensor) -> Tensor:
        """Return task ids, one per gate."""
        if self._ids is None:
            return torch.full((1,), self._task or 0, dtype=torch.long, device=cells.device)
        return self._ids if self.owner is None else torch.arange(self._tasks or 0, device=self.owner.device)

    def kept(self) -> Maps:
        """Return what is merged for this task, or for all tasks if each row has its own."""
        if self._remembered is None:
            return {}
        return self._remembered.merged.setdefault(None if self._ids is not None else self._task, {})

    @property
    def store(self) -> Any:
        """What holds merged experts, and whether they do not fit; None without a memory."""
        return self._remembered


class SegmentGroups(Groups):
    """Segments of a causal stack: each gate reads the segment before."""

    def __init__(self, layout: Layout, memory: LayerRouting | None, call: CausalCall) -> None:
        super().__init__()
        self.layout, self.memory, self._call = layout, memory, call
        steady = call.keeps and layout.length == 1 and layout.prompt is None and call.prompt_end is None
        self.keeps = steady and memory is not None and not memory.shuffled
        self.changed = call.opens
        self._after: dict[str, Pool] = {}
        self._tokens: dict[str, Tensor] = {}
        if memory is not None and not self.keeps:
            memory.merged = {}

    def split(self, x: Tensor) -> Tensor:
        """Put tokens into the cells of their segments."""
        return self.layout.split(x)

    def join(self, y: Tensor) -> Tensor:
        """Take tokens out of their cells."""
        return self.layout.join(y)

    def real(self) -> Tensor | None:
        """Mark the segments that hold a token."""
        occupied = self.layout.occupied
        return None if occupied is None else occupied.any(-1).flatten()

    def read(self, name: str, cells: Tensor) -> Tensor:
        """Return what the segments before have left [N, D]."""
        pool = self.memory.pools.get(name) if self.memory is not None else None
        inputs, self._after[name] = advance(pool or Pool.empty(self.layout.rows, cells), self.layout, cells)
        if self._call.recording:
            self._tokens[name] = self.layout.join(cells)
        return inputs

    def close(self) -> None:
        """Move the state behind this call's tokens."""
        if self.memory is None:
            return
        if self._call.recording:
            self.memory.record(self._tokens, self.layout, self._call.mask)
        self.memory.commit(self.layout, self._after, self._call.static)
        self.memory.shuffled = False
        self.memory.prompt = self.memory.request = self._call.prompt
        self.memory.answering = self.memory.answering or self._call.answering
        if self._call.prompt_end is not None:
            self.memory.freeze(self._call.past + self._call.prompt_end)


class AnswerGroups(Groups):
    """Rows whose gate is settled for good: an answer's by its prompt, a decoder's by its encoder.

    Rows of one source, such as beams, are one group. `still` says that no gradient is wanted, so that what was
    merged before serves, in a compiled step too.
    """

    settled = True

    def __init__(
        self,
        memory: LayerRouting | None,
        keeps: bool,
        still: bool,
        encoder: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.memory, self._encoder = memory, encoder
        self.keeps, self._still = keeps and memory is not None, still
        self._repeats = 1 if memory is None else memory.repeats if encoder is None else memory.copies
        self._rows = 0

    def split(self, x: Tensor) -> Tensor:
        """Join the rows of each source."""
        self._rows = x.shape[0]
        return x.reshape(self._rows // self._repeats, -1, x.shape[-1])

    def join(self, y: Tensor) -> Tensor:
        """Give the rows back."""
        return y.reshape(self._rows, -1, y.shape[-1])

    def read(self, name: str, cells: Tensor) -> Tensor:
        """Return the mean of the prompt, or of the encoder's output [N, D]."""
        if self._encoder is not None:
            inputs = self._encoder
        elif self.memory is not None:
            inputs = self.memory.frozen_input(name)
        else:
            raise ValueError("an answer's gate needs its prompt")
        return inputs[:: self._repeats]

    def kept(self) -> Maps:
        """Return the merged experts of the answer."""
        return self.memory.merged if self.memory is not None and self._still else {}

    def close(self) -> None:
        """Remember the encoder's mean."""
        if self.memory is not None and self._encoder is not None:
            self.memory.pools = {"hidden": Pool(self._encoder, self._encoder, self._encoder)}
            self.memory.freeze(0)
