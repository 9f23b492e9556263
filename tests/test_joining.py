"""Joining experts: against the formulas, and where a joint decomposition is the weighted mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meo_hf.errors import CheckpointError, UsageError
from meo_hf.reduction.joining import Stack, align_members, join, joint_svd, solve_down, weighted_mean

torch.set_num_threads(1)

EXPERTS, NEURONS, WIDTH = 5, 7, 4
KINDS = ("plain", "halves", "interleaved", "apart")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_maps(kind: str, experts: int = EXPERTS, bias: bool = True) -> dict[str, Stack]:
    names = {"plain": ["up_proj"], "apart": ["gate_proj", "up_proj"]}.get(kind, ["gate_up_proj"])
    rows = 2 * NEURONS if kind in ("halves", "interleaved") else NEURONS
    maps: dict[str, Stack] = {}
    for seed, name in enumerate(names):
        maps[name] = drawn(experts, rows, WIDTH, seed=seed), drawn(experts, rows, seed=9 + seed) if bias else None
    maps["down_proj"] = drawn(experts, WIDTH, NEURONS, seed=20), drawn(experts, WIDTH, seed=21) if bias else None
    return maps


def expert(maps: dict[str, Stack], kind: str, x: Tensor) -> Tensor:
    """One expert's answer, from its maps [O, I]."""
    hidden = []
    for name in list(maps)[:-1]:
        weight, bias = maps[name]
        hidden.append(x @ weight.T + (0 if bias is None else bias))
    if kind == "halves":
        hidden = list(hidden[0].chunk(2, -1))
    elif kind == "interleaved":
        hidden = [hidden[0][..., ::2], hidden[0][..., 1::2]]
    inside = torch.nn.functional.silu(hidden[0]) * (hidden[1] if len(hidden) == 2 else 1)
    weight, bias = maps["down_proj"]
    return inside @ weight.T + (0 if bias is None else bias)


def one(maps: dict[str, Stack], number: int) -> dict[str, Stack]:
    return {name: (weight[number], None if bias is None else bias[number]) for name, (weight, bias) in maps.items()}


def shuffled(maps: dict[str, Stack], kind: str, number: int, order: Tensor) -> dict[str, Stack]:
    """An expert with its neurons in another order, done without the shipped code."""
    made: dict[str, Stack] = {}
    for name, (weight, bias) in one(maps, number).items():
        if name == "down_proj":
            made[name] = weight[:, order], bias
            continue
        rows = order
        if kind == "halves":
            rows = torch.cat([order, order + NEURONS])
        elif kind == "interleaved":
            rows = torch.stack([2 * order, 2 * order + 1], 1).flatten()
        made[name] = weight[rows], None if bias is None else bias[rows]
    return made


def with_copy(maps: dict[str, Stack], number: int, copy: dict[str, Stack]) -> dict[str, Stack]:
    made: dict[str, Stack] = {}
    for name, (weight, bias) in maps.items():
        parts = (weight.clone(), None if bias is None else bias.clone())
        for whole, own in zip(parts, copy[name], strict=True):
            if whole is not None and own is not None:
                whole[number] = own
        made[name] = parts
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_aligned_members_are_the_same_functions_in_their_leaders_order(kind: str, bias: bool) -> None:
    maps = drawn_maps(kind, bias=bias)
    order = drawn(NEURONS, seed=5).argsort()
    planted = with_copy(maps, 1, shuffled(maps, kind, 3, order))
    made, match = align_members(planted, (3, 1, 0), kind == "interleaved")
    assert list(made) == list(maps)
    x = drawn(6, WIDTH, seed=6)
    for at, number in enumerate((3, 1, 0)):
        torch.testing.assert_close(expert(one(made, at), kind, x), expert(one(planted, number), kind, x))
    for name, (weight, own) in made.items():
        assert torch.equal(weight[1], maps[name][0][3])
        assert own is None or torch.equal(own[1], planted[name][1][3])
        assert torch.equal(weight[0], maps[name][0][3])
    assert match.after < match.before
    joined = join(planted, ((3, 0.5), (1, 0.5)), "aligned", kind == "interleaved")
    torch.testing.assert_close(expert(joined, kind, x), expert(one(planted, 3), kind, x))
    mean = join(planted, ((3, 0.5), (1, 0.5)), "mean")
    assert not torch.allclose(expert(mean, kind, x), expert(one(planted, 3), kind, x))


def test_mean_is_weighted_and_keeps_its_dtype() -> None:
    members = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.bfloat16)
    made = weighted_mean(members, (0.75, 0.25))
    assert torch.equal(made, torch.tensor([1.5, 3.0], dtype=torch.bfloat16))
    half = torch.tensor([[100.0], [0.0]], dtype=torch.bfloat16)
    assert float(weighted_mean(half, (0.3, 0.7))) == 30  # in bfloat16 the share alone is 0.3008
    maps = drawn_maps("halves")
    row = ((4, 0.2), (2, 0.5), (0, -0.3))
    for name, (weight, bias) in join(maps, row, "mean").items():
        torch.testing.assert_close(weight, sum(share * maps[name][0][old] for old, share in row))
        torch.testing.assert_close(bias, sum(share * maps[name][1][old] for old, share in row))


def by_formula(weights: Tensor, shares: list[float], rank: int) -> Tensor:
    """U S (sum of a_i V_i^T) from a decomposition of [W_1 ... W_G], cut off after `rank` values."""
    u, s, vh = torch.linalg.svd(torch.cat(list(weights), 1), full_matrices=False)
    blocks = vh[:rank].split(weights.shape[2], 1)
    v = sum(share * block for share, block in zip(shares, blocks, strict=True))
    return u[:, :rank] @ torch.diag(s[:rank]) @ v


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.integers(0, 100))
def test_joint_svd_is_the_formula_and_at_full_rank_the_mean(g: int, o: int, i: int, rank: int, seed: int) -> None:
    weights, shares = drawn(g, o, i, seed=seed), drawn(g, seed=seed + 1).softmax(0).tolist()
    torch.testing.assert_close(joint_svd(weights, shares, rank), by_formula(weights, shares, rank))
    mean = weighted_mean(weights, shares)
    torch.testing.assert_close(by_formula(weights, shares, min(o, g * i)), mean)
    torch.testing.assert_close(joint_svd(weights, shares, min(o, g * i)), mean)
    default = joint_svd(weights, shares)
    torch.testing.assert_close(default, by_formula(weights, shares, min(o, i)))
    same = o <= i or g == 1
    assert torch.allclose(default, mean) == same


def test_joint_svd_takes_out_what_no_two_members_share() -> None:
    """Members that share 3 of 40 output directions, with noise: what is gained is the noise outside of them."""
    shared = torch.linalg.qr(drawn(40, 3)).Q
    clean = shared @ drawn(6, 3, 10, seed=1)
    noisy, shares = clean + 0.1 * drawn(6, 40, 10, seed=2), [1 / 6] * 6
    target = weighted_mean(clean, shares)
    errors = {rank: float((joint_svd(noisy, shares, rank) - target).norm()) for rank in (2, 3, 10, 40)}
    assert errors[3] < 0.5 * errors[40]
    assert errors[3] < errors[10] < errors[40] < errors[2]
    assert joint_svd(noisy, shares).equal(joint_svd(noisy, shares, 10))


@pytest.mark.parametrize("kind", ["halves", "interleaved", "apart"])
def test_gate_and_up_are_decomposed_apart(kind: str) -> None:
    maps, row = drawn_maps(kind), ((2, 0.7), (0, 0.3))
    made = join(maps, row, "joint-svd", kind == "interleaved")
    whole = maps.get("gate_up_proj", (None, None))[0]
    if kind == "apart":
        parts, found = [maps["gate_proj"][0], maps["up_proj"][0]], [made["gate_proj"][0], made["up_proj"][0]]
    elif kind == "halves":
        parts, found = list(whole.chunk(2, 1)), list(made["gate_up_proj"][0].chunk(2, 0))
    else:
        parts, found = [whole[:, ::2], whole[:, 1::2]], [made["gate_up_proj"][0][::2], made["gate_up_proj"][0][1::2]]
    for part, one_found in zip(parts, found, strict=True):
        torch.testing.assert_close(one_found, by_formula(part[[2, 0]], [0.7, 0.3], WIDTH))
    mean = join(maps, row, "mean")
    assert not torch.allclose(made[next(iter(maps))][0], mean[next(iter(maps))][0])
    torch.testing.assert_close(made["down_proj"], mean["down_proj"])  # fewer outputs than inputs


@pytest.mark.parametrize("how", ["mean", "aligned", "joint-svd"])
def test_an_expert_alone_stays_as_it_is(how: str) -> None:
    maps = drawn_maps("halves")
    for name, (weight, bias) in join(maps, ((3, 1.0),), how).items():
        assert weight.equal(maps[name][0][3])
        assert bias is not None
        assert bias.equal(maps[name][1][3])


def test_down_projection_is_the_least_squares_solution() -> None:
    hidden, answers = drawn(6, 50), drawn(3, 50, seed=1)
    found = solve_down(answers @ hidden.T, hidden @ hidden.T)
    torch.testing.assert_close(found, torch.linalg.lstsq(hidden.T, answers.T).solution.T)
    torch.testing.assert_close(solve_down(answers @ hidden.T, hidden @ hidden.T, drawn(3, 6, seed=2)), found)


def test_down_projection_with_fewer_tokens_than_neurons() -> None:
    hidden, start = drawn(8, 5), drawn(3, 8, seed=3)
    hidden[7] = hidden[6]
    answers = drawn(3, 5, seed=1)
    products = answers @ hidden.T, hidden @ hidden.T
    least = solve_down(*products)
    torch.testing.assert_close(least, answers @ torch.linalg.pinv(hidden), rtol=1e-6, atol=1e-8)
    near = solve_down(*products, start)
    torch.testing.assert_close(near @ hidden, answers, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        near - start, (answers - start @ hidden) @ torch.linalg.pinv(hidden), rtol=1e-6, atol=1e-8
    )
    assert float((near - start).norm()) < float((least - start).norm())
    rest = torch.eye(8, dtype=torch.float64) - hidden @ torch.linalg.pinv(hidden)
    torch.testing.assert_close(near @ rest, start @ rest)


def test_down_projection_without_tokens() -> None:
    nothing = torch.zeros(3, 4), torch.zeros(4, 4)
    assert not solve_down(*nothing).any()
    start = drawn(3, 4)
    assert solve_down(*nothing, start).equal(start)


def test_directions_that_are_only_rounding_are_left_alone() -> None:
    """Products summed in float64 from activations in bfloat16: a direction of rounding must not blow up."""
    hidden = drawn(4, 200)
    hidden[3] = hidden[2] * (1 + 1e-7 * drawn(200, seed=4))
    found = solve_down(drawn(2, 200, seed=1) @ hidden.T, hidden @ hidden.T)
    assert float(found.abs().max()) < 10
    assert float(solve_down(drawn(2, 200, seed=1) @ hidden.T, hidden @ hidden.T, cutoff=0.0).abs().max()) > 1000


def test_what_cannot_be_joined_is_refused() -> None:
    maps = drawn_maps("plain")
    with pytest.raises(UsageError, match="joined by mean, aligned, joint-svd, not by 'given'"):
        join(maps, ((0, 1.0),), "given")
    with pytest.raises(UsageError, match="at least 1, not 0"):
        joint_svd(drawn(2, 3, 3), (0.5, 0.5), 0)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        joint_svd(torch.full((2, 3, 2), torch.nan), (0.5, 0.5))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        align_members({name: (weight * torch.nan, bias) for name, (weight, bias) in maps.items()}, (0, 1))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        solve_down(torch.ones(2, 2), torch.full((2, 2), torch.inf))
