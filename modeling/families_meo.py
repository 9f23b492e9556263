"""Where each Transformers family keeps its dense feed-forward: one typed row per family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .errors_meo import MeoConfigError
from .levels_meo import LEVELS, Kind
from .moe_families_meo import MOE_FAMILIES, MoeFamily


@dataclass(frozen=True)
class Family:
    """One row: attribute paths on the live module that owns the projections (`owner`).

    `up` lists alternatives; each is one path, or the pair (gate, up) of a gated feed-forward.
    `fused` marks a single first projection that holds gate and up. `dropout` is the path, if any, of the
    dropout between the projections. With `hosted`, the merged feed-forward takes the slot of the first
    projection and activation and second projection become `Identity`; otherwise it replaces the owner.
    `switches` are the config values that change the feed-forward's function: tests run each both ways.
    """

    model_type: str
    kind: Kind
    up: tuple[tuple[str, ...], ...]
    down: str
    activation: str
    fused: bool = False
    dropout: str | None = None
    hosted: bool = False
    switches: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def default_level(self) -> str:
        """The level a conversion takes when none is asked for."""
        return LEVELS[self.kind][0]

    @property
    def levels(self) -> dict[Kind, tuple[str, ...]]:
        """The levels that each kind of stack can take, the default first."""
        return LEVELS


_TIED = (True, False)
_BERT = {
    "up": (("intermediate.dense",),),
    "down": "output.dense",
    "activation": "intermediate.intermediate_act_fn",
    "hosted": True,
    "switches": {
        "hidden_act": ("gelu", "relu"),
        "chunk_size_feed_forward": (0, 2),
        "tie_word_embeddings": _TIED,
        "hidden_dropout_prob": (0.0, 0.1),
    },
}
_BART = {
    "up": (("fc1",),),
    "down": "fc2",
    "activation": "activation_fn",
    "dropout": "activation_dropout",
    "hosted": True,
    "switches": {
        "activation_function": ("gelu", "relu"),
        "activation_dropout": (0.0, 0.1),
        "tie_word_embeddings": _TIED,
        "scale_embedding": (True, False),
    },
}
_T5 = {
    "up": (("wi",), ("wi_0", "wi_1")),
    "down": "wo",
    "activation": "act",
    "dropout": "dropout",
    "switches": {
        "feed_forward_proj": ("relu", "gated-gelu"),
        "dropout_rate": (0.0, 0.1),
        "tie_word_embeddings": _TIED,
    },
}
_LLAMA = {"up": (("gate_proj", "up_proj"),), "down": "down_proj", "activation": "act_fn"}
_PHI3 = {"up": (("gate_up_proj",),), "down": "down_proj", "activation": "activation_fn", "fused": True}
_SILU = {"hidden_act": ("silu", "gelu"), "tie_word_embeddings": _TIED}
_GEMMA = {"hidden_activation": ("gelu_pytorch_tanh", "silu"), "tie_word_embeddings": _TIED}


def _rows() -> list[Family]:
    bert = [
        Family(name, "encoder", **_BERT)  # type: ignore[arg-type]
        for name in ("bert", "roberta", "xlm-roberta", "electra")
    ]
    plain = {k: v for k, v in _BERT["switches"].items() if k != "chunk_size_feed_forward"}  # type: ignore[attr-defined]
    unchunked = {**_BERT, "switches": plain}
    mpnet = {**_BERT, "switches": {k: v for k, v in plain.items() if k != "tie_word_embeddings"}}
    seq2seq = [
        Family(name, "encoder-decoder", **_BART)  # type: ignore[arg-type]
        for name in ("bart", "mbart", "marian", "pegasus")
    ]
    tied = {k: v for k, v in _T5["switches"].items() if k != "tie_word_embeddings"}  # type: ignore[attr-defined]
    t5 = [Family("t5", "encoder-decoder", **_T5), Family("mt5", "encoder-decoder", **{**_T5, "switches": tied})]  # type: ignore[arg-type]
    llama = [
        Family(name, "decoder", **_LLAMA, switches=switches)  # type: ignore[arg-type]
        for name, switches in {
            "llama": {**_SILU, "mlp_bias": (False, True)},
            "mistral": _SILU,
            "qwen2": _SILU,
            "qwen3": _SILU,
            "gemma2": _GEMMA,
            "gemma3_text": _GEMMA,
            "olmo2": _SILU,
            "smollm3": {**_SILU, "mlp_bias": (False, True)},
            "granite": {**_SILU, "mlp_bias": (False, True), "residual_multiplier": (1.0, 0.5)},
            "stablelm": {**_SILU, "use_parallel_residual": (False, True)},
            "cohere": _SILU,
        }.items()
    ]
    fused = [Family(name, "decoder", **_PHI3, switches=_SILU) for name in ("phi3", "glm4")]  # type: ignore[arg-type]
    return [
        *bert,
        Family("deberta-v2", "encoder", **unchunked),  # type: ignore[arg-type]
        Family("mpnet", "encoder", **mpnet),  # type: ignore[arg-type]
        Family(
            "distilbert",
            "encoder",
            up=(("lin1",),),
            down="lin2",
            activation="activation",
            hosted=True,
            switches={
                "activation": ("gelu", "relu"),
                "chunk_size_feed_forward": (0, 2),
                "tie_word_embeddings": _TIED,
                "dropout": (0.0, 0.1),
            },
        ),
        Family(
            "albert",
            "encoder",
            up=(("ffn",),),
            down="ffn_output",
            activation="activation",
            hosted=True,
            switches={
                "hidden_act": ("gelu_new", "relu"),
                "chunk_size_feed_forward": (0, 2),
                "num_hidden_groups": (1, 2),
                "inner_group_num": (1, 2),
                "tie_word_embeddings": _TIED,
            },
        ),
        Family(
            "modernbert",
            "encoder",
            up=(("Wi",),),
            down="Wo",
            activation="act",
            fused=True,
            dropout="drop",
            switches={
                "hidden_activation": ("gelu", "silu"),
                "mlp_bias": (False, True),
                "mlp_dropout": (0.0, 0.1),
                "tie_word_embeddings": _TIED,
            },
        ),
        Family(
            "vit",
            "encoder",
            up=(("fc1",),),
            down="fc2",
            activation="activation_fn",
            hosted=True,
            switches={"hidden_act": ("gelu", "relu"), "hidden_dropout_prob": (0.0, 0.1)},
        ),
        *t5,
        *seq2seq,
        Family(
            "gpt2",
            "decoder",
            up=(("c_fc",),),
            down="c_proj",
            activation="act",
            hosted=True,
            switches={
                "activation_function": ("gelu_new", "relu"),
                "resid_pdrop": (0.0, 0.1),
                "tie_word_embeddings": _TIED,
            },
        ),
        Family(
            "gpt_neox",
            "decoder",
            up=(("dense_h_to_4h",),),
            down="dense_4h_to_h",
            activation="act",
            hosted=True,
            switches={
                "hidden_act": ("gelu", "relu"),
                "use_parallel_residual": (True, False),
                "tie_word_embeddings": _TIED,
            },
        ),
        Family(
            "opt",
            "decoder",
            up=(("fc1",),),
            down="fc2",
            activation="activation_fn",
            hosted=True,
            switches={
                "activation_function": ("relu", "gelu"),
                "enable_bias": (True, False),
                "do_layer_norm_before": (True, False),
                "tie_word_embeddings": _TIED,
            },
        ),
        Family(
            "phi",
            "decoder",
            up=(("fc1",),),
            down="fc2",
            activation="activation_fn",
            hosted=True,
            switches={"hidden_act": ("gelu_new", "relu"), "resid_pdrop": (0.0, 0.1)},
        ),
        Family(
            "starcoder2",
            "decoder",
            up=(("c_fc",),),
            down="c_proj",
            activation="act",
            hosted=True,
            switches={
                "hidden_act": ("gelu_pytorch_tanh", "relu"),
                "use_bias": (True, False),
                "residual_dropout": (0.0, 0.1),
            },
        ),
        *llama,
        *fused,
    ]


FAMILIES: dict[str, Family] = {row.model_type: row for row in _rows()}


def has_row(model_type: str) -> bool:
    """Return whether a Transformers model type has a row, dense or MoE."""
    return model_type in FAMILIES or model_type in MOE_FAMILIES


def family_of(model_type: str) -> Family | MoeFamily:
    """Return the row of a family, dense or MoE, given its Transformers model type (with or without `meo_`).

    Raises MeoConfigError for a family that has no row.
    """
    name = model_type.removeprefix("meo_")
    row = FAMILIES.get(name) or MOE_FAMILIES.get(name)
    if row is None:
        raise MeoConfigError(
            f"no family row for model type {model_type!r}; known: {', '.join(sorted(FAMILIES | MOE_FAMILIES))}. "
            "Add one line to families_meo.py."
        )
    return row
