"""What an adapter of ours finds in a MEO model, from this package's code or a repository's own copy of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from meo_hf.errors import UnsupportedError

ROLES = ("up", "down")


def mergers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield path and module of everything that merges experts; adapters around it are no part of the path."""
    for path, module in model.named_modules():
        if hasattr(module, "merged_maps") and hasattr(module, "stack"):
            yield path.replace(".base_layer", ""), module


def routers(model: nn.Module) -> list[str]:
    """Return the paths of all routers that choose experts to merge; PEFT's copies of them are no part of the paths."""
    found = (
        path
        for path, module in model.named_modules()
        if type(module).__name__ == "MeoRouter" or (hasattr(module, "places") and hasattr(module, "route"))
    )
    return sorted({path.split(".modules_to_save")[0].removesuffix(".original_module") for path in found})


def stacks(model: nn.Module, role: str) -> list[str]:
    """Return the names of the parameters that hold all experts' first (`up`) or last (`down`) linear maps.

    Raises UnsupportedError where experts are no stacks [E, O, I], or do not merge.
    """
    found = []
    for path, module in mergers(model):
        if getattr(module, "part_sizes", None):
            raise UnsupportedError(
                f"the experts of {type(model).__name__} are kept as parts: PEFT's own LoraConfig adapts those, for "
                "example with target_parameters=['parts.down.A', 'parts.down.B']"
            )
        if module._context.settings.level == "unmerged":
            place = path.rpartition(".")[2]
            weights = (name for name, p in module.named_parameters() if p.dim() > 1 and not name.endswith("bias"))
            own = [f"{place}.{name}" for name in weights if "router" not in name]  # which is in JetMoE's blocks
            raise UnsupportedError(
                f"the experts of {type(model).__name__} run one by one (level 'unmerged'), which takes PEFT's own "
                f"LoraConfig: target_parameters={own}"
            )
        names = [name for name, p in module.named_parameters(recurse=False) if not name.endswith("bias")]
        if any(len(getattr(p, "ds_shape", p.shape)) != 3 for p in map(module.get_parameter, names)):
            raise UnsupportedError(
                f"the experts of {type(model).__name__} are matrices, not stacks: use PEFT's own LoraConfig with "
                f"target_parameters={sorted(names)}"
            )
        last = names[-1:] if len(names) > 1 else names if "output" in path else []
        chosen = last if role == "down" else [name for name in names if name not in last]
        found += [f"{path}.{name}" for name in chosen]
    return found
