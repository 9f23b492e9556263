"""What a child of test_distributed does with models that are split when they are loaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


def expert_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Return what this process holds of each linear map of merged experts, in bytes."""
    owners = [(path, module) for path, module in model.named_modules() if hasattr(module, "merged_maps")]
    pairs = [(f"{path}.{name}", p) for path, owner in owners for name, p in owner.named_parameters(recurse=False)]
    return {name: (p.to_local() if isinstance(p, DTensor) else p).nbytes for name, p in pairs}


def whole(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient as it would be in one process."""
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return loss and gradients of one training step."""
    model.train()
    loss = model(**inputs, labels=inputs.get("decoder_input_ids", inputs["input_ids"])).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": {name: whole(p.grad) for name, p in model.named_parameters()}}


def measure(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return logits, tokens that follow, gradients, and the bytes of experts and of what stays merged for tasks."""
    found: dict[str, Any] = {"bytes": expert_bytes(model)}
    with torch.no_grad():
        found["logits"] = model(**inputs).logits
        found["again"] = model(**inputs).logits  # by what was kept
        found["kept"] = sum(memory.nbytes for memory in model._meo_context.task_memories)
        if model.can_generate():
            found["tokens"] = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return found | gradients(model, inputs)


def load(case: dict[str, Any], config: dict[str, Any] | None) -> PreTrainedModel:
    """Load the model of a case, split as `config` says."""
    options = {} if config is None else {"distributed_config": DistributedConfig(**config)}
    return getattr(transformers, case["auto"]).from_pretrained(case["folder"], **options).eval()


def run(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Measure a model, and save it from its parts; or say how loading failed."""
    if case.get("refused"):
        try:
            load(case, case["config"])
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"error": None, "message": "it was loaded"}
    model = load(case, case["config"])
    torch.manual_seed(rank)  # noise must be the same all the same
    found = measure(model, torch.load(case["inputs"]))
    if case.get("saved"):
        model.save_pretrained(case["saved"])
    return found
