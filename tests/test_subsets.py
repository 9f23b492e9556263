"""Which experts to keep: the loss against a plain reference, planted duplicates found, every subset or a beam."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.subsets import ENUMERATED, OutputGrams, search_subsets, subset_loss

torch.set_num_threads(1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routed(logits: Tensor, kept: tuple[int, ...], top_k: int = 2) -> Tensor:
    """Dense gates [T, E] of a router that knows the kept experts only: softmax of the top ones' logits."""
    masked = torch.full_like(logits, -math.inf)
    masked[:, list(kept)] = logits[:, list(kept)]
    values, index = masked.topk(min(top_k, len(kept)))
    return torch.zeros_like(logits).scatter(1, index, values.softmax(1))


def answers(outputs: Tensor, gates: Tensor) -> Tensor:
    return torch.stack([sum(g * f for g, f in zip(gates[t], outputs[t], strict=True)) for t in range(len(gates))])


def kept_loss(outputs: list[Tensor], logits: list[Tensor]) -> Callable[[tuple[int, ...]], float]:
    grams = OutputGrams()
    for batch in outputs:
        grams.add(batch)
    everyone = tuple(range(logits[0].shape[1]))
    full = [routed(batch, everyone) for batch in logits]
    return lambda kept: subset_loss(grams, full, [routed(batch, kept) for batch in logits])


def of_parts(weights: list[float]) -> Callable[[tuple[int, ...]], float]:
    """A loss that is the sum of the dropped experts' weights, so the best subset is known."""
    return lambda kept: math.fsum(weight for one, weight in enumerate(weights) if one not in kept)


@pytest.mark.parametrize("width", [3, 5, 9])
def test_loss_is_the_change_of_the_blocks_answer(width: int) -> None:
    """With Grams and with answers themselves; two batches' norms are added."""
    outputs, logits = [drawn(4, 5, width), drawn(3, 5, width, seed=1)], [drawn(4, 5, seed=2), drawn(3, 5, seed=3)]
    loss = kept_loss(outputs, logits)
    for kept in itertools.combinations(range(5), 3):
        expected = sum(
            float((answers(f, routed(z, kept)) - answers(f, routed(z, tuple(range(5))))).norm())
            for f, z in zip(outputs, logits, strict=True)
        )
        assert loss(kept) == pytest.approx(expected)
    assert loss(tuple(range(5))) == 0


def test_smaller_of_grams_and_answers_is_kept() -> None:
    grams = OutputGrams()
    for width in (3, 5, 9):
        grams.add(drawn(2, 5, width).bfloat16())
    assert [tuple(batch.shape) for batch in grams.batches] == [(2, 5, 3), (2, 5, 5), (2, 5, 5)]
    assert {batch.dtype for batch in grams.batches} == {torch.float32}


def test_loss_by_hand() -> None:
    grams = OutputGrams()
    grams.add(torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]], [[torch.nan] * 2] * 2]))
    full = [torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])]
    new = [torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])]
    # token 0: 0.5 (3, 0) - 0.5 (0, 4), of length 2.5; token 1: equal experts change nothing; token 2 is padding
    assert subset_loss(grams, full, new, [torch.tensor([1.0, 1.0, 0.0])]) == pytest.approx(2.5)
    assert subset_loss(grams, full, new, [torch.tensor([4.0, 1.0, 0.0])]) == pytest.approx(5.0)
    assert math.isnan(subset_loss(grams, full, new))


def test_planted_duplicates_and_silent_experts_go() -> None:
    """Of six experts, 4 copies 1 with its router row, and 2 answers nothing and is never selected."""
    for seed in range(3):
        outputs, logits = drawn(40, 6, 8, seed=seed), drawn(40, 6, seed=seed + 10)
        outputs[:, 4] = outputs[:, 1]
        logits[:, 2] = -50
        logits[:, 4] = -40
        loss = kept_loss([outputs], [logits])
        found = search_subsets(6, 4, loss)
        assert found.kept == (0, 1, 3, 5)
        assert found.loss == pytest.approx(0, abs=1e-9)
        assert search_subsets(6, 4, loss, limit=0).kept == found.kept


def test_gates_are_those_of_the_router_that_is_left() -> None:
    """One of two alike experts can go if the other gets its gate; gates that are only cut off would say otherwise."""
    outputs = torch.zeros(1, 3, 2, dtype=torch.float64)
    outputs[0] = torch.tensor([[4.0, 0.0], [4.0, 0.1], [0.0, 1.0]])
    logits = torch.log(torch.tensor([[0.45, 0.35, 0.2]], dtype=torch.float64))
    grams = OutputGrams()
    grams.add(outputs)
    full = logits.softmax(1)

    def masked(kept: tuple[int, ...], again: bool) -> Tensor:
        gates = torch.where(torch.tensor([one in kept for one in range(3)]), full, 0)
        return gates / gates.sum() if again else gates

    assert search_subsets(3, 2, lambda kept: subset_loss(grams, [full], [masked(kept, True)])).kept == (0, 2)
    assert search_subsets(3, 2, lambda kept: subset_loss(grams, [full], [masked(kept, False)])).kept == (0, 1)


def test_all_subsets_are_tried_where_they_are_few() -> None:
    tried: list[tuple[int, ...]] = []

    def loss(kept: tuple[int, ...]) -> float:
        tried.append(kept)
        return 1.0

    found = search_subsets(5, 3, loss)
    assert tried == list(itertools.combinations(range(5), 3))
    assert (found.kept, found.loss, found.how, found.evaluated) == ((0, 1, 2), 1.0, "enumerated 10 subsets", 10)
    assert search_subsets(3, 3, loss).how == "enumerated 1 subset"
    assert math.comb(14, 7) <= ENUMERATED < math.comb(16, 8)


def test_a_beam_says_how_far_it_looked() -> None:
    found = search_subsets(6, 3, of_parts([3, 1, 4, 1, 5, 9]), limit=0)
    assert found.kept == (2, 4, 5)
    assert found.evaluated == 6 + 5 + 4
    assert found.how == "beam search of width 1 over 15 subsets"
    assert search_subsets(6, 3, of_parts([1] * 6), limit=0).kept == (0, 1, 2)


def test_a_wider_beam_finds_what_a_greedy_one_misses() -> None:
    """Without 0 the loss is least at first, but the best pair to drop is 1 with 2."""
    pairs = {frozenset({1, 2}): 0.0}
    single = [1.0, 2.0, 2.0, 3.0]

    def loss(kept: tuple[int, ...]) -> float:
        dropped = frozenset(range(4)) - set(kept)
        return pairs.get(dropped, sum(single[one] for one in dropped))

    assert search_subsets(4, 2, loss, width=1, limit=0).kept == (1, 3)
    assert search_subsets(4, 2, loss, width=2, limit=0).kept == search_subsets(4, 2, loss).kept == (0, 3)


def test_router_groups_keep_equally_many() -> None:
    weights, groups = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0], [0, 1, 0, 1, 0, 1]
    best = min(
        (of_parts(weights)(kept), kept)
        for kept in itertools.combinations(range(6), 4)
        if sum(one % 2 for one in kept) == 2
    )
    enumerated = search_subsets(6, 4, of_parts(weights), groups=groups)
    assert (enumerated.loss, enumerated.kept) == best
    assert enumerated.evaluated == 9
    assert search_subsets(6, 4, of_parts(weights), groups=groups, limit=0).kept == best[1]
    assert search_subsets(6, 4, of_parts(weights)).kept != best[1]
    for keep, of in ((3, groups), (4, [0, 0, 0, 0, 0, 1])):
        with pytest.raises(UsageError, match="2 groups of experts"):
            search_subsets(6, keep, of_parts(weights), groups=of)


@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 5))
def test_a_beam_that_holds_everything_finds_the_best(seed: int, experts: int, keep: int) -> None:
    keep = min(keep, experts)
    loss = kept_loss([drawn(5, experts, 4, seed=seed)], [drawn(5, experts, seed=seed + 1)])
    best = search_subsets(experts, keep, loss)
    assert best.evaluated == math.comb(experts, keep)
    assert best.loss == min(map(loss, itertools.combinations(range(experts), keep)))
    wide, greedy = (search_subsets(experts, keep, loss, width=width, limit=0) for width in (100, 1))
    assert (wide.kept, wide.loss) == (best.kept, best.loss)
    assert greedy.loss >= best.loss
    assert len(greedy.kept) == keep


def test_what_cannot_be_kept_is_refused() -> None:
    for keep in (0, 5):
        with pytest.raises(UsageError, match="a block of 4 experts cannot keep"):
            search_subsets(4, keep, of_parts([1.0] * 4))
    with pytest.raises(UsageError, match="a beam holds at least 1 subset"):
        search_subsets(4, 2, of_parts([1.0] * 4), width=0)
    with pytest.raises(UsageError, match="2 group numbers were given for 4 experts"):
        search_subsets(4, 2, of_parts([1.0] * 4), groups=[0, 1])
    with pytest.raises(CheckpointError, match="the loss is nan"):
        search_subsets(4, 2, lambda kept: math.nan)
