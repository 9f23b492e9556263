"""What observers are shown, and the statistics made of it, against loops over stock blocks."""

from __future__ import annotations

import statistics as plain
import threading
from pathlib import Path

import pytest
import torch
from accelerate.utils.offload import OffloadedWeightsLoader
from contracts import assert_close, assert_differs
from meo_hf.modeling.moe_meo import merged_moe
from moe_contracts import MoeCase, moe_modules
from observed import SELECTS_ONE, Tokens, batches_of, every_statistic, prepared, rows_of, tokens_by_block, weights_of
from reduction_tiny import bench_of, source_of
from torch import Tensor
from unmerged_reference import case_of, count_of

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.reduction.by_layer import is_offloaded, layers_around
from meo_hf.reduction.calibration import Batch
from meo_hf.reduction.down_fit import DownFit
from meo_hf.reduction.joined import linear_maps
from meo_hf.reduction.loading import unmerged_class
from meo_hf.reduction.observing import BlockView, ExpertView, Observer, observe
from meo_hf.reduction.statistics import (
    Frequency,
    MeanOutput,
    Reap,
    TailRatio,
    untouched,
    weighted_median,
)

torch.set_num_threads(1)
FAMILIES = (
    "mixtral",
    "olmoe",
    "deepseek_v3",
    "gpt_oss",
    "dbrx",
    "jetmoe",
    "llama4_text",
    "switch_transformers",
    "nllb-moe",
    "longcat_flash",
)
STATEFUL = ("jamba", "qwen3_next", "gemma4_text", "deepseek_v4")  # their layers take and share more than tokens


def expected(tokens: Tokens, weights: Tensor, gated: bool = True, weighed: bool = True) -> list[Tensor]:
    """Return what `every_statistic` should find, token by token; `gated` and `weighed` break it."""
    count, experts = tokens.answers.shape[:2]
    found = [torch.zeros(experts, dtype=torch.float64) for _ in range(5)]
    mean = torch.zeros(experts, tokens.answers.shape[-1], dtype=torch.float64)
    repeated = []
    for t in range(count):
        v = float(weights[t]) if weighed else 1.0
        total = float(tokens.gates[t].sum())
        for e in range(experts):
            gate = float(tokens.gates[t, e])
            mean[e] += v * tokens.answers[t, e]
            if gate == 0:
                continue
            size = float(tokens.answers[t, e].pow(2).sum()) ** 0.5
            for place, value in enumerate(
                (1.0, gate, size, size * (gate / total if gated else 1), size * (gate if gated else 1))
            ):
                found[place][e] += v * value
        ordered = sorted((float(g) for g in tokens.gates[t] if g > 0), reverse=True)
        if len(ordered) > 1:
            half = -(-len(ordered) // 2)
            repeated += [sum(ordered[half:]) / sum(ordered[:half])] * int(v)
    reached = found[0].clamp(min=1e-300)
    logits = tokens.logits * (weights if weighed else torch.ones_like(weights)).sqrt()[:, None]
    alike = [[float(F_cosine(logits[:, a], logits[:, b])) for b in range(experts)] for a in range(experts)]
    made = [found[0], found[1], *(one / reached for one in found[2:])]
    made += [mean / float(weights.sum() if weighed else count), torch.tensor(alike, dtype=torch.float64)]
    return [*made, *([torch.tensor(plain.median(repeated), dtype=torch.float64)] if repeated else [])]


def F_cosine(a: Tensor, b: Tensor) -> Tensor:  # noqa: N802
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_their_formulas(family: str) -> None:
    case, stock, model, rows, weights = prepared(family)
    tokens, flat = tokens_by_block(case, stock, model, rows), torch.cat(weights)
    found = every_statistic(family)
    observe(model, batches_of(rows, weights, 4), found)
    assert list(found[0].result()) == list(moe_modules(stock))
    for path, own in tokens.items():
        for one, right in zip(found, expected(own, flat), strict=True):
            assert_close(one.result()[path], right, 2e-5)
        broken = [expected(own, flat, gated=False), expected(own, flat, weighed=False)]
        if family not in SELECTS_ONE:
            assert_differs(found[3].result()[path], broken[0][3])
        assert_differs(found[4].result()[path], broken[0][4])
        for place in range(7):  # a median may stay as it is
            assert_differs(found[place].result()[path], broken[1][place], 1e-5)


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_padding_that_counted_would_show(family: str) -> None:
    _, _, model, rows, weights = prepared(family)
    right, wrong, again = every_statistic(family), every_statistic(family), every_statistic(family)
    batches = batches_of(rows, weights, 4)
    observe(model, batches, right)
    observe(model, batches_of(rows, weights, 1), again)
    observe(model, [Batch(b.input_ids, torch.ones_like(b.attention_mask), b.token_weights + 1) for b in batches], wrong)
    for one, other, alone in zip(right, wrong, again, strict=True):
        path = next(iter(one.result()))
        assert_differs(one.result()[path], other.result()[path], 1e-4)
        assert_close(one.result()[path], alone.result()[path], 1e-6)


class Calls(Observer):
    """Notes what it is shown, and routes again."""

    reads = "routed"

    def __init__(self) -> None:
        self.blocks: list[BlockView] = []
        self.experts: list[tuple[str, int, int]] = []

    def see(self, block: BlockView) -> None:
        self.blocks.append(block)

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        self.experts.append((block.path, expert.number, len(expert.token)))
        assert torch.equal(block.gates[expert.token, expert.slot], expert.gates)


@pytest.mark.parametrize(
    "family", ["gpt_oss", "dbrx", "jetmoe", "llama4_text", "nllb-moe", "deepseek_v4", "gemma4_text"]
)
def test_a_view_carries_the_router_and_its_call(family: str) -> None:
    _, stock, model, rows, weights = prepared(family)
    model.float()  # in double precision tokens that see nothing become NaN
    seen = Calls()
    observe(model, batches_of(rows, weights, 3), [seen])
    assert [b.path for b in seen.blocks] == list(moe_modules(stock)) * 2
    assert len(seen.experts) == len(seen.blocks) * count_of(stock)
    assert sum(count for *_, count in seen.experts) == sum(block.index.numel() for block in seen.blocks)
    for block in seen.blocks:
        with torch.no_grad():
            output = block.call.again()
        places = dict(zip(("logits", "weights", "index"), block.call.router.places, strict=True))
        gates = output[places["weights"]].reshape(len(block.real), -1)[block.real]
        index = output[places["index"]].reshape(len(block.real), -1)[block.real]
        assert torch.equal(gates, block.gates)
        assert torch.equal(index, block.index)
        assert (
            block.weights.sum() == sum(own.sum() for own in weights[:3])
            or block in seen.blocks[len(seen.blocks) // 2 :]
        )


@pytest.mark.parametrize("family", [*FAMILIES[:1], *FAMILIES[3:9], *STATEFUL])
def test_layer_by_layer_is_batch_by_batch(family: str) -> None:
    _, _, model, rows, weights = prepared(family)
    model.float()  # as above
    one, other = [Reap(), MeanOutput()], [Reap(), MeanOutput()]
    batches = batches_of(rows, weights, 2)
    order = Calls()
    observe(model, batches, one)
    observe(model, batches, [*other, order], by_layer=True)
    for a, b in zip(one, other, strict=True):
        assert a.result().keys() == b.result().keys()
        assert all(torch.equal(value, b.result()[path]) for path, value in a.result().items())
    with pytest.raises(UsageError, match="reads = 'all'"):
        observe(model, batches, [Careless()])
    paths = [block.path for block in order.blocks]
    assert paths == [path for path in dict.fromkeys(paths) for _ in batches]


@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_offloaded_weights_are_loaded_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_of(source_of(family, tmp_path / "model"))
    made, config = unmerged_class(work.source, work.family, work.mixture)
    whole = made.from_pretrained(tmp_path / "model", config=config, dtype=torch.float32)
    layers = layers_around(whole, list(work.mixture.blocks))
    outside = [name for name, _ in whole.named_modules() if name and not any(k.startswith(f"{name}.") for k in layers)]
    places = {name: "cpu" for name in outside if not any(f"{name}.".startswith(f"{layer}.") for layer in layers)}
    places |= dict.fromkeys(layers, "disk")
    model = made.from_pretrained(
        tmp_path / "model", config=config, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "off"
    )
    assert is_offloaded(model)
    rows = rows_of(family)
    batches = batches_of(rows, weights_of(rows), 1)
    loads: list[str] = []
    load = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda self, key: (loads.append(key), load(self, key))[1]
    )
    found, right = Reap(), Reap()
    observe(model, batches, [found])
    observe(whole, batches, [right])
    assert sorted(loads) == sorted(set(loads))
    assert len(loads) >= len(layers)
    assert all(torch.equal(value, right.result()[path]) for path, value in found.result().items())
    assert all(parameter.is_meta for parameter in next(iter(layers_around(model, list(layers)).values())).parameters())


class Careless(Observer):
    """Reads answers that it did not ask for."""

    reads = "routed"

    def see_expert(self, block: BlockView, expert: ExpertView) -> None:
        expert.answers()


class Interrupts(Observer):
    """Stops everything at the third thing it is shown."""

    left = 3

    def see(self, block: BlockView) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("by_layer", [False, True])
def test_an_interrupt_leaves_the_model_as_it_was(by_layer: bool) -> None:
    _, _, model, rows, weights = prepared("mixtral")
    batches = batches_of(rows, weights, 2)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        observe(model, batches, [Interrupts()], by_layer=by_layer)
    assert model.training
    assert not [thread for thread in threading.enumerate() if thread.name == "meo-hf batch"]
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for layer in model.model.layers for module in layer.modules()
    )
    assert all("_run_each" not in module.__dict__ for _, module in merged_moe(model))


def test_only_named_blocks_are_shown_and_unknown_ones_refused() -> None:
    _, stock, model, rows, weights = prepared("mixtral")
    path, seen = list(moe_modules(stock))[1], Frequency()
    observe(model, batches_of(rows, weights, 2), [seen], blocks=[path])
    assert list(seen.result()) == [path]
    with pytest.raises(UsageError, match="is no block"):
        observe(model, batches_of(rows, weights, 2), [seen], blocks=["model.layers.9.mlp"])
    with pytest.raises(UsageError, match="unmerged"):
        observe(MoeCase("mixtral").merged(stock), batches_of(rows, weights, 2), [seen])


def test_numbers_that_are_not_finite_are_refused() -> None:
    _, _, model, rows, weights = prepared("mixtral")
    model.model.embed_tokens.weight.data[int(rows[0][0])] = float("inf")
    with pytest.raises(UnsupportedError, match="not finite"):
        observe(model, batches_of(rows, weights, 2), [Frequency()])


def test_statistics_refuse_what_is_not_there() -> None:
    _, _, model, rows, weights = prepared("switch_transformers")
    with pytest.raises(UsageError, match="none to skip"):
        observe(model, batches_of(rows, weights, 2), [TailRatio()])
    frequency = Frequency()
    observe(model, batches_of([torch.tensor([5])], [torch.ones(1)], 1), [frequency])
    lost = untouched(frequency.result())
    assert {path: 6 - len(experts) for path, experts in lost.items()} == dict.fromkeys(frequency.result(), 1)


def test_the_median_counts_weights() -> None:
    def median(values: list[float], weights: list[float]) -> float:
        return float(weighted_median(*(torch.tensor(each, dtype=torch.float64) for each in (values, weights))))

    assert median([3, 1, 2], [1, 1, 1]) == 2
    assert median([4, 1, 2, 3], [1, 1, 1, 1]) == 2.5
    assert median([3, 1, 2], [5, 1, 1]) == 3
    assert median([3, 1], [1, 1]) == 2
    assert median([7], [2]) == 7
    assert median([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.6]) == pytest.approx(3.5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "jetmoe", "llama4_text", "nllb-moe"])
def test_fitted_down_projections_answer_best(family: str) -> None:
    case = case_of(family)
    model = case.merged(case.stock(), level="unmerged")
    rows = rows_of(family, (8,) * 9)
    weights, row = weights_of(rows), ((2, 0.25), (0, 0.75))
    batches = batches_of(rows, weights, 4)
    path, module = next((one._meo.path, one) for _, one in merged_moe(model))
    fit, seen = DownFit({path: (((1, 1.0),), row)}), Calls()
    observe(model, batches, [fit, seen])
    assert float(fit.result()[path]) == 1
    x, v = (
        torch.cat([getattr(block, name) for block in seen.blocks if block.path == path]) for name in ("x", "weights")
    )
    with torch.no_grad():
        wanted = sum(share * module.expert(old, x) for old, share in row)
        maps = linear_maps(module)
        for weight, bias in maps.values():
            for tensor in (weight, bias):
                if tensor is not None:
                    tensor.data[0] = sum(share * tensor[old] for old, share in row)
    down = maps[list(maps)[-1]][0]

    def slope(matrix: Tensor) -> tuple[float, float]:
        """Return the loss and the size of its gradient where the merged expert's last map is `matrix`."""
        down.data[0] = matrix
        model.zero_grad()
        loss = (v[:, None] * (module.expert(0, x) - wanted).pow(2)).sum()
        (gradient,) = torch.autograd.grad(
            loss, [next(p for p in model.parameters() if p.data_ptr() == down.data_ptr())]
        )
        return float(loss.detach()), float(gradient.norm())

    mean = down[0].detach().clone()
    before, after = slope(mean), slope(fit.solve(path, 1))
    assert after[0] < 0.9 * before[0]
    assert after[1] < 1e-5 * before[1]
