"""Fine-tune a stock mixture so that fewer experts per token suffice: the entropy of its gates joins the loss.

After SEER-MoE (arXiv 2404.05089). Legend: T tokens, E experts, M blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from meo_hf.errors import UsageError
from meo_hf.training.balance import share_of_batch
from meo_hf.training.routers import RouterTap, logits_of, shares_of, stock_mixture


def entropy_of(shares: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean entropy in nats of distributions over experts [T, E], of real tokens [T]; zero where none is."""
    entropy = -(shares * torch.where(shares > 0, shares, 1).log()).sum(-1)
    if real is None:
        return entropy.mean()
    return torch.where(real, entropy, 0).sum() / real.sum().clamp(min=1)


class GateEntropy(TrainerCallback):
    """Add `gate_entropy`, in nats, to the Trainer's training logs, and how much of it the loss carries; see `sharpen`.

    Both are means since the last log, of this process.
    """

    def __init__(self, weight: float, warmup: float) -> None:
        if weight < 0 or not 0 <= warmup <= 1:
            raise UsageError(f"weight is {weight!r}, warmup {warmup!r}: give a weight >= 0 and a share of the steps")
        self.weight, self.warmup = weight, warmup
        self._entropies, self._weights, self._batches = torch.zeros(()), 0.0, 0

    def weight_at(self, state: Any) -> float:
        """Return the weight in the step that a Trainer's state is in: it rises from zero, linearly, and stays."""
        rises = self.warmup * state.max_steps
        return self.weight * min(1.0, state.global_step / rises) if rises else self.weight

    def note(self, entropy: Tensor, weight: float) -> None:
        """Note a batch's mean entropy and the weight that it got."""
        self._entropies = self._entropies.to(entropy.device) + entropy
        self._weights, self._batches = self._weights + weight, self._batches + 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to the logs of a training step."""
        if logs is None or "loss" not in logs or not self._batches:
            return
        entropy = self._entropies.item() / self._batches
        values = {"gate_entropy": entropy, "gate_entropy_weight": self._weights / self._batches}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)
        self._entropies, self._weights, self._batches = torch.zeros(()), 0.0, 0


def sharpen(trainer: Trainer, weight: float, warmup: float = 0.0) -> GateEntropy:
    """Make a Trainer of a stock mixture add `weight` times the mean entropy of the gates to its loss.

    The mean is over blocks and real tokens, of the distribution over all experts before any is selected: the softmax of
    the router's logits, or of routers with other scores (sigmoid, sqrt-softplus) the scores divided by their sum. The
    weight rises from zero over the share `warmup` of all steps. Each batch adds its share of `num_items_in_batch`, as
    the model's own loss does; evaluation has the task's loss alone. Returns a callback that logs the entropy.

    Raises UsageError for a MEO model, a Trainer that has this already, or several GPUs in one process; in training for
    a router whose logits carry no gradient. UnsupportedError for a model without experts.
    """
    callbacks = trainer.callback_handler.callbacks
    if trainer.args.n_gpu > 1:
        raise UsageError("this Trainer would copy the model to several GPUs in one process: start it with torchrun")
    if any(isinstance(callback, GateEntropy) for callback in callbacks):
        raise UsageError("this Trainer adds the gates' entropy already")
    trained: Any = trainer.model
    inner, family = stock_mixture(trained)
    callback = GateEntropy(weight, warmup)
    heard: list[tuple[Tensor, Tensor | None]] = []

    def hear(path: str, block: Any, output: Any, real: Tensor | None) -> None:
        logits = logits_of(family.layout, output)
        if not logits.requires_grad:
            raise UsageError(
                f"the router of {path} has no gradient: train it, and use gradient checkpointing without use_reentrant"
            )
        heard.append((logits, real))  # a checkpointed layer may compute nothing more than it will again

    compute_loss = trainer.compute_loss

    def with_entropy(
        model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.get("labels")
        heard.clear()
        tap = RouterTap(trained, None, hear)
        try:
            result = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        finally:
            tap.close()
        if not heard:
            return result
        loss: Any = result[0] if return_outputs else result
        each = [entropy_of(shares_of(family, inner.config, logits), real) for logits, real in heard]
        entropy = torch.stack([one.to(loss.device) for one in each]).mean()
        heard.clear()
        now = callback.weight_at(trainer.state)
        callback.note(entropy.detach(), now)
        loss = loss + now * share_of_batch(trainer, labels, num_items_in_batch) * entropy
        return (loss, *result[1:]) if return_outputs else loss

    trainer.compute_loss = with_entropy  # type: ignore[method-assign]
    callbacks.insert(0, callback)
    return callback
