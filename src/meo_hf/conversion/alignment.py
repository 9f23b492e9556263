"""Alignment of experts: each expert's hidden neurons are put in the order in which they match the first expert's.

The order of hidden neurons is arbitrary, so it changes no expert's function, but it decides what an average of experts
is. Weight matching as in Git Re-Basin (Ainsworth et al., arXiv 2209.04836); for one hidden layer it is solved exactly.

Legend: E experts, F hidden neurons of an expert, C entries that belong to one neuron, K entries that belong to none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meo_hf.errors import CheckpointError, UnsupportedError
from meo_hf.modeling.moe_families_meo import Layout


@dataclass(frozen=True)
class NeuronAxis:
    """Where a tensor of one or more experts counts their hidden neurons.

    `shape` is the tensor's, unflattened so that its first axis counts experts, from number `first` on, and one axis
    only neurons. `axis` is that one's number, None where no entry belongs to a neuron: the bias of the last map.
    """

    shape: tuple[int, ...]
    axis: int | None
    first: int = 0

    @property
    def numbers(self) -> range:
        """The experts that the tensor holds."""
        return range(self.first, self.first + self.shape[0])

    def expert(self, tensor: Tensor, number: int) -> Tensor:
        """Return what a tensor holds of one expert, in `shape` without its first axis."""
        return tensor.reshape(self.shape)[number - self.first]

    def reorder(self, expert: Tensor, permutation: Tensor) -> Tensor:
        """Return one expert's part of a tensor with neuron permutation[i] at place i."""
        return expert if self.axis is None else expert.index_select(self.axis - 1, permutation)

    def permute(self, tensor: Tensor, permutations: Tensor) -> Tensor:
        """Return a tensor with its experts' neurons reordered by permutations [E, F]; experts beyond E stay."""
        made = tensor.reshape(self.shape).clone()
        for number in self.numbers:
            if number < len(permutations):
                part = made[number - self.first]
                part.copy_(self.reorder(part, permutations[number]))
        return made.reshape(tensor.shape)


@dataclass(frozen=True)
class ExpertTensors:
    """The tensors that an MoE block's experts consist of: how many experts, their neurons, and each tensor's axes."""

    count: int
    neurons: int
    axes: dict[str, NeuronAxis]


@dataclass(frozen=True)
class Alignment:
    """Permutations [E, F], and how far experts are from the first one before and after.

    A distance is the mean over all other experts e of ||W_e - W_0|| / ||W_0||, over all tensors of an expert together.
    """

    permutations: Tensor
    before: float
    after: float


def neuron_axis(shape: tuple[int, ...], at: int, neurons: int, interleaved: bool = False) -> NeuronAxis:
    """Return where an axis of F entries, or of 2F entries for gate and up, counts neurons.

    Gate and up are halves, or `interleaved`: gate 0, up 0, gate 1, ...
    """
    if shape[at] == neurons:
        return NeuronAxis(shape, at)
    split = (neurons, 2) if interleaved else (2, neurons)
    return NeuronAxis((*shape[:at], *split, *shape[at + 1 :]), at if interleaved else at + 1)


def expert_axes(block: Any, layout: Layout) -> ExpertTensors:
    """Return what the experts of an MoE block consist of, by names inside the block.

    Raises UnsupportedError for a tensor of which it is not known what it is for.
    """
    if layout == "dbrx":
        mlp = block.experts.mlp
        count, neurons = mlp.moe_num_experts, mlp.ffn_hidden_size
        axis = NeuronAxis((count, neurons, mlp.hidden_size), 1)
        return ExpertTensors(count, neurons, {f"experts.mlp.{name}": axis for name in ("w1", "v1", "w2")})
    if layout == "jetmoe":
        first, down = (tuple(linear.weight.shape) for linear in (block.input_linear, block.output_linear))
        axes = {"input_linear.weight": neuron_axis(first, 1, down[2]), "output_linear.weight": NeuronAxis(down, 2)}
        return ExpertTensors(down[0], down[2], axes)
    if layout == "modules":
        experts = [expert for name, expert in block.experts.items() if name.startswith("expert_")]
        axes = {name: axis for number, expert in enumerate(experts) for name, axis in _module_axes(expert, number)}
        return ExpertTensors(len(experts), axes[next(iter(axes))].shape[1], axes)
    return _stacked_axes(block.experts, layout)


def _module_axes(expert: nn.Module, number: int) -> Iterator[tuple[str, NeuronAxis]]:
    linears = [(name, module) for name, module in expert.named_children() if isinstance(module, nn.Linear)]
    for (name, linear), weight_axis, bias_axis in zip(linears, (1, 2), (1, None), strict=True):
        path = f"experts.expert_{number}.{name}"
        yield f"{path}.weight", NeuronAxis((1, *linear.weight.shape), weight_axis, number)
        if linear.bias is not None:
            yield f"{path}.bias", NeuronAxis((1, *linear.bias.shape), bias_axis, number)


def _stacked_axes(experts: Any, layout: Layout) -> ExpertTensors:
    transposed = getattr(experts, "is_transposed", layout == "llama4")
    interleaved = not getattr(experts, "is_concatenated", True)
    rows, columns = (2, 1) if transposed else (1, 2)
    count, neurons = experts.down_proj.shape[0], experts.down_proj.shape[columns]
    axes = {}
    for name, parameter in experts.named_parameters():
        shape = tuple(parameter.shape)
        if name in ("gate_up_proj", "up_proj"):
            axes[name] = neuron_axis(shape, rows, neurons, interleaved)
        elif name in ("gate_up_proj_bias", "up_proj_bias"):
            axes[name] = neuron_axis(shape, 1, neurons, interleaved)
        elif name in ("down_proj", "down_proj_bias"):
            axes[name] = NeuronAxis(shape, columns if name == "down_proj" else None)
        elif not name.startswith("post_expert_norm."):  # it reads the output, which has no neurons
            known = "gate_up_proj, up_proj, down_proj and their biases"
            raise UnsupportedError(
                f"{type(experts).__name__} has a parameter {name}, not only {known}: its experts cannot be aligned"
            )
    return ExpertTensors(count, neurons, {f"experts.{name}": axis for name, axis in axes.items()})


def solver() -> Callable[..., Any]:
    """Return SciPy's solver of assignment problems; raises UnsupportedError without SciPy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UnsupportedError("aligning experts needs the package scipy: pip install 'meo_hf[align]'") from None
    return linear_sum_assignment


def match_neurons(reference: Tensor, other: Tensor) -> Tensor:
    """Return the permutation p [F] with the largest sum over i of <reference[i], other[p[i]]>, for neurons [F, C].

    Raises CheckpointError for weights that are NaN or infinite.
    """
    similarity = reference @ other.T
    if not bool(similarity.isfinite().all()):
        raise CheckpointError("experts hold NaN or infinite weights, which match nothing: check the checkpoint")
    _, columns = solver()(similarity.numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int32)


def align_experts(count: int, load: Callable[[int], tuple[Tensor, Tensor]]) -> Alignment:
    """Match experts to the first one; `load` gives an expert's neurons [F, C] and its other entries [K] in float32.

    It holds the first expert and one other at a time, and their similarities [F, F].
    """
    neurons, rest = load(0)
    norm = math.hypot(float(neurons.norm()), float(rest.norm())) or 1.0
    same = torch.arange(len(neurons), dtype=torch.int32)
    permutations, before, after = [same], [], []
    for number in range(1, count):
        other, other_rest = load(number)
        permutation = match_neurons(neurons, other)
        apart = float((other_rest - rest).norm())
        old = math.hypot(float((other - neurons).norm()), apart) / norm
        new = math.hypot(float(other[permutation].sub_(neurons).norm()), apart) / norm
        gains = new < old  # rounding aside, it never loses; equal neurons stay where they are
        permutations.append(permutation if gains else same)
        before.append(old)
        after.append(new if gains else old)
    others = max(count - 1, 1)
    return Alignment(torch.stack(permutations), sum(before) / others, sum(after) / others)


def join_neurons(parts: list[tuple[NeuronAxis, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return one expert's neurons [F, C] and its other entries [K] in float32, from its part of each tensor."""
    neurons, rest = [], [torch.zeros(0)]
    for axis, part in parts:
        if axis.axis is None:
            rest.append(part.flatten().float())
        else:
            rows = part.movedim(axis.axis - 1, 0)
            neurons.append(rows.reshape(len(rows), -1).float())
    return torch.cat(neurons, 1), torch.cat(rest)


def align(stacks: Mapping[str, Tensor], tensors: ExpertTensors) -> Alignment:
    """Match the experts of one MoE block, given its tensors by the names in `tensors.axes`."""

    def load(number: int) -> tuple[Tensor, Tensor]:
        axes = [(name, axis) for name, axis in tensors.axes.items() if number in axis.numbers]
        return join_neurons([(axis, axis.expert(stacks[name], number)) for name, axis in axes])

    return align_experts(tensors.count, load)
