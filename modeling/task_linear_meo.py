"""Linear maps outside of feed-forwards that each task adds a low-rank part of its own to, as LoRAs of attention do.

Legend: B rows, S positions, N groups that share a task, I input features, O output features.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .arguments_meo import fixed_task
from .configuration_meo import MeoSettings
from .errors_meo import MeoConfigError, RoutingError
from .feedforward_meo import MeoFeedForward
from .groups_meo import TaskGroups
from .low_rank_meo import Factors, low_rank_linear, part_of
from .moe_meo import merging_class
from .router_meo import Gates
from .routing_meo import RoutingContext


class TaskLinear:
    """What a linear module adds to itself: y = W_0 x + B_t A_t x for rows of task t."""

    low_rank: Factors
    _context: RoutingContext

    def forward(self, x: Tensor) -> Tensor:
        """Map rows [B, S, I], or flattened [B * S, I]; keeps the shape."""
        y = super().forward(x)  # type: ignore[misc]
        call = self._context.call()
        try:
            rows = call.grouped(x)
        except RoutingError:
            raise RoutingError(
                f"a linear map with a part for each task got {tuple(x.shape)} in a batch of {call.rows} rows: what it "
                "maps belongs to no row (such as relative positions), so no task's part fits. Convert with `outside` "
                "`merge`, or from adapters that leave such maps alone"
            ) from None
        groups = TaskGroups(fixed_task(self._context, call), call.task_ids)
        cells = groups.split(rows)
        tasks = groups.read("hidden", cells).to(x.device)
        gates = Gates(tasks[:, None], torch.ones(len(tasks), 1, device=x.device))
        part = low_rank_linear(cells.to(y.dtype), part_of(self.low_rank), gates, None)
        return y + groups.join(part).reshape(y.shape)


def task_linears(model: nn.Module) -> dict[str, Any]:
    """Return the linear maps of a model that have parts for tasks, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TaskLinear)}


def check_task_linears(model: PreTrainedModel, settings: MeoSettings) -> None:
    """Raise MeoConfigError if linear maps with parts for tasks were replaced, as some quantisers do while loading."""
    lost = [path for path, module in _ranked(model, settings) if not isinstance(module, TaskLinear)]
    if lost:
        raise MeoConfigError(
            f"{len(lost)} linear maps that add a part for each task, such as {lost[0]}, were replaced while loading: "
            "quantise other modules only (`modules_to_not_convert`), or weights in place, as torchao does"
        )


def give_tasks_parts(model: PreTrainedModel, settings: MeoSettings, context: RoutingContext) -> None:
    """Let linear maps outside of feed-forwards that the settings give a rank add a part for each task."""
    for path, module in _ranked(model, settings):
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight.t() if isinstance(module, Conv1D) else module.weight  # type: ignore[operator]
        module.__class__ = merging_class(TaskLinear, cast(Any, type(module)))
        module.low_rank = Factors(len(settings.tasks), settings.rank_of(path), weight)
        module._context = context  # type: ignore[assignment]


def _ranked(model: nn.Module, settings: MeoSettings) -> list[tuple[str, Any]]:
    """Return linear maps outside of feed-forwards that the settings give a rank, whatever class they have by now."""
    if settings.expert_format != "lowrank" or settings.level != "task":
        return []
    inside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, MeoFeedForward))
    linears = ((p, m) for p, m in model.named_modules() if hasattr(m, "in_features") or isinstance(m, Conv1D))
    return [(path, module) for path, module in linears if not path.startswith(inside) and settings.rank_of(path)]
