"""Add the balance loss where a Trainer computes its loss without the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from meo_hf.modeling.loss_meo import count_labels
from meo_hf.modeling.routing_meo import RoutingContext


def add_balance(trainer: Trainer, context: RoutingContext) -> None:
    """Make a Trainer's loss carry the balance loss of each batch once, also where the model is not told the labels.

    With label smoothing, a `compute_loss_func` or a fused output head, the Trainer computes the loss itself. Then the
    balance loss is added with the batch's share of `num_items_in_batch`, as the model does, and a decoder learns from
    the labels where its prompts end.
    """
    compute_loss = trainer.compute_loss

    def with_balance(
        model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.get("labels")
        context.unadded, context.labels = [], labels
        try:
            result = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        finally:
            unadded, context.unadded, context.labels = context.unadded, None, None
        if not unadded:
            return result
        loss: Any = result[0] if return_outputs else result
        balance = torch.stack([balance.to(loss.device) for balance in unadded]).mean()
        loss = loss + share_of_batch(trainer, labels, num_items_in_batch) * balance
        return (loss, *result[1:]) if return_outputs else loss

    trainer.compute_loss = with_balance  # type: ignore[method-assign]


def share_of_batch(trainer: Trainer, labels: Any, items: Any) -> Any:
    """Return this batch's share of the step, where the Trainer does not divide by accumulation steps itself."""
    counts = trainer.model_accepts_loss_kwargs and items is not None
    if not counts and trainer.compute_loss_func is None:
        return 1
    if items is None or not isinstance(labels, Tensor):
        return 1 / trainer.current_gradient_accumulation_steps
    share = count_labels(trainer.model, labels) / items
    return share * (loss_scale(trainer) if trainer.args.average_tokens_across_devices else 1)


def loss_scale(trainer: Trainer) -> int:
    """Return how many processes have batches of their own: items are counted over them, and gradients are averaged.

    Processes that share a model by tensor parallel share batches too.
    """
    return trainer.accelerator.num_processes // trainer.get_tp_size()
