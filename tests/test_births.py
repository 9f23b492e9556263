"""How experts are born: copies, noise, drop-upcycling, or one checkpoint each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import identical, same_tensors, saved, tensors
from tiny import tiny_dense
from torch import Tensor

from meo_hf import convert
from meo_hf.conversion.births import NOISE
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError

LAYERS, NEURONS, FEATURES, EXPERTS = 2, 150, 64, 3
WIDE = {"hidden_size": FEATURES, "intermediate_size": NEURONS}
# a path per matrix, gate first; how to read it as [neurons, features]
LAYOUTS = {
    "bert": (("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"), False, WIDE),
    "gpt2": (
        ("transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj"),
        False,
        {"n_embd": FEATURES, "n_inner": NEURONS},
    ),
    "llama": (
        ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"),
        False,
        {**WIDE, "mlp_bias": True},
    ),
    "phi3": (("model.layers.{}.mlp.gate_up_proj", "model.layers.{}.mlp.down_proj"), True, WIDE),
    "modernbert": (("model.layers.{}.mlp.Wi", "model.layers.{}.mlp.Wo"), True, {**WIDE, "mlp_bias": True}),
}


def odd_source(family: str, folder: Path) -> Path:
    """Write a model whose matrices have means and deviations of their own."""
    model = tiny_dense(family, **LAYOUTS[family][2])
    paths, fused, _ = LAYOUTS[family]
    with torch.no_grad():
        for layer in range(LAYERS):
            for number, path in enumerate(paths):
                weight = model.get_submodule(path.format(layer)).weight
                parts = weight.chunk(2) if fused and number == 0 else (weight,)
                for half, part in enumerate(parts):
                    part.mul_(2.0 + layer + half).add_(number - 0.5 + 2 * half)
    model.save_pretrained(folder)
    return folder


def dense_matrices(family: str, folder: Path, layer: int) -> list[Tensor]:
    """Return gate, up and down, or up and down, each [neurons, features]."""
    paths, fused, _ = LAYOUTS[family]
    stored = tensors(folder)
    weights = [stored[f"{path.format(layer)}.weight"] for path in paths]
    oriented = [w.t() if family == "gpt2" else w for w in weights]
    return [*(oriented[0].chunk(2) if fused else oriented[:-1]), oriented[-1].t()]


def expert_matrices(family: str, folder: Path, layer: int) -> list[Tensor]:
    """Return the same of a conversion, each [experts, neurons, features]."""
    prefix = LAYOUTS[family][0][0].partition("{}")[0] + f"{layer}."
    stored = {n: t for n, t in tensors(folder).items() if n.startswith(prefix)}
    first = next(t for n, t in stored.items() if n.endswith(("experts.up_proj", "experts.gate_up_proj")))
    down = next(t for n, t in stored.items() if n.endswith("experts.down_proj"))
    gated = first.shape[1] == 2 * NEURONS
    return [*(first.chunk(2, 1) if gated else (first,)), down.mT]


def biases(folder: Path) -> list[Tensor]:
    return [t for n, t in tensors(folder).items() if n.endswith("_proj_bias")]


@pytest.fixture(params=LAYOUTS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_copies_are_the_source(family: str, tmp_path: Path) -> None:
    convert(odd_source(family, tmp_path / "dense"), tmp_path / "meo", num_experts=EXPERTS, verify="none")
    for layer in range(LAYERS):
        dense = dense_matrices(family, tmp_path / "dense", layer)
        experts = expert_matrices(family, tmp_path / "meo", layer)
        for before, after in zip(dense, experts, strict=True):
            assert all(identical(before, expert) for expert in after)


def test_noise_is_a_hundredth_of_each_matrix(family: str, tmp_path: Path) -> None:
    convert(
        odd_source(family, tmp_path / "dense"),
        tmp_path / "meo",
        num_experts=EXPERTS,
        expert_init="noise",
        verify="none",
    )
    drawn = []
    for layer in range(LAYERS):
        dense = dense_matrices(family, tmp_path / "dense", layer)
        for before, after in zip(dense, expert_matrices(family, tmp_path / "meo", layer), strict=True):
            noise = after - before
            assert abs(float(noise.std()) / (NOISE * float(before.std())) - 1) < 0.05
            assert abs(float(noise.mean())) < 0.05 * float(noise.std())
            drawn += [expert.flatten()[:FEATURES] / noise.std() for expert in noise]
    similarity = torch.stack(drawn).corrcoef().fill_diagonal_(0).abs()
    assert float(similarity.max()) < 0.8, "two experts, matrices or layers share their noise"
    assert all((bias == bias[0]).all() for bias in biases(tmp_path / "meo")), "biases are copied"


def test_drop_upcycling_redraws_half_of_the_neurons(family: str, tmp_path: Path) -> None:
    """The same neurons in gate, up and down; new entries like those they replace; the rest to the bit."""
    source = odd_source(family, tmp_path / "dense")
    convert(source, tmp_path / "meo", num_experts=EXPERTS, expert_init="drop-upcycle", verify="none")
    redrawn = set()
    for layer in range(LAYERS):
        dense = dense_matrices(family, source, layer)
        experts = expert_matrices(family, tmp_path / "meo", layer)
        assert len(experts) == len(dense)
        for expert in range(EXPERTS):
            changed = [(after[expert] != before).any(1) for before, after in zip(dense, experts, strict=True)]
            assert all(torch.equal(changed[0], other) for other in changed), "projections lost different neurons"
            assert int(changed[0].sum()) == NEURONS // 2
            redrawn.add(tuple(changed[0].tolist()))
            for before, after in zip(dense, experts, strict=True):
                old, new = before[changed[0]], after[expert][changed[0]]
                assert bool((old != new).all()), "a neuron was redrawn in part"
                assert abs(float(new.std() / old.std()) - 1) < 0.06
                assert abs(float(new.mean() - old.mean())) < 0.06 * float(old.std())
    assert len(redrawn) == LAYERS * EXPERTS, "layers or experts share their choice"
    assert all((bias == bias[0]).all() for bias in biases(tmp_path / "meo")), "biases are copied"


def fine_tunes(folder: Path, family: str, count: int = 3, **overrides: object) -> list[Path]:
    """Write checkpoints that differ from each other in every tensor."""
    paths = []
    for number in range(count):
        model = tiny_dense(family, **overrides)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / f"expert{number}")
        paths.append(folder / f"expert{number}")
    return paths


def part_of(family: str, stack: str, expert: Path) -> Tensor:
    """Return what a stack should hold of one expert, from its checkpoint."""
    stored, kind = tensors(expert), "bias" if stack.endswith("_bias") else "weight"
    slot, _, name = stack.removesuffix("_bias").rpartition(".experts.")
    if family == "llama":
        names = ["gate_proj", "up_proj"] if name == "gate_up_proj" else ["down_proj"]
        return torch.cat([stored[f"{slot}.{n}.{kind}"] for n in names])
    owner = slot.removesuffix(".intermediate.dense").removesuffix(".c_fc")
    paths = {"bert": ("intermediate.dense", "output.dense"), "gpt2": ("c_fc", "c_proj")}[family]
    weight = stored[f"{owner}.{paths[name == 'down_proj']}.{kind}"]
    return weight.t() if family == "gpt2" and kind == "weight" else weight


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_one_expert_per_checkpoint(family: str, tmp_path: Path) -> None:
    source, experts = saved(family, tmp_path / "dense"), fine_tunes(tmp_path, family)
    convert(source, tmp_path / "meo", experts=experts, verify="none")
    made, before = tensors(tmp_path / "meo"), tensors(source)
    stacks = {n: t for n, t in made.items() if ".experts." in n}
    assert len(stacks) >= 2 * LAYERS
    for name, stack in stacks.items():
        assert stack.shape[0] == len(experts)
        for number, expert in enumerate(experts):
            assert identical(stack[number], part_of(family, name, expert)), (name, number)
    outside = {n: t for n, t in made.items() if ".experts." not in n and ".router." not in n}
    assert outside
    assert not same_tensors(outside, {name: before[name] for name in outside})


def test_what_experts_change_outside_is_reported(tmp_path: Path) -> None:
    source, experts = saved("bert", tmp_path / "dense"), fine_tunes(tmp_path, "bert", 2)
    same = saved("bert", tmp_path / "same")
    report = convert(source, tmp_path / "meo", experts=[*experts, same], verify="sample")
    outside = {n for n in tensors(source) if "intermediate.dense" not in n and ".output.dense" not in n}
    outside |= {n for n in tensors(source) if "attention.output" in n}
    counts = {Path(e["id"]).name: e["outside_differing"] for e in report.experts}
    assert counts == {"expert0": len(outside), "expert1": len(outside), "same": 0}
    assert [f"expert0 differs from the source in {len(outside)} tensors" in w for w in report.warnings] == [True, False]
    assert not any("same differs" in warning for warning in report.warnings)
    card = (tmp_path / "meo/README.md").read_text()
    assert "expert0 differs from the source" in card
    assert str(tmp_path) not in card, "a path of this machine is nobody's business"
    assert report.passed


def test_unchecked_experts_are_said_to_be_unchecked(tmp_path: Path) -> None:
    experts = fine_tunes(tmp_path, "bert", 2)
    report = convert(saved("bert", tmp_path / "dense"), tmp_path / "meo", experts=experts, verify="none")
    assert any("outside the feed-forwards were not compared" in warning for warning in report.warnings)


def test_experts_take_the_type_of_the_source(tmp_path: Path) -> None:
    source, wide = saved("llama", tmp_path / "dense", torch.bfloat16), saved("llama", tmp_path / "wide")
    convert(source, tmp_path / "meo", experts=[wide, source], verify="none")
    assert {t.dtype for t in tensors(tmp_path / "meo").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "meo/config.json").read_text())["dtype"] == "bfloat16"


def test_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = saved("bert", tmp_path / "dense")
    with pytest.raises(UnsupportedError, match="is of family 'roberta'"):
        convert(source, tmp_path / "meo", experts=[saved("roberta", tmp_path / "other")], top_k=1)
    with pytest.raises(CheckpointError, match=r"has shape \[96, 32\], the config asks for \[48, 32\]"):
        convert(source, tmp_path / "meo", experts=[saved("bert", tmp_path / "wide", intermediate_size=96)], top_k=1)
    with pytest.raises(CheckpointError, match="lacks"):
        convert(source, tmp_path / "meo", experts=[saved("bert", tmp_path / "short", num_hidden_layers=1)], top_k=1)
    with pytest.raises(UsageError, match="contradicts 1 --expert"):
        convert(source, tmp_path / "meo", experts=[source], num_experts=2, top_k=1)
    with pytest.raises(UsageError, match="no effect with --expert"):
        convert(source, tmp_path / "meo", experts=[source], expert_init="noise", top_k=1)
    assert not (tmp_path / "meo").exists()
