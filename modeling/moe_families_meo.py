"""The mixture-of-experts families of Transformers: one typed row each.

A row says only what the live model does not: everything that its experts' layout decides (transposed, bias,
interleaved, no gate, norm after the expert) is read from the modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .levels_meo import MOE_LEVELS, POOLINGS, Kind

Layout = Literal["stacked", "modules", "dbrx", "jetmoe", "llama4"]


@dataclass(frozen=True)
class MoeFamily:
    """One row: how a family's MoE blocks are built, and which config values change what they compute.

    `layout` names the adapter: `stacked` is the common one. `top_k` is the path of the number of selected experts in
    the text config, or that number where the router fixes it; where it `chooses_top_k`, a user may. `poolings` lists
    how gates can be pooled, the default first. `linears` are the two maps of an expert that is a module (layout
    `modules`). `refused` holds the reason why a family is not converted.
    """

    model_type: str
    kind: Kind = "decoder"
    layout: Layout = "stacked"
    top_k: str | int = "num_experts_per_tok"
    chooses_top_k: bool = True
    poolings: tuple[str, ...] = POOLINGS
    linears: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def default_level(self) -> str:
        """The level a conversion takes when none is asked for."""
        return MOE_LEVELS[self.kind][0]

    @property
    def switches(self) -> tuple[str, ...]:
        """Names of the config values that change what the family's blocks compute; tests run each both ways."""
        return tuple(_SWITCHES.get(self.model_type, "").split())

    @property
    def levels(self) -> dict[Kind, tuple[str, ...]]:
        """The levels that each kind of stack can take, the default first."""
        return MOE_LEVELS


_SWITCHES = {
    "afmoe": "hidden_act num_dense_layers num_shared_experts route_scale tie_word_embeddings",
    "axk1": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "axk2": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "bailing_hybrid": (
        "first_k_dense_replace hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor topk_group"
    ),
    "beam": "hidden_act mlp_layer_types n_group norm_topk_prob routed_scaling_factor tie_word_embeddings topk_group",
    "cohere2_moe": (
        "expert_selection_fn hidden_act mlp_layer_types norm_topk_prob num_shared_experts "
        "shared_expert_combination_strategy tie_word_embeddings"
    ),
    "deepseek_v2": (
        "first_k_dense_replace hidden_act mlp_bias n_group n_shared_experts routed_scaling_factor "
        "tie_word_embeddings topk_group topk_method"
    ),
    "deepseek_v3": (
        "first_k_dense_replace hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "deepseek_v32": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "dots1": (
        "first_k_dense_replace hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "dots3_note_text": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "shared_experts_intermediate_size tie_word_embeddings topk_group"
    ),
    "ernie4_5_moe": (
        "hidden_act moe_layer_end_index moe_layer_interval moe_layer_start_index moe_norm_min "
        "moe_num_shared_experts tie_word_embeddings use_bias"
    ),
    "exaone_moe": (
        "first_k_dense_replace hidden_act n_group norm_topk_prob num_shared_experts routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "flex_olmo": "hidden_act norm_topk_prob tie_word_embeddings",
    "flint": (
        "decoder_sparse_step hidden_act mlp_only_layers norm_topk_prob shared_expert_intermediate_size "
        "tie_word_embeddings"
    ),
    "glm4_moe": (
        "first_k_dense_replace hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "glm4_moe_lite": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "glm_moe_dsa": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "gpt_oss": "swiglu_alpha swiglu_limit tie_word_embeddings",
    "granitemoe": "hidden_act residual_multiplier tie_word_embeddings",
    "granitemoe_swa": "hidden_act residual_multiplier shared_intermediate_size tie_word_embeddings",
    "granitemoehybrid": "hidden_act num_local_experts residual_multiplier shared_intermediate_size tie_word_embeddings",
    "granitemoeshared": "hidden_act residual_multiplier shared_intermediate_size tie_word_embeddings",
    "hy_v3": (
        "enable_moe_fp32_combine hidden_act mlp_bias mlp_layer_types num_shared_experts router_scaling_factor "
        "tie_word_embeddings"
    ),
    "hy_v4": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "swiglu_limit tie_word_embeddings topk_group"
    ),
    "inkling_text": "hidden_act mlp_layer_types n_shared_experts route_scale",
    "inkling2_text": "mlp_gate_softcap mlp_up_softcap route_scale scoring_func",
    "jamba": "expert_layer_offset expert_layer_period hidden_act num_experts tie_word_embeddings",
    "kimi_linear": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor topk_group"
    ),
    "kolibri1": "hidden_act norm_topk_prob shared_expert_intermediate_size tie_word_embeddings",
    "laguna": (
        "hidden_act mlp_layer_types moe_routed_scaling_factor moe_router_logit_softcapping "
        "shared_expert_intermediate_size tie_word_embeddings"
    ),
    "lfm2_moe": "norm_topk_prob num_dense_layers routed_scaling_factor tie_word_embeddings use_expert_bias",
    "longcat_flash": "hidden_act routed_scaling_factor tie_word_embeddings zero_expert_num",
    "mellum": "hidden_act mlp_layer_types norm_topk_prob tie_word_embeddings",
    "mimo_v2_flash": (
        "hidden_act mlp_layer_types n_group norm_topk_prob routed_scaling_factor tie_word_embeddings topk_group"
    ),
    "minimax": "hidden_act mlp_alpha_factor mlp_beta_factor tie_word_embeddings",
    "minimax_m2": "hidden_act tie_word_embeddings",
    "minimax_m3_vl_text": (
        "mlp_layer_types routed_scaling_factor shared_intermediate_size swiglu_alpha swiglu_limit tie_word_embeddings"
    ),
    "mistral4": (
        "first_k_dense_replace hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "mixtral": "hidden_act tie_word_embeddings",
    "nemotron_h": (
        "layers_block_type mlp_bias mlp_hidden_act moe_latent_size moe_shared_expert_intermediate_size "
        "n_group norm_topk_prob routed_scaling_factor topk_group"
    ),
    "olmoe": "hidden_act norm_topk_prob tie_word_embeddings",
    "qwen2_moe": (
        "decoder_sparse_step hidden_act mlp_only_layers norm_topk_prob shared_expert_intermediate_size "
        "tie_word_embeddings"
    ),
    "qwen3_5_moe_text": "hidden_act shared_expert_intermediate_size tie_word_embeddings",
    "qwen3_moe": "decoder_sparse_step hidden_act mlp_only_layers norm_topk_prob tie_word_embeddings",
    "qwen3_next": (
        "decoder_sparse_step hidden_act mlp_only_layers norm_topk_prob shared_expert_intermediate_size "
        "tie_word_embeddings"
    ),
    "qwen4_exp_text": "hidden_act norm_topk_prob output_gate_type shared_expert_intermediate_size tie_word_embeddings",
    "solar_open": (
        "hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor tie_word_embeddings topk_group"
    ),
    "deepseek_ocr2": (
        "hidden_act mlp_bias mlp_layer_types n_group n_shared_experts num_experts_per_tok "
        "routed_scaling_factor tie_word_embeddings topk_group topk_method"
    ),
    "dots3_note": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "shared_experts_intermediate_size tie_word_embeddings topk_group"
    ),
    "glm4v_moe": (
        "first_k_dense_replace hidden_act n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "tie_word_embeddings topk_group"
    ),
    "glm5_next": (
        "hidden_act mlp_layer_types n_group n_shared_experts norm_topk_prob routed_scaling_factor "
        "swiglu_limit tie_word_embeddings topk_group"
    ),
    "inkling_mm_model": "hidden_act mlp_layer_types n_shared_experts route_scale",
    "inkling2": "mlp_gate_softcap mlp_up_softcap route_scale scoring_func",
    "minimax_m3_vl": (
        "mlp_layer_types routed_scaling_factor shared_intermediate_size swiglu_alpha swiglu_limit tie_word_embeddings"
    ),
    "mistral_large4": (
        "hidden_act mlp_layer_types n_group n_shared_experts routed_scaling_factor tie_word_embeddings topk_group"
    ),
    "muse_spark": "hidden_act mlp_layer_types moe_hidden_size output_multiplier routed_scaling_factor",
    "qwen3_vl_moe": "decoder_sparse_step hidden_act mlp_only_layers tie_word_embeddings",
    "qwen3_omni_moe_thinker": "decoder_sparse_step hidden_act mlp_only_layers norm_topk_prob tie_word_embeddings",
    "qwen3_5_moe": "hidden_act shared_expert_intermediate_size tie_word_embeddings",
    "qwen4_exp": "hidden_act norm_topk_prob output_gate_type shared_expert_intermediate_size tie_word_embeddings",
    "step3p7": (
        "mlp_bias mlp_layer_types moe_router_scaling_factor share_expert_dim swiglu_limits "
        "swiglu_limits_shared tie_word_embeddings"
    ),
    "unlimited_ocr": (
        "hidden_act mlp_bias mlp_layer_types n_group n_shared_experts num_experts_per_tok "
        "routed_scaling_factor tie_word_embeddings topk_group topk_method"
    ),
    "aria_text": "hidden_act mlp_bias moe_num_shared_experts tie_word_embeddings",
    "aria": "hidden_act mlp_bias moe_num_shared_experts tie_word_embeddings",
    "dbrx": "ffn_config.ffn_act_fn ffn_config.moe_normalize_expert_weights",
    "deepseek_v4": (
        "hidden_act mlp_bias mlp_layer_types routed_scaling_factor scoring_func swiglu_limit tie_word_embeddings"
    ),
    "gemma4_text": "enable_moe_block hidden_activation tie_word_embeddings",
    "gemma4": "enable_moe_block hidden_activation tie_word_embeddings",
    "hunyuan_v1_moe": "hidden_act tie_word_embeddings",
    "jetmoe": "activation_function tie_word_embeddings",
    "llama4_text": "hidden_act interleave_moe_layer_step num_experts_per_tok tie_word_embeddings",
    "llama4": "hidden_act interleave_moe_layer_step num_experts_per_tok",
    "nllb-moe": (
        "activation_function batch_prioritized_routing decoder_sparse_step encoder_sparse_step "
        "moe_eval_capacity_token_fraction moe_token_dropout normalize_router_prob_before_dropping router_bias "
        "tie_word_embeddings"
    ),
    "openai_privacy_filter": "swiglu_alpha swiglu_limit",
    "phimoe": "hidden_act lm_head_bias router_jitter_noise tie_word_embeddings",
    "switch_transformers": (
        "dense_act_fn expert_capacity num_sparse_decoder_layers num_sparse_encoder_layers router_bias "
        "tie_word_embeddings"
    ),
    "zaya": "hidden_act lm_head_bias tie_word_embeddings",
}
_DIFFUSION = "its decoder denoises a whole block of tokens at once, so no segment is known before the next"
_DOGE = "its experts are single neurons looked up by product keys: there are no weight matrices to merge"
_ERNIE_VL = "its blocks see text and image tokens apart, without their places in the row, so no group can be formed"
_VITPOSE = "its expert is chosen by the caller (`dataset_index`), one per image: no gate, nothing to merge"


def _rows() -> list[MoeFamily]:
    common = (
        "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
        "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite",
        "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v3",
        "hy_v4", "inkling_text", "inkling2_text", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe",
        "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mistral4",
        "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
        "qwen4_exp_text", "solar_open",
        "deepseek_ocr2", "dots3_note", "glm4v_moe", "glm5_next", "inkling_mm_model", "inkling2",
        "minimax_m3_vl", "mistral_large4", "muse_spark", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "qwen3_5_moe",
        "qwen4_exp", "step3p7", "unlimited_ocr",
    )  # fmt: skip
    return [
        *(MoeFamily(name) for name in common),
        MoeFamily("aria_text", top_k="moe_topk"),
        MoeFamily("aria", top_k="moe_topk"),
        MoeFamily("dbrx", layout="dbrx", top_k="ffn_config.moe_top_k"),
        MoeFamily("deepseek_v4", poolings=("probs",)),
        MoeFamily("diffusion_gemma", top_k="top_k_experts", refused=_DIFFUSION),
        MoeFamily("doge", refused=_DOGE),
        MoeFamily("ernie4_5_vl_moe", refused=_ERNIE_VL),
        MoeFamily("gemma4_text", top_k="top_k_experts"),
        MoeFamily("gemma4", top_k="top_k_experts"),
        MoeFamily("hunyuan_v1_moe", top_k="moe_topk"),
        MoeFamily("jetmoe", layout="jetmoe", chooses_top_k=False),
        MoeFamily("llama4_text", layout="llama4"),
        MoeFamily("llama4", layout="llama4"),
        MoeFamily(
            "nllb-moe", "encoder-decoder", layout="modules", linears=("fc1", "fc2"), top_k=2, poolings=("hidden",)
        ),
        MoeFamily("openai_privacy_filter", "encoder"),
        MoeFamily("phimoe", chooses_top_k=False),
        MoeFamily(
            "switch_transformers",
            "encoder-decoder",
            layout="modules",
            linears=("wi", "wo"),
            top_k=1,
            poolings=("hidden",),
        ),
        MoeFamily("vitpose_backbone", "encoder", refused=_VITPOSE),
        MoeFamily("zaya", poolings=("probs",)),
    ]


MOE_FAMILIES: dict[str, MoeFamily] = {row.model_type: row for row in _rows()}
