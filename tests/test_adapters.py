"""Our adapters: what they compute, train, save and refuse, over families and scopes."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import SCOPES, Case, assert_close, assert_differs, logits_of
from meo_hf.modeling.cache_meo import routings
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.merger_meo import Merger
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from meo_hf.modeling.router_meo import MeoRouter
from moe_contracts import KEPT, MoeCase
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import labels_for
from torch import Tensor, nn
from transformers import PreTrainedModel

from meo_hf import MeoLoraConfig
from meo_hf.adapters import PEFT_TYPE, ParamWrapper
from meo_hf.errors import UnsupportedError, UsageError

DENSE = [Case(family, row.default_level, SCOPES[n % 2]) for n, (family, row) in enumerate(FAMILIES.items())]
MIXTURES = [MoeCase(family, MOE_FAMILIES[family].poolings[0]) for family in KEPT if family != "dbrx"]
KINDS: dict[str, dict[str, Any]] = {
    "per_expert": {},
    "shared": {"scope": "shared"},
    "dora": {"use_dora": True, "rank_pattern": {r".*down_proj": 2}, "alpha_pattern": {r".*down_proj": 5}},
    "shared-dora": {"scope": "shared", "use_dora": True, "use_rslora": True},
}
SOME = [Case("llama", "segment"), Case("bert", "token", "projection"), Case("t5", "sequence"), MoeCase("gpt_oss")]


def every(some: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", some, ids=lambda c: f"{c.family}-{getattr(c, 'scope', 'moe')}")


def model_of(case: Case | MoeCase, **meo: Any) -> PreTrainedModel:
    return case.drawn(**meo) if isinstance(case, Case) else case.merged(case.stock(), **meo)


def adapted(model: nn.Module, seed: int = 5, **options: Any) -> PeftModel:
    """Add an adapter that changes what the model says."""
    torch.manual_seed(seed)
    made = get_peft_model(model, MeoLoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options}))
    return stirred(made)


@torch.no_grad()
def stirred(model: PeftModel, seed: int = 7) -> PeftModel:
    """Move all parameters of adapters, such as magnitudes and biases, away from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tolerance(case: Case | MoeCase) -> float:
    return 2e-5 if isinstance(case, MoeCase) else 1e-6


def with_biases(case: Case | MoeCase) -> bool:
    model = model_of(case)
    return any(n.endswith("bias") for m in model.modules() if isinstance(m, Merger) for n, _ in m.named_parameters())


@every([*DENSE, *MIXTURES])
def test_merged_is_unmerged_and_disabled_is_base(case: Case | MoeCase) -> None:
    for kind in ("per_expert", "shared"):
        check_merging(case, merge_and_unload=kind == "shared", **KINDS[kind])


@pytest.mark.parametrize("kind", ["dora", "shared-dora"])
@every(SOME)
def test_scaled_rows_merge(case: Case | MoeCase, kind: str) -> None:
    check_merging(case, **KINDS[kind])


@every(SOME)
def test_biases_merge_where_experts_have_them(case: Case | MoeCase) -> None:
    if with_biases(case):
        check_merging(case, lora_bias=True)
        check_merging(case, lora_bias=True, scope="shared")
        return
    peft = adapted(model_of(case), lora_bias=True)
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    with pytest.raises(ValueError, match="has no bias"):
        peft.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in peft.state_dict().items())


def check_merging(case: Case | MoeCase, merge_and_unload: bool = True, **options: Any) -> None:
    model, inputs = model_of(case), case.inputs()
    base = logits_of(model, inputs)
    peft = adapted(model, **options)
    found = logits_of(peft, inputs)
    assert_differs(found, base)
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft, inputs), base)
    peft.merge_adapter()
    assert_close(logits_of(peft, inputs), found, tolerance(case))
    peft.unmerge_adapter()
    assert_close(logits_of(peft, inputs), found, tolerance(case))
    with peft.disable_adapter():
        assert_close(logits_of(peft, inputs), base, tolerance(case))
    if merge_and_unload:
        assert_close(logits_of(peft.merge_and_unload(safe_merge=True), inputs), found, tolerance(case))


@pytest.mark.parametrize("kind", list(KINDS))
@every(SOME)
def test_experts_with_adapters_are_what_their_definition_says(case: Case | MoeCase, kind: str) -> None:
    model, inputs = model_of(case), case.inputs()
    peft = adapted(copy.deepcopy(model), **KINDS[kind])
    found = logits_of(peft, inputs)
    plain = dict(model.named_parameters())
    with torch.no_grad():
        for path, wrapper in peft.base_model.model.named_modules():
            if isinstance(wrapper, ParamWrapper):
                name = f"{path.replace('.base_layer', '')}.{wrapper.parameter_name}"
                for expert, weight in enumerate(plain[name]):
                    weight.copy_(defined(wrapper, weight, expert))
    assert_close(logits_of(model, inputs), found, tolerance(case))


def defined(wrapper: ParamWrapper, weight: Tensor, expert: int) -> Tensor:
    """Return one expert's weight as the papers define it: LoRA's sum, and DoRA's direction times magnitude."""
    own = "default"
    down, up, rank = wrapper.lora_A[own].weight, wrapper.lora_B[own].weight, wrapper.r[own]
    if len(down) > rank:
        down, up = down[expert * rank : (expert + 1) * rank], up[:, expert :: len(down) // rank]
    weight = weight.t() if wrapper.is_transposed else weight
    changed = weight + wrapper.scaling[own] * up @ down
    if own in wrapper.lora_magnitude_vector:
        changed = wrapper.lora_magnitude_vector[own].weight[expert, :, None] * changed
        changed = changed / (changed.norm(dim=1) / wrapper.lora_magnitude_vector[own].weight[expert].abs())[:, None]
    return changed.t() if wrapper.is_transposed else changed


@pytest.mark.parametrize("kind", ["per_expert", "shared", "dora"])
@every([*SOME, MoeCase("mixtral"), MoeCase("jetmoe"), MoeCase("switch_transformers"), MoeCase("llama4")])
def test_saved_is_loaded_and_holds_the_adapter_alone(case: Case | MoeCase, kind: str, tmp_path: Path) -> None:
    model, inputs = model_of(case), case.inputs()
    base = copy.deepcopy(model)
    peft = adapted(model, **KINDS[kind])
    found = logits_of(peft, inputs)
    peft.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(".lora_" in name for name in names)
    assert len(names) == sum(".lora_" in name for name, _ in peft.named_parameters())
    kept = PeftConfig.from_pretrained(str(tmp_path)).peft_type
    assert kept == ("LORA" if kind == "per_expert" else PEFT_TYPE)
    for low in (False, True):
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(logits_of(again, inputs), found)
    own = MeoLoraConfig.from_pretrained(str(tmp_path))
    assert isinstance(own, MeoLoraConfig)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), config=own, is_trainable=True)
    assert torch.equal(logits_of(again, inputs), found)
    assert all(isinstance(m, ParamWrapper) for m in again.modules() if hasattr(m, "parameter_name"))


@pytest.mark.parametrize("trainable", ["adapters", "routers", "both"])
@every(SOME)
def test_gradients_reach_what_is_trained(case: Case | MoeCase, trainable: str, tmp_path: Path) -> None:
    model, inputs = model_of(case), case.inputs()
    base = copy.deepcopy(model)
    peft = adapted(model, trainable=trainable).train()
    peft(**inputs).logits.square().sum().backward()
    wanted = {"adapters": (".lora_",), "routers": (".modules_to_save.",), "both": (".lora_", ".modules_to_save.")}
    for name, parameter in peft.named_parameters():
        meant = any(part in name for part in wanted[trainable])
        assert (parameter.grad is not None and bool(parameter.grad.any())) == meant, name
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad / parameter.grad.norm())
    found = logits_of(peft.eval(), inputs)
    assert_differs(found, logits_of(base, inputs), 1e-4)
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(logits_of(again, inputs), found)


def test_dropout_acts_on_what_the_factors_read_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("llama", "segment")
    peft, inputs = adapted(model_of(case, router="top_k"), lora_dropout=0.5), case.inputs()
    still = logits_of(peft.eval(), inputs)
    assert torch.equal(logits_of(peft, inputs), still)
    peft.train()
    assert_differs(logits_of(peft, inputs), logits_of(peft, inputs))
    seen = []
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: seen.append(self.p) or x)
    assert_close(logits_of(peft, inputs), still)
    assert seen.count(0.5) >= sum(isinstance(m, ParamWrapper) for m in peft.modules())  # gate and up may drop apart


@every([Case("llama", "segment"), Case("llama", "sequence"), Case("t5", "sequence"), MoeCase("mixtral")])
def test_adapters_can_change_between_and_within_generations(case: Case | MoeCase) -> None:
    model, inputs = model_of(case), case.inputs()
    peft = adapted(model)
    torch.manual_seed(9)
    peft.add_adapter("second", MeoLoraConfig(r=2, init_lora_weights=False))
    stirred(peft, 8)
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}

    def written(cached: bool) -> Tensor:
        options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(peft.generate(**inputs, use_cache=cached, **options).logits)

    seen = []
    for adapter in ("default", "second", "default"):
        peft.set_adapter(adapter)
        assert_close(written(True), written(False), 1e-4)
        seen.append(written(True))
    assert torch.equal(seen[0], seen[2])
    assert_differs(seen[0], seen[1])
    with peft.disable_adapter():
        assert_close(written(True), written(False), 1e-4)


def test_kept_tasks_follow_their_adapters() -> None:
    case = Case("bert", "task")
    peft, inputs = adapted(model_of(case)), case.inputs()
    stirred(peft, 8)
    found = logits_of(peft, inputs)
    with peft.disable_adapter():
        base = logits_of(peft, inputs)
        assert_differs(found, base)
    assert torch.equal(logits_of(peft, inputs), found)
    peft.merge_adapter()
    assert_close(logits_of(peft, inputs), found)
    peft.unmerge_adapter()
    for wrapper in peft.modules():
        if isinstance(wrapper, ParamWrapper):
            wrapper.scale_layer(2.0)
    assert_differs(logits_of(peft, inputs), found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    case = Case("llama", "segment")
    model, inputs = model_of(case, balance_loss=0.0), case.inputs()
    found = []
    for checkpointed in (False, True):
        peft = adapted(copy.deepcopy(model), use_dora=True).train()
        if checkpointed:
            peft.enable_input_require_grads()
            peft.gradient_checkpointing_enable({"use_reentrant": reentrant})
        peft(**inputs).logits.square().sum().backward()
        found.append({name: p.grad for name, p in peft.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, 1e-9)


def test_compiled_is_eager() -> None:
    case = Case("llama", "segment")
    peft, inputs = adapted(model_of(case)), case.inputs()
    expected = logits_of(peft, inputs)
    compiled = torch.compile(peft.base_model.model, fullgraph=True, backend="aot_eager")
    assert_close(logits_of(compiled, inputs), expected)


def test_plain_adapters_of_mixtures_go_both_ways(tmp_path: Path) -> None:
    case = MoeCase("mixtral")
    stock, inputs = case.stock(), case.inputs()
    ours = adapted(case.merged(stock))
    found = logits_of(ours, inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(stock), str(tmp_path / "ours"))
    merged = copy.deepcopy(theirs).merge_and_unload()
    assert_close(logits_of(case.merged(merged), inputs), found, tolerance(case))
    theirs.save_pretrained(tmp_path / "theirs")
    for config in (None, MeoLoraConfig.from_pretrained(str(tmp_path / "theirs"))):
        again = PeftModel.from_pretrained(case.merged(stock), str(tmp_path / "theirs"), config=config)
        assert torch.equal(logits_of(again, inputs), found)
    torch.manual_seed(3)
    names = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names, init_lora_weights=False)
    stocks = get_peft_model(copy.deepcopy(stock), config)
    stocks.save_pretrained(tmp_path / "stock")
    expected = logits_of(case.merged(stocks.merge_and_unload()), inputs)
    for config in (None, MeoLoraConfig.from_pretrained(str(tmp_path / "stock"))):
        again = PeftModel.from_pretrained(case.merged(stock), str(tmp_path / "stock"), config=config)
        assert_close(logits_of(again, inputs), expected, tolerance(case))


def test_names_of_old_files_reach_the_experts() -> None:
    case = MoeCase("mixtral")
    peft = get_peft_model(case.merged(case.stock()), LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"]))
    assert {m.parameter_name for m in peft.modules() if hasattr(m, "parameter_name")} == {"gate_up_proj", "down_proj"}


def test_layers_can_be_chosen() -> None:
    peft = adapted(model_of(Case("llama", "segment")), layers_to_transform=[1], target_modules=["down"])
    assert [n.split(".lora_")[0] for n, _ in peft.named_parameters() if ".lora_A" in n] == [
        "base_model.model.model.layers.1.mlp.experts"
    ]


def test_it_says_what_it_trains(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("meo_hf").propagate = True
    with caplog.at_level(logging.WARNING):
        peft = adapted(model_of(Case("llama", "segment")), trainable="both")
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    gates = sum(p.numel() for m in peft.modules() if isinstance(m, MeoRouter) for p in m.parameters()) // 2
    text = next(record.message for record in caplog.records if "trains" in record.message)
    assert f"trains {trained:,} parameters" in text
    assert "a pair for each of 6 experts in 2 blocks" in text
    assert f"routers ({gates:,})" in text


def test_stock_adapters_say_what_they_miss(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("meo_hf", "transformers"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.WARNING):
        get_peft_model(model_of(Case("llama", "segment")), LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    text = " ".join(record.message for record in caplog.records)
    assert "names up_proj in target_modules: no such module" in text
    assert "does not touch the experts" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        get_peft_model(
            model_of(Case("llama", "segment")),
            LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        )
    assert not any("Adapter" in record.message for record in caplog.records)


def test_default_targets_are_the_family_s() -> None:
    peft = get_peft_model(model_of(Case("llama", "segment")), LoraConfig(r=2))
    assert {n.split(".lora_")[0].rpartition(".")[2] for n, _ in peft.named_parameters() if ".lora_A" in n} == {
        "q_proj",
        "v_proj",
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scope": "both"}, "allowed: per_expert, shared"),
        ({"trainable": "all"}, "allowed: adapters, routers, both"),
        ({"init_lora_weights": "pissa"}, "gaussian"),
        ({"layers_to_transform": [7]}, "no experts in layers"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        adapted(model_of(Case("llama", "segment")), **options)


def test_experts_that_are_no_stacks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="matrices, not stacks"):
        adapted(model_of(MoeCase("dbrx")))


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UsageError, match="is this a MEO model"):
        adapted(copy.deepcopy(Case("llama", "segment").dense()))


def test_kinds_do_not_mix_on_the_same_experts() -> None:
    peft = adapted(model_of(Case("llama", "segment")))
    names = sorted(peft.peft_config["default"].target_parameters)
    with pytest.raises(ValueError, match="adapter"):
        peft.add_adapter("stock", LoraConfig(r=2, target_modules=[], target_parameters=names))


def test_the_file_names_the_package(tmp_path: Path) -> None:
    adapted(model_of(Case("llama", "segment")), scope="shared").save_pretrained(tmp_path)
    assert "meo_hf" in json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"]


def test_losses_fall_with_the_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    case = Case("bert", "token", "projection")
    inputs = case.inputs()
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(3)]
    labels = labels_for("bert", inputs)
    rows = [{**row, "labels": labels[i]} for i, row in enumerate(rows)]
    peft = adapted(model_of(case).float(), trainable="both", lora_dropout=0.1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, learning_rate=2e-2, per_device_train_batch_size=3, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(peft, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "case", [Case("llama", "sequence"), Case("llama", "sequence", "projection"), MoeCase("mixtral")]
)
def test_steps_find_what_was_merged_with_the_adapter(case: Case | MoeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, inputs = (
        adapted(model_of(case, **({"level": "sequence"} if isinstance(case, MoeCase) else {}))),
        case.inputs(),
    )
    merges = []
    original = Merger._merge
    monkeypatch.setattr(Merger, "_merge", lambda self, name, *rest: merges.append(name) or original(self, name, *rest))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    peft.generate(**inputs, do_sample=False, max_new_tokens=2, use_cache=True)
    once = len(merges)
    merges.clear()
    peft.generate(**inputs, do_sample=False, max_new_tokens=4, use_cache=True)
    assert once == len(merges) > 0


def test_an_old_file_of_experts_one_by_one_is_read(tmp_path: Path) -> None:
    case = MoeCase("mixtral")
    stock, inputs = case.stock(), case.inputs()
    config, rank = stock.config, 2
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            for name in ("w1", "w2", "w3"):
                sizes = (config.hidden_size, config.intermediate_size)
                read, write = sizes if name != "w2" else sizes[::-1]
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(rank, read, generator=generator) * 0.5
                tensors[f"{path}.lora_B.weight"] = torch.randn(write, rank, generator=generator) * 0.5
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["w1", "w2", "w3"], "task_type": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    merged = PeftModel.from_pretrained(copy.deepcopy(stock), str(tmp_path)).merge_and_unload()
    with torch.no_grad():
        weight = stock.model.layers[0].mlp.experts.gate_up_proj[1, : config.intermediate_size].clone()
    path = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1"
    weight += (2 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]).to(weight)
    assert_close(merged.model.layers[0].mlp.experts.gate_up_proj[1, : config.intermediate_size], weight)
    peft = PeftModel.from_pretrained(case.merged(stock), str(tmp_path))
    expected = logits_of(case.merged(merged), inputs)
    assert_close(logits_of(peft, inputs), expected, tolerance(case))
    assert_differs(expected, logits_of(case.merged(stock), inputs))


def continued(peft: PeftModel, ids: Tensor, change: Any) -> None:
    """Fail unless a KV cache that outlives a change goes on as a copy of it does, which has nothing merged."""
    lengths = {"prompt_lengths": torch.full_like(ids[:, 0], ids.shape[1])}
    with torch.no_grad():
        cache = peft(input_ids=ids, use_cache=True, **lengths).past_key_values
        before = peft(input_ids=ids[:, :1], past_key_values=cache).logits
        assert all(routing.merged for routing in routings(cache))
        change()
        twin = copy.deepcopy(cache)
        found, expected = (peft(input_ids=ids[:, :1], past_key_values=each).logits for each in (cache, twin))
    assert_close(found, expected)
    assert_differs(found, before, 1e-3)


@pytest.mark.parametrize(
    "change", ["weights", "other adapter", "disabled", "merged anew", "routers disabled", "experts disabled"]
)
def test_a_cache_outlives_changes_of_adapters(change: str) -> None:
    model, ids = model_of(Case("llama", "sequence")), Case("llama", "sequence").inputs()["input_ids"]
    if change == "experts disabled":
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"])
        peft = get_peft_model(model, config).eval()
        changed = [p for name, p in peft.named_parameters() if ".experts.modules_to_save." in name]
    elif change == "routers disabled":
        peft = adapted(model, trainable="routers").eval()
        changed = [p for name, p in peft.named_parameters() if ".modules_to_save." in name and "noise" not in name]
    else:
        peft, changed = adapted(model), []
    with torch.no_grad():
        for parameter in changed:
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    if change == "other adapter":
        torch.manual_seed(2)
        peft.add_adapter("other", MeoLoraConfig(r=2, init_lora_weights=False))
        continued(peft, ids, lambda: (peft.delete_adapter("default"), peft.set_adapter("other")))
    elif change == "weights":
        continued(peft, ids, lambda: stirred(peft, 11))
    elif change == "merged anew":
        peft.merge_adapter()
        continued(peft, ids, lambda: (peft.unmerge_adapter(), stirred(peft, 11), peft.merge_adapter()))
    else:
        with contextlib.ExitStack() as stack:
            continued(peft, ids, lambda: stack.enter_context(peft.disable_adapter()))


@pytest.mark.parametrize("trained", ["routers", "experts"])
def test_kept_tasks_follow_copies_that_are_trained(trained: str) -> None:
    case = Case("bert", "task")
    model, inputs = model_of(case), case.inputs()
    base = logits_of(model, inputs)
    if trained == "routers":
        peft = adapted(model, trainable="routers").eval()
    else:
        peft = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["experts"])).eval()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert_differs(logits_of(peft, inputs), base)
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft, inputs), base)


def test_further_adapters_name_the_same_maps() -> None:
    peft = adapted(model_of(Case("llama", "segment")), target_modules=["down"])
    inputs = Case("llama", "segment").inputs()
    found = logits_of(peft, inputs)
    with pytest.raises(ValueError, match="same set of parameters"):
        peft.add_adapter("both", MeoLoraConfig(r=2))
    assert torch.equal(logits_of(peft, inputs), found)
    plain = get_peft_model(
        model_of(Case("llama", "segment")), LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    )
    with pytest.raises(ValueError, match="peft types"):
        plain.add_adapter("ours", MeoLoraConfig(r=2, target_modules=["down"]))
    stock = model_of(Case("llama", "segment"))
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]
    stock.add_adapter(LoraConfig(r=2, target_modules=[], target_parameters=names), "one")
    with pytest.raises(UsageError, match="a plain LoRA holds"):
        stock.add_adapter(MeoLoraConfig(r=2, scope="shared", target_modules=["down"]), "two")


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"layers_to_transform": [1]}, {"encoder.block.1", "decoder.block.1"}),
        ({"exclude_modules": ".*encoder.*"}, {"decoder.block.0", "decoder.block.1"}),
        ({"layers_to_transform": [0], "layers_pattern": "layer", "exclude_modules": ["experts"]}, None),
    ],
)
def test_experts_of_chosen_layers(options: dict[str, Any], left: set[str] | None) -> None:
    if left is None:
        with pytest.raises(UsageError, match="no experts"):
            adapted(model_of(Case("t5", "sequence")), target_modules=["down"], **options)
        return
    peft = adapted(model_of(Case("t5", "sequence")), target_modules=["down"], **options)
    names = [n for n, _ in peft.base_model.model.named_parameters() if ".lora_A" in n]
    assert {".".join(name.split(".")[:3]) for name in names} == left


def test_rows_without_magnitude_come_back() -> None:
    case = Case("llama", "segment")
    peft, inputs = adapted(model_of(case), use_dora=True), case.inputs()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "magnitude" in name:
                parameter[:, ::3] = 0
    with peft.disable_adapter():
        base = logits_of(peft, inputs)
    found = logits_of(peft, inputs)
    peft.merge_adapter()
    assert_close(logits_of(peft, inputs), found)
    peft.unmerge_adapter()
    with peft.disable_adapter():
        assert_close(logits_of(peft, inputs), base)


def test_a_task_type_at_level_task_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("transformers").propagate = logging.getLogger("meo_hf").propagate = True
    with caplog.at_level(logging.WARNING):
        adapted(model_of(Case("bert", "task")), task_type="TOKEN_CLS")
    assert any("keeps `task_ids` to itself" in record.message for record in caplog.records)
