"""What a call may be told about its gates, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .configuration_meo import ROUTINGS
from .errors_meo import RoutingError

if TYPE_CHECKING:
    from .routing_meo import Call, RoutingContext


def check_arguments(context: RoutingContext, call: Call, top: bool, find: Any) -> None:
    """Raise RoutingError for arguments that do not fit the batch, have no effect, or contradict each other."""
    level = context.settings.level
    if call.task_ids is not None:
        _check_task_ids(call.task_ids, call.rows, level, len(context.settings.tasks))
    if call.routing is not None and call.routing not in ROUTINGS:
        raise RoutingError(f"routing is {call.routing!r}; allowed: {', '.join(ROUTINGS)}")
    idle = ("routing", "prompt_lengths") if level != "task" else ("routing", "prompt_lengths", "routing_mask")
    if top and not context.reads_past:
        for name in idle:
            if find(name) is not None:
                raise RoutingError(f"`{name}` has no effect in this model, of level {level!r}: leave it out")
    prompt = call.prompt_lengths
    if prompt is None:
        return
    if not isinstance(prompt, Tensor) or prompt.dtype not in (torch.int32, torch.int64) or prompt.dim() != 1:
        found = f"{prompt.dtype} {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
        raise RoutingError(f"`prompt_lengths` is {found}; give a whole-number tensor [batch]: real tokens per prompt")
    if call.rows is not None and prompt.shape[0] != call.rows:
        raise RoutingError(f"`prompt_lengths` has {prompt.shape[0]} entries for {call.rows} rows; give one per row")


def _check_task_ids(task_ids: Any, rows: int | None, level: str | None, num_tasks: int) -> None:
    if not isinstance(task_ids, Tensor) or task_ids.dtype not in (torch.int32, torch.int64) or task_ids.dim() != 1:
        found = f"{task_ids.dtype} {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else type(task_ids).__name__
        raise RoutingError(f"`task_ids` is {found}; give a whole-number tensor [batch], one task index per row")
    if rows is not None and task_ids.shape[0] != rows:
        raise RoutingError(f"`task_ids` has {task_ids.shape[0]} entries for {rows} rows; give one per row")
    if level != "task":
        raise RoutingError(f"`task_ids` have no effect at level {level!r}: leave them out")
    on_cpu = task_ids.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look would wait
    if on_cpu and not bool(((task_ids >= 0) & (task_ids < num_tasks)).all()):
        raise RoutingError(f"`task_ids` are {task_ids.tolist()}, but the tasks are 0 to {num_tasks - 1}")


def fixed_task(context: RoutingContext, call: Call) -> int | None:
    """Return the one task of a batch that carries no task ids."""
    if call.task_ids is not None:
        return None
    if context.task is not None:
        return context.task
    tasks = len(context.settings.tasks)
    if tasks == 1:
        return 0
    raise RoutingError(f"this model has {tasks} tasks: pass `task_ids` [batch], or call model.set_task(name) first")
