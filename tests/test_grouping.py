"""Grouping experts: hand-computed groups, planted duplicates, and exactly as many groups as asked for."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.reduction.grouping import (
    Groups,
    adaptive_counts,
    by_agglomeration,
    by_dominant,
    by_k_means,
    roots_of,
    row_of_group,
    shares,
    stands_for,
)

torch.set_num_threads(1)

EQUAL = torch.ones(6)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(of: list[int], width: int = 5) -> Tensor:
    """Experts that are exact copies of independently drawn ones."""
    return drawn(max(of) + 1, width)[of]


def check(groups: Groups, frequency: Tensor, keep: int) -> None:
    assert len(groups) == keep
    assert all(groups)
    assert sorted(expert for group in groups for expert in group) == list(range(len(frequency)))
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    for group in groups:
        assert group[0] == min(group, key=lambda one: (-float(frequency[one]), one))


def test_others_join_the_most_similar_dominant_expert() -> None:
    similarity = torch.tensor(
        [[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.8, 0.7], [0.1, 0.8, 1.0, 0.3], [0.2, 0.7, 0.3, 1.0]], dtype=torch.float64
    )
    assert by_dominant(similarity, torch.tensor([1, 0, 5, 4]), 2) == ((2, 1), (3, 0))
    assert by_dominant(similarity, torch.tensor([5, 0, 1, 4]), 2) == (
        (
            0,
            1,
        ),
        (3, 2),
    )
    assert by_dominant(similarity, torch.tensor([5, 0, 1, 4]), 4) == ((0,), (1,), (2,), (3,))


def test_equal_frequencies_and_similarities_go_to_smaller_numbers() -> None:
    assert by_dominant(torch.ones(4, 4), torch.zeros(4), 2) == ((0, 2, 3), (1,))
    assert by_agglomeration(torch.zeros(4, 3), torch.tensor([0, 0, 2, 2]), 1) == ((2, 0, 1, 3),)


def test_counts_are_spread_by_frequencies_relative_to_their_layer() -> None:
    frequencies = {"a": torch.tensor([1000, 900, 100, 0]), "b": torch.tensor([10, 4, 3, 2])}
    # relative: a 1, .9, .1, 0; b 1, .4, .3, .2
    assert [tuple(adaptive_counts(frequencies, total).values()) for total in range(2, 9)] == [
        (1, 1), (2, 1), (2, 2), (2, 3), (2, 4), (3, 4), (4, 4)
    ]  # fmt: skip
    assert adaptive_counts(frequencies, 5, least=2) == {"a": 2, "b": 3}
    assert adaptive_counts({"a": torch.zeros(3), "b": torch.zeros(3)}, 3) == {"a": 2, "b": 1}
    for total, least in ((1, 1), (9, 1), (4, 5), (5, 3), (4, 0)):
        with pytest.raises(UsageError, match="cannot be spread over 2 blocks"):
            adaptive_counts(frequencies, total, least)


def test_agglomeration_is_by_mean_distances() -> None:
    # 0 and 1 join. 3 is then 2.5 from them on average, at most 3, and 2.7 from 5.7.
    line = torch.tensor([[0.0], [1.0], [3.0], [5.7]])
    frequency = torch.tensor([0, 2, 3, 1])
    assert by_agglomeration(line, frequency, 3) == ((1, 0), (2,), (3,))
    assert by_agglomeration(line, frequency, 2) == ((2, 0, 1), (3,))
    # 3 is 2 from 1, but 2.5 on average, and 2.4 from 5.4.
    assert by_agglomeration(torch.tensor([[0.0], [1.0], [3.0], [5.4]]), EQUAL[:4], 2) == ((0, 1), (2, 3))


def test_cosine_ignores_lengths() -> None:
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0], [0.0, 8.0], [0.0, 0.0]])
    assert by_agglomeration(values, EQUAL[:5], 3, "cosine") == ((0, 2), (1, 3), (4,))
    assert by_agglomeration(values, EQUAL[:5], 3) == ((0, 1, 4), (2,), (3,))
    assert by_k_means(values[:4], EQUAL[:4], 2) == ((0, 2), (1, 3))


@pytest.mark.parametrize("seed", range(5))
def test_planted_copies_are_found(seed: int) -> None:
    of = [0, 1, 0, 2, 1, 0]
    frequency = torch.tensor([1, 0, 2, 0, 3, 0])
    expected = ((2, 0, 5), (3,), (4, 1))
    values = planted(of)
    assert by_agglomeration(values, frequency, 3) == expected
    assert by_k_means(values, frequency, 3, seed) == expected
    unit = values / values.norm(dim=1, keepdim=True)
    assert by_k_means(roots_of(unit @ unit.T), frequency, 3, seed) == expected


def test_roots_have_the_given_products() -> None:
    values = drawn(4, 3)
    roots = roots_of(values @ values.T)
    torch.testing.assert_close(roots @ roots.T, values @ values.T)
    torch.testing.assert_close(
        roots_of(torch.diag(torch.tensor([4.0, -1.0]))).abs().amax(0), EQUAL.new_tensor([0, 2]).double()
    )


def test_seeds_give_other_starts() -> None:
    values, frequency = drawn(40, 20), torch.ones(40)
    assert len({by_k_means(values, frequency, 10, seed) for seed in range(3)}) > 1


def test_k_means_finds_the_best_of_all_divisions() -> None:
    """Against a plain search: of all divisions of 7 experts in two, the one with the largest sum of cosines."""
    for seed in range(4):
        unit = torch.nn.functional.normalize(drawn(7, 3, seed=seed), dim=1)

        def quality(groups: Groups, unit: Tensor = unit) -> float:
            return sum(float(unit[list(group)].sum(0).norm()) for group in groups)

        best = max(
            quality((tuple(e for e in range(7) if mask >> e & 1), tuple(e for e in range(7) if not mask >> e & 1)))
            for mask in range(1, 127)
        )
        assert quality(by_k_means(unit, EQUAL.new_ones(7), 2)) == pytest.approx(best)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 3))
def test_every_method_makes_exactly_as_many_groups(of: list[int], keep: int, seed: int) -> None:
    keep = min(keep, len(of))
    values = planted(of)
    frequency = torch.tensor(of)
    check(by_agglomeration(values, frequency, keep), frequency, keep)
    check(by_agglomeration(values, frequency, keep, "cosine"), frequency, keep)
    check(by_dominant(values @ values.T, frequency, keep), frequency, keep)
    groups = by_k_means(values, frequency, keep, seed)
    check(groups, frequency, keep)
    assert by_k_means(values, frequency, keep, seed) == groups
    assert [groups[at][0] for at in stands_for(groups)] == [
        next(group[0] for group in groups if expert in group) for expert in range(len(of))
    ]


def test_more_groups_than_different_experts() -> None:
    for values in (torch.zeros(5, 2), torch.eye(2)[[0] * 5], planted([0, 0, 0, 1, 1])):
        for keep in range(1, 6):
            check(by_k_means(values, EQUAL[:5], keep), EQUAL[:5], keep)
            check(by_agglomeration(values, EQUAL[:5], keep), EQUAL[:5], keep)


def test_shares_are_parts_of_the_frequency() -> None:
    frequency = torch.tensor([3, 0, 1, 0])
    assert shares((0, 2), frequency) == (0.75, 0.25)
    assert shares((1, 3), frequency) == (0.5, 0.5)
    assert row_of_group((2, 1), frequency) == ((2, 1.0), (1, 0.0))


def test_what_cannot_be_grouped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    values = drawn(3, 2)
    for keep in (0, 4):
        for group in (by_dominant, by_agglomeration, by_k_means):
            with pytest.raises(UsageError, match="a block of 3 experts cannot have"):
                group(values, EQUAL[:3], keep)
    with pytest.raises(UsageError, match="distances are euclidean or cosine, not 'cityblock'"):
        by_agglomeration(values, EQUAL[:3], 2, "cityblock")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        by_k_means(torch.full((3, 2), torch.nan), EQUAL[:3], 2)
    monkeypatch.setitem(sys.modules, "scipy.cluster", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'meo_hf\[align\]'"):
        by_agglomeration(values, EQUAL[:3], 2)
