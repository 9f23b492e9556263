"""What PEFT should know about MEO models, and what their users should know about an adapter.

PEFT is not imported here: what it has loaded is told, and what it will load reads Transformers' own table.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers import conversion_mapping
from transformers.utils import logging

from .families_meo import Family
from .merger_meo import Merger
from .moe_families_meo import MoeFamily
from .wrapped_meo import innermost, is_wrapper

logger = logging.get_logger(__name__)


def share_adapter_names(family: Family | MoeFamily, made: str) -> None:
    """Let PEFT adapt a MEO model type as its family: the same default targets, and old names of experts in files.

    Without it `target_modules=["q_proj", "w1", "w2", "w3"]` would adapt `q_proj` alone, and say nothing.
    """
    stock = family.model_type
    patterns = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    tables = [patterns, _loaded("peft.utils.transformers_weight_conversion", "_MODEL_TO_CONVERSION_PATTERN")]
    root = stock if stock in patterns.values() else patterns.get(stock)
    for table in tables:
        if root is not None and table is not None:
            table.setdefault(made, root)
    gone = _replaced(family)
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO") and isinstance(table, dict) and isinstance(table.get(stock), list):
            left = [target for target in table[stock] if target.rpartition(".")[2] not in gone]
            if left and made not in table:
                table[made] = left


def _loaded(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _replaced(family: Family | MoeFamily) -> set[str]:
    """Return the last names of projections that merged experts replace."""
    if isinstance(family, MoeFamily):
        return set()
    return {path.rpartition(".")[2] for paths in (*family.up, (family.down,)) for path in paths}


ADDITIVE = ("LORA", "LOHA", "LOKR", "ADALORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def tell_untouched(model: nn.Module, configs: dict[str, Any]) -> None:
    """Warn about targets of an adapter that are not there, and about experts that it does not touch."""
    paths = dict(model.named_modules())
    stacks: dict[str, int] = {}
    for path, module in paths.items():
        copied = ".modules_to_save." in path or path.endswith(".original_module")  # PEFT trains a copy as it is
        if isinstance(module, Merger) and isinstance(module, nn.Module) and not (copied or _wrapped(paths, path)):
            if any(is_wrapper(part) for part in module.modules()):  # of experts that are kept as parts
                continue
            own = {name: p.numel() for name, p in module.named_parameters(recurse=False) if not name.endswith("bias")}
            stacks |= {f"{path}.{name}": size for name, size in own.items()}
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    level = getattr(getattr(model, "_meo_context", None), "settings", None)
    for adapter, config in configs.items():
        if getattr(level, "level", None) == "task" and getattr(config, "task_type", None) is not None:
            logger.warning(
                f"Adapter {adapter!r} has a task_type, and PEFT's model for it keeps `task_ids` to itself: leave "
                "task_type out (None), or this model sees no task but the one of `set_task`."
            )
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        adds = kind in ADDITIVE and not getattr(config, "use_dora", False)
        if not adds and any(hasattr(module, "low_rank") and hasattr(module, "weight") for module in paths.values()):
            logger.warning(
                f"Adapter {adapter!r} does more than add to weights. Where a linear map has a part for each task, that "
                "part is changed too while the adapter is unmerged, and is not once it is merged: leave it unmerged."
            )
        if getattr(config, "target_modules", None) is None and not getattr(config, "target_parameters", None):
            continue
        missing = _missing(config, list(paths))
        if missing:
            logger.warning(f"Adapter {adapter!r} names {', '.join(missing)} in target_modules: no such module is here.")
        if stacks:
            names = sorted({".".join(name.split(".")[-2:]) for name in stacks})
            ours = "" if getattr(level, "level", None) == "unmerged" else ", or `meo_hf.MeoLoraConfig`"
            logger.warning(
                f"Adapter {adapter!r} does not touch the experts, {sum(stacks.values()) / parameters:.0%} of the "
                f"model's parameters: target_parameters={names} of a LoraConfig adapts them{ours}."
            )


def _wrapped(paths: dict[str, nn.Module], path: str) -> bool:
    """Return whether an adapter is around a module."""
    parent = paths.get(path.removesuffix(".base_layer"))
    return path.endswith(".base_layer") and is_wrapper(parent) and innermost(parent) is paths[path]


def _missing(config: Any, paths: list[str]) -> list[str]:
    """Return the listed targets that are the name of no module."""
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, str) or not targets:
        return []
    plain = {path.replace(".base_layer", "") for path in paths}
    return sorted(t for t in targets if not any(path == t or path.endswith(f".{t}") for path in plain))
