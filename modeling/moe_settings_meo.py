"""What a mixture of experts' own config says about its experts, and the keys of its `meo` block."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from .errors_meo import MeoConfigError
from .moe_families_meo import MoeFamily

MOE_KEYS = (
    "schema_version", "level", "pooling", "combine", "segment_length", "routing", "merged_cache_bytes", "layers",
    "source", "weights", "expert_format", "expert_ranks", "expert_parts", "expert_counts", "expert_maps", "skip",
    "meo_hf_version",
)  # fmt: skip
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _holder(config: PreTrainedConfig, path: str) -> tuple[Any, str]:
    """Return the sub-config that holds a key of the text config, and the key's last part."""
    *parents, name = path.split(".")
    holder: Any = config if config.is_encoder_decoder else config.get_text_config(decoder=True)  # which may be a copy
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name


def top_k_of(config: PreTrainedConfig, family: MoeFamily) -> int:
    """Return how many experts a mixture of experts selects per gate."""
    top_k = family.top_k
    value = top_k if isinstance(top_k, int) else getattr(*_holder(config, top_k))
    return value[0] if isinstance(value, (list, tuple)) else value


def num_experts_of(config: PreTrainedConfig, family: MoeFamily) -> int:
    """Return how many experts each MoE block of a config has."""
    top_k = family.top_k
    holder, _ = _holder(config, top_k if isinstance(top_k, str) else "")
    value = next((found for name in _COUNTS if (found := getattr(holder, name, None))), 0)
    return max(value) if isinstance(value, (list, tuple)) else value


def set_num_experts(config: PreTrainedConfig, family: MoeFamily, count: int) -> None:
    """Set how many experts the MoE blocks of a config have; other numbers in a list, as of dense layers, stay."""
    old, top_k = num_experts_of(config, family), family.top_k
    holder, _ = _holder(config, top_k if isinstance(top_k, str) else "")
    for name in _COUNTS:
        value = getattr(holder, name, None)
        if isinstance(value, (list, tuple)):
            setattr(holder, name, [count if one == old else one for one in value])
        elif value is not None:
            setattr(holder, name, count)


def set_top_k(config: PreTrainedConfig, family: MoeFamily, top_k: Any) -> None:
    """Set how many experts a mixture of experts selects; it may be more than the family's own number."""
    if isinstance(family.top_k, int) or not family.chooses_top_k:
        raise MeoConfigError(f"the router of {family.model_type} fixes the number of selected experts: leave top_k out")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise MeoConfigError(f"top_k is {top_k!r}; give a whole number >= 1")
    if top_k > (count := num_experts_of(config, family)):
        raise MeoConfigError(f"top_k is {top_k}, but {family.model_type} has {count} experts; lower it")
    holder, name = _holder(config, family.top_k)
    old = getattr(holder, name)
    setattr(holder, name, [top_k] * len(old) if isinstance(old, (list, tuple)) else top_k)
