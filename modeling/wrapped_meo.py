"""PEFT's LoRA on stacks of experts without their deltas: its wrappers are peeled off, and their factors merged.

PEFT's own forward adds every expert's delta to the stack in each call. A block that hosts experts gives each wrapper
that PEFT puts around them a made subclass of its class, whose forward hands the low-rank factors on. PEFT is not
imported here; its wrappers are known by what they hold.

Legend: E experts, R rank, I input features, O output features.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import Tensor, nn

from .low_rank_meo import Adapted, LowRank
from .merger_meo import Merger


class HostsExperts:
    """A block whose experts an adapter may wrap."""

    def __setattr__(self, name: str, value: Any) -> None:
        if is_wrapper(value) and _merges(innermost(value)) and not isinstance(value, Peeling):
            value.__class__ = peeling_class(cast(Any, type(value)))
        super().__setattr__(name, value)


class Peeling(HostsExperts):
    """What a wrapper of experts adds to hand its factors on, and to count how often it changed the weights."""

    parameter_name: str
    base_layer: Any
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    changes: int = 0

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge as PEFT does."""
        self.changes += 1
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        """Unmerge as PEFT does."""
        self.changes += 1
        super().unmerge()  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts with what all wrappers around them add."""
        adapted = None if kwargs.get("adapter_names") else adapted_maps(self)
        if adapted is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return innermost(self)(*args, adapted=adapted, **kwargs)


def _merges(module: Any) -> bool:
    return isinstance(module, Merger) and module._context.settings.level != "unmerged"


def is_wrapper(module: Any) -> bool:
    """Return whether a module wraps one parameter of another, as PEFT's do."""
    return isinstance(module, nn.Module) and hasattr(module, "base_layer") and hasattr(module, "parameter_name")


def innermost(module: Any) -> Any:
    """Return what wrappers are around."""
    while is_wrapper(module):
        module = module.base_layer
    return module


def adapted_maps(wrapper: Any) -> dict[str, Adapted] | None:
    """Return by parameter what the wrappers around experts add; None where PEFT's own way must be gone."""
    found: dict[str, Adapted] = {}
    while is_wrapper(wrapper):
        if not isinstance(wrapper, Peeling) or (wrapper.disable_adapters and wrapper.merged):
            return None
        adapted: Adapted | None = Adapted()
        if not wrapper.merged and not wrapper.disable_adapters:
            own = getattr(wrapper, "adapted", None)  # a wrapper of our own knows more than PEFT's layout
            adapted = stock_parts(wrapper) if own is None else own()
        if adapted is None:
            return None
        found[wrapper.parameter_name] = adapted._replace(
            mark=(adapted.mark, tuple(wrapper.merged_adapters), wrapper.changes)
        )
        wrapper = wrapper.base_layer
    return found


def stock_parts(wrapper: Any) -> Adapted | None:
    """Read PEFT's layout: A [E * R, I] by experts, B [O, R * E] by ranks; None for a parameter that is no stack."""
    if wrapper.get_param().dim() != 3 or not wrapper.get_param().is_floating_point():
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    scales = tuple((name, wrapper.scaling[name]) for name in names)
    parts = tuple(LowRank(*factors_of(wrapper, name, wrapper.num_experts), scale) for name, scale in scales)
    made_of = [factors[name].weight for name in names for factors in (wrapper.lora_A, wrapper.lora_B)]
    made_of += [scale for _, scale in scales if isinstance(scale, Tensor)]  # where hot-swapping was prepared for
    mark = tuple((name, None if isinstance(scale, Tensor) else scale) for name, scale in scales)
    return Adapted(parts, None, mark, tuple(made_of))


def chosen_in(module: Any) -> tuple[Any, ...]:
    """Return what PEFT's wrappers around a module, or a dict of them, have chosen; () where there are none."""
    if isinstance(module, nn.ModuleDict):
        return tuple(chosen_in(each) for each in module.values())
    found = []
    while hasattr(module, "disable_adapters"):
        merged = tuple(getattr(module, "merged_adapters", ()))
        found.append((module.disable_adapters, tuple(module.active_adapters), merged))
        module = getattr(module, "base_layer", None)
    return tuple(found)


def factors_of(wrapper: Any, name: str, experts: int) -> tuple[Tensor, Tensor]:
    """Return A [E, R, I] and B [E, O, R] of an adapter."""
    down, up = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    return down.unflatten(0, (experts, -1)), up.unflatten(1, (-1, experts)).permute(2, 0, 1)


@functools.cache
def peeling_class(base: Any) -> Any:
    """Return the class that a wrapper gets, made once; it keeps its name, by which PEFT knows it."""

    def reduce(self: Any) -> Any:
        return _unpickled, (base,), self.__dict__

    return type(base.__name__, (Peeling, base), {"__module__": __name__, "__doc__": base.__doc__, "__reduce__": reduce})


def _unpickled(base: type) -> Any:
    return object.__new__(peeling_class(base))
