"""Blocks of a mixture of experts with another number of experts than its config says: checked, and built."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .configuration_meo import MeoSettings
from .errors_meo import MeoConfigError
from .moe_families_meo import MoeFamily
from .moe_settings_meo import num_experts_of, set_num_experts, top_k_of


def check_fewer(
    config: Any, family: MoeFamily, settings: MeoSettings, blocks: Collection[str], own: Collection[str]
) -> None:
    """Raise MeoConfigError for counts, maps or thresholds that do not fit the blocks of these paths.

    `own` are those whose layers the settings name; the others stay the family's.
    """
    counts, maps = settings.expert_counts or {}, settings.expert_maps or {}
    limits = (settings.skip or {}).get("threshold")
    limits = limits if isinstance(limits, dict) else {}
    named = (("expert_counts", counts, blocks), ("expert_maps", maps, own), ("skip's threshold", limits, own))
    for name, paths, known in named:
        if lost := sorted(set(paths) - set(known)):
            reason = "is in none of `layers`" if lost[0] in blocks else "has no experts"
            raise MeoConfigError(f"{name} names {lost[0]!r}, which {reason}; it may name: {', '.join(known)}")
    experts, top_k = num_experts_of(config, family), top_k_of(config, family)
    for path, count in counts.items():
        if count > experts:
            raise MeoConfigError(f"expert_counts[{path!r}] is {count}, more than the config's {experts}; lower it")
        if path not in maps:
            _check_count(config, path, count, experts, top_k)
    for path, stands_for in maps.items():
        if len(stands_for) != experts:
            raise MeoConfigError(f"expert_maps[{path!r}] names {len(stands_for)} experts; its router knows {experts}")
        if (count := counts.get(path, experts)) <= max(stands_for):
            raise MeoConfigError(
                f"expert_maps[{path!r}] names expert {max(stands_for)}; the block has {count}, counted from 0"
            )
    if settings.skip and top_k == 1:
        raise MeoConfigError("skip has no effect where a token selects one expert: leave it out")


def _check_count(config: Any, path: str, count: int, experts: int, top_k: int) -> None:
    """Raise MeoConfigError where a router could not select from so many experts."""
    if count < top_k:
        raise MeoConfigError(
            f"expert_counts[{path!r}] is {count}, but a token selects {top_k}: keep as many, lower top_k, or keep the "
            "router with expert_maps"
        )
    text = config.get_text_config(decoder=True)
    groups, kept = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
    if groups == 1 or getattr(text, "topk_method", None) == "greedy":
        return
    least = max(min(2, experts // groups), -(-top_k // kept))  # some routers rank groups by their two best
    if count % groups or count // groups < least:
        raise MeoConfigError(
            f"expert_counts[{path!r}] is {count}, but the router selects by {groups} groups: give a multiple of "
            f"{groups}, at least {least * groups}, or keep the router with expert_maps"
        )


def resize_blocks(model: nn.Module, family: MoeFamily, settings: MeoSettings) -> dict[str, nn.Module]:
    """Give MoE blocks as many experts as the settings say; those with a map keep their routers.

    Returns by path, on the meta device, the blocks that the family's own initialisation fits.
    """
    maps, experts = settings.expert_maps or {}, num_experts_of(model.config, family)  # type: ignore[arg-type]
    counts = {path: count for path, count in (settings.expert_counts or {}).items() if count != experts}
    stock: dict[str, nn.Module] = {}
    for count in sorted(set(counts.values())):
        twin = _stock_class(model)(resized_config(model.config, family, count))
        for path in [path for path, its in counts.items() if its == count]:
            old, block = model.get_submodule(path), twin.get_submodule(path)
            if family.layout == "modules":
                stock[path] = copy.deepcopy(old).to("meta")
            _keep_configs(old, block)
            if path not in maps:
                model.set_submodule(path, block)
                continue
            for name in ("experts", "input_linear", "output_linear"):
                if hasattr(old, name):
                    setattr(old, name, getattr(block, name))
    return stock


def _keep_configs(old: nn.Module, made: nn.Module) -> None:
    """Let the modules of a new block read the model's own config, as `set_attn_implementation` expects.

    Routers read the number of experts from theirs.
    """
    for name, module in made.named_modules():
        if "config" in module.__dict__ and name.partition(".")[0] not in ("gate", "router"):
            module.config = old.get_submodule(name).config


def resized_config(config: Any, family: MoeFamily, count: int) -> PreTrainedConfig:
    """Return a copy of a config with another number of experts, that makes stock models."""
    made: PreTrainedConfig = copy.deepcopy(config)
    made.__dict__.pop("meo", None)
    set_num_experts(made, family, count)
    return made


def _stock_class(model: nn.Module) -> Any:
    return next(base for base in type(model).__mro__ if base.__module__.startswith("transformers."))
