"""Which experts of an MoE block become one.

A grouping is a tuple of groups. A group is led by its dominant expert, the one that is selected most often (of several
the smallest number), and its other members follow by number; groups come in the order of their leaders.

Legend: E experts of a block, D entries of what describes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.reduction.plan import Row

Groups = tuple[tuple[int, ...], ...]

METRICS = ("euclidean", "cosine")
STARTS = 10  # of k-means; the best end is kept
STEPS = 100  # of k-means from one start


def by_dominant(similarity: Tensor, frequency: Tensor, keep: int) -> Groups:
    """Return groups around the `keep` most frequent experts: every other joins the one most similar to it.

    For similarities [E, E] and frequencies [E]; of equal ones the smaller number counts. M-SMoE (arXiv 2310.01334).
    """
    _check(keep, frequency, similarity)
    dominant = sorted(_by_frequency(frequency.tolist())[:keep])
    groups = {leader: [leader] for leader in dominant}
    for expert, row in enumerate(similarity[:, dominant].tolist()):
        if expert not in groups:
            groups[dominant[row.index(max(row))]].append(expert)
    return _ordered(groups.values(), frequency)


def adaptive_counts(frequencies: Mapping[str, Tensor], total: int, least: int = 1) -> dict[str, int]:
    """Return how many dominant experts each block has, of `total` in all blocks together.

    Frequencies [E] are divided by their largest one in their block, then the most frequent experts of all blocks are
    dominant, after `least` in each block. M-SMoE (arXiv 2310.01334).
    """
    sizes = {path: len(frequency) for path, frequency in frequencies.items()}
    lowest, highest = least * len(sizes), sum(sizes.values())
    if least < 1 or least > min(sizes.values()) or not lowest <= total <= highest:
        raise UsageError(
            f"{total} experts cannot be spread over {len(sizes)} blocks with at least {least} in each: "
            f"they have {min(sizes.values())} to {max(sizes.values())} experts, so give {lowest} to {highest}"
        )
    ranked = []
    for at, (path, frequency) in enumerate(frequencies.items()):
        _finite(frequency)
        values = frequency.double().tolist()
        top = max(values) or 1.0
        ranked += [(-values[one] / top, at, one, path) for one in _by_frequency(values)[least:]]
    counts = dict.fromkeys(sizes, least)
    for *_, path in sorted(ranked)[: total - lowest]:
        counts[path] += 1
    return counts


def by_agglomeration(descriptors: Tensor, frequency: Tensor, keep: int, metric: str = "euclidean") -> Groups:
    """Return `keep` groups from merging the two nearest ones, by the mean distance of their members, again and again.

    For descriptors [E, D], such as an expert's mean output. HC-SMoE (arXiv 2410.08589), which uses Euclidean distances.
    Raises UnsupportedError without SciPy.
    """
    _check(keep, frequency, descriptors)
    if metric not in METRICS:
        raise UsageError(f"distances are {' or '.join(METRICS)}, not {metric!r}")
    if len(descriptors) == 1:
        return ((0,),)
    hierarchy, distance = _scipy()
    values = descriptors.double().cpu()
    if metric == "cosine":  # of unit vectors half the squared distance; an expert that never answers is at one half
        condensed = distance.pdist(_unit(values).numpy(), "sqeuclidean") / 2
    else:
        condensed = distance.pdist(values.numpy(), metric)
    # The first E - keep merges, in their order, leave exactly `keep` groups, whatever distances are equal.
    merges = hierarchy.linkage(condensed, method="average")[: len(values) - keep, :2].astype(int).tolist()
    members = {expert: [expert] for expert in range(len(values))}
    for made, (one, other) in enumerate(merges, len(values)):
        members[made] = members.pop(one) + members.pop(other)
    return _ordered(members.values(), frequency)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy.cluster import hierarchy
        from scipy.spatial import distance
    except ImportError:
        raise UnsupportedError("grouping experts needs the package scipy: pip install 'meo_hf[align]'") from None
    return hierarchy, distance


def by_k_means(descriptors: Tensor, frequency: Tensor, keep: int, seed: int = 0) -> Groups:
    """Return `keep` groups with the largest cosines between members [D] and their group's mean, as k-means finds them.

    Starts are k-means++, each expert drawn by its distance from the nearest one so far. Sub-MoE (arXiv 2506.23266, eq.
    2-3) takes all outputs of an expert for [E, D]; `roots_of` their mean cosines gives the same groups.
    """
    _check(keep, frequency, descriptors)
    unit = _unit(descriptors.double().cpu())
    generator = torch.Generator().manual_seed(seed)
    ends = [_k_means(unit, _starts(unit, keep, generator)) for _ in range(STARTS)]
    _, labels = max(ends, key=lambda end: end[0])
    return _ordered([torch.nonzero(labels == one)[:, 0].tolist() for one in range(keep)], frequency)


def roots_of(similarity: Tensor) -> Tensor:
    """Return descriptors [E, E] whose inner products are the given ones [E, E], with what is below zero cut off."""
    _finite(similarity)
    values, vectors = torch.linalg.eigh((similarity + similarity.T).double() / 2)
    return vectors * values.clamp(min=0).sqrt()


def _starts(unit: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(unit), (1,), generator=generator))]
    while len(chosen) < keep:
        distance = (1 - unit @ unit[chosen].T).clamp(min=0).amin(1)
        free = torch.ones(len(unit), dtype=torch.float64)
        free[chosen] = 0
        weight = distance * free if bool((distance * free).any()) else free
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return unit[chosen]


def _k_means(unit: Tensor, centres: Tensor) -> tuple[float, Tensor]:
    labels = torch.full((len(unit),), -1)
    for _ in range(STEPS):
        cosine = unit @ centres.T
        found = cosine.argmax(1)
        own = cosine.amax(1)
        for empty in sorted(set(range(len(centres))) - set(found.tolist())):
            movable = torch.bincount(found, minlength=len(centres))[found] > 1
            found[torch.where(movable, own, torch.inf).argmin()] = empty
        if torch.equal(found, labels):
            break
        labels = found
        centres = _unit(torch.stack([unit[labels == one].mean(0) for one in range(len(centres))]))
    return float((unit * centres[labels]).sum()), labels


def shares(group: Sequence[int], frequency: Tensor) -> tuple[float, ...]:
    """Return the weights of a group's members: their parts of its frequency, equal ones where none was selected."""
    own = frequency[list(group)].double()
    total = own.sum()
    return tuple((own / total if total > 0 else torch.full_like(own, 1 / len(group))).tolist())


def row_of_group(group: Sequence[int], frequency: Tensor) -> Row:
    """Return a group as a plan's row."""
    return tuple(zip(group, shares(group, frequency), strict=True))


def stands_for(groups: Groups) -> tuple[int, ...]:
    """Return the number of its group for each expert."""
    numbers = {expert: at for at, group in enumerate(groups) for expert in group}
    return tuple(numbers[expert] for expert in range(len(numbers)))


def _by_frequency(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda one: -values[one])


def _ordered(groups: Iterable[Sequence[int]], frequency: Tensor) -> Groups:
    values = frequency.tolist()
    made = []
    for group in groups:
        leader = min(group, key=lambda one: (-values[one], one))
        made.append((leader, *sorted(set(group) - {leader})))
    return tuple(sorted(made))


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1, eps=torch.finfo(values.dtype).tiny)


def _check(keep: int, frequency: Tensor, of_experts: Tensor) -> None:
    if not 1 <= keep <= len(frequency):
        raise UsageError(f"a block of {len(frequency)} experts cannot have {keep}: give 1 to {len(frequency)}")
    _finite(frequency)
    _finite(of_experts)


def _finite(values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise CheckpointError("experts gave NaN or infinite values, which cannot be compared: check the checkpoint")
