"""Experts as one weight and low-rank parts compute what whole experts W_0 + B_i A_i do, everywhere."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import FEW, SCOPES, SEGMENT, Case, assert_close, assert_differs, logits_of
from meo_hf.modeling.blocks_meo import find_blocks
from meo_hf.modeling.cache_meo import routings
from meo_hf.modeling.configuration_meo import MeoSettings
from meo_hf.modeling.families_meo import FAMILIES, LEVELS
from meo_hf.modeling.feedforward_meo import MergedExperts, merged_feed_forwards
from meo_hf.modeling.low_rank_meo import Factors
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.parallel_meo import check_ranks
from meo_hf.modeling.router_meo import MeoRouter
from moe_contracts import MoeCase
from peft import get_peft_model
from tiny import draw_experts, labels_for, merged_of, tiny_dense
from torch import Tensor, nn
from transformers import PreTrainedModel

from meo_hf import MeoLoraConfig
from meo_hf.errors import MeoConfigError

EVERY = [Case(family, row.default_level, scope) for family, row in FAMILIES.items() for scope in SCOPES]
OTHERS = [Case(f, level) for f in (*FEW, "phi3", "bert", "t5") for level in LEVELS[FAMILIES[f].kind][1:]]
LAYOUTS = ("mixtral", "gpt_oss", "dbrx", "llama4_text", "nllb-moe", "longcat_flash", "inkling_mm_model", "qwen2_moe")


def every(cases: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda c: "-".join((c.family, c.level, c.scope)))


def ranks_of(case: Case) -> dict[str, int]:
    """Return another rank for each linear map of the feed-forwards, by its path."""
    dense = case.dense()
    paths = [
        f"{block.path}.{path}" for block in find_blocks(dense, FAMILIES[case.family]) for path in block.paths.values()
    ]
    return dict(zip(paths, itertools.cycle((2, 3, 4)), strict=False))


def low_rank(case: Case, **meo: Any) -> PreTrainedModel:
    return case.drawn(expert_format="lowrank", expert_ranks=ranks_of(case), **meo)


@torch.no_grad()
def whole(low: PreTrainedModel) -> PreTrainedModel:
    """Return the model whose experts are multiplied out, made from parameters' names alone."""
    config = copy.deepcopy(low.config)
    config.meo = {k: v for k, v in config.meo.items() if k not in ("expert_format", "expert_ranks")}
    full = type(low)(config).to(low.dtype).eval()
    for router in low.modules():
        if isinstance(router, MeoRouter) and router.bias is not None:  # whole experts' have none
            nn.init.zeros_(router.bias)
    own = dict(low.named_parameters())
    for name, parameter in full.named_parameters():
        old = own[name]
        if old.shape == parameter.shape:
            parameter.copy_(old)
            continue
        path, _, stack = name.rpartition(".")
        parts = {"gate_up_proj": ("gate", "up", "gate_up"), "up_proj": ("up",), "down_proj": ("down",)}[stack]
        made = old.expand_as(parameter).clone()
        for at, key in enumerate(parts):
            if f"{path}.low_rank.{key}.A" not in own:
                continue
            delta = own[f"{path}.low_rank.{key}.B"].transpose(1, 2) @ own[f"{path}.low_rank.{key}.A"]
            rows = (
                slice(None)
                if delta.shape[1] == made.shape[1]
                else slice(at * delta.shape[1], (at + 1) * delta.shape[1])
            )
            made[:, rows] += delta
        parameter.copy_(made)
    for buffer, old in zip(full.buffers(), low.buffers(), strict=True):
        buffer.copy_(old)
    return full


def without_parts(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, Factors):
            nn.init.zeros_(module.B)
    return model


@every([*EVERY, *OTHERS])
def test_low_rank_experts_are_whole_ones(case: Case) -> None:
    low, inputs = low_rank(case), case.inputs()
    expected = logits_of(whole(low), inputs)
    assert_close(logits_of(low, inputs), expected, 1e-9)
    assert_differs(logits_of(without_parts(low), inputs), expected)


@every([Case("llama", "segment"), Case("bert", "sequence"), Case("t5", "task", "projection")])
def test_gradients_are_those_of_whole_experts(case: Case) -> None:
    low, inputs = low_rank(case), case.inputs()
    full = whole(low)
    labels = labels_for(case.family, inputs)
    for model in (low, full):
        model(**inputs, labels=labels).loss.backward()
    for path, module in merged_of(full).items():
        mine = low.get_submodule(path).experts
        grad = module.experts.down_proj.grad
        factors = mine.low_rank["down"]
        assert_close(mine.down_proj.grad, grad.sum(0, keepdim=True), 1e-9)
        assert_close(factors.A.grad, factors.B @ grad, 1e-9)
        assert_close(factors.B.grad, factors.A @ grad.transpose(1, 2), 1e-9)
        assert factors.B.grad.abs().sum((1, 2)).gt(0).any()


@every([Case(f, level) for f in ("llama", "gpt2") for level in LEVELS["decoder"]])
def test_steps_with_a_cache_go_on_as_whole_experts_do(case: Case) -> None:
    low = low_rank(case)
    full, inputs = whole(low), case.inputs()
    ids = inputs["input_ids"]
    extra = {"task_ids": inputs["task_ids"]} if case.level == "task" else {}
    options = {**extra, "max_new_tokens": 2 * SEGMENT + 1, "do_sample": False, "eos_token_id": None}
    outputs = [
        model.generate(input_ids=ids, output_logits=True, return_dict_in_generate=True, **options)
        for model in (low, full)
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits), 1e-8)


def test_steps_keep_gates_and_no_merged_experts() -> None:
    case = Case("llama", "sequence")
    low = low_rank(case)
    with torch.no_grad():
        out = low(**case.inputs(), use_cache=True)
        out = low(input_ids=torch.full((3, 1), 7), past_key_values=out.past_key_values)
    kept = [pair for memory in routings(out.past_key_values) for pair in memory.merged.values()]
    assert kept
    assert all(tensor.numel() <= 3 * 2 for pair in kept for tensor in pair)  # 3 rows of 2 selected experts


@pytest.mark.parametrize("family", LAYOUTS)
def test_low_rank_experts_of_mixtures_are_whole_ones(family: str, tmp_path: Path) -> None:
    case = MoeCase(family, MOE_FAMILIES[family].poolings[0])
    full, low = mixtures(case)
    inputs = {**case.inputs(), **({"routing": "segment"} if case.causal else {})}
    expected = logits_of(full, inputs)
    assert_close(logits_of(low, inputs), expected, case.tolerance)
    low.save_pretrained(tmp_path)
    again, info = type(low).from_pretrained(tmp_path, dtype=case.dtype, output_loading_info=True)
    assert not any(info.values()), info
    state, found = low.state_dict(), again.state_dict()
    assert not [name for name in state if not torch.equal(state[name], found[name])]
    assert_differs(logits_of(without_parts(low), inputs), expected)


@torch.no_grad()
def mixtures(case: MoeCase) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a mixture that merges, and the same function kept as low-rank experts."""
    full = case.merged(case.stock())
    ranks = {name: rank for rank, name in enumerate(sorted({n for _, m in merged_moe(full) for n in m.maps}), 3)}
    config = copy.deepcopy(full.config)
    config.meo = {**config.meo, "expert_format": "lowrank", "expert_ranks": ranks}
    low = type(full)(config).to(case.dtype).eval()
    own, generator = full.state_dict(), torch.Generator().manual_seed(0)
    for name, tensor in low.state_dict().items():
        if ".low_rank." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        else:
            tensor.copy_(own[name][: len(tensor)] if tensor.dim() else own[name])
    for path, module in merged_moe(full):
        mine = low.get_submodule(path)
        for name in module.maps:
            factors = mine.low_rank[name.removesuffix("_proj")]
            product = factors.B.transpose(1, 2) @ factors.A
            stack = module.stack(name)[0][: len(product)]
            stack.copy_(mine.stack(name)[0] + product)
    return full, low


def test_a_new_model_adds_nothing_until_it_is_trained() -> None:
    dense = tiny_dense("llama")
    model = low_rank(Case("llama", "segment"))
    fresh = type(model)(model.config).eval()
    for module in fresh.modules():
        if isinstance(module, Factors):
            assert module.A.abs().sum() > 0
            assert not module.B.any()
    assert {
        p.shape[0] for _, ff in merged_feed_forwards(fresh) for p in (ff.experts.gate_up_proj, ff.experts.down_proj)
    } == {1}
    assert fresh.num_parameters() < 1.5 * dense.num_parameters()


def test_the_longest_ending_gives_the_rank() -> None:
    settings = MeoSettings(expert_format="lowrank", expert_ranks={"up_proj": 4, "1.mlp.up_proj": 2, "q_proj": 8})
    paths = (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.up_proj",
        "x.gate_up_proj",
    )
    assert [settings.rank_of(path) for path in paths] == [4, 2, 4, 0]


def test_a_feed_forward_without_a_rank_stays_dense() -> None:
    case = Case("llama", "segment")
    model = case.dense()
    ranks = {path: rank for path, rank in ranks_of(case).items() if ".layers.1." in path and "down" in path}
    config = low_rank(case).config
    config.meo = {**config.meo, "expert_ranks": ranks}
    made = draw_experts(type(low_rank(case))(config))
    assert list(merged_of(made)) == ["model.layers.1.mlp"]
    assert isinstance(made.model.layers[0].mlp, type(model.model.layers[0].mlp))
    assert list(made.model.layers[1].mlp.experts.low_rank) == ["down"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"expert_format": "lowrank"}, "give a rank for each linear map"),
        ({"expert_format": "lowrank", "expert_ranks": {}}, "give a rank for each linear map"),
        ({"expert_format": "lowrank", "expert_ranks": {"up_proj": 0}}, "give a whole number >= 1"),
        ({"expert_format": "lowrank", "expert_ranks": {"up_proj": True}}, "give a whole number >= 1"),
        ({"expert_ranks": {"up_proj": 4}}, "has no effect with expert_format 'full'"),
        ({"expert_format": "svd"}, "allowed: full, lowrank"),
    ],
)
def test_settings_that_make_no_sense_are_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(MeoConfigError, match=message):
        MeoSettings.from_dict(block)


def test_whole_experts_say_nothing_of_a_format() -> None:
    assert not {"expert_format", "expert_ranks"} & MeoSettings().to_dict().keys()


def test_tensor_parallel_is_refused() -> None:
    class Distributed:
        tp_size = 2

    check_ranks(Distributed, object(), "full")
    with pytest.raises(MeoConfigError, match="does not know the low-rank parts"):
        check_ranks(Distributed, object(), "lowrank")


def test_plans_name_low_rank_maps() -> None:
    assert {row.plan for row in low_rank(Case("llama", "segment")).meo_plan()} == {"low rank"}


def test_copies_keep_their_own_parts() -> None:
    case = Case("llama", "task")
    model, inputs = low_rank(case), case.inputs()
    before: Tensor = logits_of(model, inputs)
    copied = without_parts(copy.deepcopy(model))
    assert_differs(logits_of(copied, inputs), before)
    assert_close(logits_of(model, inputs), before, 0)


@pytest.mark.parametrize("scope", ["per_expert", "shared"])
@torch.no_grad()
def test_an_adapter_adapts_what_low_rank_experts_share(scope: str, caplog: pytest.LogCaptureFixture) -> None:
    case = Case("llama", "task")
    model, inputs = low_rank(case), case.inputs()
    before = logits_of(model, inputs)
    adapted = get_peft_model(model, MeoLoraConfig(r=2, scope=scope, init_lora_weights=False))
    found = logits_of(adapted, inputs)
    assert_differs(found, before)
    with adapted.disable_adapter():
        assert_close(logits_of(adapted, inputs), before, 0)
    assert_close(logits_of(adapted.merge_and_unload(), inputs), found, 1e-6)
    assert "the weight that all low-rank experts share in 2 blocks" in caplog.text


@every([Case("llama", "segment"), Case("bert", "sequence"), Case("t5", "task")])
@torch.no_grad()
def test_weights_that_are_only_lent_are_multiplied_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = low_rank(case), case.inputs()
    expected, forward = logits_of(model, inputs), MergedExperts.forward

    def lent(self: MergedExperts, *args: Any, **kwargs: Any) -> Any:
        maps = forward(self, *args, **kwargs)
        for parameter in self.parameters():  # as FSDP2 takes a unit's weights away after its forward
            parameter.data.fill_(torch.nan)
        return maps

    monkeypatch.setattr(MergedExperts, "forward", lent)
    assert not logits_of(copy.deepcopy(model), inputs).isfinite().all()
    monkeypatch.setattr(MergedExperts, "is_lent", lambda self: True)
    assert_close(logits_of(model, inputs), expected, 1e-9)


@torch.no_grad()
def test_biases_of_an_adapter_are_kept_where_weights_are_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("bert", "sequence")
    model, inputs = low_rank(case), case.inputs()
    config = MeoLoraConfig(r=2, lora_bias=True, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "bias" in name:
            parameter.data.fill_(0.3)
    expected = logits_of(adapted, inputs)
    monkeypatch.setattr(MergedExperts, "is_lent", lambda self: True)
    assert_close(logits_of(adapted, inputs), expected, 1e-9)
