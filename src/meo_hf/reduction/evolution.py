"""Evolution of what experts and routers become, judged by runs alone: EEP (arXiv 2407.00945, algorithm 1).

A candidate has two matrices per block: row j of W_EM says what the new expert j is made of, row j of W_RM what its
router row is. First, rows keep one old expert each and both matrices are one; then both change freely on their own.
A generation's children come from two of the best so far: rows of either, or all of one, and then a mutation.

Legend: E experts of a block, E' new ones.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.plan import Row

Pair = tuple[Tensor, Tensor]
Candidate = dict[str, Pair]
"""W_EM and W_RM [E', E] in float64, by block."""


@dataclass(frozen=True)
class Space:
    """What a block can become: E' of E experts, equally many of each router group that `groups` names per expert."""

    experts: int
    keep: int
    groups: tuple[int, ...] | None = None

    def parts(self) -> list[tuple[list[int], int]]:
        """Return the experts of each group and how many of them stay; raises UsageError where that is impossible."""
        groups = self.groups or (0,) * self.experts
        numbers = sorted(set(groups))
        members = [[one for one, group in enumerate(groups) if group == number] for number in numbers]
        target, rest = divmod(self.keep, len(numbers))
        if rest or not 1 <= target <= min(map(len, members)) or len(groups) != self.experts:
            raise UsageError(
                f"{self.keep} of {self.experts} experts cannot be kept in {len(numbers)} equal groups: "
                f"give a multiple of {len(numbers)} up to {self.experts}"
            )
        return [(part, target) for part in members]


@dataclass(frozen=True)
class Evolution:
    """How long a search runs and how far it goes.

    40 + 160 generations as in EEP. Each has `population` children of the `parents` best candidates. `deviation` is that
    of the Gaussian mutation. Blocks share matrices in so many equal `depths`; None gives each block its own. EEP names
    4 depths or one per block, and neither of the other numbers.
    """

    population: int = 16
    parents: int = 8
    pruning: int = 40
    merging: int = 160
    deviation: float = 0.05
    depths: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.population, self.parents) < 1 or min(self.pruning, self.merging) < 0 or self.deviation <= 0:
            raise UsageError(
                f"{self} makes no search: give at least 1 child and 1 parent, no negative number of generations, and "
                "a deviation above 0"
            )


@dataclass(frozen=True)
class Evolved:
    """The best candidate, its fitness, the best fitness after each generation, and how many candidates were tried."""

    best: Candidate
    fitness: float
    history: tuple[float, ...]
    evaluated: int


Genome = list[Pair]


@dataclass
class _State:
    generation: int
    elite: list[tuple[float, Genome]]
    history: list[float]
    evaluated: int


def evolve(
    blocks: Mapping[str, Space],
    fitness: Callable[[Candidate], float],
    how: Evolution,
    state: Path | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    of: Mapping[str, object] | None = None,
) -> Evolved:
    """Return the fittest candidate for some blocks, given in the order of their depth; higher fitness is better.

    The search is kept in the file `state` after each generation, and one that is there goes on as if it had never
    stopped. `progress` gets the generation, the last one's number, and the best fitness. `of` says what `fitness`
    depends on. Raises UsageError for a state of another search, CheckpointError for a damaged one.
    """
    depths = _depths(blocks, how.depths)
    spaces = [blocks[paths[0]] for paths in depths]
    shapes = {path: asdict(one) for path, one in blocks.items()}
    search = json.loads(json.dumps({"blocks": shapes, **asdict(how), **(of or {})}))
    if state is not None and (state.is_dir() or not state.parent.is_dir()):
        raise UsageError(f"{state} cannot hold a search: name a file, in a folder that exists")
    total = how.pruning + how.merging
    now = _State(-1, [], [], 0)
    if state is not None and state.exists():
        now = _load(state, search, len(spaces))
    for generation in range(now.generation + 1, total + 1):
        if generation == how.pruning + 1:
            now.elite = now.elite[:1]  # merging starts from the best pruning alone
        children = [_child(spaces, now.elite, how, generation, number) for number in range(how.population)]
        for genome in children:
            value = float(fitness(_candidate(genome, depths)))
            if math.isnan(value):
                raise UsageError("a candidate's fitness is NaN: give a number, such as -inf for one that fails")
            now.elite.append((value, genome))
        now.elite = sorted(now.elite, key=lambda one: -one[0])[: how.parents]  # of equals, the older
        now.generation, now.evaluated = generation, now.evaluated + len(children)
        now.history.append(now.elite[0][0])
        if state is not None:
            _save(state, now, search)
        if progress is not None:
            progress(generation, total, now.elite[0][0])
    value, genome = now.elite[0]
    return Evolved(_candidate(genome, depths), value, tuple(now.history), now.evaluated)


def rows_of(matrix: Tensor) -> tuple[Row, ...]:
    """Return a matrix [E', E] as a plan's rows: weights that are not zero, the largest first."""
    made = []
    for values in matrix.tolist():
        order = sorted(range(len(values)), key=lambda old: (-abs(values[old]), old))
        made.append(tuple((old, values[old]) for at, old in enumerate(order) if at == 0 or values[old] != 0))
    return tuple(made)


def _depths(blocks: Mapping[str, Space], depths: int | None) -> list[list[str]]:
    paths = list(blocks)
    count = len(paths) if depths is None else depths
    if not 1 <= count <= len(paths):
        raise UsageError(f"{len(paths)} blocks cannot be split into {count} depths: give 1 to {len(paths)}")
    bounds = [round(at * len(paths) / count) for at in range(count + 1)]
    made = [paths[start:end] for start, end in itertools.pairwise(bounds)]
    for shared in made:
        if other := next((path for path in shared if blocks[path] != blocks[shared[0]]), None):
            raise UsageError(f"{shared[0]} and {other} cannot share matrices, because their experts differ: use depths")
    return made


def _candidate(genome: Genome, depths: list[list[str]]) -> Candidate:
    return {path: pair for pair, paths in zip(genome, depths, strict=True) for path in paths}


def _child(
    spaces: list[Space], elite: list[tuple[float, Genome]], how: Evolution, generation: int, number: int
) -> Genome:
    # A child's chance comes from its number alone, so a search that goes on needs no generator's state.
    chance = random.Random(f"{how.seed}/{generation}/{number}")
    if not elite:
        return [_one_hot([chance.sample(part, keep) for part, keep in space.parts()], space) for space in spaces]
    father, mother = chance.choice(elite)[1], chance.choice(elite)[1]
    if (side := chance.choice((father, mother, None))) is not None:
        father = mother = side
    if generation <= how.pruning:
        return _pruned(spaces, father, mother, chance)
    return _merged(father, mother, how.deviation, chance)


def _pruned(spaces: list[Space], father: Genome, mother: Genome, chance: random.Random) -> Genome:
    changed = chance.randrange(len(spaces))
    made = []
    for at, space in enumerate(spaces):
        one, other = (set(parent[at][0].argmax(1).tolist()) for parent in (father, mother))
        kept = []
        for part, keep in space.parts():
            both, either = sorted(one & other & set(part)), sorted((one ^ other) & set(part))
            kept.append([*both, *chance.sample(either, keep - len(both))])
        swaps = [(own, sorted(set(part) - set(own))) for own, (part, keep) in zip(kept, space.parts(), strict=True)]
        swaps = [(own, dropped) for own, dropped in swaps if dropped]
        if swaps and (at == changed or chance.random() < 1 / len(spaces)):
            own, dropped = chance.choice(swaps)
            own[chance.randrange(len(own))] = chance.choice(dropped)
        made.append(_one_hot(kept, space))
    return made


def _merged(father: Genome, mother: Genome, deviation: float, chance: random.Random) -> Genome:
    noise = torch.Generator().manual_seed(chance.getrandbits(63))
    made = []
    for one, other in zip(father, mother, strict=True):
        rows = torch.tensor([chance.random() < 0.5 for _ in one[0]])[:, None]
        experts, router = (
            torch.where(rows, mine, theirs) + deviation * torch.randn(mine.shape, generator=noise, dtype=mine.dtype)
            for mine, theirs in zip(one, other, strict=True)
        )
        made.append((experts, router))
    return made


def _one_hot(parts: list[list[int]], space: Space) -> Pair:
    matrix = torch.eye(space.experts, dtype=torch.float64)[sorted(one for part in parts for one in part)]
    return matrix, matrix


def _save(path: Path, now: _State, search: dict[str, object]) -> None:
    tensors = {
        f"{rank}.{at}.{name}": matrix.clone()
        for rank, (_, genome) in enumerate(now.elite)
        for at, pair in enumerate(genome)
        for name, matrix in zip(("experts", "router"), pair, strict=True)
    }
    values = [value for value, _ in now.elite]
    told = {"generation": now.generation, "evaluated": now.evaluated, "fitness": values, "history": now.history}
    beside = path.with_name(f"{path.name}.partial")
    save_file(tensors, beside, metadata={"search": json.dumps(search), "state": json.dumps(told)})
    beside.replace(path)


def _load(path: Path, search: dict[str, object], depths: int) -> _State:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            made, told = json.loads(metadata["search"]), json.loads(metadata["state"])
            differs = sorted(name for name in search if made.get(name) != search[name])
            fitness = [] if differs else [float(value) for value in told["fitness"]]
            elite = [(value, [_pair(file, rank, at) for at in range(depths)]) for rank, value in enumerate(fitness)]
            now = _State(int(told["generation"]), elite, list(told["history"]), int(told["evaluated"]))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no state of a search ({error!r}): remove it to start anew") from None
    if differs:
        raise UsageError(
            f"{path} holds another search, with other {', '.join(differs)}: give it what it was started with, or "
            "another file"
        )
    return now


def _pair(file: safe_open, rank: int, at: int) -> Pair:
    return file.get_tensor(f"{rank}.{at}.experts"), file.get_tensor(f"{rank}.{at}.router")
