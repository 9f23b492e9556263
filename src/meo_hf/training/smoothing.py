"""Label smoothing that keeps the balance loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from meo_hf.errors import UsageError
from meo_hf.modeling.families_meo import family_of
from meo_hf.modeling.moe_families_meo import MoeFamily


def smoothed_loss(model: nn.Module, factor: float = 0.1) -> Callable[..., Tensor]:
    """Return a `compute_loss_func` for the Trainer: label smoothing, plus the model's balance loss.

    With `label_smoothing_factor` the Trainer takes the labels away from the model, and nobody adds its balance loss.
    Raises UsageError for a factor outside of (0, 1).
    """
    if not 0 < factor < 1:
        raise UsageError(f"the label smoothing factor is {factor}; give a number between 0 and 1")
    smoother = LabelSmoother(epsilon=factor)
    config: Any = model.config
    causal = getattr(model, "loss_type", None) == "ForCausalLM" and not config.is_encoder_decoder
    weight = 1.0
    if config.model_type.startswith("meo_") and isinstance(family_of(config.model_type), MoeFamily):
        weight = getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)  # it reports its loss unweighted

    def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        loss = smoother(outputs, labels, shift_labels=causal, num_items_in_batch=num_items_in_batch)
        aux_loss = outputs.get("aux_loss")
        if not isinstance(aux_loss, Tensor) or not aux_loss.requires_grad:
            return loss
        counted = (labels[..., 1:] if causal else labels).ne(smoother.ignore_index).sum()
        share = 1 if num_items_in_batch is None else counted / num_items_in_batch
        return loss + weight * share * aux_loss.to(loss.device)

    return compute_loss
