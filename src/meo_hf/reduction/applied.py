"""Apply a plan: what to write for every tensor of a source. Nothing here knows which method made the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from meo_hf.conversion.births import Copied
from meo_hf.conversion.plan import matches
from meo_hf.conversion.safetensors_files import CODES, DTYPES, TensorRef, TensorSpec, raw_bytes
from meo_hf.conversion.source import Source
from meo_hf.conversion.stored import StoredTensor, stored_tensors
from meo_hf.conversion.write import Targets
from meo_hf.errors import CheckpointError
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.reduction.counted import Counted, Mixture
from meo_hf.reduction.joined import stack_name
from meo_hf.reduction.parted import PartedBlocks
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, Row


@dataclass(frozen=True)
class Summed:
    """Tensors of single experts on disk, weighted and summed in float32; one alone keeps its bytes."""

    parts: tuple[tuple[TensorRef, float], ...]

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        (first, weight), *others = self.parts
        if not others and weight == 1.0:
            yield from first.chunks()
            return
        total = first.load().float() * weight
        for ref, share in others:
            total += ref.load().float() * share
        yield raw_bytes(total.to(DTYPES[target.dtype]))


class LiveTensor:
    """A live tensor that is made when the first of its tensors on disk is asked for, and kept until the last was."""

    def __init__(self, name: str, make: Callable[[], Tensor], model: PreTrainedModel, spec: TensorSpec) -> None:
        self.name, self._make, self._model = name, make, model
        probe = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
        found = revert_weight_conversion(model, {name: probe})
        self.specs = {disk: TensorSpec(disk, CODES[one.dtype], tuple(one.shape)) for disk, one in found.items()}
        self._waiting, self._lock = set(self.specs), Lock()
        self._made: dict[str, Tensor] | None = None

    def take(self, disk: str) -> Tensor:
        """Return one of its tensors on disk."""
        with self._lock:
            if self._made is None:
                self._made = revert_weight_conversion(self._model, {self.name: self._make()})
            tensor = self._made[disk]
            self._waiting.discard(disk)
            if not self._waiting:
                self._made, self._waiting = None, set(self.specs)
            return tensor


@dataclass(frozen=True)
class Piece:
    """One of a live tensor's tensors on disk."""

    live: LiveTensor

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield raw_bytes(self.live.take(target.name).to(DTYPES[target.dtype]))


@dataclass
class Application:
    """What applying a plan writes, and the tensors that it leaves out because the stock model does not load them.

    `parts` are those of what is written that belong to experts kept as parts: their names in the model by disk name.
    """

    targets: Targets
    left_out: list[str]
    parted: PartedBlocks
    parts: dict[str, str]


@dataclass(frozen=True)
class Slice:
    """What a live stack, made when it is asked for, holds of one expert."""

    make: Callable[[], Tensor]
    number: int

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes."""
        yield raw_bytes(self.make()[self.number].to(DTYPES[target.dtype]))


Joined = Callable[[str, BlockPlan, str], Tensor]
"""What makes a live tensor of a block whose experts are not just summed: block, its plan, the tensor's name."""


def apply_plan(
    source: Source,
    family: MoeFamily,
    plan: ReductionPlan,
    mixture: Mixture,
    stock: PreTrainedModel,
    made: PreTrainedModel,
    joined: Joined,
    parted: PartedBlocks,
) -> Application:
    """Return what to write; `stock` and `made` are the source's model and the reduced one, on the meta device.

    Raises CheckpointError for tensors on disk that have no place in the model, or experts that are not there.
    """
    state, buffers = stock.state_dict(), {name for name, _ in stock.named_buffers()}
    stored = stored_tensors(source, stock)
    needed = {live for live, one in mixture.tensors.items() if one.block in plan.blocks}
    if lost := sorted((needed & state.keys()) - stored.keys()):
        raise CheckpointError(
            f"{source.name} lacks {len(lost)} tensors of its experts and routers, e.g. {lost[0]}: download it again"
        )
    targets: Targets = {}
    left_out: list[str] = []
    modules: dict[str, dict[int, tuple[Counted, StoredTensor]]] = {}
    for live, found in stored.items():
        counted = mixture.tensors.get(live)
        block = plan.blocks.get(counted.block) if counted is not None else None
        if live not in state:
            ignored = live in buffers or matches(stock._keys_to_ignore_on_load_unexpected, live)
            names = [ref.spec.name for refs in found.refs.values() for ref in refs]
            if not ignored:
                raise CheckpointError(f"{source.name}: {names[0]} has no place in {type(stock).__name__}")
            left_out += names
        elif counted is None or block is None:
            targets |= _copied(found)
        elif counted.number is None and live in parted.replaced:
            _check_whole(source, counted, found)
        elif counted.number is not None:
            modules.setdefault(counted.kind, {})[counted.number] = (counted, found)
        else:
            rows = block.experts if counted.of_experts else block.router
            special = counted.of_experts and block.how != "mean"
            make = partial(joined, counted.block, block, live) if special else None
            targets |= _copied(found) if rows is None else _made(source, counted, found, rows, stock, made, make)
    for kind, each in modules.items():
        block, stack = plan.blocks[next(iter(each.values()))[0].block], stack_name(kind, family)
        refs = _in_order(source, each, kind)
        if stack not in parted.replaced:
            targets |= _of_modules(each[0][0], refs, block, joined, stack)
    parts: dict[str, str] = {}
    for spec, compute in parted.tensors():
        own = LiveTensor(spec.name, compute, made, spec)
        targets |= {disk: (one, Piece(own)) for disk, one in own.specs.items()}
        parts |= dict.fromkeys(own.specs, spec.name)
    return Application(targets, sorted(left_out), parted, parts)


def _copied(found: StoredTensor) -> Targets:
    return {ref.spec.name: (ref.spec, Copied(ref)) for refs in found.refs.values() for ref in refs}


def _made(
    source: Source,
    counted: Counted,
    found: StoredTensor,
    rows: Sequence[Row],
    stock: PreTrainedModel,
    made: PreTrainedModel,
    make: Callable[[], Tensor] | None,
) -> Targets:
    """Return what becomes of a live tensor with a slice per expert."""
    single = found.converter is not None and all(
        len(refs) in (counted.experts, counted.experts + counted.beyond) for refs in found.refs.values()
    )
    if make is None and single and counted.experts > 1:
        return {
            name: target
            for refs in found.refs.values()
            for name, target in _of_single(refs, counted.experts, rows).items()
        }
    _check_whole(source, counted, found)
    if make is None:
        make = lambda: counted.select(found.load(stock), rows)  # noqa: E731
    shape = counted.resized(stock.state_dict()[counted.live].shape, len(rows))
    live = LiveTensor(counted.live, make, made, TensorSpec(counted.live, found.dtype, shape))
    return {disk: (spec, Piece(live)) for disk, spec in live.specs.items()}


def _check_whole(source: Source, counted: Counted, found: StoredTensor) -> None:
    counts = {len(refs) for refs in found.refs.values()}
    if counts - {1, counted.experts, counted.experts + counted.beyond} or len(counts) > 1:
        raise CheckpointError(
            f"{source.name} holds {counted.live} of {counted.experts} experts in {sorted(counts)} tensors"
        )


def _of_single(refs: Sequence[TensorRef], experts: int, rows: Sequence[Row]) -> Targets:
    """Return what becomes of one tensor on disk per expert: new ones take the names of the first old ones."""
    made: Targets = {}
    for new, row in enumerate(rows):
        spec = TensorSpec(refs[new].spec.name, refs[row[0][0]].spec.dtype, refs[row[0][0]].spec.shape)
        made[spec.name] = (spec, Summed(tuple((refs[old], weight) for old, weight in row)))
    for at, ref in enumerate(refs[experts:]):
        spec = TensorSpec(refs[len(rows) + at].spec.name, ref.spec.dtype, ref.spec.shape)
        made[spec.name] = (spec, Copied(ref))
    return made


def _in_order(source: Source, each: dict[int, tuple[Counted, StoredTensor]], kind: str) -> list[TensorRef]:
    """Return one tensor of all experts that are modules; raises CheckpointError where an expert lacks it."""
    experts = next(iter(each.values()))[0].experts
    if lost := sorted(set(range(experts)) - set(each)):
        raise CheckpointError(f"{source.name} lacks expert {lost[0]} of {kind}")
    return [ref for number in range(experts) for own in each[number][1].refs.values() for ref in own]


def _of_modules(counted: Counted, refs: Sequence[TensorRef], block: BlockPlan, joined: Joined, stack: str) -> Targets:
    """Return what becomes of one tensor of experts that are modules; `stack` is its name in our class."""
    if block.how == "mean":
        return _of_single(refs, len(refs), block.experts)
    make = partial(joined, counted.block, block, stack)
    return {refs[new].spec.name: (refs[new].spec, Slice(make, new)) for new in range(block.count)}
