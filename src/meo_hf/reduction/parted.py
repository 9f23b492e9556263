"""What is written for experts that a plan keeps as parts; they are computed when the first of a map's is asked for.

Legend: E' new experts of a block, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from meo_hf.conversion.safetensors_files import CODES, TensorSpec
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.merger_meo import bank_key
from meo_hf.reduction.decomposing import Decomposed, composed, decompose, relative_error
from meo_hf.reduction.joined import JoinedBlocks
from meo_hf.reduction.plan import BlockPlan, MapParts

Made = tuple[TensorSpec, Callable[[], Tensor]]
"""Name, type and shape of a live tensor, and what makes it."""


@dataclass(eq=False)
class PartedMap:
    """One linear map of a block; `whole` reads the tensor of the model that holds its new experts."""

    path: str
    live: str
    name: str
    module: Any
    count: int
    dtype: torch.dtype
    parts: MapParts
    whole: Callable[[], Tensor]
    error: float | None = None

    @property
    def prefix(self) -> str:
        """What the names of its parts begin with."""
        return f"{self.path.removesuffix(f'.{self.name}')}.parts.{bank_key(self.name)}."

    @property
    def rows(self) -> int:
        """How many rows of the tensor one expert has."""
        view, held = self.module.stack(self.name)[0], self.module.get_parameter(self.module.held_in(self.name))
        return int(view[0].numel() // held[0].numel())

    def mean(self) -> Tensor:
        """Return W_0 as it is kept: in the tensor's own layout and type."""
        tensor = self.whole()
        own = tensor[: self.rows * self.count].unflatten(0, (self.count, self.rows))
        return own.float().mean(0).to(self.dtype)

    def view(self, tensor: Tensor) -> Tensor:
        """Return the linear map [E, O, I] in such a tensor, as float32."""
        probe, held = copy.copy(self.module), self.module.held_in(self.name)
        probe._parameters = {**self.module._parameters, held: nn.Parameter(tensor, requires_grad=False)}
        return probe.stack(self.name)[0].float()

    def experts(self) -> Tensor:
        """Return the new experts [E', O, I]."""
        return self.view(self.whole())[: self.count]

    def shared(self) -> Tensor | None:
        """Return W_0 [O, I] as it is kept, None where there is none."""
        return self.view(self.mean())[0] if self.parts.shared else None

    def decomposed(self) -> Decomposed:
        """Compute the parts, and note what they miss."""
        experts, shared = self.experts(), self.shared()
        made = decompose(experts, shared, self.parts.ranks, self.parts.columns)
        self.error = relative_error(composed(made, shared, self.parts.ranks, self.parts.columns), experts)
        return made

    def best(self) -> float:
        """Return the relative error of its experts with such parts."""
        if self.error is None:
            self.decomposed()
        return self.error or 0.0


def expert_maps(module: Any, path: str) -> dict[str, tuple[str, int, int]]:
    """Return by path the name, O and I of the linear maps of a block's experts.

    Raises UnsupportedError for experts that are no one module.
    """
    if not module.maps:
        raise UnsupportedError(f"{type(module).__name__} cannot keep experts as parts: take another method")
    shapes = {name: module.stack(name)[0].shape for name in module.maps}
    return {f"{path}.{name}": (name, shape[1], shape[2]) for name, shape in shapes.items()}


class PartedBlocks:
    """The linear maps of blocks that a plan keeps as parts, by path; the parts of two are kept at a time."""

    def __init__(self, joined: JoinedBlocks, blocks: Mapping[str, BlockPlan]) -> None:
        self.maps: dict[str, PartedMap] = {}
        self._made: dict[str, Decomposed] = {}
        self._lock = Lock()
        for block, plan in blocks.items():
            if not plan.parts:
                continue
            path, module = joined.experts_of(block)
            known = expert_maps(module, path)
            if lost := sorted(set(plan.parts) - set(known)):
                raise UsageError(f"the plan for {block} names {lost[0]}; its linear maps: {', '.join(known)}")
            for map_path, parts in plan.parts.items():
                name, _, inputs = known[map_path]
                if any(number >= inputs for own in parts.columns for number in own):
                    raise UsageError(f"the plan for {map_path} names columns beyond its {inputs}: make it anew")
                live = f"{path}.{module.held_in(name)}"
                whole = partial(joined.tensor, block, plan, live)
                self.maps[map_path] = PartedMap(
                    map_path, live, name, module, plan.count, joined.dtype_of(live), parts, whole
                )

    @property
    def replaced(self) -> set[str]:
        """Names of the model's tensors that hold whole experts no more."""
        return {one.live for one in self.maps.values()}

    def tensors(self) -> Iterator[Made]:
        """Yield what the model holds instead."""
        for one in self.maps.values():
            held = one.module.get_parameter(one.module.held_in(one.name))
            _, outputs, inputs = one.module.stack(one.name)[0].shape
            code = CODES[one.dtype]
            if one.parts.shared:
                yield TensorSpec(one.live, code, (one.rows, *held.shape[1:])), one.mean
            rank, columns = sum(one.parts.ranks), sum(map(len, one.parts.columns))
            shapes = {"A": (rank, inputs), "B": (rank, outputs), "S": (columns, outputs), "index": (columns,)}
            for letter, shape in shapes.items():
                if shape[0]:
                    spec = TensorSpec(one.prefix + letter, "I64" if letter == "index" else code, shape)
                    yield spec, partial(self._part, one, letter)

    def _part(self, one: PartedMap, letter: str) -> Tensor:
        with self._lock:
            if one.path not in self._made:
                while len(self._made) > 1:
                    self._made.pop(next(iter(self._made)))
                self._made[one.path] = one.decomposed()
            made: Tensor = getattr(self._made[one.path], letter)
        return made if letter == "index" else made.to(one.dtype)

    def losses(self) -> list[dict[str, Any]]:
        """Return per linear map its ranks and columns together, and the relative error of its experts."""
        return [
            {
                "map": path,
                "rank": sum(one.parts.ranks),
                "columns": sum(map(len, one.parts.columns)),
                "error": one.best(),
            }
            for path, one in self.maps.items()
        ]
