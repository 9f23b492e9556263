"""What a recovery trains: everything, routers only, or adapters, which are merged into the weights at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from meo_hf.errors import UsageError
from meo_hf.modeling.moe_adapters_meo import DbrxGLU
from meo_hf.modeling.moe_meo import GroupRouter
from meo_hf.modeling.router_meo import MeoRouter

RANK = 16


def routers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every router of a MEO model: its own, or a mixture of experts' family's."""
    return (module for module in model.modules() if isinstance(module, (MeoRouter, GroupRouter)))


def choose_trained(model: Any, train: str, rank: int | None = None) -> Any:
    """Freeze what is not trained; returns the model, for adapters within PEFT's wrapper.

    Raises UsageError where nothing would be trained.
    """
    check_routers(model, train)
    if train == "all":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    trained = with_adapters(model, rank or RANK) if train == "adapters" else model
    for router in routers_of(model):
        router.requires_grad_(True)
    return trained


def check_routers(model: Any, train: str) -> None:
    """Raise UsageError where routers alone would have nothing to learn, or no task is chosen."""
    context = getattr(model, "_meo_context", None)
    level = "" if context is None else context.settings.level
    if context is not None and level == "task" and context.task is None:
        raise UsageError(
            "this model has level 'task' and no default task, so nobody knows which one the text belongs to: choose "
            "it with `set_task` and save the model"
        )
    if train != "routers":
        return
    routers = list(routers_of(model))
    if not routers:
        raise UsageError(f"{type(model).__name__} has no routers that merge experts: train all, or adapters")
    if level == "task":
        raise UsageError("at level 'task' a router is a table of gates for each task: train all, or adapters")
    if all(_is_constant(router, model) for router in routers):
        raise UsageError("with top_k 1 every gate is 1, so routers have nothing to learn by: train all, or adapters")


@torch.no_grad()
def _is_constant(router: Any, model: Any) -> bool:
    """Whether a router's gates are the same whatever it reads: one expert, whose weight is normalised."""
    if isinstance(router, MeoRouter):
        return router.top_k == 1
    like = next(router.parameters())
    states = torch.randn(1, 8, model.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(0))
    try:
        _, (_, weights, *_) = router._sorted(router.route(states.flatten(0, 1).to(like)))
    except (RuntimeError, TypeError, ValueError):  # it reads more than states
        return False
    return bool(weights.shape[-1] == 1 and weights.float().std() < 1e-4)


def with_adapters(model: Any, rank: int) -> Any:
    """Wrap a model in PEFT's LoRA: every linear map but routers' and the output layer, and every stack of experts."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_linears(model), target_parameters=_stacks(model))
    return get_peft_model(model, config)


def _linears(model: Any) -> list[str]:
    left = {id(part) for router in routers_of(model) for part in router.modules()} | {id(model.get_output_embeddings())}
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in left]


def _stacks(model: nn.Module) -> list[str]:
    """Name the stacks of experts; GPT-2's linear maps go with them, which PEFT does not mix with stacks otherwise."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (parameter.dim() == 3 and not isinstance(module, _ConvNd))
        or (parameter.dim() == 2 and isinstance(module, (DbrxGLU, Conv1D)))
    ]


def merged(model: Any) -> Any:
    """Return a model with its adapters merged into the weights, or as it is if it has none."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def widen(model: nn.Module) -> dict[str, torch.dtype]:
    """Make all floating-point weights float32; returns the types that they had."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    model.float()
    return dtypes


def narrow(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give all weights the types that they had."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])
