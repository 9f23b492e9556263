"""A checkpoint on disk with aligned experts: every tensor keeps its name, type and shape, its values change places.

Tensors are permuted as they lie on disk, not converted and converted back: where loading converts them, their neurons'
axis is the one along which to permute first and convert then is to convert first and permute the live tensor then.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.alignment import (
    Alignment,
    ExpertTensors,
    NeuronAxis,
    align_experts,
    expert_axes,
    join_neurons,
    neuron_axis,
    solver,
)
from meo_hf.conversion.births import Copied, Recipe, generator
from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, TensorSpec, raw_bytes
from meo_hf.conversion.source import Source, first_line
from meo_hf.conversion.stored import StoredTensor, stored_tensors
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.moe_layouts_meo import layer_number, moe_blocks


@dataclass(frozen=True)
class ExpertFile:
    """A tensor on disk that holds weights of experts, and where it counts their neurons."""

    ref: TensorRef
    axis: NeuronAxis

    def expert(self, number: int) -> Tensor:
        """Read one expert's part."""
        spec = TensorSpec(self.ref.spec.name, self.ref.spec.dtype, self.axis.shape[1:])
        offset = self.ref.offset + (number - self.axis.first) * spec.nbytes
        return TensorRef(spec, self.ref.path, offset).load()


class AlignedExperts:
    """The experts of one MoE block on disk, matched on first use.

    Matching holds two experts in float32 and their similarities; what stays is a permutation per expert.
    """

    def __init__(self, path: str, tensors: ExpertTensors, files: list[ExpertFile]) -> None:
        self.path, self.layer, self.files = path, layer_number(path), files
        self.count, self.neurons = tensors.count, tensors.neurons
        self._alignment: Alignment | None = None
        self._lock = Lock()

    @property
    def alignment(self) -> Alignment:
        """Permutations and distances; computed once, also where several threads ask for them."""
        with self._lock:
            if self._alignment is None:
                try:
                    self._alignment = align_experts(self.count, self._load)
                except CheckpointError as error:
                    raise CheckpointError(f"{self.path}: {error}") from None
            return self._alignment

    @property
    def working_memory(self) -> int:
        """Bytes that matching holds at a time."""
        entries = sum(math.prod(file.axis.shape[1:]) for file in self.files if 0 in file.axis.numbers)
        return 4 * 4 * entries + (4 + 8 + 8) * self.neurons**2  # the solver copies similarities twice, as float64

    def _load(self, number: int) -> tuple[Tensor, Tensor]:
        return join_neurons([(file.axis, file.expert(number)) for file in self.files if number in file.axis.numbers])


@dataclass(frozen=True)
class Permuted:
    """A tensor of experts with their neurons in the order that aligns them."""

    file: ExpertFile
    experts: AlignedExperts

    def chunks(self, target: TensorSpec) -> Iterator[memoryview]:
        """Yield the target's bytes, expert by expert."""
        permutations = self.experts.alignment.permutations
        for number in self.file.axis.numbers:
            part = self.file.expert(number)
            if number < len(permutations):
                part = self.file.axis.reorder(part, permutations[number])
            yield raw_bytes(part.to(DTYPES[target.dtype]))


def aligned_targets(
    source: Source, model: PreTrainedModel, layers: list[int] | None = None
) -> tuple[dict[str, tuple[TensorSpec, Recipe]], list[AlignedExperts]]:
    """Return what to write, and the experts it aligns, whose distances are known once they are written.

    `model` is the stock model on the meta device, `layers` those to align, None for all. All other tensors are copied.
    Only headers are read. Raises UnsupportedError, CheckpointError or UsageError.
    """
    solver()
    family = MOE_FAMILIES.get(source.config.model_type)
    if family is None:
        raise UnsupportedError(f"{source.name} is no known mixture of experts: only experts can be aligned")
    if family.refused is not None:
        raise UnsupportedError(f"{source.name} is not converted: {family.refused}")
    blocks = dict(moe_blocks(model, family.layout))
    have = sorted({layer_number(path) for path in blocks})
    if lost := sorted(set(layers or ()) - set(have)):
        raise UsageError(f"layers {lost} have no experts; layers with experts: {have}")
    stored = _Stored(model, source)
    targets: dict[str, tuple[TensorSpec, Recipe]] = {n: (ref.spec, Copied(ref)) for n, ref in source.tensors.items()}
    aligned = []
    for path, block in blocks.items():
        if layers is not None and layer_number(path) not in layers:
            continue
        tensors = expert_axes(block, family.layout)
        files = stored.files(path, tensors) if tensors.count > 1 else []
        if files:
            experts = AlignedExperts(path, tensors, files)
            aligned.append(experts)
            moved = [file for file in files if file.axis.axis is not None]
            targets.update({file.ref.spec.name: (file.ref.spec, Permuted(file, experts)) for file in moved})
    return targets, aligned


class _Stored:
    """How a checkpoint stores the experts of a live model."""

    def __init__(self, model: PreTrainedModel, source: Source) -> None:
        self.model, self.name = model, source.name
        self.found = stored_tensors(source, model)
        named = model.named_parameters(remove_duplicate=False)
        self.stored = {id(parameter) for name, parameter in named if name in self.found}
        self.known: dict[Any, dict[str, NeuronAxis]] = {}

    def files(self, path: str, tensors: ExpertTensors) -> list[ExpertFile]:
        """Return a block's tensors on disk; none if it is tied to experts that are stored under another name."""
        names = [f"{path}.{name}" for name in tensors.axes]
        lacking = [name for name in names if name not in self.found]
        if lacking and all(id(self.model.get_parameter(name)) in self.stored for name in names):
            return []
        if lacking:
            raise CheckpointError(f"{self.name} lacks {lacking[0]}: download it again")
        pairs = zip(names, tensors.axes.values(), strict=True)
        return [file for name, axis in pairs for file in self._files_of(name, axis, tensors)]

    def _files_of(self, live: str, axis: NeuronAxis, tensors: ExpertTensors) -> Iterator[ExpertFile]:
        found = self.found[live]
        if found.converter is None:
            (ref, *others) = [ref for refs in found.refs.values() for ref in refs]
            if others:
                raise CheckpointError(f"{self.name} holds {live} twice, as {ref.spec.name} and {others[0].spec.name}")
            self._check_shape(ref, tuple(self.model.get_parameter(live).shape))
            yield ExpertFile(ref, axis)
            return
        counts = {len(refs) for refs in found.refs.values()}
        stacked = counts == {1}
        if not stacked and (len(counts) > 1 or min(counts) < tensors.count):
            raise CheckpointError(f"{self.name} holds {live} of {tensors.count} experts in {sorted(counts)} tensors")
        for refs in found.refs.values():
            for ref in refs:
                self._check_shape(ref, refs[0].spec.shape)
        loaded = axis if stacked else replace(axis, shape=(1, *axis.shape[1:]))
        for pattern, disk_axis in self._disk_axes(live, found, loaded, stacked, tensors.neurons).items():
            for number, ref in enumerate(found.refs[pattern]):
                yield ExpertFile(ref, replace(disk_axis, first=number))

    def _check_shape(self, ref: TensorRef, shape: tuple[int, ...]) -> None:
        if ref.spec.shape != shape:
            raise CheckpointError(
                f"{self.name}: {ref.spec.name} has shape {list(ref.spec.shape)}, it should have {list(shape)}"
            )

    def _disk_axes(
        self, live: str, found: StoredTensor, axis: NeuronAxis, stacked: bool, neurons: int
    ) -> dict[str, NeuronAxis]:
        """Return where a converter's tensors count neurons, by its patterns; a test on random bytes decides."""
        shapes = {pattern: refs[0].spec.shape for pattern, refs in found.refs.items()}
        key = id(found.converter), axis, tuple(shapes.items())
        if key in self.known:
            return self.known[key]
        draw = generator(0)
        probes = {p: torch.randint(256, shape, dtype=torch.uint8, generator=draw) for p, shape in shapes.items()}
        order = torch.rand(axis.shape[0], neurons, generator=draw).argsort(-1)
        try:
            wanted = axis.permute(self._joined(found, probes), order)
            for axes in itertools.product(*(_candidates(shape, stacked, neurons) for shape in shapes.values())):
                chosen = dict(zip(shapes, axes, strict=True))
                permuted = {pattern: chosen[pattern].permute(probe, order) for pattern, probe in probes.items()}
                if torch.equal(self._joined(found, permuted), wanted):
                    self.known[key] = chosen
                    return chosen
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.name}: {live} cannot be made of {shapes}: {first_line(error)}") from None
        raise UnsupportedError(
            f"{self.name}: it is not known where {', '.join(shapes)} count the neurons of {live}: convert without "
            "aligning experts"
        )

    def _joined(self, found: StoredTensor, tensors: dict[str, Tensor]) -> Tensor:
        return found.join(self.model, {pattern: [tensor.clone()] for pattern, tensor in tensors.items()})


def _candidates(shape: tuple[int, ...], stacked: bool, neurons: int) -> Iterator[NeuronAxis]:
    """Yield where a tensor could count neurons."""
    shape = shape if stacked else (1, *shape)
    for at in range(1, len(shape)):
        if shape[at] in (neurons, 2 * neurons):
            yield neuron_axis(shape, at, neurons)
        if shape[at] == 2 * neurons:
            yield neuron_axis(shape, at, neurons, interleaved=True)
    yield NeuronAxis(shape, None)
