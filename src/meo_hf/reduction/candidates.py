"""A reduced model in memory whose plan can be changed: what a search asks how good it is."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.source import first_line, quiet_transformers
from meo_hf.errors import MeoError, UsageError
from meo_hf.reduction.calibration import Batch
from meo_hf.reduction.counted import Mixture, combined
from meo_hf.reduction.outcome import outcome_of
from meo_hf.reduction.plan import BlockPlan, ReductionPlan
from meo_hf.reduction.workbench import Workbench

Metric = Callable[[PreTrainedModel, Any], float]


class Candidates:
    """One model of the reduced size, filled by one plan after the other from a source that stays in memory."""

    def __init__(self, work: Workbench, plan: ReductionPlan) -> None:
        outcome = outcome_of(work.source, work.family, plan, work.mixture)
        with quiet_transformers():
            stock = work.source.model_class().from_pretrained(work.source.loadable, dtype=torch.float32)
            self.model: Any = outcome.model_class(outcome.config).float().eval().requires_grad_(False)
        self._mixture: Mixture = work.mixture
        self._old = stock.state_dict()
        new = self.model.state_dict()
        changed = {one.live for one in work.mixture.tensors.values() if one.block in plan.blocks}
        for name, tensor in new.items():
            if name not in changed:
                tensor.copy_(self._old[name])

    def fill(self, blocks: Mapping[str, BlockPlan]) -> PreTrainedModel:
        """Return the model that a plan makes; the next plan changes it."""
        new = self.model.eval().state_dict()  # asked for anew: a metric may have moved the model
        for one in self._mixture.tensors.values():
            if one.block not in blocks:
                continue
            block = blocks[one.block]
            rows = block.experts if one.of_experts else block.router or ()
            if one.number is None:
                new[one.live].copy_(one.select(self._old[one.live], rows))
            elif one.number < len(rows):
                name = one.kind.replace(".expert_.", ".expert_{}.")
                old = {number: self._old[name.format(number)] for number, _ in rows[one.number]}
                new[one.live].copy_(combined(old, rows[one.number]))
        return self.model


def metric_of(spec: str | None, batches: list[Batch]) -> Metric:
    """Return what judges a model, higher is better: a function in a file of yours, or minus the loss on some text.

    `spec` is FILE.py:NAME. Raises UsageError where there is no such function.
    """
    if spec is None:
        return lambda model, _: -mean_loss(model, batches)
    path, colon, name = spec.rpartition(":")
    found = importlib.util.spec_from_file_location("meo_hf_metric", Path(path).expanduser()) if colon else None
    if found is None or found.loader is None or not Path(path).expanduser().is_file():
        raise UsageError(f"--metric {spec!r} is no FILE.py:NAME of a function in a file of yours")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise UsageError(f"--metric {path} cannot be run ({type(error).__name__}: {first_line(error)})") from error
    metric = getattr(module, name, None)
    if not callable(metric):
        raise UsageError(f"--metric {path} has no function {name}")
    return metric  # type: ignore[no-any-return]


def judged(metric: Metric, model: PreTrainedModel, tokenizer: Any) -> float:
    """Return what a metric says of a model; raises UsageError where it fails, or says no number."""
    try:
        return float(metric(model, tokenizer))
    except MeoError:
        raise
    except Exception as error:  # a user's function may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"--metric failed ({type(error).__name__}: {first_line(error)}, {Path(last.filename).name} line "
            f"{last.lineno}): it takes a model and its tokenizer, and returns a number"
        ) from error


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Return the mean negative log-likelihood of the next token, in nats, by the weights of the tokens."""
    total = weight = 0.0
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        losses = _losses(logits[:, :-1], batch.input_ids[:, 1:])
        own = batch.token_weights[:, 1:]
        total += float((losses.double() * own).sum())
        weight += float(own.sum())
    return total / weight


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.float().mT, ids, reduction="none")
