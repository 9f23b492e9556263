"""PEFT's other methods on MEO models: they train, switch off, come back from their files, and generate."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import Case, assert_close, assert_differs, logits_of
from meo_hf.modeling.errors_meo import RoutingError
from moe_contracts import MoeCase
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter
from real import ASSETS
from torch import Tensor

from meo_hf.demo import Package, fetch

TORCHAO = Package("torchao==0.18.0", "6540b148e40ba81cbd4de86392225a076a1591146e9cebb099b3b234ba9feebe", "torchao")
TARGETS = {"llama": ["q_proj", "v_proj"], "mixtral": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"]}
METHODS: dict[str, Callable[..., Any]] = {
    "lora": lambda **o: LoraConfig(r=2, init_lora_weights=False, **o),
    "rslora": lambda **o: LoraConfig(r=2, init_lora_weights=False, use_rslora=True, lora_dropout=0.1, **o),
    "dora": lambda **o: LoraConfig(r=2, init_lora_weights=False, use_dora=True, **o),
    "ia3": lambda **o: IA3Config(feedforward_modules=[], init_ia3_weights=False, **o),
    "loha": lambda **o: LoHaConfig(r=2, init_weights=False, **o),
    "lokr": lambda **o: LoKrConfig(r=2, init_weights=False, **o),
}
PROMPTS: dict[str, Callable[..., Any]] = {
    "prompt": lambda **o: PromptTuningConfig(num_virtual_tokens=3, **o),
    "p-tuning": lambda **o: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **o),
    "prefix": lambda **o: PrefixTuningConfig(num_virtual_tokens=3, **o),
}
CASES = [
    (Case("llama", "segment"), "CAUSAL_LM"),
    (Case("llama", "sequence"), "CAUSAL_LM"),
    (MoeCase("mixtral"), "CAUSAL_LM"),
    (Case("t5", "sequence"), "SEQ_2_SEQ_LM"),
    (Case("bert", "task"), None),
]
PROMPTED = [pair for pair in CASES if pair[1]]


def cases(pairs: list[Any]) -> pytest.MarkDecorator:
    ids = [f"{case.family}-{getattr(case, 'level', 'moe')}" for case, _ in pairs]
    return pytest.mark.parametrize(("case", "task"), pairs, ids=ids)


def model_of(case: Case | MoeCase, prefix: int = 0) -> Any:
    model = (case.drawn() if isinstance(case, Case) else case.merged(case.stock())).float()
    if prefix and case.family != "t5":
        model.expect_prefix(prefix)
    return model


@torch.no_grad()
def stirred(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def check(case: Case | MoeCase, config: Any, folder: Path, prefix: int = 0) -> None:
    model, inputs = model_of(case, prefix), case.inputs()
    base = logits_of(model, inputs)
    peft = stirred(get_peft_model(model, config))
    found = logits_of(peft, inputs)
    assert_differs(found[:, -base.shape[1] :], base)
    with peft.disable_adapter():
        assert torch.equal(logits_of(peft, inputs), base)
    peft.save_pretrained(folder)
    again = PeftModel.from_pretrained(model_of(case, prefix), str(folder)).eval()
    assert torch.equal(logits_of(again, inputs), found)
    peft.train()(**inputs).logits.square().mean().backward()
    trained = [(name, p.grad) for name, p in peft.named_parameters() if p.requires_grad]
    assert trained
    assert all(grad is not None and bool(grad.any()) for _, grad in trained)
    if getattr(config, "task_type", None) == "CAUSAL_LM":
        check_generation(peft.eval(), inputs)


def check_generation(peft: Any, inputs: dict[str, Tensor]) -> None:
    """Compare what was generated, step by step, with one pass over all of it."""
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
    written = peft.generate(**inputs, **options)
    ids = written.sequences[:, -(inputs["input_ids"].shape[1] + 5) :]
    lengths = {"prompt_lengths": torch.full((len(ids),), inputs["input_ids"].shape[1])}
    takes = peft.get_base_model()._meo_context.settings.level == "sequence"
    whole = logits_of(peft, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **(lengths if takes else {})})
    assert_close(torch.stack(written.logits, 1), whole[:, -6:-1], 1e-4)


@pytest.mark.parametrize("method", list(METHODS))
@cases(CASES)
def test_methods(case: Case | MoeCase, task: str | None, method: str, tmp_path: Path) -> None:
    check(case, METHODS[method](target_modules=TARGETS[case.family], task_type=task), tmp_path)


@pytest.mark.parametrize("method", list(PROMPTS))
@cases([pair for pair in PROMPTED if getattr(pair[0], "level", "") != "sequence" or pair[0].family == "t5"])
def test_virtual_tokens(case: Case | MoeCase, task: str, method: str, tmp_path: Path) -> None:
    check(case, PROMPTS[method](task_type=task), tmp_path, prefix=3 if method == "prefix" else 0)


def test_an_unexpected_prefix_is_refused_with_the_way_out() -> None:
    case = Case("llama", "segment")
    peft = get_peft_model(model_of(case), PROMPTS["prefix"](task_type="CAUSAL_LM"))
    with pytest.raises(RoutingError, match=r"expect_prefix\(3\)"):
        logits_of(peft, case.inputs())


@cases(PROMPTED)
def test_routers_and_heads_are_kept_with_the_adapter(case: Case | MoeCase, task: str, tmp_path: Path) -> None:
    router = "gate" if isinstance(case, MoeCase) else "router"
    config = METHODS["lora"](target_modules=TARGETS[case.family], modules_to_save=[router, "lm_head"], task_type=task)
    model, inputs = model_of(case), case.inputs()
    base = copy.deepcopy(model)
    peft = stirred(get_peft_model(model, config))
    names = [name for name, p in peft.named_parameters() if p.requires_grad]
    assert any(f".{router}.modules_to_save." in name for name in names)
    found = logits_of(peft, inputs)
    peft.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits_of(again, inputs), found)
    assert_close(logits_of(again.merge_and_unload(), inputs), found, 1e-4)
    assert_differs(logits_of(base, inputs), found)


@cases(PROMPTED[:1])
def test_adapters_are_combined_and_swapped(case: Case, task: str, tmp_path: Path) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model, inputs = model_of(case), case.inputs()
    found = []
    for seed, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=[], target_parameters=names, init_lora_weights=False)
        peft = get_peft_model(copy.deepcopy(model), config)
        found.append(logits_of(peft, inputs))
        peft.save_pretrained(folder)
    assert_differs(found[0], found[1])
    swapped = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "one"))
    logits_of(swapped, inputs)
    hotswap_adapter(swapped, str(tmp_path / "two"), adapter_name="default")
    assert torch.equal(logits_of(swapped, inputs), found[1])
    attention = get_peft_model(copy.deepcopy(model), METHODS["lora"](target_modules=["q_proj"]))
    torch.manual_seed(3)
    attention.add_adapter("second", METHODS["lora"](target_modules=["q_proj"]))
    attention.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="cat")
    attention.set_adapter("both")
    mixed = logits_of(attention, inputs)
    attention.base_model.set_adapter(["default", "second"])
    assert_differs(mixed, logits_of(attention, inputs))
    with attention.disable_adapter():
        assert_differs(mixed, logits_of(attention, inputs))


QUANTISED = """
import logging, sys, torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
import meo_hf
ids = torch.arange(5, 21).reshape(2, 8)
with torch.no_grad():
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])(ids).logits
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert type(model.model.layers[0].self_attn.q_proj.weight.data) is not torch.Tensor
    found = model(ids).logits
    assert 0 < float((found - base).norm() / base.norm()) < 0.5  # gates may tip
    names = [name for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    assert sum(model.get_parameter(name).nbytes for name in names) == int(sys.argv[2])
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    assert torch.equal(peft(ids).logits, found)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the wheel is for Linux on x86-64"
)
@pytest.mark.parametrize("case", [Case("llama", "segment"), MoeCase("mixtral")], ids=["llama", "mixtral"])
def test_quantised_models_say_what_stayed_in_full_precision(case: Case | MoeCase, tmp_path: Path) -> None:
    fetch(TORCHAO, ASSETS)
    model = model_of(case)
    model.save_pretrained(tmp_path)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3)
    command = [sys.executable, "-c", QUANTISED, str(tmp_path), str(experts)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ASSETS), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"left the experts as they are: {experts / 2**20:,.1f} MiB of float32" in done.stderr
