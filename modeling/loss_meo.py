"""The loss of a MEO model in training: the task's own, counted as the Trainer asks, and the balance loss once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils import ModelOutput

from .errors_meo import MeoConfigError
from .routing_meo import RoutingContext

# `super()` of a property cannot be compiled
_stock_loss_function: Any = PreTrainedModel.loss_function.fget  # type: ignore[attr-defined]


class LossMixin:
    """What a MEO model does to the loss that its Transformers class computes.

    With `num_items_in_batch` the Trainer adds up the losses of accumulated batches and processes, so each batch has
    to contribute its share of the items. Many stock classes return a plain mean all the same, and mixtures of experts
    their whole auxiliary loss: what was accumulated would count several times. Here they contribute their share.
    """

    config: Any
    training: bool
    _meo_context: RoutingContext

    @property
    def loss_function(self) -> Callable[..., Any]:
        """The stock loss, which notes whether it was told the number of items."""
        function, context = _stock_loss_function(self), self._meo_context

        def noted(*args: Any, **kwargs: Any) -> Any:
            loss = function(*args, **kwargs)
            plain = getattr(self.config, "problem_type", None) in ("regression", "multi_label_classification")
            if context.current is not None:
                context.current.shared = kwargs.get("num_items_in_batch") is not None and not plain
            return loss

        return noted

    @loss_function.setter
    def loss_function(self, value: Callable[..., Any]) -> None:
        self._loss_function = value

    def _check_balance(self, output_router_logits: bool | None) -> None:
        """Raise MeoConfigError where a family's balance loss would count experts that some blocks do not have."""
        settings = self._meo_context.settings
        counts, maps = settings.expert_counts or {}, settings.expert_maps or {}
        uneven = [path for path, count in counts.items() if count != settings.num_experts and path not in maps]
        if output_router_logits is None:
            output_router_logits = getattr(self.config.get_text_config(), "output_router_logits", False)
        if uneven and output_router_logits:
            raise MeoConfigError(
                f"the balance loss of this family, which output_router_logits asks for, needs {settings.num_experts} "
                f"experts in each block; {uneven[0]} has {counts[uneven[0]]}: leave output_router_logits out"
            )

    def _finish_loss(self, outputs: Any, arguments: dict[str, Any]) -> Any:
        """Make a loss this batch's share, and add the balance loss; without one, hand that over as `aux_loss`."""
        context, named = self._meo_context, isinstance(outputs, ModelOutput)
        call = context.current
        loss = outputs.get("loss") if named else outputs[0]
        if not isinstance(loss, Tensor) or loss.dim():  # labels may be missing, or only some of several
            if self.training and call is not None:
                self._hand_over_balance(outputs if named else None)
            return outputs
        items, labels = arguments.get("num_items_in_batch"), arguments.get("labels")
        share = self._label_count(labels) / items if items is not None and isinstance(labels, Tensor) else None
        if share is not None and call is not None and not call.shared:
            loss = loss * share
        own = self._own_balance(outputs) if named else None  # already in the loss
        if own is not None and share is not None and call is not None and call.shared:
            loss = loss + own.to(loss.device) * (share - 1)
        if not self.training or call is None or not call.balance:
            if self.training and own is not None and context.usage is not None:
                context.usage.add_balance(own)
            return _with_loss(outputs, loss)
        aux_loss = call.balance_loss(loss.device)
        if context.usage is not None:
            context.usage.add_balance(aux_loss)
        loss = loss + (aux_loss if share is None else aux_loss * share)
        if named:
            outputs["aux_loss"] = aux_loss.detach() if share is None else (aux_loss * share).detach()
        return _with_loss(outputs, loss)

    def _hand_over_balance(self, outputs: Any) -> None:
        call = self._meo_context.current
        if call is not None and call.balance:
            aux_loss = call.balance_loss(call.balance[0].device)
            self._meo_context.hand_over(aux_loss)
            if outputs is not None:  # whoever was handed it will add it
                outputs["aux_loss"] = aux_loss if self._meo_context.unadded is None else aux_loss.detach()
        elif outputs is not None and (own := self._own_balance(outputs)) is not None:
            self._meo_context.hand_over(own)

    def _own_balance(self, outputs: Any) -> Tensor | None:
        """Return what the stock class of a mixture of experts adds to its loss; it reports it unweighted."""
        aux_loss, weight = outputs.get("aux_loss"), own_balance_weight(self)
        return weight * aux_loss if isinstance(aux_loss, Tensor) and weight else None

    def _label_count(self, labels: Tensor) -> Tensor:
        return count_labels(self, labels)


def own_balance_weight(model: Any) -> float | None:
    """Return the coefficient of a mixture of experts' own balance loss, None if it has none."""
    owners, names = (model, model.config.get_text_config()), ("router_aux_loss_coef", "aux_loss_coef")
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((weight for weight in found if weight is not None), None)


def count_labels(model: Any, labels: Tensor) -> Tensor:
    """Count the labels that are predicted, as the Trainer does: a causal model predicts none at the first position."""
    shifts = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    shifts = shifts and not getattr(model.config, "is_encoder_decoder", False)
    return (labels[..., 1:] if shifts else labels).ne(-100).sum()


def _with_loss(outputs: Any, loss: Tensor) -> Any:
    if isinstance(outputs, ModelOutput):
        outputs["loss"] = loss
        return outputs
    return (loss, *outputs[1:])
