"""How each layout of mixture-of-experts blocks is found in a model and made to merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import Tensor, nn

from .blocks_meo import cache_layer
from .configuration_meo import MeoSettings
from .errors_meo import MeoConfigError
from .fewer_meo import check_fewer, resize_blocks
from .moe_adapters_meo import (
    DbrxBlock,
    DbrxGLU,
    DbrxRouting,
    JetMoeBlock,
    JetMoeLinear,
    JetMoeRouting,
    Llama4Block,
    Llama4Experts,
    Llama4Routing,
    SparseBlock,
    Top1Routing,
    Top2Routing,
)
from .moe_families_meo import Layout, MoeFamily
from .moe_meo import GroupRouter, MergedExpertsMixin, Site, merge_module, merging_class, place_module
from .parts_meo import sizes_of
from .routing_meo import RoutingContext
from .wrapped_meo import HostsExperts


def _stacks(module: Any) -> bool:
    stacks = [getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
    shapes = [getattr(p, "ds_shape", p.shape) for p in stacks if isinstance(p, nn.Parameter)]  # ZeRO-3 empties them
    return sum(len(shape) == 3 for shape in shapes) == 2


def _merge_stacked(module: Any, merge: Callable[..., None]) -> None:
    merge(router_of(module), GroupRouter)
    merge(module.experts, MergedExpertsMixin)
    own: Any = type(module)
    module.__class__ = merging_class(HostsExperts, own)


def _merge_dbrx(module: Any, merge: Callable[..., None]) -> None:
    merge(module.router, DbrxRouting)
    merge(module.experts.mlp, DbrxGLU)
    merge(module, DbrxBlock)


def _merge_llama4(module: Any, merge: Callable[..., None]) -> None:
    merge(module.router, Llama4Routing)
    merge(module.experts, Llama4Experts)
    merge(module, Llama4Block)


def _merge_jetmoe(module: Any, merge: Callable[..., None]) -> None:
    merge(module.router, JetMoeRouting)
    merge(module.input_linear, JetMoeLinear, "input_linear")
    merge(module.output_linear, JetMoeLinear, "output_linear")
    merge(module, JetMoeBlock)


def router_of(module: Any) -> Any:
    """Return the router of an MoE block, None where there is none."""
    found = (getattr(module, name, None) for name in ("gate", "router"))
    return next((router for router in found if isinstance(router, nn.Module)), None)


def is_block(module: Any, layout: Layout) -> bool:
    """Return whether a module is an MoE block of a layout."""
    experts = getattr(module, "experts", None)
    if layout == "jetmoe":
        return all(hasattr(module, name) for name in ("input_linear", "output_linear", "router", "activation"))
    if layout == "dbrx":
        return hasattr(module, "route_tokens_to_experts") and hasattr(getattr(experts, "mlp", None), "w1")
    if layout == "modules":
        return isinstance(experts, nn.ModuleDict) and hasattr(module, "router")
    return router_of(module) is not None and _stacks(experts)


MERGE = {"stacked": _merge_stacked, "dbrx": _merge_dbrx, "llama4": _merge_llama4, "jetmoe": _merge_jetmoe}


def expert_owners(block: Any) -> tuple[str, ...]:
    """Return the names of a block's modules that hold its experts."""
    return ("experts",) if hasattr(block, "experts") else ("input_linear", "output_linear")


def expert_tensors(block: Any) -> list[Tensor]:
    """Return the weights of all experts of a block, without biases."""
    named = (pair for owner in expert_owners(block) for pair in getattr(block, owner).named_parameters())
    return [parameter for name, parameter in named if parameter.dim() > 1 and not name.endswith("bias")]


def layer_number(path: str) -> int:
    """Return the number of the layer that a module path leads through."""
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


def moe_blocks(model: nn.Module, layout: Layout) -> Iterator[tuple[str, Any]]:
    """Yield path and module of every MoE block."""
    return ((path, module) for path, module in model.named_modules() if is_block(module, layout))


def replace_moe(model: nn.Module, family: MoeFamily, settings: MeoSettings, context: RoutingContext) -> None:
    """Make every MoE block that the settings name merge its experts.

    Raises MeoConfigError if the model has none, or not in a layer that the settings name.
    """
    blocks = list(moe_blocks(model, family.layout))
    if not blocks:
        raise MeoConfigError(
            f"found no experts in {type(model).__name__}: its config makes a dense model (or Transformers "
            f"{transformers.__version__} builds this family in an older way: use a newer one)"
        )
    have = sorted({layer_number(path) for path, _ in blocks})
    if settings.layers is not None and (beyond := sorted(set(settings.layers) - set(have))):
        raise MeoConfigError(f"layers {beyond} have no experts; layers with experts: {have}")
    own = [path for path, _ in blocks if settings.layers is None or layer_number(path) in settings.layers]
    check_fewer(model.config, family, settings, dict(blocks), own)
    stock = resize_blocks(model, family, settings)
    blocks = [(path, model.get_submodule(path)) for path, _ in blocks]
    policy = getattr(model.config, "second_expert_policy", "all")
    if policy != "all":
        raise MeoConfigError(f"second_expert_policy {policy!r} draws experts at random in every call: set it to 'all'")
    for path, module in blocks:
        if type(router_of(module)) is nn.Linear:
            raise MeoConfigError(
                f"the router of {family.model_type} only projects in Transformers {transformers.__version__}, which "
                "builds its blocks in an older way: use a newer one"
            )
        if path not in own:
            continue
        partner = family.kind == "encoder-decoder" and "decoder" in path.split(".")
        layer = cache_layer(model, path, layer_number(path))
        block = module if family.layout == "dbrx" else None
        site = Site(path, layer, partner, block)
        _merge_block(model, module, family.layout, site, context, settings.combine, stock.get(path))
        if settings.expert_format == "lowrank":
            keep_low_rank(model.get_submodule(path), path, settings)
        elif settings.expert_format == "parts":
            keep_apart(model.get_submodule(path), path, settings)


def keep_low_rank(block: Any, path: str, settings: MeoSettings) -> None:
    """Let a block keep what its experts share, and low-rank parts of each.

    Raises MeoConfigError for experts that are no one module.
    """
    place, module = _experts_in(block, settings.expert_format)
    experts = module.count()
    ranks = {name: settings.rank_of(f"{path}.{place}.{name}") for name in module.maps}
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not name.endswith("bias"):
            kept = parameter.detach()[: len(parameter) // experts].clone()
            setattr(module, name, nn.Parameter(kept))
    module.keep_parts(ranks, experts)


def keep_apart(block: Any, path: str, settings: MeoSettings) -> None:
    """Let a block keep the parts of its experts that the settings name; its other linear maps stay whole.

    Raises MeoConfigError for experts that are no one module, and for sizes of another number of experts.
    """
    place, module = _experts_in(block, settings.expert_format)
    named = {name: settings.parts_of(f"{path}.{place}.{name}") for name in module.maps}
    experts = module.count()
    sizes = {name: sizes_of(one, experts, f"{path}.{place}.{name}") for name, one in named.items() if one is not None}
    if sizes:
        module.keep_apart(sizes)


def _experts_in(block: Any, expert_format: str) -> tuple[str, Any]:
    """Return place and module of a block's experts; raises MeoConfigError where they are no one module."""
    if not hasattr(block, "experts"):
        raise MeoConfigError(f"expert_format {expert_format!r} is not known for {type(block).__name__}: take 'full'")
    named: Iterator[tuple[str, Any]] = block.named_modules()
    return next((name, each) for name, each in named if isinstance(each, MergedExpertsMixin))


def _merge_block(
    model: nn.Module, module: Any, layout: Layout, site: Site, context: RoutingContext, combine: str, like: Any
) -> None:
    def merge(part: nn.Module, mixin: type, name: str = "") -> None:
        own = site if not name else Site(name, site.layer, site.reads_encoder)
        merge_module(part, mixin, own, context, combine)

    if layout == "modules":
        sparse = SparseBlock(module, like)
        model.set_submodule(site.path, sparse)
        merge(sparse.router, Top2Routing if hasattr(sparse.router, "second_expert_policy") else Top1Routing)
        place_module(sparse.experts, site, context, combine)
        return
    MERGE[layout](module, merge)
