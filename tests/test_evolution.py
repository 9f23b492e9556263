"""Evolution: known optima are found, candidates stay what their phase allows, an interrupted search goes on exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.evolution import Candidate, Evolution, Evolved, Space, evolve, rows_of
from meo_hf.reduction.plan import BlockPlan, one_hot

torch.set_num_threads(1)

BLOCKS = {"layers.0": Space(5, 2), "layers.1": Space(5, 2), "layers.2": Space(6, 3)}
SHORT = Evolution(population=6, parents=3, pruning=4, merging=5, seed=3)
BEST = {"layers.0": [1, 4], "layers.1": [0, 3], "layers.2": [1, 2, 5]}


def fitness(candidate: Candidate) -> float:
    """Largest, at zero, for the matrices that keep the experts in BEST, with routers doubled."""
    total = 0.0
    for path, (experts, router) in candidate.items():
        target = torch.eye(experts.shape[1], dtype=torch.float64)[BEST[path]]
        total -= float((experts - target).square().sum()) + 0.1 * float((router - 2 * target).square().sum())
    return total


def same(one: Evolved, other: Evolved) -> bool:
    pairs = [(a, b) for path in one.best for a, b in zip(one.best[path], other.best[path], strict=True)]
    return all(a.equal(b) for a, b in pairs) and (one.fitness, one.history, one.evaluated) == (
        other.fitness, other.history, other.evaluated
    )  # fmt: skip


def test_pruning_finds_the_experts_and_merging_goes_beyond() -> None:
    how = Evolution(population=20, parents=6, pruning=25, merging=40, seed=1)
    pruned = evolve(BLOCKS, fitness, replace(how, merging=0))
    for path, (experts, router) in pruned.best.items():
        assert experts.argmax(1).tolist() == BEST[path]
        assert torch.equal(experts, router)
    merged = evolve(BLOCKS, fitness, how)
    assert merged.history[:26] == pruned.history
    assert merged.fitness > pruned.fitness == pytest.approx(-0.7)
    assert merged.fitness == fitness(merged.best) == max(merged.history)
    assert list(merged.history) == sorted(merged.history)
    assert merged.evaluated == 20 * 66


def test_candidates_are_what_their_phase_allows() -> None:
    seen: list[Candidate] = []

    def watched(candidate: Candidate) -> float:
        seen.append(candidate)
        return fitness(candidate)

    evolve(BLOCKS, watched, SHORT)
    pruning, merging = seen[: 6 * 5], seen[6 * 5 :]
    assert len(merging) == 6 * 5
    for candidate, (path, space) in itertools.product(pruning, BLOCKS.items()):
        experts, router = candidate[path]
        kept = experts.argmax(1).tolist()
        assert kept == sorted(set(kept))
        assert torch.equal(experts, torch.eye(space.experts, dtype=torch.float64)[kept])
        assert torch.equal(experts, router)
        assert len(kept) == space.keep
    for candidate, (path, space) in itertools.product(merging, BLOCKS.items()):
        experts, router = candidate[path]
        assert experts.shape == router.shape == (space.keep, space.experts)
        assert not torch.equal(experts, router)
        assert len(experts.unique()) == experts.numel()
    assert len({tuple(c["layers.2"][0].argmax(1).tolist()) for c in pruning}) > 5


def test_children_in_merging_stay_near_their_parents() -> None:
    """They start from the best pruning alone, and the mean square of 3000 changes is the deviation's."""
    seen: list[Candidate] = []

    def watched(candidate: Candidate) -> float:
        seen.append(candidate)
        return -float(len(seen))  # the first is the best

    how = Evolution(population=50, parents=8, pruning=0, merging=1, deviation=0.2)
    evolve({"block": Space(10, 3)}, watched, how)
    first = seen[0]["block"]
    moves = torch.stack([torch.stack(one["block"]) - torch.stack(first) for one in seen[50:]])
    assert moves.numel() == 3000
    assert float(moves.square().mean().sqrt()) == pytest.approx(0.2, rel=0.05)


def seen_by(space: Space, how: Evolution) -> list[Candidate]:
    """All candidates of a search in which all are equal."""
    seen: list[Candidate] = []
    evolve({"block": space}, lambda candidate: float(seen.append(candidate) or 0), how)
    return seen


def test_children_in_pruning_mix_experts_of_two_parents() -> None:
    seen = seen_by(Space(12, 6), Evolution(population=30, parents=30, pruning=1, merging=0))
    kept = [set(one["block"][0].argmax(1).tolist()) for one in seen]
    apart = [min(len(child - parent) for parent in kept[:30]) for child in kept[30:]]
    assert 1 in apart
    assert max(apart) > 1  # a swap alone makes one new expert of six


def test_children_in_merging_mix_rows_of_two_parents() -> None:
    """In 800 dimensions the parent of a row is the nearest one, with both of its matrices."""
    seen = seen_by(Space(400, 3), Evolution(population=12, parents=13, pruning=0, merging=2))
    parents = [torch.cat(one["block"], 1) for one in [seen[0], *seen[12:24]]]
    of_both = set()
    for child in (torch.cat(one["block"], 1) for one in seen[24:]):
        squares = torch.stack([(child - parent).square() for parent in parents])
        nearest = squares.sum(2).argmin(0)
        assert nearest.equal(squares[..., :400].sum(2).argmin(0))
        assert nearest.equal(squares[..., 400:].sum(2).argmin(0))
        of_both.add(len(nearest.unique()))
    assert of_both == {1, 2}


def test_blocks_that_keep_all_experts_stay() -> None:
    blocks = {"all": Space(3, 3), "some": Space(4, 2), "one group": Space(4, 4, (0, 1, 0, 1))}
    found = evolve(blocks, lambda one: float(one["some"][0].argmax(1).sum()), replace(SHORT, merging=0)).best
    assert [matrix.argmax(1).tolist() for matrix, _ in found.values()] == [[0, 1, 2], [2, 3], [0, 1, 2, 3]]


def test_blocks_of_one_depth_share_matrices() -> None:
    blocks = {f"layers.{at}": Space(4, 2) for at in range(5)}

    def alike(candidate: Candidate) -> float:
        return -float(sum((experts - 0.1 * at).square().sum() for at, (experts, _) in enumerate(candidate.values())))

    found = evolve(blocks, alike, replace(SHORT, depths=2)).best
    one, other = found["layers.0"], found["layers.4"]
    shared = [all(torch.equal(a, b) for a, b in zip(found[path], one, strict=True)) for path in blocks]
    assert shared in ([True, True, False, False, False], [True, True, True, False, False])
    assert not torch.equal(one[0], other[0])
    assert len({id(pair) for pair in evolve(blocks, alike, SHORT).best.values()}) == 5


def test_router_groups_keep_equally_many() -> None:
    groups = (0, 0, 0, 1, 1, 1)

    def watched(candidate: Candidate) -> float:
        kept = candidate["block"][0].argmax(1).tolist()
        assert sum(one < 3 for one in kept) == 2
        return float(sum(kept))

    found = evolve({"block": Space(6, 4, groups)}, watched, Evolution(6, 3, 10, 0, seed=1))
    assert found.best["block"][0].argmax(1).tolist() == [1, 2, 4, 5]


@pytest.mark.parametrize("stop", [0, 2, 4, 5, 7])
def test_an_interrupted_search_goes_on_exactly(stop: int, tmp_path: Path) -> None:
    """Killed inside the generation after `stop`, which is the last of pruning or the first of merging too."""
    whole = evolve(BLOCKS, fitness, SHORT)
    tried = 0

    def killed(candidate: Candidate) -> float:
        nonlocal tried
        tried += 1
        if tried > 6 * (stop + 1) + 2:
            raise KeyboardInterrupt
        return fitness(candidate)

    state = tmp_path / "search.safetensors"
    with pytest.raises(KeyboardInterrupt):
        evolve(BLOCKS, killed, SHORT, state)
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    told: list[tuple[int, int, float]] = []
    resumed = evolve(BLOCKS, fitness, SHORT, state, lambda *now: told.append(now))
    assert same(resumed, whole)
    assert [generation for generation, _, _ in told] == list(range(stop + 1, 10))
    assert told[-1] == (9, 9, whole.fitness)
    done = evolve(BLOCKS, lambda candidate: math.nan, SHORT, state)
    assert same(done, whole)


def test_seeds_and_generations_differ() -> None:
    whole = evolve(BLOCKS, fitness, SHORT)
    assert same(evolve(BLOCKS, fitness, SHORT), whole)
    assert not same(evolve(BLOCKS, fitness, replace(SHORT, seed=4)), whole)


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "search.safetensors"
    evolve(BLOCKS, fitness, SHORT, state)
    with pytest.raises(UsageError, match="another search, with other parents, seed: give it"):
        evolve(BLOCKS, fitness, replace(SHORT, seed=9, parents=2), state)
    with pytest.raises(UsageError, match="another search, with other blocks"):
        evolve({**BLOCKS, "layers.2": Space(6, 2)}, fitness, SHORT, state)
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="is no state of a search"):
        evolve(BLOCKS, fitness, SHORT, state)
    save_file({"a": torch.zeros(1)}, state)
    with pytest.raises(CheckpointError, match="is no state of a search"):
        evolve(BLOCKS, fitness, SHORT, state)


def test_a_candidate_that_fails_is_never_chosen() -> None:
    def failing(candidate: Candidate) -> float:
        return -math.inf if 0 in candidate["block"][0].argmax(1).tolist() else 1.0

    found = evolve({"block": Space(4, 2)}, failing, replace(SHORT, merging=0))
    assert found.fitness == 1.0
    with pytest.raises(UsageError, match="fitness is NaN"):
        evolve(BLOCKS, lambda candidate: math.nan, SHORT)


def test_rows_of_a_plan() -> None:
    matrix = torch.tensor([[0.0, 0.25, -0.5], [0.0, 0.0, 1.0], [0.3, 0.3, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    rows = rows_of(matrix)
    assert rows == (((2, -0.5), (1, 0.25)), ((2, 1.0),), ((0, 0.3), (1, 0.3)), ((0, 0.0),))
    pruned = evolve(BLOCKS, fitness, replace(SHORT, merging=0)).best["layers.0"]
    plan = BlockPlan(rows_of(pruned[0]), rows_of(pruned[1]))
    plan.check("layers.0", 5)
    assert plan.keeps
    assert plan.experts == one_hot(pruned[0].argmax(1).tolist())


def test_searches_that_make_no_sense_are_refused() -> None:
    for wrong in ({"population": 0}, {"parents": 0}, {"pruning": -1}, {"deviation": 0.0}):
        with pytest.raises(UsageError, match="makes no search"):
            replace(SHORT, **wrong)
    for space in (Space(4, 0), Space(4, 5), Space(4, 3, (0, 0, 1, 1)), Space(4, 4, (0, 0, 0, 1))):
        with pytest.raises(UsageError, match="cannot be kept in"):
            evolve({"block": space}, fitness, SHORT)
    with pytest.raises(UsageError, match="3 blocks cannot be split into 4 depths"):
        evolve(BLOCKS, fitness, replace(SHORT, depths=4))
    with pytest.raises(UsageError, match=r"layers\.0 and layers\.2 cannot share matrices"):
        evolve(BLOCKS, fitness, replace(SHORT, depths=1))
