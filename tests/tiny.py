"""Tiny models of every family, from configs, and inputs for them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.families_meo import FAMILIES, Family
from meo_hf.modeling.feedforward_meo import MeoFeedForward
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.remote_meo import heads_of
from meo_hf.modeling.router_meo import Gates, MeoRouter
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

VOCAB = 99
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 1,
    "eos_token_id": 3,
    "decoder_start_token_id": 1,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "distilbert": {
        "vocab_size": VOCAB,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
    },
    "albert": {**_COMMON, "embedding_size": 16},
    "electra": {**_COMMON, "embedding_size": 16},
    "deberta-v2": {**_COMMON, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    "modernbert": {
        **_COMMON,
        "global_attn_every_n_layers": 2,
        "local_attention": 8,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "vit": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "encoder_stride": 4,
    },
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "marian": _SEQ2SEQ,
    "pegasus": _SEQ2SEQ,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "gpt_neox": {**_COMMON, "rotary_pct": 0.5},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "phi": {**_COMMON, "partial_rotary_factor": 0.5},
    "phi3": {**_GROUPED, "rope_scaling": None},
    "glm4": {**_GROUPED, "head_dim": 8},
    "qwen3": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "granite": {**_GROUPED, "residual_multiplier": 0.5},
}


def tiny_config(model_type: str, every_dropout: float = 0.0, **overrides: Any) -> PreTrainedConfig:
    """Return a small config of a family's stock class, with every dropout at one rate."""
    kind = FAMILIES[model_type].kind
    values = dict(_OVERRIDES.get(model_type, _COMMON if kind == "encoder" else _GROUPED))
    config_class = CONFIG_MAPPING[model_type]
    fields = config_class.__dataclass_fields__
    rates = {n: every_dropout for n, f in fields.items() if "drop" in n and isinstance(f.default, float)}
    return config_class(**{**rates, **values, **overrides})


def main_class(model_type: str) -> type[PreTrainedModel]:
    """Return the stock class with logits that a family is tested with."""
    heads = heads_of(model_type)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification"):
        if auto in heads and (auto != "AutoModelForCausalLM" or FAMILIES[model_type].kind == "decoder"):
            return getattr(transformers, heads[auto])
    return getattr(transformers, heads["AutoModelForMaskedLM"])


def spread(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give a dense model weights of a size at which a wrong feed-forward shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            elif "norm" not in name.lower() or name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def draw_experts(model: PreTrainedModel, seed: int = 1, spread_of_gates: float = 1.5) -> PreTrainedModel:
    """Draw every expert on its own, and routers whose logits differ by more than one between inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, MeoFeedForward):
                continue
            for parameter in module.experts.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else 100
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            for name, parameter in module.router.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * spread_of_gates
                parameter.copy_(drawn if not name.endswith("noise_weight") else torch.zeros_like(drawn))
            if module.adapter is not None:
                for parameter in module.adapter.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tiny_inputs(model_type: str, rows: int = 3, length: int = 8, seed: int = 3) -> dict[str, Tensor]:
    """Return inputs without padding for a family's main class; rows of few words each, so that their means differ."""
    generator = torch.Generator().manual_seed(seed)
    if model_type == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}

    def ids(width: int) -> Tensor:
        words = torch.randint(5, VOCAB, (rows, 3), generator=generator)
        return words.gather(1, torch.randint(0, 3, (rows, width), generator=generator))

    inputs = {"input_ids": ids(length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if FAMILIES[model_type].kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids(6)
    return inputs


def tiny_dense(model_type: str, head: type[PreTrainedModel] | None = None, **overrides: Any) -> PreTrainedModel:
    """Return a tiny stock model with spread weights."""
    return spread((head or main_class(model_type))(tiny_config(model_type, **overrides))).eval()


def meo_config(config: PreTrainedConfig, **meo: Any) -> PreTrainedConfig:
    """Return the MEO config of a stock config."""
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    return meo_config_class(type(config)).from_dict({**values, "meo": {"num_experts": 6, **meo}})


def meo_of(dense: PreTrainedModel, **meo: Any) -> PreTrainedModel:
    """Return the MEO model whose every expert is the dense feed-forward, behind routers that choose.

    Finds the projections on its own, from the family's row, and fails where any other name differs.
    """
    family = FAMILIES[dense.config.model_type]
    with no_init_weights():  # every parameter is written below
        model = draw_experts(meo_model_class(type(dense))(meo_config(dense.config, **meo))).eval()
    model.tie_weights()
    merged = merged_of(model)
    owners = {path: path.removesuffix(f".{family.up[0][0]}") if family.hosted else path for path in merged}
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert merged, "no feed-forward was replaced"
    assert all(name.startswith(tuple(f"{path}." for path in merged)) for name in missing), missing
    assert all(name.startswith(tuple(f"{path}." for path in owners.values())) for name in unexpected), unexpected
    for path, module in merged.items():
        copy_into_experts(dense.get_submodule(owners[path]), family, module)
    return model


@torch.no_grad()
def copy_into_experts(owner: nn.Module, family: Family, module: MeoFeedForward) -> None:
    """Make every expert a copy of the dense projections that a module owns, and its adapter the identity."""
    up = next(paths for paths in family.up if all(hasattr(owner, path.split(".")[0]) for path in paths))
    for name, paths in ((module.experts.first, up), ("down_proj", (family.down,))):
        linears = [owner.get_submodule(path) for path in paths]
        weights = [linear.weight.t() if isinstance(linear, Conv1D) else linear.weight for linear in linears]
        getattr(module.experts, name).copy_(torch.cat(weights))
        bias = getattr(module.experts, f"{name}_bias")
        assert (bias is None) == (linears[0].bias is None), f"{name}: only one of dense and merged has a bias"
        if bias is not None:
            bias.copy_(torch.cat([linear.bias for linear in linears]))
    if module.adapter is not None:
        module.adapter.up.weight.zero_()
        module.adapter.up.bias.zero_()


def merged_of(model: PreTrainedModel) -> dict[str, MeoFeedForward]:
    """Return the merged feed-forwards by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MeoFeedForward)}


@contextmanager
def recorded_gates(model: PreTrainedModel) -> Iterator[dict[str, list[Gates]]]:
    """Collect what each router chose, by its path."""
    gates: dict[str, list[Gates]] = defaultdict(list)
    routers = [(path, module) for path, module in model.named_modules() if isinstance(module, MeoRouter)]
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, path=path: gates[path].append(out[0]))
        for path, module in routers
    ]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def inputs_as(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return inputs with floating-point values in another precision."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def labels_for(model_type: str, inputs: dict[str, Tensor]) -> Tensor:
    """Return labels for a family's main class."""
    if model_type == "vit":
        return torch.arange(len(inputs["pixel_values"])) % 2
    return inputs.get("decoder_input_ids", inputs["input_ids"])
