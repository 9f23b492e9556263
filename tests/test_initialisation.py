"""Fresh parameters: drawn as the stock model draws them, whether a config or a checkpoint leaves them open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contracts import Case
from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.remote_meo import heads_of
from safetensors.torch import load_file, save_file
from tiny import main_class, meo_config, merged_of, tiny_config
from torch import Tensor
from transformers import PreTrainedModel

WIDER: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SEQ2SEQ = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
WIDE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(FAMILIES, WIDER),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus"), SEQ2SEQ),
    **{family: {"d_model": 64, "d_ff": 128, "d_kv": 16} for family in ("t5", "mt5")},
    "distilbert": {"dim": 64, "hidden_dim": 128},
    "gpt2": {"n_embd": 64, "n_inner": 128},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
}
HEADS = sorted((family, name) for family in FAMILIES for name in set(heads_of(family).values()))
BIG = 2000  # elements from which an estimated std is good to a few percent
HELD = [
    ("bert", "BertModel", "BertForQuestionAnswering"),
    ("modernbert", "ModernBertModel", "ModernBertForSequenceClassification"),
    ("vit", "ViTModel", "ViTForImageClassification"),
    ("t5", "T5Model", "T5ForSequenceClassification"),
    ("t5", "T5EncoderModel", "T5ForTokenClassification"),
    ("bart", "BartModel", "BartForSequenceClassification"),
    ("gpt2", "GPT2Model", "GPT2ForTokenClassification"),
    ("llama", "LlamaModel", "LlamaForSequenceClassification"),
]


def pair(family: str, head: str, **meo: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a stock model and a MEO model, each as its config draws it."""
    config = tiny_config(family, **WIDE[family])
    stock = getattr(transformers, head)
    torch.manual_seed(0)
    dense = stock(config)
    torch.manual_seed(1)
    settings = {"num_experts": 3, "token_reduction": 4, "tasks": [f"t{i}" for i in range(200)], **meo}
    return dense, meo_model_class(stock)(meo_config(config, **settings))


def dense_projections(dense: PreTrainedModel, family: str, path: str) -> dict[str, list[Tensor]]:
    """Return the dense parameters that the experts at a path stand for, by the experts' names."""
    row = FAMILIES[family]
    owner = dense.get_submodule(path.removesuffix(f".{row.up[0][0]}") if row.hosted else path)
    up = next(paths for paths in row.up if all(hasattr(owner, p.split(".")[0]) for p in paths))
    fused = "gate_up_proj" if row.fused or len(up) == 2 else "up_proj"
    found: dict[str, list[Tensor]] = {}
    for name, paths in ((fused, up), ("down_proj", (row.down,))):
        linears = [owner.get_submodule(p) for p in paths]
        found[name] = [linear.weight for linear in linears]
        if linears[0].bias is not None:
            found[f"{name}_bias"] = [linear.bias for linear in linears]
    return found


def assert_drawn_alike(name: str, actual: Tensor, expected: Tensor) -> None:
    """Compare finiteness and spread: closely where there are many numbers, and constants exactly."""
    assert torch.isfinite(actual).all(), name
    spread = float(expected.std()) if expected.numel() > 1 else 0.0
    if spread == 0:
        assert (actual == expected.flatten()[0]).all(), f"{name} is not the stock model's constant"
    elif expected.numel() >= 32:
        slack = 1.1 if min(actual.numel(), expected.numel()) >= BIG else 1.8
        ratio = float(actual.std()) / spread
        assert 1 / slack <= ratio <= slack, f"{name}: std {float(actual.std()):.4f}, stock {spread:.4f}"


@torch.no_grad()
def assert_experts_drawn_alike(model: PreTrainedModel, dense: PreTrainedModel, family: str) -> None:
    """Compare every expert with the dense projections, and the experts of a layer with each other."""
    for path, module in merged_of(model).items():
        projections = dense_projections(dense, family, path)
        assert {name for name, p in module.experts.named_parameters()} == projections.keys()
        for name, stock in projections.items():
            experts = getattr(module.experts, name)
            for expert in experts:
                for actual, expected in zip(expert.chunk(len(stock)), stock, strict=True):
                    assert_drawn_alike(f"{path}.experts.{name}", actual, expected)
            if float(stock[0].std()) > 0:
                assert not any(torch.equal(experts[0], other) for other in experts[1:]), f"{path}: equal experts"


def assert_routers_drawn(model: PreTrainedModel) -> None:
    """Check router, noise and adapter of every merged feed-forward."""
    weights = []
    for path, module in merged_of(model).items():
        for name, parameter in module.router.named_parameters():
            if name.endswith("noise_weight"):
                assert not parameter.any(), path
            else:
                weights.append(parameter.detach().flatten())
        if module.adapter is not None:
            assert not any(p.any() for p in module.adapter.up.parameters()), path
            assert not module.adapter.down.bias.any(), path
            assert 0.5 < module.adapter.down.weight.std().item() * (3 * 64) ** 0.5 < 1.5, path
    drawn = torch.cat(weights)
    assert 0.017 < float(drawn.std()) < 0.023
    assert float(drawn.abs().max()) < 0.1
    assert len(drawn.unique()) == len(drawn), "two routers are alike"


@pytest.mark.parametrize(("family", "head"), HEADS, ids=[head for _, head in HEADS])
def test_config_draws_what_stock_draws(family: str, head: str) -> None:
    level = "token" if FAMILIES[family].kind != "decoder" else "task"
    dense, model = pair(family, head, level=level)
    merged = tuple(f"{path}." for path in merged_of(model))
    stock = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith(merged):
            assert_drawn_alike(name, parameter.detach(), stock[name].detach())
    assert_experts_drawn_alike(model, dense, family)
    assert_routers_drawn(model)


@pytest.mark.parametrize(("family", "base", "head"), HELD)
def test_base_checkpoint_gets_a_fresh_head(family: str, base: str, head: str, tmp_path: Path) -> None:
    dense, model = pair(family, base)
    dense.save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "meo")
    stock_class = getattr(transformers, head)
    stock, expected = stock_class.from_pretrained(tmp_path / "dense", output_loading_info=True)
    loaded, found = meo_model_class(stock_class).from_pretrained(tmp_path / "meo", output_loading_info=True)
    assert set(found["missing_keys"]) == set(expected["missing_keys"]), "the head, and nothing else, is new"
    for name in found["missing_keys"]:
        assert_drawn_alike(name, loaded.get_parameter(name).detach(), stock.get_parameter(name).detach())
    body = getattr(loaded, "transformer", loaded) if family == "t5" else loaded.base_model
    names = set(dict(body.named_parameters()))
    assert any(".experts." in name for name in names)
    for name, parameter in model.named_parameters():
        assert name in names or name.startswith("pooler."), name  # some heads do without the pooler
        assert name not in names or torch.equal(body.get_parameter(name), parameter), name


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2"])
def test_checkpoint_with_holes_is_filled_and_kept(family: str, tmp_path: Path) -> None:
    """One layer lost its first projections, another its router: drawn afresh; all else stays to the bit."""
    dense, model = pair(family, main_class(family).__name__)
    model.save_pretrained(tmp_path)
    first, second = list(merged_of(model))[:2]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = {n for n in tensors if n.startswith(f"{second}.router.") or (n.startswith(first) and "up_proj" in n)}
    assert len(lost) >= 3
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, file, {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    for name, parameter in loaded.named_parameters():
        if name in lost:
            assert not torch.equal(parameter, model.get_parameter(name)) or not parameter.any(), name
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name
    assert_experts_drawn_alike(loaded, dense, family)
    assert_routers_drawn(loaded)


def test_noise_added_at_load_keeps_the_router(tmp_path: Path) -> None:
    model = Case("bert", "sequence").drawn(router="top_k").float()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, meo={"router": "noisy_top_k"}, output_loading_info=True)
    assert all(name.endswith("noise_weight") for name in info["missing_keys"])
    assert len(info["missing_keys"]) == len(merged_of(model))
    for path, module in merged_of(model).items():
        found = loaded.get_submodule(path)
        assert torch.equal(found.router.weight, module.router.weight)
        assert torch.equal(found.experts.up_proj, module.experts.up_proj)
        assert not found.router.noise_weight.any()
