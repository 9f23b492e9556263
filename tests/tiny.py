"""Tiny models of every family, from configs, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meo_hf.modeling.families_meo import FAMILIES
from meo_hf.modeling.feedforward_meo import MeoFeedForward
from meo_hf.modeling.remote_meo import heads_of

import transformers

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


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a small config of a family's stock class, dropout off unless asked for."""
    kind = FAMILIES[model_type].kind
    values = dict(_OVERRIDES.get(model_type, _COMMON if kind == "encoder" else _GROUPED))
    config_class = CONFIG_MAPPING[model_type]
    fields = config_class.__dataclass_fields__
    dropouts = {name: 0.0 for name in fields if "drop" in name and isinstance(fields[name].default, float)}
    return config_class(**{**dropouts, **values, **overrides})


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


def draw_experts(model: PreTrainedModel, seed: int = 1, spread_of_gates: float = 3.0) -> PreTrainedModel:
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
                if not name.endswith("noise_weight"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread_of_gates)
            if module.adapter is not None:
                parameter = module.adapter.up.weight
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def tiny_inputs(model_type: str, rows: int = 3, length: int = 8, seed: int = 2) -> dict[str, Tensor]:
    """Return inputs without padding for a family's main class."""
    generator = torch.Generator().manual_seed(seed)
    if model_type == "vit":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}

    def ids(width: int) -> Tensor:
        return torch.randint(5, VOCAB, (rows, width), generator=generator)

    inputs = {"input_ids": ids(length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if FAMILIES[model_type].kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids(6)
    return inputs
