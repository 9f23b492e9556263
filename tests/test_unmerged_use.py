"""Mixtures whose experts run one by one in use: saved and loaded elsewhere, generating, trained, misused, mutated."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tensors
from contracts import assert_close, assert_differs
from datasets import Dataset
from fresh import Fresh
from meo_hf.modeling import moe_meo, unmerged_meo
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_meo import MergedExpertsMixin, merged_moe
from meo_hf.modeling.parallel_meo import check_merging
from meo_hf.modeling.remote_meo import heads_of
from moe_contracts import moe_modules
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_moe_roundtrip import check_family
from test_parts import in_parts, ragged
from test_unmerged import check_blocks, every_other, logits, several, two_for_all
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from unmerged_reference import case_of, meo_config, reduced

from meo_hf import MeoLoraConfig, convert
from meo_hf.errors import MeoConfigError, RoutingError, UnsupportedError, UsageError
from meo_hf.training import watch

torch.set_num_threads(1)
SKIP = {"rule": "cumulative", "threshold": 0.7}
ONE_PER_LAYOUT = ("olmoe", "dbrx", "jetmoe", "llama4", "nllb-moe")
MLP = "model.layers.0.mlp"


def small(family: str = "olmoe", skip: dict[str, Any] | None = SKIP, mapped: bool = True) -> PreTrainedModel:
    """Return a model with two experts per block in the place of all, that skips some."""
    case = several(family)
    stock = case.stock()
    kept, maps = two_for_all(stock)
    options = {"expert_maps": maps} if mapped else {}
    return reduced(case, stock, kept, **options, **({"skip": skip} if skip else {}))


def test_saved_models_load_without_meo_hf(tmp_path: Path) -> None:
    fresh = Fresh()
    for family in ONE_PER_LAYOUT:
        case = several(family)
        stock, folder = case.stock(), tmp_path / family
        kept, maps = two_for_all(stock)
        first = next(iter(kept))
        kept = {first: kept[first], **{path: rows for path, rows in every_other(stock).items() if path != first}}
        model = reduced(case, stock, kept, expert_maps={first: maps[first]}, skip=SKIP).float()
        assert len(kept) > 1
        model.save_pretrained(folder / "saved")
        save_file({**case.inputs(), "logits": logits(model, case.inputs()).contiguous()}, folder / "batch.safetensors")
        auto = {stock_class: auto for auto, stock_class in heads_of(family).items()}[type(stock).__name__]
        files = {"folder": folder / "saved", "batch": folder / "batch.safetensors", "again": folder / "again"}
        fresh.add(family, check_family, auto=auto, **files)
    found = fresh.run(tmp_path)
    for family in ONE_PER_LAYOUT:
        assert found[family]["keys"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        assert found[family]["error"] <= 1e-5
        before, after = (tensors(tmp_path / family / name) for name in ("saved", "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "nllb-moe"])
def test_a_cache_changes_nothing(family: str) -> None:
    model, inputs = small(family), several(family).inputs()
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    cached, plain = (
        model.generate(**inputs, **options, use_cache=use, return_dict_in_generate=True) for use in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(plain.logits), 1e-6)


def ignores_the_rule(index: Tensor, weights: Tensor, stands_for: Any, rule: Any) -> Any:
    return CHOSEN(index, weights, stands_for, None)


def ignores_the_map(index: Tensor, weights: Tensor, stands_for: Any, rule: Any) -> Any:
    return CHOSEN(index % 2, weights, None, rule)


def forgets_to_renormalise(index: Tensor, weights: Tensor, stands_for: Any, rule: Any) -> Any:
    index, _, runs = CHOSEN(index, weights, stands_for, rule)
    return index, weights, runs


CHOSEN = unmerged_meo.chosen
MUTATIONS = [ignores_the_rule, ignores_the_map, forgets_to_renormalise]


@pytest.mark.parametrize("mutation", [None, *MUTATIONS], ids=lambda m: getattr(m, "__name__", "none"))
def test_mutations_are_noticed(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("olmoe", num_experts_per_tok=3)
    stock = case.stock()
    kept, maps = two_for_all(stock)
    model = reduced(case, stock, kept, expert_maps=maps, skip=SKIP)
    rule = (SKIP["rule"], SKIP["threshold"])
    if mutation is None:
        check_blocks(case, stock, model, maps, kept, rule)
        return
    monkeypatch.setattr(moe_meo, "chosen", mutation)
    with pytest.raises(AssertionError):
        check_blocks(case, stock, model, maps, kept, rule)


@pytest.mark.parametrize("family", ["olmoe", "jetmoe", "dbrx"])
@pytest.mark.parametrize("mapped", [False, True])
def test_adapters_of_experts_are_what_they_merge_to(family: str, mapped: bool) -> None:
    model = small(family) if mapped else reduced(several(family), several(family).stock(), {})
    inputs = several(family).inputs()
    inside = {id(p) for _, module in merged_moe(model) for p in module.parameters()}
    names = [n for n, p in model.named_parameters() if id(p) in inside and p.dim() > 1 and "router" not in n]
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    found = logits(adapted, inputs)
    assert_differs(found, logits(model, inputs), 1e-2)
    assert_close(logits(copy.deepcopy(adapted).merge_and_unload(), inputs), found, 1e-9)
    adapted.train()(**inputs).logits.square().sum().backward()
    assert all(bool(p.grad.any()) for n, p in adapted.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, "switch_transformers"])
def test_our_adapters_send_experts_that_do_not_merge_to_peft(family: str) -> None:
    """What the message names adapts every weight of every expert."""
    model = reduced(several(family), several(family).stock(), {})
    with pytest.raises(UnsupportedError, match=r"one by one .* target_parameters=\[") as raised:
        get_peft_model(copy.deepcopy(model), MeoLoraConfig(r=2))
    names = ast.literal_eval(str(raised.value).partition("target_parameters=")[2])
    inside = [pair for _, module in merged_moe(model) for pair in module.named_parameters()]
    matrices = sum(p.dim() > 1 and not name.endswith("bias") and "router" not in name for name, p in inside)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == matrices > 0


def test_our_adapters_send_parts_to_peft(caplog: pytest.LogCaptureFixture) -> None:
    full = case_of("mixtral").merged(case_of("mixtral").stock(), level="unmerged")
    with pytest.raises(UnsupportedError, match="kept as parts: PEFT's own LoraConfig adapts those"):
        get_peft_model(in_parts(full, ragged(full, True)), MeoLoraConfig(r=2))
    with caplog.at_level("WARNING"):
        parts = LoraConfig(r=2, target_modules=[], target_parameters=["parts.down.A", "parts.down.B"])
        get_peft_model(in_parts(full, ragged(full, True)), parts)
    assert "does not touch" not in caplog.text


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_run_as_the_family_s_implementations(implementation: str) -> None:
    model, inputs = small().float(), several("olmoe").inputs()
    expected = logits(model, inputs)
    model.set_experts_implementation(implementation)
    modules = [module for module in model.modules() if isinstance(module, MergedExpertsMixin)]
    assert {module.config._experts_implementation for module in modules} == {implementation}
    assert_close(logits(model, inputs), expected, 1e-5)


def test_merged_experts_have_no_implementation() -> None:
    case = case_of("olmoe")
    model = case.merged(case.stock())
    with pytest.raises(ValueError, match="merged experts have no experts_implementation"):
        model.set_experts_implementation("grouped_mm")


def test_new_models_take_the_family_s_default_implementation() -> None:
    config = meo_config(case_of("olmoe").stock())
    config._experts_implementation = None
    assert meo_model_class(type(case_of("olmoe").stock()))(config).config._experts_implementation == "grouped_mm"


def test_half_precision_stays_close() -> None:
    model, inputs = small(skip=None), several("olmoe").inputs()
    assert_close(logits(copy.deepcopy(model).bfloat16(), inputs), logits(model, inputs), 0.05)


def test_checkpointing_keeps_gradients() -> None:
    model, inputs = small().train(), several("olmoe").inputs()
    plain = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(plain[name], value) for name, value in gradients(model, inputs).items())


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_blocks_compute_the_same() -> None:
    block = small().get_submodule(MLP)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(torch.compile(block, backend="eager")(x), block(x), 1e-12)


def test_watched_training_counts_what_runs(tmp_path: Path) -> None:
    model = small().float()
    rows = [{"input_ids": [5 + i, 9, 11, 3 * i + 6], "labels": [5 + i, 9, 11, 3 * i + 6]} for i in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
    watch(trainer)
    trainer.train()
    logs = trainer.state.log_history[0]
    shares = [logs[f"experts/{MLP}.experts/load_{number}"] for number in range(2)]
    assert sum(shares) == pytest.approx(1)
    assert f"experts/{MLP}.experts/load_2" not in logs
    assert 0 <= logs["experts/entropy"] < 0.6932


def test_balance_losses_need_as_many_experts_everywhere() -> None:
    case = case_of("olmoe")
    stock, inputs = case.stock(), case.inputs()
    model = reduced(case, stock, every_other(stock))
    with pytest.raises(MeoConfigError, match=r"needs 6 experts in each block; model\.layers\.0\.mlp has 4"):
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert [len(one[0]) for one in model.model(**inputs, output_router_logits=True).router_logits] == [4, 6, 4]
    assert small()(**inputs, labels=inputs["input_ids"], output_router_logits=True).aux_loss > 0


def test_what_merging_needs_is_refused() -> None:
    model, inputs = small(), several("olmoe").inputs()
    for call in (model.meo_plan, lambda: model.set_meo_plan("dense"), lambda: model.set_task("a")):
        with pytest.raises(MeoConfigError):
            call()
    model.route_cache(None)
    model.set_meo_plan(None)
    rows = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    for name, value in {"task_ids": rows, "routing": "prompt", "prompt_lengths": rows + 2}.items():
        with pytest.raises(RoutingError, match=r"no effect (in this model, of|at) level 'unmerged'"):
            model(**inputs, **{name: value})

    class Distributed:
        tp_size = 2

    check_merging(Distributed, object(), "segment")
    with pytest.raises(MeoConfigError, match="at level 'unmerged' none are"):
        check_merging(Distributed, object(), "unmerged")


BAD = {
    "skip is": {"skip": {"rule": "ratio"}},
    "skip's rule": {"skip": {"rule": "half", "threshold": 0.5}},
    "threshold is 1.5": {"skip": {"rule": "ratio", "threshold": 1.5}},
    "threshold is nan": {"skip": {"rule": "ratio", "threshold": float("nan")}},
    "threshold is True": {"skip": {"rule": "ratio", "threshold": {MLP: True}}},
    "threshold names 'no.such'": {"skip": {"rule": "ratio", "threshold": {"no.such": 0.5}}},
    "expert_counts is": {"expert_counts": {}},
    "give a whole number >= 1": {"expert_counts": {MLP: 0}},
    "expert_counts names 'no.such'": {"expert_counts": {"no.such": 3}},
    "more than the config's 6": {"expert_counts": {MLP: 7}},
    "but a token selects 2": {"expert_counts": {MLP: 1}},
    "an expert's number for each old one": {"expert_maps": {MLP: [True] * 6}},
    "names 2 experts; its router knows 6": {"expert_maps": {MLP: [0, 0]}},
    "names expert 6; the block has 6": {"expert_maps": {MLP: [6] * 6}},
    "names expert 2; the block has 2": {"expert_maps": {MLP: [0, 1, 2] * 2}, "expert_counts": {MLP: 2}},
    "expert_maps names 'no.such'": {"expert_maps": {"no.such": [0] * 6}},
    "in none of `layers`": {"expert_maps": {MLP: [0] * 6}, "layers": [1]},
    "where a token selects one": {"top_k": 1, "skip": SKIP},
    "pooling has no effect": {"pooling": "hidden"},
    "routing has no effect": {"routing": "prompt"},
    "segment_length has no effect": {"segment_length": 3},
    "combine has no effect": {"combine": "outputs"},
    "merged_cache_bytes has no effect": {"merged_cache_bytes": 5},
    "only run merged": {"expert_format": "lowrank", "expert_ranks": {"down_proj": 2}},
    "skip has no effect at level 'segment'": {"level": "segment", "skip": SKIP},
    "expert_maps has no effect at level 'sequence'": {"level": "sequence", "expert_maps": {MLP: [0] * 6}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_say_what_to_do(message: str) -> None:
    stock = case_of("olmoe").stock()
    with pytest.raises(MeoConfigError, match=message.replace("(", r"\(")):
        meo_model_class(type(stock))(meo_config(stock, **BAD[message]))


def test_convert_does_not_write_what_merges_nothing(tmp_path: Path) -> None:
    case_of("olmoe").stock().save_pretrained(tmp_path / "stock")
    with pytest.raises(UsageError, match=r"make experts fewer with meo_hf\.reduce"):
        convert(tmp_path / "stock", tmp_path / "out", level="unmerged")
    assert not (tmp_path / "out").exists()


def test_routers_by_groups_need_whole_groups() -> None:
    stock = several("axk1", n_group=4, topk_group=2).stock()
    with pytest.raises(MeoConfigError, match="selects by 4 groups: give a multiple of 4, at least 8"):
        meo_model_class(type(stock))(meo_config(stock, expert_counts={"model.layers.1.mlp": 4}))


@pytest.mark.parametrize("level", ["segment", "sequence"])
@pytest.mark.parametrize("family", ["olmoe", "jetmoe"])
def test_fewer_experts_merge_too(family: str, level: str) -> None:
    case = case_of(family)
    stock, inputs = case.stock(), case.inputs()
    inputs |= {"routing": "segment"}
    model = reduced(case, stock, {path: [4, 0, 2] for path in moe_modules(stock)}, level=level)
    assert [module.count() for _, module in merged_moe(model)] == [3] * len(moe_modules(stock))
    whole = case.merged(stock, level=level, segment_length=256)
    assert_differs(logits(model, inputs), logits(whole, inputs), 1e-3)
    if family == "olmoe":  # whose config counts no other experts
        config = copy.deepcopy(stock.config)
        config.num_experts = 3
        few = type(stock)(config).to(case.dtype).eval()
        few.load_state_dict(model.state_dict())
        expected = case.merged(few, level=level, segment_length=256)
        assert torch.equal(logits(model, inputs), logits(expected, inputs))


def test_low_rank_experts_may_be_fewer() -> None:
    stock, inputs = case_of("olmoe").stock(), case_of("olmoe").inputs()
    options = {"level": "sequence", "expert_format": "lowrank", "expert_ranks": {"down_proj": 2, "gate_up_proj": 2}}
    model = meo_model_class(type(stock))(meo_config(stock, expert_counts={MLP: 3}, **options)).eval()
    assert [module.count() for _, module in merged_moe(model)] == [3, 6, 6]
    assert torch.isfinite(logits(model, {**inputs, "routing": "segment"})).all()


def test_a_merging_model_loads_unmerged(tmp_path: Path) -> None:
    case = case_of("olmoe")
    stock, inputs = case.stock().float(), case.inputs()
    case.merged(stock).float().save_pretrained(tmp_path)
    load = meo_model_class(type(stock)).from_pretrained
    model = load(tmp_path, meo={"level": "unmerged"}, attn_implementation="eager")
    assert_close(logits(model, inputs), logits(stock, inputs), 1e-5)
    few = load(tmp_path, meo={"level": "unmerged", "skip": SKIP}, attn_implementation="eager")
    assert_differs(logits(few, inputs), logits(stock, inputs), 1e-3)
