"""Time forward and backward of one layer, and count what is kept in between.

Gradients go to inputs, experts and gates. Merged experts recompute their weights, so they keep about what a dense
expert does; the published way keeps the experts that it gathered.

Legend: B rows, T tokens per row, G groups that share a gate, N tokens, D hidden features, O output features,
K selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from meo_hf.benchmark.layer import Advance, Call, first_output, time_rows
from meo_hf.benchmark.layer_checks import References, check_equal
from meo_hf.benchmark.layer_mixture import mixture
from meo_hf.benchmark.layer_results import Row, Timed
from meo_hf.benchmark.layer_setup import Layer, Linear, Setup, Variant, draw_layer
from meo_hf.benchmark.layer_shapes import Cell, LayerSettings
from meo_hf.benchmark.layer_variants import dense, merging, published

GRADIENTS = 5
"""Times the tolerance of outputs by which gradients may differ: they pass through more roundings."""

VARIANTS: dict[str, Callable[[Setup], Variant]] = {
    "dense": dense,
    "moe grouped_mm": lambda setup: mixture(setup, "grouped_mm"),
    "moe eager": lambda setup: mixture(setup, "eager"),
    "published": published,
    "meo": lambda setup: merging(setup, None),
}


def time_train_step(settings: LayerSettings, setup: Setup, advance: Advance) -> Timed:
    """Check every variant's gradients on a small layer, then time all in turns, each round beginning with the next."""
    cell, device = setup.cell, setup.layer.router.device
    timed = Timed(cell, [])
    small = _small(cell)
    small_setup = Setup(small, draw_layer(small.shape, small.dtype, device, settings.seed).trainable())
    setup = Setup(cell, setup.layer.trainable())
    x = setup.inputs(settings.seed)
    references = References(setup, x)
    x.requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(settings.seed + 2), device=device).to(x)
    calls: dict[str, Call] = {}
    for name, make in VARIANTS.items():
        if name == "moe eager" and "moe grouped_mm" in calls:
            continue
        advance(f"checking {name}")
        gradients = _checked(name, make(small_setup), small_setup, settings.seed, timed.notes)
        if gradients is None:
            continue
        variant = replace(make(setup), room=_room(cell, name))
        y = first_output(variant, x.detach(), timed.notes)
        if y is None:
            continue
        with torch.no_grad():
            timed.checks[name] = references.check(variant, y)
        del y
        timed.checks[f"{name}: gradients"] = gradients
        with torch.no_grad():
            row = Row(name, plans=() if variant.plans is None else variant.plans(x))
        row.saved_bytes = saved_bytes(variant, x)
        calls[name] = _step(variant, x, dy)
        row.peak_bytes = _peak_bytes(calls[name], device)
        timed.rows.append(row)
    time_rows(timed, calls, settings.rounds, device, advance)
    return timed


def _step(variant: Variant, x: Tensor, dy: Tensor) -> Call:
    return lambda: torch.autograd.grad(variant.run(x), (x, *variant.parameters), dy)


def _room(cell: Cell, name: str) -> int:
    """Estimate the bytes of gradients, and of what a variant keeps for backward beside activations."""
    shape = cell.shape
    experts = shape.parameters * (1 if name == "dense" else shape.experts)
    gathered = cell.groups * (3 * cell.top_k + 1) * shape.weights if name == "published" else 0
    copies = cell.all_tokens * cell.top_k * 3 * (shape.first_outputs + shape.hidden) if name.startswith("moe") else 0
    return (2 * experts + gathered + copies) * cell.itemsize


def saved_bytes(variant: Variant, x: Tensor) -> int:
    """Return the bytes that a forward pass keeps for backward: each storage once, parameters left out."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in variant.parameters}
    kept: dict[int, Tensor] = {}  # whole tensors, so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        variant.run(x)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


def _peak_bytes(step: Call, device: torch.device) -> int | None:
    """Return the bytes that a step needs at most beside what was there before, gradients included; CUDA only."""
    if device.type != "cuda":
        return None
    step()  # whatever is chosen or allocated at first
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _small(cell: Cell) -> Cell:
    """Return a cell of the same kind that float64 gradients of are cheap."""
    experts = min(cell.shape.experts, 8)
    shape = replace(cell.shape, hidden=64, intermediate=96, experts=experts, top_k=1)
    segments = {"tokens": 16, "segment_length": 8} if cell.level == "segment" else {"tokens": min(cell.tokens, 16)}
    return replace(cell, shape=shape, batch=min(cell.batch, 3), top_k=min(cell.top_k, experts), **segments)  # type: ignore[arg-type]


def _checked(name: str, variant: Variant, setup: Setup, seed: int, notes: list[str]) -> float | None:
    """Return the largest difference of a variant's gradients; None, and a note, if it has no backward here."""
    x = setup.inputs(seed).requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator(x.device).manual_seed(seed + 2), device=x.device).to(x)
    try:
        y = variant.run(x)
        found = torch.autograd.grad(y, (x, *variant.parameters), dy)
    except Exception as error:
        if not variant.optional:
            raise
        notes.append(f"{name}: no backward here: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return None
    expected = reference_gradients(variant, setup, x, dy)
    dtype = setup.cell.dtype
    return max(
        check_equal(f"{name}: gradients [{', '.join(map(str, mine.shape))}]", mine, its, dtype, GRADIENTS)
        for mine, its in zip(found, expected, strict=True)
        if its.abs().max() > 0 or mine.abs().max() > 0  # one expert's gate is always one
    )


def reference_gradients(variant: Variant, setup: Setup, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of inputs and of a variant's parameters, by float64 autograd of the plain formulas."""
    copies = [t.detach().double().requires_grad_() for t in variant.parameters]
    wide = x.detach().double().requires_grad_()
    if variant.kind == "dense":
        y = _dense(setup, wide, *_linears(setup.layer, copies))
    else:
        with torch.no_grad():  # rounding may tip a selection, which no gradient passes through
            index = (setup.token_gates if variant.kind == "moe" else setup.group_gates)(x).top_k_index
        up, down = _linears(setup.layer, copies[:-1])
        y = (_mixture if variant.kind == "moe" else _merged)(setup, wide, up, down, copies[-1], index)
    return torch.autograd.grad(y, (wide, *copies), dy.double())


def _linears(layer: Layer, copies: list[Tensor]) -> tuple[Linear, Linear]:
    if layer.up.bias is None:
        return Linear(copies[0], None), Linear(copies[1], None)
    return Linear(copies[0], copies[1]), Linear(copies[2], copies[3])


def _dense(setup: Setup, x: Tensor, up: Linear, down: Linear) -> Tensor:
    return down(setup.layer.activate(up(x)))


def _merged(setup: Setup, x: Tensor, up: Linear, down: Linear, router: Tensor, index: Tensor) -> Tensor:
    grouped = setup.grouped(x)
    logits = router if setup.cell.level == "task" else grouped.mean(1) @ router.t()
    gates = logits.gather(1, index).softmax(1)

    def linear(x: Tensor, of: Linear) -> Tensor:
        y = torch.einsum("gk,gkoi,gti->gto", gates, of.weight[index], x)
        return y if of.bias is None else y + torch.einsum("gk,gko->go", gates, of.bias[index])[:, None]

    return linear(setup.layer.activate(linear(grouped, up)), down).reshape(x.shape)


def _mixture(setup: Setup, x: Tensor, up: Linear, down: Linear, router: Tensor, index: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    gates = (tokens @ router.t()).gather(1, index).softmax(1)

    def linear(x: Tensor, of: Linear) -> Tensor:
        y = torch.einsum("nkoi,nki->nko", of.weight[index], x)
        return y if of.bias is None else y + of.bias[index]

    outputs = linear(setup.layer.activate(linear(tokens[:, None].expand(-1, index.shape[1], -1), up)), down)
    return (gates[..., None] * outputs).sum(1).reshape(x.shape)
