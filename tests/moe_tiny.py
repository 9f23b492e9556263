"""Tiny stock mixture-of-experts models of every family, from configs, and inputs for them."""

from __future__ import annotations

import math
import re
import zlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 99
_HEADS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "TOKEN_CLASSIFICATION", "BACKBONE")
_ROUTERS = re.compile(r"Router(MLP)?$|TopKGating$|MoEV1Gate$")
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return values but for some names."""
    return {name: value for name, value in values.items() if name not in names}


_COMMON = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
_LOCAL = {**_COMMON, "intermediate_size": 24, "num_local_experts": 6}
_GRANITES = {**_LOCAL, "attention_multiplier": 0.35}
_NAMED = {**_COMMON, "intermediate_size": 24, "num_experts": 6}
_MOE = {**_COMMON, "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6}
_ROUTED = {**_COMMON, "intermediate_size": 40, "moe_intermediate_size": 24, "n_routed_experts": 8}
_MLA = {
    **_ROUTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_FREE = _without(_COMMON, "num_experts_per_tok")
_KDA = {**_without(_MLA, "n_routed_experts", "q_lora_rank"), "num_local_experts": 8}
_GEMMA4 = {
    **_FREE,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "top_k_experts": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 4,
}
_INKLING = {
    **_ROUTED,
    "n_routed_experts": 6,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 4,
    "d_rel": 4,
    "rel_extent": 16,
    "unpadded_vocab_size": VOCAB,
}
_M3 = {
    **_LOCAL,
    "head_dim": 8,
    "dense_intermediate_size": 40,
    "shared_intermediate_size": 20,
    "rotary_dim": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_block_size": 4,
}
_QWEN35 = {
    **_without(_MOE, "intermediate_size"),
    **_LINEAR,
    "head_dim": 8,
    "shared_expert_intermediate_size": 20,
}
_LONGCAT_NAMES = (
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_experts_per_tok",
    "n_routed_experts",
)
_INDEX = {"index_topk": 16, "index_head_dim": 8, "index_n_heads": 2}

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "qwen3_next": {**_MOE, **_LINEAR, "head_dim": 8, "shared_expert_intermediate_size": 20},
    "olmoe": _NAMED,
    "flex_olmo": _NAMED,
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 3},
    "deepseek_v3": _MLA,
    "gpt_oss": {**_LOCAL, "head_dim": 8, "sliding_window": 4},
    "phimoe": _LOCAL,
    "granitemoe": _GRANITES,
    "granitemoeshared": {**_GRANITES, "shared_intermediate_size": 20},
    "granitemoehybrid": {**_GRANITES, **_MAMBA2, "shared_intermediate_size": 20},
    "jamba": {**_NAMED, "num_hidden_layers": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "ernie4_5_moe": {**_without(_MOE, "num_experts", "num_experts_per_tok"), "moe_num_experts": 6, "moe_k": 2},
    "glm4_moe": {**_ROUTED, "head_dim": 8},
    "dots1": _ROUTED,
    "hunyuan_v1_moe": {**_without(_NAMED, "num_experts_per_tok"), "head_dim": 8, "moe_topk": 2},
    "minimax": {**_LOCAL, "head_dim": 8, "block_size": 4},
    "minimax_m2": {**_LOCAL, "head_dim": 8, "rotary_dim": 8},
    "afmoe": {**_MOE, "head_dim": 8, "sliding_window": 4},
    "nemotron_h": {
        **_without(_ROUTED, "num_hidden_layers"),
        "moe_shared_expert_intermediate_size": 20,
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": _MOE,
    "exaone_moe": {**_MOE, "num_experts": 8, "sliding_window": 4},
    "cohere2_moe": {
        **_NAMED,
        "logit_scale": 1.0,
        "head_dim": 8,
        "sliding_window": 4,
        "prefix_dense_intermediate_size": 40,
    },
    "bailing_hybrid": {**_KDA, "head_dim": 8},
    "solar_open": {**_ROUTED, "head_dim": 8},
    "switch_transformers": {
        **_TOKENS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_heads": 4,
        "num_experts": 6,
        "decoder_start_token_id": 1,
        "dropout_rate": 0.0,
    },
    "nllb-moe": {
        **_TOKENS,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_experts": 6,
        "decoder_start_token_id": 2,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "jetmoe": {**_without(_LOCAL, "num_attention_heads"), "kv_channels": 8},
    "llama4_text": {**_LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 8},
    "dbrx": {
        **_TOKENS,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "aria_text": {**_FREE, "intermediate_size": 24, "moe_num_experts": 6, "moe_topk": 2},
    "axk1": _MLA,
    "axk2": {**_MLA, **_INDEX},
    "beam": {**_MOE, "num_experts": 8, "head_dim": 8, "sliding_window": 4},
    "deepseek_v32": {**_MLA, **_INDEX},
    "deepseek_v4": {
        **_without(_ROUTED, "intermediate_size"),
        **_INDEX,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "sliding_window": 4,
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "doge": {**_NAMED, "num_experts": 16, "keep_window_size": 64},
    "dots3_note_text": {
        **_MLA,
        **_INDEX,
        "head_dim": 16,
        "sliding_window": 4,
        "shared_experts_intermediate_size": 20,
        **{f"swa_{k}": _MLA[k] for k in ("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank")},
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "flint": {**_MOE, "head_dim": 8, "sliding_window": 4, "shared_expert_intermediate_size": 20},
    "gemma4_text": _GEMMA4,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": {**_MLA, **_INDEX},
    "granitemoe_swa": {**_GRANITES, "sliding_window": 4},
    "hy_v3": {**_MOE, "head_dim": 8},
    "hy_v4": {**_MLA, **_INDEX},
    "inkling_text": _INKLING,
    "inkling2_text": _without(_INKLING, "intermediate_size", "n_shared_experts"),
    "kimi_linear": {**_KDA, "linear_head_dim": 8, "linear_num_heads": 4},
    "kolibri1": {
        **_without(_MOE, "intermediate_size"),
        "head_dim": 8,
        "sliding_window": 4,
        "shared_expert_intermediate_size": 20,
    },
    "laguna": {**_MOE, "head_dim": 8, "sliding_window": 4, "shared_expert_intermediate_size": 20},
    "longcat_flash": {
        **_without(_MLA, *_LONGCAT_NAMES),
        "num_layers": 2,
        "n_routed_experts": 6,
        "zero_expert_num": 3,
        "moe_topk": 3,
        "ffn_hidden_size": 40,
        "expert_ffn_hidden_size": 24,
        "head_dim": 8,
    },
    "mellum": {**_MOE, "head_dim": 8, "sliding_window": 4},
    "mimo_v2_flash": {**_ROUTED, "head_dim": 12, "v_head_dim": 8, "sliding_window": 4},
    "minimax_m3_vl_text": _M3,
    "mistral4": _MLA,
    "openai_privacy_filter": {**_LOCAL, "head_dim": 8, "sliding_window": 4},
    "qwen3_5_moe_text": _QWEN35,
    "qwen4_exp_text": {
        **_QWEN35,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
    },
    "zaya": {
        **_without(_MOE, "intermediate_size"),
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "router_hidden_size": 16,
    },
}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "depth": 1,
    "num_hidden_layers": 1,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "d_model": 32,
    "output_dim": 32,
    "output_channels": 8,
    "downsample_channels": [8, 32],
    "global_attn_indexes": [0],
    "window_size": 2,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "projection_intermediate_size": 40,
    "projection_hidden_dim": 32,
    "moe_intermediate_size": 24,
    "num_local_experts": 6,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "adapter_input_size": 32,
    "downsample_hidden_size": 8,
    "output_proj_dims": 32,
    "subsampling_conv_channels": [8, 8],
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "vocab_size": VOCAB,
}
_BESIDE = {  # what the composite configs hold besides the text config
    "aria": {
        "vision_config": {"model_type": "idefics3_vision", **_ENCODER},
        "image_token_index": 98,
        "projector_patch_to_query_dict": {16: 4},
    },
    "deepseek_ocr2": {"vision_config": {"sam_config": _ENCODER, "encoder_config": _ENCODER}},
    "diffusion_gemma": {"vision_config": {"model_type": "gemma4_vision", **_ENCODER}, "canvas_length": 6},
    "dots3_note": {"vision_config": {**_ENCODER, "mlp_layer_types": ["dense"]}, "audio_config": _ENCODER},
    "gemma4": {"vision_config": None, "audio_config": None},
    "llama4": {"image_token_index": 98},
    "minimax_m3_vl": {"image_token_index": 98, "video_token_index": 97, "projector_hidden_size": 32},
    "mistral_large4": {"vision_config": {"model_type": "pixtral", **_ENCODER}, "image_token_index": 98},
    "muse_spark": {
        "audio_config": {**_ENCODER, "num_hidden_layers": 4},
        "out_hidden_size": 32,
        "projector_hidden_size": 32,
    },
    "qwen3_omni_moe_thinker": {"audio_config": _ENCODER, "vision_start_token_id": 94},
    "unlimited_ocr": {"vision_config": {"sam_config": _ENCODER, "encoder_config": _ENCODER}},
}
_SPECIAL = (
    "image_token_id",
    "video_token_id",
    "audio_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_start_token_id",
    "video_end_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


def _rope(*sections: int) -> dict[str, Any]:
    """Return rotary parameters with sections for rotary halves of four."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


_OCR2 = {**_ROUTED, "num_key_value_heads": 4}
_TEXTS = {
    "aria": SIZES["aria_text"],
    "deepseek_ocr2": _OCR2,
    "diffusion_gemma": _without(_GEMMA4, "hidden_size_per_layer_input", "vocab_size_per_layer_input"),
    "dots3_note": SIZES["dots3_note_text"],
    "ernie4_5_vl_moe": {**SIZES["ernie4_5_moe"], "moe_intermediate_size": [24, 20], **_rope(1, 1, 2)},
    "gemma4": SIZES["gemma4_text"],
    "glm4v_moe": {**_ROUTED, "head_dim": 16, **_rope(2, 1, 1)},
    "glm5_next": {**_MLA, **_INDEX, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4},
    "inkling_mm_model": SIZES["inkling_text"],
    "inkling2": SIZES["inkling2_text"],
    "llama4": SIZES["llama4_text"],
    "minimax_m3_vl": SIZES["minimax_m3_vl_text"],
    "mistral_large4": {**_without(_MLA, "q_lora_rank"), **_INDEX},
    "muse_spark": {
        **_without(_LOCAL, "intermediate_size"),
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "moe_hidden_size": 20,
        "head_dim": 8,
        "sliding_window": 4,
    },
    "qwen3_vl_moe": {**_MOE, "head_dim": 8},
    "qwen3_omni_moe_thinker": _MOE,
    "qwen3_5_moe": SIZES["qwen3_5_moe_text"],
    "qwen4_exp": SIZES["qwen4_exp_text"],
    "step3p7": {
        **_without(_MOE, "num_experts"),
        "num_local_experts": 6,
        "n_routed_experts": 6,
        "head_dim": 8,
        "share_expert_dim": 20,
        "sliding_window": 4,
    },
    "unlimited_ocr": _OCR2,
}
SIZES.update({k: {"text_config": v, "vision_config": _ENCODER, **_BESIDE.get(k, {})} for k, v in _TEXTS.items()})
SIZES["vitpose_backbone"] = {
    "image_size": [16, 16],
    "patch_size": [8, 8],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "mlp_ratio": 1,
    "num_experts": 6,
    "part_features": 8,
}

_GRANITE = {"hidden_act": "silu", "residual_multiplier": 0.22, "tie_word_embeddings": True}
_NOAUX = {
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "tie_word_embeddings": False,
}
_UNGROUPED = {**_NOAUX, "n_group": 1, "topk_group": 1}
_LISTED = {
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "tie_word_embeddings": False,
}
_M3_PUBLISHED = {
    "routed_scaling_factor": 2.0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "router_jitter_noise": 0.0,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_act": "silu", "router_jitter_noise": 0.0, "tie_word_embeddings": False},
    "qwen2_moe": {
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
    "qwen3_next": {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "olmoe": {"hidden_act": "silu", "norm_topk_prob": False, "tie_word_embeddings": False},
    "flex_olmo": {"hidden_act": "silu", "norm_topk_prob": False, "tie_word_embeddings": False},
    "deepseek_v2": {
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "tie_word_embeddings": False,
    },
    "deepseek_v3": _NOAUX,
    "gpt_oss": {
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "phimoe": {
        "hidden_act": "silu",
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
        "attention_bias": True,
        "lm_head_bias": True,
        "tie_word_embeddings": False,
    },
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": {
        **_GRANITE,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "jamba": {
        "hidden_act": "silu",
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "tie_word_embeddings": False,
    },
    "ernie4_5_moe": {
        "hidden_act": "silu",
        "use_bias": False,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {**_UNGROUPED, "routed_scaling_factor": 1.0, "use_qk_norm": False},
    "dots1": {**_UNGROUPED, "n_shared_experts": 2},
    "hunyuan_v1_moe": {"hidden_act": "silu", "tie_word_embeddings": True},
    "minimax": {
        "hidden_act": "silu",
        "router_jitter_noise": 0.0,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "mlp_alpha_factor": 3.5565588200778455,
        "tie_word_embeddings": False,
    },
    "minimax_m2": {"hidden_act": "silu", "router_jitter_noise": 0.0, "tie_word_embeddings": False},
    "afmoe": {
        "hidden_act": "silu",
        "route_scale": 2.826,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "nemotron_h": {
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_latent_size": None,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "tie_word_embeddings": False,
    },
    "lfm2_moe": {
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
        "num_dense_layers": 1,
        "layer_types": ["conv", "conv", "full_attention"],
        "tie_word_embeddings": True,
    },
    "exaone_moe": {
        **_without(_UNGROUPED, "n_shared_experts"),
        "num_shared_experts": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "cohere2_moe": {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "softmax",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["sparse", "sparse", "sparse"],
        "tie_word_embeddings": True,
    },
    "bailing_hybrid": {**_NOAUX, "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "solar_open": {**_without(_UNGROUPED, "first_k_dense_replace"), "routed_scaling_factor": 1.0},
    "switch_transformers": {
        "dense_act_fn": "relu",
        "expert_capacity": 64,
        "router_bias": False,
        "router_jitter_noise": 0.01,
        "router_dtype": "float32",
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "tie_word_embeddings": True,
    },
    "nllb-moe": {
        "activation_function": "relu",
        "expert_capacity": 64,
        "router_bias": False,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": False,
        "batch_prioritized_routing": False,
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": 0.2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
    "jetmoe": {"activation_function": "silu", "tie_word_embeddings": True},
    "llama4_text": {
        "hidden_act": "silu",
        "interleave_moe_layer_step": 1,
        "router_jitter_noise": 0.0,
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 1, 0],
        "tie_word_embeddings": False,
    },
    "dbrx": {
        "ffn_config.ffn_act_fn": {"name": "silu"},
        "ffn_config.moe_jitter_eps": None,
        "ffn_config.moe_normalize_expert_weights": 1.0,
        "tie_word_embeddings": False,
    },
    "aria_text": {"hidden_act": "silu", "moe_num_shared_experts": 2, "mlp_bias": False, "tie_word_embeddings": False},
    "axk1": {**_LISTED, "n_group": 4, "topk_group": 2},
    "axk2": {**_LISTED, "n_group": None, "topk_group": None},
    "beam": {
        **_without(_LISTED, "n_shared_experts"),
        "n_group": 4,
        "topk_group": 2,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v32": {**_LISTED, "n_group": 4, "topk_group": 2},
    "deepseek_v4": {
        "hidden_act": "silu",
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "n_shared_experts": 1,
        "swiglu_limit": 10.0,
        "router_jitter_noise": 0.0,
        "layer_types": ["heavily_compressed_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "tie_word_embeddings": False,
    },
    "doge": {"hidden_act": "silu", "is_moe": True, "norm_topk_prob": False, "tie_word_embeddings": False},
    "dots3_note_text": {**_LISTED, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1},
    "flint": {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "gemma4_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "enable_moe_block": True,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "glm4_moe_lite": {**_LISTED, "routed_scaling_factor": 1.8, "n_group": 1, "topk_group": 1},
    "glm_moe_dsa": {**_LISTED, "n_group": 1, "topk_group": 1},
    "granitemoe_swa": {
        "hidden_act": "silu",
        "residual_multiplier": 1.0,
        "shared_intermediate_size": 0,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "tie_word_embeddings": False,
    },
    "hy_v3": {
        "hidden_act": "silu",
        "num_shared_experts": 1,
        "router_scaling_factor": 2.826,
        "enable_moe_fp32_combine": True,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "tie_word_embeddings": False,
    },
    "hy_v4": {**_LISTED, "routed_scaling_factor": 2.827, "n_group": 1, "topk_group": 1, "swiglu_limit": 10.0},
    "inkling_text": {
        "hidden_act": "silu",
        "route_scale": 8.0,
        "n_shared_experts": 2,
        "shared_expert_sink": True,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["sparse", "sparse", "sparse"],
        "logits_mup_width_multiplier": 1.0,
    },
    "inkling2_text": {
        "hidden_act": "silu",
        "route_scale": 8.0,
        "scoring_func": "sigmoid",
        "mlp_gate_softcap": 4.0,
        "mlp_up_softcap": 25.0,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
    },
    "kimi_linear": {
        **_LISTED,
        "routed_scaling_factor": 2.446,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "kolibri1": {
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "laguna": {
        "hidden_act": "silu",
        "moe_routed_scaling_factor": 1.0,
        "moe_router_logit_softcapping": 0.0,
        "moe_apply_router_weight_on_input": False,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "tie_word_embeddings": False,
    },
    "longcat_flash": {"hidden_act": "silu", "routed_scaling_factor": 6.0, "tie_word_embeddings": False},
    "mellum": {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "mlp_layer_types": ["sparse", "sparse", "sparse"],
        "tie_word_embeddings": False,
    },
    "mimo_v2_flash": {
        **_without(_LISTED, "n_shared_experts"),
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "minimax_m3_vl_text": _M3_PUBLISHED,
    "mistral4": {**_UNGROUPED, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0},
    "openai_privacy_filter": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "qwen3_5_moe_text": {
        "hidden_act": "silu",
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "qwen4_exp_text": {
        "hidden_act": "silu",
        "norm_topk_prob": True,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "tie_word_embeddings": False,
    },
    "zaya": {"hidden_act": "silu", "lm_head_bias": False, "tie_word_embeddings": True},
}
_OCR2_PUBLISHED = {
    "hidden_act": "silu",
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "mlp_bias": False,
}
_QWEN_VL = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []}
_TEXTS_PUBLISHED: dict[str, dict[str, Any]] = {
    **{k: PUBLISHED[f"{k}_text"] for k in _TEXTS if f"{k}_text" in PUBLISHED},
    "inkling_mm_model": PUBLISHED["inkling_text"],
    "deepseek_ocr2": _OCR2_PUBLISHED,
    "diffusion_gemma": {
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "ernie4_5_vl_moe": {
        "hidden_act": "silu",
        "use_bias": False,
        "moe_num_shared_experts": 2,
        "moe_norm_min": 1e-12,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "glm4v_moe": _without(PUBLISHED["glm4_moe"], "use_qk_norm"),
    "glm5_next": {
        **_LISTED,
        "n_group": 1,
        "topk_group": 1,
        "swiglu_limit": 10.0,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "indexer_types": ["full", "full", "full"],
    },
    "mistral_large4": {
        **_without(_LISTED, "norm_topk_prob"),
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
    },
    "muse_spark": {
        "hidden_act": "silu",
        "routed_scaling_factor": 1.0,
        "output_multiplier": 0.1767766952966369,
        "mlp_layer_types": ["sparse", "sparse", "sparse"],
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "qwen3_vl_moe": _QWEN_VL,
    "qwen3_omni_moe_thinker": {**_QWEN_VL, "norm_topk_prob": True},
    "step3p7": {
        "hidden_act": "silu",
        "moe_router_scaling_factor": 1.0,
        "swiglu_limits": None,
        "swiglu_limits_shared": None,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "unlimited_ocr": _OCR2_PUBLISHED,
}


def _in_text(values: dict[str, Any]) -> dict[str, Any]:
    """Return values under the names they have in a composite config, whose own tie rules."""
    names = {k: ",".join(f"text_config.{part}" for part in k.split(",")) for k in values}
    return {k if k == "tie_word_embeddings" else names[k]: v for k, v in values.items()}


PUBLISHED.update({k: _in_text(v) for k, v in _TEXTS_PUBLISHED.items()})
PUBLISHED["vitpose_backbone"] = {"hidden_act": "gelu"}

_ACT = {"hidden_act": ("silu", "gelu")}
_TIED = {"tie_word_embeddings": (False, True)}
_NORM = {"norm_topk_prob": (True, False)}
_BASE = {**_ACT, **_TIED}
_QWEN = {**_BASE, **_NORM, "decoder_sparse_step": (1, 2), "mlp_only_layers": ([], [0])}
_GROUPS = {"topk_group": (2, 4), "n_group": (4, 2)}
_NOAUX_SWITCHES = {
    **_BASE,
    **_NORM,
    "routed_scaling_factor": (2.5, 1.0),
    "first_k_dense_replace": (1, 0),
    "n_shared_experts": (1, 2),
}
_LEADING = (["dense", "sparse", "sparse"], ["sparse", "sparse", "sparse"])
_LISTED_SWITCHES = {
    **_without(_NOAUX_SWITCHES, "first_k_dense_replace"),
    "mlp_layer_types": _LEADING,
}
_M3_SWITCHES = {
    **_TIED,
    "routed_scaling_factor": (2.0, 1.0),
    "swiglu_alpha": (1.702, 1.0),
    "swiglu_limit": (7.0, 0.5),
    "shared_intermediate_size": (20, 12),
    "mlp_layer_types": _LEADING,
}
SWITCHES: dict[str, dict[str, tuple[Any, Any]]] = {
    "mixtral": _BASE,
    "qwen2_moe": {**_QWEN, "norm_topk_prob": (False, True), "shared_expert_intermediate_size": (20, 12)},
    "qwen3_moe": _QWEN,
    "qwen3_next": {**_QWEN, "shared_expert_intermediate_size": (20, 12)},
    "olmoe": {**_BASE, "norm_topk_prob": (False, True)},
    "flex_olmo": {**_BASE, "norm_topk_prob": (False, True)},  # normed after the experts: only its epsilon shows
    "deepseek_v2": {
        **_without(_NOAUX_SWITCHES, "norm_topk_prob"),
        "routed_scaling_factor": (16.0, 1.0),
        "topk_method": ("group_limited_greedy", "greedy"),
        **_GROUPS,
        "n_shared_experts": (2, 1),
        "mlp_bias": (False, True),
    },
    "deepseek_v3": {**_NOAUX_SWITCHES, **_GROUPS},
    "gpt_oss": {**_TIED, "swiglu_alpha": (1.702, 1.0), "swiglu_limit": (7.0, 0.5)},
    "phimoe": {**_BASE, "router_jitter_noise": (0.01, 0.3), "lm_head_bias": (True, False)},
    "granitemoe": {**_ACT, "tie_word_embeddings": (True, False), "residual_multiplier": (0.22, 1.0)},
    "granitemoeshared": {
        **_ACT,
        "tie_word_embeddings": (True, False),
        "residual_multiplier": (0.22, 1.0),
        "shared_intermediate_size": (20, 0),
    },
    "granitemoehybrid": {
        **_ACT,
        "tie_word_embeddings": (True, False),
        "residual_multiplier": (0.22, 1.0),
        "shared_intermediate_size": (20, 12),
        "num_local_experts": (6, 0),
    },
    "jamba": {
        **_BASE,
        "expert_layer_offset": (1, 0),
        "expert_layer_period,expert_layer_offset": ((2, 1), (1, 0)),
        "num_experts": (6, 1),
    },
    "ernie4_5_moe": {
        **_ACT,
        "tie_word_embeddings": (True, False),
        "use_bias": (False, True),
        "moe_num_shared_experts": (2, 0),
        "moe_layer_start_index": (1, 0),
        "moe_layer_end_index": (-1, 1),
        "moe_layer_interval": (1, 2),
        "moe_norm_min": (1e-12, 0.99),
    },
    "glm4_moe": {
        **_NOAUX_SWITCHES,
        "routed_scaling_factor": (1.0, 2.5),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "dots1": {**_NOAUX_SWITCHES, "n_shared_experts": (2, 1), "n_group,topk_group": ((1, 1), (4, 2))},
    "hunyuan_v1_moe": {**_ACT, "tie_word_embeddings": (True, False)},
    "minimax": {
        **_BASE,
        "mlp_alpha_factor": (3.5565588200778455, 1.0),
        "mlp_beta_factor": (1.0, 0.5),
    },
    "minimax_m2": _BASE,
    "afmoe": {
        **_BASE,
        "route_scale": (2.826, 1.0),
        "num_dense_layers": (1, 0),
        "num_shared_experts": (1, 2),
    },
    "nemotron_h": {
        **_NORM,
        "mlp_hidden_act": ("relu2", "silu"),
        "mlp_bias": (False, True),
        "routed_scaling_factor": (2.5, 1.0),
        "n_group,topk_group": ((1, 1), (4, 2)),
        "moe_latent_size": (None, 12),
        "moe_shared_expert_intermediate_size": (20, 12),
        "layers_block_type": (
            ["linear_attention", "moe", "full_attention", "moe"],
            ["linear_attention", "moe", "full_attention", "mlp"],
        ),
    },
    "lfm2_moe": {
        **_NORM,
        "tie_word_embeddings": (True, False),
        "routed_scaling_factor": (1.0, 2.5),
        "use_expert_bias": (True, False),
        "num_dense_layers": (1, 0),
    },
    "exaone_moe": {
        **_without(_NOAUX_SWITCHES, "n_shared_experts"),
        "num_shared_experts": (1, 2),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "cohere2_moe": {
        **_ACT,
        "tie_word_embeddings": (True, False),
        "num_shared_experts": (0, 1),
        "expert_selection_fn": ("softmax", "sigmoid"),
        "num_shared_experts,shared_expert_combination_strategy": ((0, "average"), (2, "sum")),
        "expert_selection_fn,norm_topk_prob": (("softmax", True), ("sigmoid", False)),
        "mlp_layer_types": (["sparse", "sparse", "sparse"], ["dense", "sparse", "sparse"]),
    },
    "bailing_hybrid": {**_without(_NOAUX_SWITCHES, "tie_word_embeddings"), **_GROUPS},
    "solar_open": {
        **_without(_NOAUX_SWITCHES, "first_k_dense_replace"),
        "routed_scaling_factor": (1.0, 2.5),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "switch_transformers": {
        "dense_act_fn": ("relu", "gelu"),
        "expert_capacity": (64, 1),
        "router_bias": (False, True),
        "num_sparse_encoder_layers": (2, 4),
        "num_sparse_decoder_layers": (2, 0),
        "tie_word_embeddings": (True, False),
    },
    "nllb-moe": {
        "activation_function": ("relu", "gelu"),
        "router_bias": (False, True),
        "moe_eval_capacity_token_fraction": (1.0, 0.25),
        "moe_eval_capacity_token_fraction,normalize_router_prob_before_dropping": ((1.0, False), (0.25, True)),
        "moe_eval_capacity_token_fraction,batch_prioritized_routing": ((1.0, False), (0.25, True)),
        "moe_token_dropout": (0.2, 0.0),
        "encoder_sparse_step": (2, 4),
        "decoder_sparse_step": (2, 0),
        "tie_word_embeddings": (True, False),
    },
    "jetmoe": {"activation_function": ("silu", "gelu"), "tie_word_embeddings": (True, False)},
    "llama4_text": {**_BASE, "interleave_moe_layer_step": (1, 2), "num_experts_per_tok": (1, 2)},
    "dbrx": {
        "ffn_config.ffn_act_fn": ({"name": "silu"}, {"name": "gelu"}),
        "ffn_config.moe_normalize_expert_weights": (1.0, None),
    },
    "aria_text": {**_BASE, "moe_num_shared_experts": (2, 1), "mlp_bias": (False, True)},
    "axk1": {**_LISTED_SWITCHES, **_GROUPS},
    "axk2": {**_LISTED_SWITCHES, "n_group,topk_group": ((None, None), (4, 2))},
    # normed after the experts: of norm_topk_prob and routed_scaling_factor only the norm's epsilon shows
    "beam": {**_without(_LISTED_SWITCHES, "n_shared_experts"), **_GROUPS},
    "deepseek_v32": {**_LISTED_SWITCHES, **_GROUPS},
    "deepseek_v4": {
        **_BASE,
        "scoring_func": ("sqrtsoftplus", "sigmoid"),
        "routed_scaling_factor": (1.5, 1.0),
        "mlp_bias": (False, True),
        "swiglu_limit": (10.0, 0.5),
        "mlp_layer_types": (["hash_moe", "moe", "moe"], ["moe", "moe", "moe"]),
    },
    "doge": {**_BASE, "is_moe": (True, False), "mlp_bias": (False, True)},
    "dots3_note_text": {
        **_LISTED_SWITCHES,
        "routed_scaling_factor": (1.0, 2.5),
        "shared_experts_intermediate_size": (20, 12),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "flint": {**_QWEN, "mlp_only_layers": ([0], []), "shared_expert_intermediate_size": (20, 12)},
    "gemma4_text": {
        "hidden_activation": ("gelu_pytorch_tanh", "silu"),
        "enable_moe_block": (True, False),
        "tie_word_embeddings": (True, False),
    },
    "glm4_moe_lite": {
        **_LISTED_SWITCHES,
        "routed_scaling_factor": (1.8, 1.0),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "glm_moe_dsa": {**_LISTED_SWITCHES, "n_group,topk_group": ((1, 1), (4, 2))},
    "granitemoe_swa": {**_BASE, "residual_multiplier": (1.0, 0.22), "shared_intermediate_size": (0, 20)},
    "hy_v3": {
        **_BASE,
        "num_shared_experts": (1, 2),
        "router_scaling_factor": (2.826, 1.0),
        "mlp_bias": (False, True),
        "enable_moe_fp32_combine": (True, False),  # shows below and above fp32 only
        "mlp_layer_types": _LEADING,
    },
    "hy_v4": {
        **_LISTED_SWITCHES,
        "routed_scaling_factor": (2.827, 1.0),
        "n_group,topk_group": ((1, 1), (4, 2)),
        "swiglu_limit": (10.0, 0.5),
    },
    "inkling_text": {
        **_ACT,
        "route_scale": (8.0, 1.0),
        "n_shared_experts": (2, 1),
        "mlp_layer_types": (["sparse", "sparse", "sparse"], ["dense", "sparse", "sparse"]),
    },
    "inkling2_text": {
        "route_scale": (8.0, 1.0),
        "scoring_func": ("sigmoid", "sqrtsoftplus"),
        "mlp_gate_softcap": (4.0, 0.5),
        "mlp_up_softcap": (25.0, 0.5),
    },
    "kimi_linear": {
        **_without(_LISTED_SWITCHES, "tie_word_embeddings"),
        "routed_scaling_factor": (2.446, 1.0),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "kolibri1": {**_BASE, "norm_topk_prob": (False, True), "shared_expert_intermediate_size": (20, 12)},
    "laguna": {
        **_BASE,
        "moe_routed_scaling_factor": (1.0, 2.5),
        "moe_router_logit_softcapping": (0.0, 1.0),
        "shared_expert_intermediate_size": (20, 12),
        "mlp_layer_types": _LEADING,
    },
    "longcat_flash": {
        **_BASE,
        "routed_scaling_factor": (6.0, 1.0),
        "zero_expert_num": (3, 0),
    },
    "mellum": {**_BASE, **_NORM, "mlp_layer_types": _LEADING[::-1]},
    "mimo_v2_flash": {
        **_without(_LISTED_SWITCHES, "n_shared_experts"),
        "routed_scaling_factor": (1.0, 2.5),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "minimax_m3_vl_text": _M3_SWITCHES,
    "mistral4": {
        **_NOAUX_SWITCHES,
        "routed_scaling_factor": (1.0, 2.5),
        "first_k_dense_replace": (0, 1),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "openai_privacy_filter": {"swiglu_alpha": (1.702, 1.0), "swiglu_limit": (7.0, 0.5)},
    "qwen3_5_moe_text": {**_BASE, "shared_expert_intermediate_size": (20, 12)},
    "qwen4_exp_text": {
        **_TIED,
        **_NORM,
        "hidden_act,output_gate_type": (("silu", None), ("gelu", "silu")),
        "shared_expert_intermediate_size": (20, 12),
    },
    "zaya": {**_ACT, "tie_word_embeddings": (True, False), "lm_head_bias": (False, True)},
}
_OCR2_SWITCHES = {
    **_BASE,
    "routed_scaling_factor": (1.0, 2.5),
    "n_shared_experts": (2, 1),
    "mlp_layer_types": _LEADING,
    "mlp_bias": (False, True),
    "num_experts_per_tok,topk_method,n_group,topk_group": ((2, "greedy", 1, 1), (3, "group_limited_greedy", 4, 2)),
}
_QWEN_VL_SWITCHES = _without(_QWEN, "norm_topk_prob")
_TEXTS_SWITCHES: dict[str, dict[str, tuple[Any, Any]]] = {
    **{k: SWITCHES[f"{k}_text"] for k in _TEXTS if f"{k}_text" in SWITCHES},
    "inkling_mm_model": SWITCHES["inkling_text"],
    "llama4": _without(SWITCHES["llama4_text"], "tie_word_embeddings"),
    "deepseek_ocr2": _OCR2_SWITCHES,
    "diffusion_gemma": {"hidden_activation": ("gelu_pytorch_tanh", "silu")},
    "ernie4_5_vl_moe": {
        **_ACT,
        "tie_word_embeddings": (True, False),
        "use_bias": (False, True),
        "moe_num_shared_experts": (2, 0),
        "moe_norm_min": (1e-12, 0.99),
        "mlp_layer_types": _LEADING,
    },
    "glm4v_moe": SWITCHES["glm4_moe"],
    "glm5_next": {
        **_LISTED_SWITCHES,
        "n_group,topk_group": ((1, 1), (4, 2)),
        "swiglu_limit": (10.0, 0.5),
    },
    "mistral_large4": {
        **_without(_LISTED_SWITCHES, "norm_topk_prob"),
        "routed_scaling_factor": (1.0, 2.5),
        "n_group,topk_group": ((1, 1), (4, 2)),
    },
    "muse_spark": {
        **_ACT,
        "routed_scaling_factor": (1.0, 2.5),  # normed after the experts: only the norm's epsilon shows
        "output_multiplier": (0.1767766952966369, 1.0),
        "moe_hidden_size": (20, 12),
        "mlp_layer_types": _LEADING[::-1],
    },
    "qwen3_vl_moe": _QWEN_VL_SWITCHES,
    "qwen3_omni_moe_thinker": _QWEN,
    "step3p7": {
        **_TIED,
        "moe_router_scaling_factor": (1.0, 2.5),
        "swiglu_limits": (None, [0.5, 0.5, 0.5]),
        "swiglu_limits_shared": (None, [0.5, 0.5, 0.5]),
        "share_expert_dim": (20, 12),
        "mlp_bias": (False, True),
        "mlp_layer_types": _LEADING,
    },
    "unlimited_ocr": _OCR2_SWITCHES,
}
SWITCHES.update({k: _in_text(v) for k, v in _TEXTS_SWITCHES.items()})
SWITCHES["vitpose_backbone"] = {"hidden_act": ("gelu", "relu"), "part_features": (8, 16)}

STOCK_FAILS: dict[str, str] = {
    "beam": "fp64: the experts and the logits are computed in float32",
    "diffusion_gemma": "fp64: the logits come back in float32; not causal by design",
    "doge": "causal, cache, batch: the routing mixes the tokens of a batch",
    "inkling2_text": "fp64: the router casts its input to float32 but not its weight",
    "inkling2": "fp64: the router casts its input to float32 but not its weight",
    "minimax": "cache: positions restart at zero where layer 0 is linear attention; not with these layer types",
    "nemotron_h": "fp64: the logits come back in float32",
    "nllb-moe": "experts: only the first two are ever run, the chosen index is read as a mask",
    "qwen3_omni_moe_thinker": "cache: a step with an attention mask needs position_ids too",
}


def _merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Return nested values, later ones first: "a.b" names b in the config a, "a,b" names two values of a pair."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for names, values in layer.items():
            for name, value in zip(names.split(","), values if "," in names else (values,), strict=True):
                owner, _, rest = name.partition(".")
                value = {rest: value} if rest else value
                old = merged.get(owner)
                merged[owner] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _known(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a config of an encoder has a field for."""
    fields = {
        "model_type",
        *getattr(config_class, "__dataclass_fields__", values),
        *getattr(config_class, "sub_configs", ()),
    }
    return {k: v for k, v in values.items() if k in fields}


def tiny_moe_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a small config of a family with its published routing; names of overrides as in `SWITCHES`."""
    config_class = CONFIG_MAPPING[model_type]
    values = _merged(SIZES[model_type], PUBLISHED[model_type], overrides)
    for name, part in config_class.sub_configs.items():
        if name in ("vision_config", "audio_config") and values.get(name):
            values[name] = _known(CONFIG_MAPPING.get(values[name].get("model_type"), part), values[name])
    if "text_config" in values:
        fields = config_class.__dataclass_fields__
        values = {**{k: VOCAB - 1 - i for i, k in enumerate(_SPECIAL) if k in fields}, **values}
    return config_class(**values, attn_implementation="eager", experts_implementation="eager")


def moe_class(model_type: str) -> type[PreTrainedModel]:
    """Return the stock class with logits that a family is tested with."""
    for head in _HEADS[2:] + _HEADS if model_type in _TEXTS else _HEADS:
        name = getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES").get(model_type)
        if name is not None:
            return getattr(transformers, name)
    raise KeyError(model_type)


def _drawn(module: nn.Module, name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    """Return new values for a parameter: by fan-in for weights, around a constant for norms, biases and the like."""
    noise = torch.randn(old.shape, generator=generator)
    if name == "A_log":
        return torch.linspace(0.5, 4, old.numel()).log().view_as(old) + 0.1 * noise
    start = old.flatten()[0] if bool((old == old.flatten()[0]).all()) else 0.0
    if old.dim() < 2 or start == 1 or name.endswith("bias"):
        return start + 0.1 * noise
    fan_in = old[0].numel() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else old.shape[-1]
    if old.dim() == 3 and getattr(module, "is_transposed", "Llama4" in type(module).__name__):
        fan_in = old.shape[-2]
    return noise * fan_in**-0.5


def _gain(owners: list[nn.Module], spread_of_logits: float) -> float:
    """Return the factor on a router's weights for a spread of its logits, behind its own fixed scales."""
    scales = [getattr(owner, name, 1.0) for owner in owners for name in ("scalar_root_size", "output_multiplier")]
    return spread_of_logits / math.prod(scales)


@torch.no_grad()
def spread_moe(model: PreTrainedModel, seed: int = 0, spread_of_logits: float = 2.5) -> PreTrainedModel:
    """Give a model weights, each by its name, of a size at which a wrong route or expert shows in the logits."""
    drawn = set()
    for path, module in sorted(model.named_modules()):
        owners = [module, *([model.get_submodule(path.rpartition(".")[0])] if path else [])]
        routes = path.endswith("router_gate") or any(_ROUTERS.search(type(owner).__name__) for owner in owners)
        for name, tensor in sorted([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]):
            if id(tensor) in drawn:
                continue
            drawn.add(id(tensor))
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}.{name}".encode()))
            if isinstance(tensor, nn.Parameter):
                tensor.copy_(_drawn(module, name, tensor, generator))
                if routes and tensor.dim() == 2 and not name.endswith("bias"):
                    tensor.mul_(_gain(owners, spread_of_logits))
            elif "bias" in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif name == "tid2eid":
                ranks = torch.rand(len(tensor), module.num_experts, generator=generator).argsort(-1)
                tensor.copy_(ranks[:, : tensor.shape[1]])
    return model


def tiny_moe(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny stock model in evaluation mode whose every parameter is drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        model = moe_class(model_type)(tiny_moe_config(model_type, **overrides))
    return spread_moe(model.float(), seed).eval()


def tiny_moe_inputs(model_type: str, rows: int = 3, length: int = 8, seed: int = 3) -> dict[str, Tensor]:
    """Return inputs without padding for a family's class."""
    generator = torch.Generator().manual_seed(seed)
    if model_type == "vitpose_backbone":
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "dataset_index": torch.arange(rows) % SIZES[model_type]["num_experts"]}

    def ids(width: int) -> Tensor:
        return torch.randint(5, VOCAB - len(_SPECIAL), (rows, width), generator=generator)

    inputs = {"input_ids": ids(length), "attention_mask": torch.ones(rows, length, dtype=torch.long)}
    if model_type in ("switch_transformers", "nllb-moe", "diffusion_gemma"):
        inputs["decoder_input_ids"] = ids(6)
    return inputs
