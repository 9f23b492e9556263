"""Aligned experts: the same functions, closer to each other, under the same names on disk."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import identical
from checkpoints import tensors as stored_tensors
from meo_hf.modeling.configuration_meo import SCHEMA_VERSION, meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.moe_layouts_meo import layer_number, moe_blocks
from moe_tiny import tiny_moe, tiny_moe_config, tiny_moe_inputs
from safetensors.torch import save_file
from tiny import tiny_dense
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion import aligned_weights, alignment
from meo_hf.conversion.aligned_weights import AlignedExperts, aligned_targets
from meo_hf.conversion.alignment import ExpertTensors, NeuronAxis, align, expert_axes, match_neurons
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.conversion.source import Source, index_tensors, meta_model
from meo_hf.conversion.write import write_tensors
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError

FAMILIES = (
    "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "nemotron_h", "jamba", "granitemoe", "dbrx", "jetmoe",
    "llama4_text", "switch_transformers", "nllb-moe", "longcat_flash", "aria_text", "openai_privacy_filter", "phimoe",
    "minimax",
)  # fmt: skip
STORED = (*FAMILIES, "qwen3_vl_moe", "step3p7", "inkling_mm_model")  # transposed, half fused, interleaved on disk
IN_FLOAT32 = ("nemotron_h", "openai_privacy_filter")  # their logits or sums are, whatever the weights
SHARD = "60KB"


def blocks_of(model: PreTrainedModel) -> list[tuple[str, Any, ExpertTensors]]:
    layout = MOE_FAMILIES[model.config.model_type].layout
    return [(path, block, alignment.expert_axes(block, layout)) for path, block in moe_blocks(model, layout)]


def stacks_of(block: Any, tensors: ExpertTensors) -> dict[str, Tensor]:
    return {name: block.get_parameter(name).detach() for name in tensors.axes}


def drawn_orders(tensors: ExpertTensors) -> Tensor:
    return torch.rand(tensors.count, tensors.neurons).argsort(-1)


@torch.no_grad()
def reorder(block: Any, tensors: ExpertTensors, permutations: Tensor) -> None:
    for name, axis in tensors.axes.items():
        block.get_parameter(name).copy_(axis.permute(block.get_parameter(name), permutations))


@torch.no_grad()
def make_shuffled_copies(model: PreTrainedModel) -> PreTrainedModel:
    """Make all experts of a block its first one, with neurons in an order of each one's own."""
    for _, block, tensors in blocks_of(model):
        first = {
            n.replace("expert_0", ""): p for n, p in stacks_of(block, tensors).items() if 0 in tensors.axes[n].numbers
        }
        for name, axis in tensors.axes.items():
            source = first[name.replace(f"expert_{axis.first}", "")]
            made = source.reshape(-1, *axis.shape[1:])[:1].expand(axis.shape)
            block.get_parameter(name).copy_(made.reshape(block.get_parameter(name).shape))
        orders = drawn_orders(tensors)
        orders[0] = torch.arange(tensors.neurons)
        reorder(block, tensors, orders)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel) -> Tensor:
    """Return logits; of NLLB-MoE each expert's own output, because its stock block only ever runs two of them."""
    if model.config.model_type == "nllb-moe":
        x = torch.randn(4, model.config.d_model, generator=torch.Generator().manual_seed(5)).to(model.dtype)
        return torch.stack(
            [
                expert(x)
                for _, block, _ in blocks_of(model)
                for expert in block.experts.values()
                if hasattr(expert, "fc1")
            ]
        )
    return model(**tiny_moe_inputs(model.config.model_type)).logits


def check_same(left: Tensor, right: Tensor, tolerance: float) -> None:
    assert float((left - right).abs().max() / left.abs().max()) <= tolerance


def check_order_changes_nothing(model_type: str) -> None:
    torch.manual_seed(0)
    model = tiny_moe(model_type).double()
    before = outputs(model)
    for _, block, tensors in blocks_of(model):
        old = {name: stack.clone() for name, stack in stacks_of(block, tensors).items()}
        reorder(block, tensors, drawn_orders(tensors))
        moved = [name for name, stack in stacks_of(block, tensors).items() if not torch.equal(stack, old[name])]
        assert moved, "nothing was permuted"
    check_same(before, outputs(model), 1e-6 if model_type in IN_FLOAT32 else 1e-12)


def check_shuffled_copies_are_matched(model_type: str) -> None:
    torch.manual_seed(0)
    for _, block, tensors in blocks_of(make_shuffled_copies(tiny_moe(model_type))):
        found = align(stacks_of(block, tensors), tensors)
        assert found.before > 0.5
        assert found.after == 0
        reorder(block, tensors, found.permutations)
        parts = [
            torch.cat(
                [
                    axis.expert(block.get_parameter(n), e).flatten()
                    for n, axis in tensors.axes.items()
                    if e in axis.numbers
                ]
            )
            for e in range(tensors.count)
        ]
        assert all(torch.equal(part, parts[0]) for part in parts)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_order_of_neurons_changes_nothing(model_type: str) -> None:
    check_order_changes_nothing(model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_shuffled_copies_are_matched_exactly(model_type: str) -> None:
    check_shuffled_copies_are_matched(model_type)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "nemotron_h", "dbrx"])
def test_the_distance_never_grows(model_type: str) -> None:
    for _, block, tensors in blocks_of(tiny_moe(model_type)):
        stacks = stacks_of(block, tensors)
        found = align(stacks, tensors)
        assert 0 < found.after < found.before
        assert torch.equal(found.permutations[0], torch.arange(tensors.neurons))
        moved = {name: axis.permute(stacks[name], found.permutations) for name, axis in tensors.axes.items()}
        again = align(moved, tensors)
        assert again.before == pytest.approx(found.after, rel=1e-6)
        assert again.after == again.before
        assert all(torch.equal(p, again.permutations[0]) for p in again.permutations), "an aligned expert moved again"


def stacked_layout(count: int, neurons: int, features: int, interleaved: bool) -> ExpertTensors:
    """Return transposed experts with gates and biases."""
    axes = {
        "gate_up_proj": alignment.neuron_axis((count, features, 2 * neurons), 2, neurons, interleaved),
        "gate_up_proj_bias": alignment.neuron_axis((count, 2 * neurons), 1, neurons, interleaved),
        "down_proj": NeuronAxis((count, neurons, features), 1),
        "down_proj_bias": NeuronAxis((count, features), None),
    }
    return ExpertTensors(count, neurons, axes)


@pytest.mark.parametrize("interleaved", [False, True])
def test_no_order_is_closer(interleaved: bool) -> None:
    """Against all 120 orders of five neurons; the reported distance is that of whole experts, biases included."""
    torch.manual_seed(1)
    layout = stacked_layout(2, 5, 3, interleaved)
    stacks = {name: torch.randn(2, *((3, 10), (10,), (5, 3), (3,))[at]) for at, name in enumerate(layout.axes)}

    def distance(order: tuple[int, ...]) -> float:
        permutations = torch.tensor([range(5), order])
        moved = [axis.permute(stacks[name], permutations).flatten(1) for name, axis in layout.axes.items()]
        first, second = torch.cat(moved, 1).double()
        return float((second - first).norm() / first.norm())

    found = align(stacks, layout)
    distances = [distance(order) for order in itertools.permutations(range(5))]
    assert found.after == pytest.approx(min(distances), rel=1e-6)
    assert found.before == pytest.approx(distances[0], rel=1e-6)
    assert min(distances) < sorted(distances)[1], "two orders are as good: the test sees no difference"


def test_all_tensors_vote() -> None:
    """Neurons that differ in one tensor only are matched by it."""
    torch.manual_seed(2)
    layout = stacked_layout(2, 6, 4, interleaved=True)
    for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj"):
        stacks = {
            n: torch.zeros(
                2,
                *{"gate_up_proj": (4, 12), "gate_up_proj_bias": (12,), "down_proj": (6, 4), "down_proj_bias": (4,)}[n],
            )
            for n in layout.axes
        }
        stacks[name][:] = torch.randn_like(stacks[name][0])
        orders = torch.stack([torch.arange(6), torch.randperm(6)])
        shuffled = {n: axis.permute(stacks[n], orders) for n, axis in layout.axes.items()}
        found = align(shuffled, layout)
        assert found.before > 0
        assert found.after == 0, name


def test_equal_experts_stay_as_they_are() -> None:
    layout = stacked_layout(3, 4, 2, interleaved=False)
    found = align({name: torch.ones(axis.shape) for name, axis in layout.axes.items()}, layout)
    assert (found.before, found.after) == (0, 0)
    assert torch.equal(found.permutations, torch.arange(4).expand(3, -1))


def opened(model: PreTrainedModel, folder: Path) -> Source:
    return Source("tiny", folder, None, model.config, index_tensors(folder))


def write_aligned(
    model: PreTrainedModel, source: Source, folder: Path, layers: list[int] | None = None
) -> list[AlignedExperts]:
    targets, aligned = aligned_targets(source, meta_model(type(model), model.config), layers)
    folder.mkdir()
    write_tensors(targets, folder, SHARD)
    model.config.save_pretrained(folder)
    return aligned


def loaded(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    made, report = type(model).from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return made.eval()


def check_round_trip(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    model = tiny_moe(model_type).to(dtype)
    model.save_pretrained(folder / "stock", max_shard_size=SHARD)
    source = opened(model, folder / "stock")
    aligned = write_aligned(model, source, folder / "aligned")
    assert [experts.path for experts in aligned] == [path for path, *_ in blocks_of(model)]

    before, after = stored_tensors(folder / "stock"), stored_tensors(folder / "aligned")
    assert before.keys() == after.keys()
    inside = {file.ref.spec.name for experts in aligned for file in experts.files}
    moved = {name for name in before if not identical(before[name], after[name])}
    assert moved
    assert moved <= inside
    for name in inside:
        assert (before[name].dtype, before[name].shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values), name

    made, stock = loaded(model, folder / "aligned", dtype), loaded(model, folder / "stock", dtype)
    for (path, new, tensors_of), (_, old, _), experts in zip(blocks_of(made), blocks_of(stock), aligned, strict=True):
        live = align(stacks_of(old, tensors_of), tensors_of)
        assert torch.equal(live.permutations, experts.alignment.permutations)
        assert (live.before, live.after) == pytest.approx((experts.alignment.before, experts.alignment.after), rel=1e-6)
        for name, axis in tensors_of.axes.items():
            wanted = axis.permute(old.get_parameter(name), live.permutations)
            assert identical(new.get_parameter(name).detach(), wanted.detach()), (path, name)
    check_same(outputs(stock.double()), outputs(made.double()), 1e-6 if model_type in IN_FLOAT32 else 1e-12)


@pytest.mark.parametrize("model_type", STORED)
def test_checkpoints_keep_names_and_function(model_type: str, tmp_path: Path) -> None:
    check_round_trip(model_type, tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "dbrx", "switch_transformers"])
def test_half_precision_is_permuted_bit_by_bit(model_type: str, tmp_path: Path) -> None:
    check_round_trip(model_type, tmp_path, torch.bfloat16)


def test_where_neurons_are_on_disk_is_found_by_shape_too(tmp_path: Path) -> None:
    """Qwen3-VL-MoE loads both orientations of its stacks; either keeps its own."""
    model = tiny_moe("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "stock")
    stored = stored_tensors(tmp_path / "stock")
    flipped = {n: t.mT.contiguous() if ".experts." in n else t for n, t in stored.items()}
    (tmp_path / "hub").mkdir()
    save_file(flipped, tmp_path / "hub/model.safetensors", {"format": "pt"})
    for name in ("stock", "hub"):
        write_aligned(model, opened(model, tmp_path / name), tmp_path / f"{name}-aligned")
    left, right = stored_tensors(tmp_path / "stock-aligned"), stored_tensors(tmp_path / "hub-aligned")
    assert any(not identical(left[n], stored[n]) for n in left)
    assert all(identical(t.mT if ".experts." in n else t, left[n]) for n, t in right.items())


def test_only_the_layers_asked_for_are_aligned(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "stock")
    source = opened(model, tmp_path / "stock")
    aligned = write_aligned(model, source, tmp_path / "aligned", layers=[1])
    before, after = stored_tensors(tmp_path / "stock"), stored_tensors(tmp_path / "aligned")
    moved = {layer_number(name) for name in before if not identical(before[name], after[name])}
    assert moved == {1} == {experts.layer for experts in aligned}
    with pytest.raises(UsageError, match=r"layers \[7\] have no experts; layers with experts: \[0, 1, 2\]"):
        aligned_targets(source, meta_model(type(model), model.config), [1, 7])


def test_memory_is_bounded_by_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are of one expert's part of one tensor; threads that share a block match it once."""
    model = tiny_moe("gpt_oss")
    model.save_pretrained(tmp_path / "stock")
    read, matched = [], []
    load, align_experts = TensorRef.load, aligned_weights.align_experts
    monkeypatch.setattr(TensorRef, "load", lambda ref: read.append(ref.spec.nbytes) or load(ref))
    monkeypatch.setattr(aligned_weights, "align_experts", lambda *a: matched.append(1) or align_experts(*a))
    targets, aligned = aligned_targets(opened(model, tmp_path / "stock"), meta_model(type(model), model.config))
    assert not read, "planning reads headers only"
    moved = [target for target in targets.values() if isinstance(target[1], aligned_weights.Permuted)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda target: sum(map(len, target[1].chunks(target[0]))), moved))
    _, block, _ = blocks_of(model)[0]
    assert max(read) == block.experts.gate_up_proj[0].nbytes
    assert len(matched) == len(aligned) == 3


def test_what_cannot_be_aligned_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "stock")
    source, meta = opened(model, tmp_path / "stock"), meta_model(type(model), model.config)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

    def with_tensors(**changed: Any) -> Source:
        return replace(source, tensors={n: changed.get(n, r) for n, r in source.tensors.items() if changed.get(n, r)})

    assert name in source.tensors
    with pytest.raises(CheckpointError, match=r"holds .*gate_up_proj of 6 experts in \[5, 6\] tensors"):
        aligned_targets(with_tensors(**{name: None}), meta)
    wide = replace(source.tensors[name], spec=replace(source.tensors[name].spec, shape=(32, 24)))
    with pytest.raises(CheckpointError, match=r"experts.2.w1.weight has shape \[32, 24\], it should have \[24, 32\]"):
        aligned_targets(with_tensors(**{name: wide}), meta)
    gone = {n: None for n in source.tensors if ".layers.1." in n and ".w2." in n}
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.mlp.experts.down_proj"):
        aligned_targets(with_tensors(**gone), meta)
    dense = tiny_dense("llama")
    with pytest.raises(UnsupportedError, match="no known mixture of experts"):
        aligned_targets(Source("tiny", tmp_path, None, dense.config, {}), dense)
    with pytest.raises(UnsupportedError, match="is not converted: its experts are single neurons"):
        aligned_targets(Source("tiny", tmp_path, None, tiny_moe_config("doge"), {}), dense)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UnsupportedError, match="needs the package scipy"):
        aligned_targets(source, meta)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny_moe("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    model.save_pretrained(tmp_path / "stock")
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp: experts hold NaN or infinite weights"):
        write_aligned(model, opened(model, tmp_path / "stock"), tmp_path / "aligned")


def test_a_tensor_of_unknown_use_is_refused() -> None:
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.experts.register_parameter("scale", torch.nn.Parameter(torch.ones(6, 24)))
    with pytest.raises(UnsupportedError, match="MixtralExperts has a parameter scale"):
        blocks_of(model)


def as_meo(stock: PreTrainedModel) -> PreTrainedModel:
    """Return the MEO model with the weights of a stock one."""
    values = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures")}
    block = {"schema_version": SCHEMA_VERSION, "level": "segment", "segment_length": 4, "pooling": "hidden"}
    config = meo_config_class(type(stock.config)).from_dict({**values, "meo": block})
    config._attn_implementation = "eager"
    made = meo_model_class(type(stock))(config).to(stock.dtype)
    made.load_state_dict(stock.state_dict())
    return made.eval()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "dbrx", "jetmoe"])
def test_merged_copies_are_the_expert(model_type: str) -> None:
    """In these families gates have a fixed sum, so what is merged from aligned copies is what stock computes."""
    torch.manual_seed(0)
    stock = make_shuffled_copies(tiny_moe(model_type).double())
    wanted = outputs(stock)
    apart = outputs(as_meo(stock))
    assert float((apart - wanted).abs().max() / wanted.abs().max()) > 1e-2, "the average of shuffled copies is no copy"
    for _, block, tensors in blocks_of(stock):
        reorder(block, tensors, align(stacks_of(block, tensors), tensors).permutations)
    check_same(wanted, outputs(as_meo(stock)), 1e-6)  # the gates are float32


Patch = pytest.MonkeyPatch


def with_axes(patch: Patch, change: Callable[[str, NeuronAxis], NeuronAxis]) -> None:
    def changed(*args: Any) -> ExpertTensors:
        found = expert_axes(*args)
        return replace(found, axes={name: change(name, axis) for name, axis in found.axes.items()})

    patch.setattr(alignment, "expert_axes", changed)
    patch.setattr(aligned_weights, "expert_axes", changed)


def forget_down(patch: Patch) -> None:
    with_axes(patch, lambda name, axis: replace(axis, axis=None) if "down_proj" in name else axis)


def forget_bias(patch: Patch) -> None:
    with_axes(patch, lambda name, axis: replace(axis, axis=None) if name.endswith("bias") else axis)


def forget_interleaving(patch: Patch) -> None:
    stock = alignment.neuron_axis
    patch.setattr(alignment, "neuron_axis", lambda shape, at, neurons, interleaved=False: stock(shape, at, neurons))


def invert_permutations(patch: Patch) -> None:
    patch.setattr(alignment, "match_neurons", lambda *a: match_neurons(*a).argsort().int())


def match_by_columns(patch: Patch) -> None:
    patch.setattr(alignment, "match_neurons", lambda reference, other: match_neurons(reference.flip(1), other))


def copy_in_place(patch: Patch) -> None:
    patch.setattr(NeuronAxis, "reorder", lambda self, expert, permutation: expert)


def ignore_shape_on_disk(patch: Patch) -> None:
    patch.setattr(aligned_weights, "_candidates", lambda shape, *_: iter([NeuronAxis((1, *shape), 1)]))


@pytest.mark.parametrize(
    ("mutation", "check", "model_type"),
    [
        (forget_down, check_order_changes_nothing, "mixtral"),
        (forget_down, check_order_changes_nothing, "nemotron_h"),
        (forget_bias, check_order_changes_nothing, "gpt_oss"),
        (forget_interleaving, check_order_changes_nothing, "gpt_oss"),
        (copy_in_place, check_order_changes_nothing, "mixtral"),
        (invert_permutations, check_shuffled_copies_are_matched, "mixtral"),
        (match_by_columns, check_shuffled_copies_are_matched, "dbrx"),
        (copy_in_place, check_round_trip, "mixtral"),
        (forget_down, check_round_trip, "gpt_oss"),
        (ignore_shape_on_disk, check_round_trip, "mixtral"),
    ],
)
def test_mistakes_are_noticed(
    mutation: Callable[[Patch], None],
    check: Callable[..., None],
    model_type: str,
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    arguments = [tmp_path] if check is check_round_trip else []
    mutation(monkeypatch)
    with pytest.raises((AssertionError, CheckpointError)):
        check(model_type, *arguments)
