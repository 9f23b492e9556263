"""Distil one language model into another: what is compared, token by token, and the Trainer that does it.

Legend: B rows, S positions, V vocabulary, D features.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments

from meo_hf.errors import UsageError
from meo_hf.modeling.loss_meo import own_balance_weight
from meo_hf.training.balance import loss_scale
from meo_hf.training.matching import check_depth, feed_forward_pairs, recorded, relative_errors

IGNORED = -100
WEIGHTS = "model.safetensors"
_CHUNK = 2**24
"""Logits that are compared at once, so that float32 copies stay small whatever the vocabulary."""


@dataclass(frozen=True)
class DistillationWeights:
    """What the loss is made of: each part's weight, and the temperature of the KL divergence.

    Raises UsageError for a negative weight, a temperature that is not positive, or a loss without parts.
    """

    kl: float = 1.0
    lm: float = 0.0
    hidden: float = 0.0
    ffn: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        parts = {"kl": self.kl, "lm": self.lm, "hidden": self.hidden, "ffn": self.ffn}
        for name, weight in parts.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UsageError(f"the weight of {name!r} is {weight}: give a number from 0 on")
        if not any(parts.values()):
            raise UsageError("all weights of the loss are 0: there is nothing to learn")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"the temperature is {self.temperature}: give a number above 0")
        if self.temperature != 1 and not self.kl:
            raise UsageError("the temperature has no effect without the KL divergence: leave one of them out")


def targets_of(labels: Tensor, shifts: bool) -> Tensor:
    """Return the token that each position predicts [B, S], `IGNORED` where none; `shifts` for causal models."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifts else labels


def token_sums(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sum KL(teacher || student) and the student's negative log-likelihood over all targets, in nats.

    Logits are [B, S, V], targets [B, S]. Softmax runs in float32 or wider, a chunk of rows at a time, and again in
    backward. With a temperature both distributions are softened and the divergence is multiplied by its square.
    """
    rows = max(1, _CHUNK // student.shape[-1])
    pieces = zip(
        student.flatten(0, 1).split(rows), teacher.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True
    )
    found = []
    for piece in pieces:
        if student.requires_grad and torch.is_grad_enabled():
            found.append(checkpoint(_chunk_sums, *piece, temperature, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(_chunk_sums(*piece, temperature))
    divergence, likelihood = torch.stack([torch.stack(pair) for pair in found]).sum(0)
    return divergence, likelihood


def _chunk_sums(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    counted = targets != IGNORED
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(student.device, wide)
    plain = student.log_softmax(-1)
    q = plain if temperature == 1 else (student / temperature).log_softmax(-1)
    p = (teacher / temperature).log_softmax(-1)
    gap = torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum(-1) * temperature**2  # what is ruled out weighs nothing
    nll = -plain.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(counted, gap, 0).sum(), torch.where(counted, nll, 0).sum()


class DistillationTrainer(Trainer):
    """The stock Trainer with the loss of a student that learns from a frozen teacher.

    Batches need `labels`; they name the tokens that count (all but -100) and are not given to the models, whose gates
    would take the last label of a row for the end of its prompt: a MEO decoder is trained with routing='segment'.
    Every part of the loss is a mean over these tokens, over all batches of a step, so accumulation changes nothing.
    Logs carry each part, unweighted. `aux_loss`, where the model returns one that can be trained, is added once.

    A checkpoint holds the trained parameters under their live names: Transformers restores a checkpoint under the
    names of files, which for mixtures of experts are others, and leaves the experts untrained with a warning.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        *,
        teacher: PreTrainedModel,
        weights: DistillationWeights | None = None,
        **kwargs: Any,
    ) -> None:
        if args.label_smoothing_factor:
            raise UsageError("label smoothing has no effect on distillation: set label_smoothing_factor to 0")
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that labels are counted over all batches of a step
        self.distillation = weights or DistillationWeights()
        self.teacher: Any = teacher.to(args.device).eval().requires_grad_(False)  # type: ignore[arg-type]
        self._student: Any = inner_model(self.model)
        self._shifts = not type(self._student).__name__.endswith("ForMaskedLM")
        if not self._shifts and self.distillation.lm:
            raise UsageError("a masked language model has no next token: set the weight of 'lm' to 0")
        if self.distillation.hidden:
            check_depth(self._student, self.teacher)
        self._pairs = feed_forward_pairs(self._student, self.teacher) if self.distillation.ffn else {}
        self._sums: dict[str, float] = defaultdict(float)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one batch, as its share of all tokens of the step."""
        batch = {name: value for name, value in inputs.items() if name != "labels"}
        asked = {**batch, "use_cache": False} if self._shifts else dict(batch)
        if self.distillation.hidden:
            asked["output_hidden_states"] = True
        with torch.no_grad(), recorded(self.teacher, self._pairs.values()) as expected:
            known = self.teacher(**asked, **gating(self.teacher))
        with recorded(self._student, self._pairs) as found:
            outputs = model(**asked, **gating(self._student))
        targets = targets_of(inputs["labels"], self._shifts)
        parts = self._parts(outputs, known, targets, found, expected)
        own = (targets != IGNORED).sum()
        total = own if num_items_in_batch is None else num_items_in_batch
        weights = self.distillation
        loss = sum(getattr(weights, name) * part for name, part in parts.items()) / total
        aux_loss = self._aux_loss(outputs)
        if aux_loss is not None:
            parts["aux_loss"] = aux_loss * own
            loss = loss + parts["aux_loss"] / total
        if model.training:
            self._count(parts, own)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * loss_scale(self)
        return (loss, outputs) if return_outputs else loss

    def _parts(
        self, outputs: Any, known: Any, targets: Tensor, found: dict[str, Tensor], expected: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the sum over tokens of every part that has a weight."""
        weights, counted, parts = self.distillation, targets != IGNORED, {}
        if weights.kl or weights.lm:
            sums = token_sums(outputs.logits, known.logits, targets, weights.temperature)
            parts = {name: part for name, part in zip(("kl", "lm"), sums, strict=True) if getattr(weights, name)}
        if weights.hidden:
            states = zip(outputs.hidden_states[1:], known.hidden_states[1:], strict=True)
            parts["hidden"] = relative_errors(states, counted)
        if weights.ffn:
            blocks = ((found[path], expected[other]) for path, other in self._pairs.items())
            parts["ffn"] = relative_errors(blocks, counted)
        return parts

    def _aux_loss(self, outputs: Any) -> Tensor | None:
        """Return the balance loss that a model hands over; a mixture of experts' own has no coefficient in it yet."""
        aux_loss = outputs.get("aux_loss") if hasattr(outputs, "get") else None
        if not isinstance(aux_loss, Tensor) or not aux_loss.requires_grad:
            return None
        weight = own_balance_weight(self._student)
        return aux_loss if weight is None else aux_loss * weight

    def _count(self, parts: Mapping[str, Tensor], tokens: Tensor) -> None:
        for name, part in {**parts, "tokens": tokens}.items():
            self._sums[name] += float(part.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, as means over the tokens since the last time."""
        tokens = float(self._sums["tokens"])
        if tokens and "loss" in logs:
            logs |= {name: float(part) / tokens for name, part in self._sums.items() if name != "tokens"}
            self._sums.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as Transformers does; within a checkpoint only what is trained."""
        if not _internal_call or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            from safetensors.torch import save_file

            folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
            os.makedirs(folder, exist_ok=True)
            trained = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
            save_file(trained, folder / WEIGHTS, {"format": "pt"})


def inner_model(model: Any) -> Any:
    """Return the Transformers model within PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def gating(model: Any) -> dict[str, str]:
    """Return what a model's forward takes beside tokens: MEO decoders gate whole texts segment by segment."""
    context = getattr(model, "_meo_context", None)
    return {"routing": "segment"} if context is not None and context.reads_past else {}
