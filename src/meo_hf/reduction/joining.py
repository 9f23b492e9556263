"""What the weights of a group of experts become.

Legend: E experts of a block, G of a group, F hidden neurons of an expert, O outputs and I inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meo_hf.conversion.alignment import Alignment, ExpertTensors, NeuronAxis, align, neuron_axis
from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.plan import HOWS, Row

Stack = tuple[Tensor, Tensor | None]
"""Weights [E, O, I] of one linear map of experts and their biases [E, O]; of one expert [O, I] and [O]."""

CUTOFF = 1e-10
JOINED = tuple(how for how in HOWS if how != "given")


def weighted_mean(members: Tensor, shares: Sequence[float]) -> Tensor:
    """Return the sum [...] of members [G, ...] by their shares [G], made in float32 at least."""
    wide = members.to(torch.promote_types(members.dtype, torch.float32))
    return torch.tensordot(torch.tensor(shares, dtype=wide.dtype, device=wide.device), wide, 1).to(members.dtype)


def align_members(
    maps: Mapping[str, Stack], group: Sequence[int], interleaved: bool = False
) -> tuple[dict[str, Stack], Alignment]:
    """Return a group's members [G, ...] with their neurons in the order that matches its leader's, and the match.

    `maps` are a block's linear maps in the order of their use: the last one reads neurons, the others have F outputs,
    or 2F for gate and up, which are halves or `interleaved`.
    """
    *_, last = maps
    neurons = maps[last][0].shape[2]
    stacks, axes = {}, {}
    for name, (weight, bias) in maps.items():
        for kind, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None:
                continue
            members = stacks[f"{name}.{kind}"] = tensor.detach()[list(group)]
            shape = tuple(members.shape)
            if name == last:
                axes[f"{name}.{kind}"] = NeuronAxis(shape, 2 if kind == "weight" else None)
            else:
                axes[f"{name}.{kind}"] = neuron_axis(shape, 1, neurons, interleaved)
    match = align({name: stack.cpu() for name, stack in stacks.items()}, ExpertTensors(len(group), neurons, axes))
    permutations = match.permutations.to(maps[last][0].device)
    made = {name: axes[name].permute(stack, permutations) for name, stack in stacks.items()}
    return {name: (made[f"{name}.weight"], made.get(f"{name}.bias")) for name in maps}, match


def joint_svd(weights: Tensor, shares: Sequence[float], rank: int | None = None) -> Tensor:
    """Return one map [O, I] for members [G, O, I]: the sum of their coordinates in a basis of outputs they share.

    With [W_1 ... W_G] = U S [V_1^T ... V_G^T], it is U_r S_r (sum of a_i V_i^T), where U_r are the r leading left
    vectors; Sub-MoE (arXiv 2506.23266, eq. 5-8 and 12). As S_r V_i^T = U_r^T W_i, this is U_r U_r^T times the
    weighted mean: **with all vectors it is the weighted mean itself**, and with fewer it is the mean without what lies
    outside the outputs that the members share, which helps only where that is noise. `rank` is by default what one
    expert can have, min(O, I), so a map with O <= I gets the weighted mean; the paper names no r.
    """
    members, outputs, inputs = weights.shape
    rank = min(outputs, inputs) if rank is None else rank
    if rank < 1:
        raise UsageError(f"a rank is at least 1, not {rank}")
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    mean = weighted_mean(wide, shares)
    if rank < min(outputs, members * inputs):
        _finite(wide)
        joint = wide.movedim(0, 1).reshape(outputs, -1)
        basis = torch.linalg.svd(joint, full_matrices=False).U[:, :rank]
        mean = basis @ (basis.T @ mean)
    return mean.to(weights.dtype)


def join(maps: Mapping[str, Stack], row: Row, how: str, interleaved: bool = False) -> dict[str, Stack]:
    """Return the linear maps of one new expert from a block's, by a plan's row and `how`, as in `align_members`.

    Gate and up of one map are decomposed apart for `joint-svd`; biases become their weighted mean.
    """
    if how not in JOINED:
        raise UsageError(f"experts are joined by {', '.join(JOINED)}, not by {how!r}")
    group, weights = [old for old, _ in row], [weight for _, weight in row]
    members: dict[str, Stack] = {n: (w[group], None if b is None else b[group]) for n, (w, b) in maps.items()}
    if how == "aligned" and len(group) > 1:
        members, _ = align_members(maps, group, interleaved)
    *_, last = maps
    neurons = maps[last][0].shape[2]
    made = {}
    for name, (weight, bias) in members.items():
        if how == "joint-svd" and len(group) > 1:
            joined = _joint_parts(weight, weights, 1 if name == last else weight.shape[1] // neurons, interleaved)
        else:
            joined = weighted_mean(weight, weights)
        made[name] = joined, None if bias is None else weighted_mean(bias, weights)
    return made


def _joint_parts(weight: Tensor, shares: Sequence[float], parts: int, interleaved: bool) -> Tensor:
    axis = 2 if interleaved else 1
    split = weight.unflatten(1, (-1, parts) if interleaved else (parts, -1))
    return torch.stack([joint_svd(part, shares) for part in split.unbind(axis)], axis - 1).flatten(0, 1)


def solve_down(yp: Tensor, pp: Tensor, start: Tensor | None = None, cutoff: float = CUTOFF) -> Tensor:
    """Return the map W [D, F] with the least ||W P - Y||, from the products yp = Y P^T [D, F] and pp = P P^T [F, F].

    P are a merged expert's hidden activations [F, T] over T tokens, Y [D, T] what it should answer: W = Y P^+ of
    MergeMoE (arXiv 2510.14436). Where P says nothing, in directions whose share of its largest eigenvalue is below
    `cutoff`, W stays what `start` is, zero by default: with fewer tokens than neurons there always are such ones.
    """
    products, wanted = pp.double(), yp.double()
    _finite(products)
    _finite(wanted)
    if start is not None:
        wanted = wanted - start.double() @ products
    values, vectors = torch.linalg.eigh((products + products.T) / 2)
    known = values > cutoff * values[-1].clamp(min=0)
    found = (wanted @ vectors[:, known] / values[known]) @ vectors[:, known].T
    return found if start is None else start.double() + found


def _finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise CheckpointError("experts hold or gave NaN or infinite values, which join to none: check the checkpoint")
