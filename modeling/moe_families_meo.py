"""The mixture-of-experts families of Transformers: one typed row each.

A row says only what the live model does not: everything that its experts' layout decides (transposed, bias,
interleaved, no gate, norm after the expert) is read from the modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
    switches: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    refused: str | None = None

    @property
    def default_level(self) -> str:
        """The level a conversion takes when none is asked for."""
        return MOE_LEVELS[self.kind][0]

    @property
    def levels(self) -> dict[Kind, tuple[str, ...]]:
        """The levels that each kind of stack can take, the default first."""
        return MOE_LEVELS


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
