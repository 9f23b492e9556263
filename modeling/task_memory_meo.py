"""Merged experts of tasks, which stay from call to call until the weights that they come from change.

A change is seen by the parameters' addresses and version counters, and on a CPU by samples of their values too,
because some libraries write through `.data`, which no counter sees. `train()` forgets all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .cache_meo import Maps
from .low_rank_meo import Mark

SAMPLES = 64


class TaskMemory:
    """Merged linear maps by task; of all tasks at once under None.

    `mark` tells the adapters that were merged with them; `crowded` says that no memory is left for more.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop everything."""
        self.merged: dict[int | None, Maps] = {}
        self.mark = Mark()
        self.crowded = False
        self._marks: Any = None
        self._samples: list[Tensor] = []
        self._owners: list[weakref.ref[Tensor]] = []

    def refresh(self, parameters: Iterable[Tensor], *, closely: bool) -> None:
        """Forget what was merged from other values; `closely` also compares samples of parameters on a CPU."""
        parameters = list(parameters)
        marks = [(id(p), p.data_ptr(), None if p.is_inference() else p._version) for p in parameters]
        moved = marks != self._marks or any(owner() is None for owner in self._owners)  # whose id another may have now
        if not moved and not closely:
            return
        samples = [_sample(p) for p in parameters if p.device.type == "cpu"]
        if moved or not all(map(torch.equal, samples, self._samples)):
            self.forget()
        self._marks, self._samples, self._owners = marks, samples, [weakref.ref(p) for p in parameters]

    @property
    def nbytes(self) -> int:
        """Bytes of all merged experts."""
        pairs = (pair for maps in self.merged.values() for pair in maps.values())
        return sum(tensor.nbytes for pair in pairs for tensor in pair if tensor is not None)

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything behind in copies and files: it is derived."""
        return TaskMemory().__dict__


def _sample(parameter: Tensor) -> Tensor:
    """Copy values from all over a parameter: of each expert at least one."""
    values = parameter.detach()
    flat = values.flatten(1) if values.dim() > 1 else values.reshape(1, -1)
    return flat[:, :: max(1, flat.numel() // SAMPLES)].clone()
