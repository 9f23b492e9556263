"""The layer that the layer benchmarks run: its experts, its inputs and its gates.

Legend: B rows, T tokens per row, G groups that share a gate, D hidden features, F intermediate features,
O output features of a projection, E experts, K selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from meo_hf.benchmark.layer_shapes import Cell, Shape
from meo_hf.benchmark.options import DTYPES

Kind = Literal["dense", "moe", "merged"]


class Linear(NamedTuple):
    """One projection of all experts, weight [E, O, I] and bias [E, O]; or of one expert."""

    weight: Tensor
    bias: Tensor | None

    def expert(self, number: int) -> Linear:
        """Return a copy of one expert, in memory of its own as a dense model's."""
        return Linear(*(None if t is None else _leaf(t[number].clone(), t.requires_grad) for t in self))  # type: ignore[arg-type]

    def parameters(self) -> tuple[Tensor, ...]:
        """Return the tensors that are there."""
        return tuple(t for t in self if t is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply one expert."""
        return F.linear(x, self.weight, self.bias)


class Gates(NamedTuple):
    """Selected experts and their weights, both [N, K]; weights are float32."""

    top_k_index: Tensor
    top_k_weights: Tensor


@dataclass(frozen=True)
class Layer:
    """Experts drawn independently, and a router whose logits have a standard deviation of about one."""

    shape: Shape
    up: Linear
    down: Linear
    router: Tensor
    """[E, D], float32: logits of a token; of a pooled state once scaled"""
    task_logits: Tensor
    """[1, E], float32"""

    def activate(self, hidden: Tensor) -> Tensor:
        """Apply what is between the projections: [..., first_outputs] -> [..., F]."""
        return activate(self.shape, hidden)

    def trainable(self) -> Layer:
        """Return this layer, its memory shared, with parameters that want gradients."""
        up, down = (
            Linear(*(None if t is None else _leaf(t, True) for t in of))  # type: ignore[arg-type]
            for of in (self.up, self.down)
        )
        return Layer(self.shape, up, down, self.router, _leaf(self.task_logits, True))


def _leaf(tensor: Tensor, wants_gradient: bool) -> Tensor:
    return tensor.detach().requires_grad_(wants_gradient)


def activate(shape: Shape, hidden: Tensor) -> Tensor:
    """Apply a shape's activation, gated or not."""
    if not shape.gated:
        return F.gelu(hidden)
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def draw_layer(shape: Shape, dtype: str, device: torch.device, seed: int) -> Layer:
    """Draw a layer whose outputs are about as large as its inputs."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float, dtype: torch.dtype = DTYPES[dtype]) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype, device=device).mul_(scale)

    def linear(outputs: int, inputs: int) -> Linear:
        size = (inputs, outputs) if shape.transposed else (outputs, inputs)
        weight = draw(shape.experts, *size, scale=inputs**-0.5)
        bias = draw(shape.experts, outputs, scale=0.1) if shape.biases else None
        return Linear(weight.transpose(1, 2) if shape.transposed else weight, bias)

    return Layer(
        shape,
        linear(shape.first_outputs, shape.hidden),
        linear(shape.hidden, shape.intermediate),
        draw(shape.experts, shape.hidden, scale=shape.hidden**-0.5, dtype=torch.float32),
        draw(1, shape.experts, scale=1, dtype=torch.float32),
    )


def select(logits: Tensor, top_k: int) -> Gates:
    """Keep the largest logits [N, E] and take their softmax."""
    top, index = logits.topk(top_k, dim=1)
    return Gates(index, top.softmax(1))


class Setup:
    """A cell, its layer, and what its variants need that is made before anything is timed."""

    def __init__(self, cell: Cell, layer: Layer) -> None:
        self.cell, self.layer = cell, layer
        # pooling many tokens shrinks what they have in common: their router is scaled so that gates stay as spread
        train = layer.up.weight.requires_grad
        self.pooled_router = _leaf(layer.router * cell.group_tokens**0.5, train)
        self.token_router = _leaf(layer.router.to(DTYPES[cell.dtype], copy=True), train)

    def inputs(self, seed: int) -> Tensor:
        """Draw hidden states [B, T, D]."""
        size = (self.cell.batch, self.cell.tokens, self.cell.shape.hidden)
        device = self.layer.router.device
        generator = torch.Generator(device).manual_seed(seed + 1)
        return torch.randn(size, generator=generator, dtype=DTYPES[self.cell.dtype], device=device)

    def grouped(self, x: Tensor) -> Tensor:
        """Return hidden states [B, T, D] by group [G, T', D]."""
        return x.reshape(self.cell.groups, self.cell.group_tokens, -1)

    def group_gates(self, x: Tensor) -> Gates:
        """Return the gate of each group of hidden states [B, T, D]."""
        return select(self.group_logits(x), self.cell.top_k)

    def group_logits(self, x: Tensor) -> Tensor:
        """Return what groups' gates are selected by [G, E]."""
        if self.cell.level == "task":
            return self.layer.task_logits
        return F.linear(self.grouped(x).mean(1, dtype=torch.float32), self.pooled_router)

    def token_gates(self, x: Tensor) -> Gates:
        """Return a gate of each token, as a mixture of experts has it."""
        return select(self.token_logits(x), self.cell.top_k)

    def token_logits(self, x: Tensor) -> Tensor:
        """Return what tokens' gates are selected by [B * T, E], in the model's dtype as in Transformers' mixtures."""
        return F.linear(x.flatten(0, 1), self.token_router).float()


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer: hidden states [B, T, D] -> [B, T, D], gates included."""

    name: str
    kind: Kind
    run: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...]
    """what it would train: experts and router"""
    room: int = 0
    """bytes that it needs beside weights and activations, about"""
    plans: Callable[[Tensor], tuple[str, str]] | None = None
    """the plans that its two projections use"""
    capturable: bool = True
    """whether no step waits for the device"""
    optional: bool = False
    """whether it may fail here: somebody else's code, made for some devices"""
