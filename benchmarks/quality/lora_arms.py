"""Which LoRA an arm trains in the place of all weights; the head is trained with it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from meo_hf import MeoLoraConfig

RANK = 8
ATTENTION = ["query", "value"]
FEED_FORWARD = r".*\.layer\.\d+\.(attention\.self\.(query|value)|intermediate\.dense|output\.dense)"
HEAD = ["pooler", "classifier"]
"""What begins fresh in every arm: the checkpoint of BERT-tiny has no pooler."""


def lora(kind: str) -> LoraConfig:
    """Return a kind's config: attention, feed-forward (both stock PEFT), shared or per expert, and what it adds.

    All but attention adapt query and value too. Routers or word embeddings that a kind adds are trained as they are.
    """
    base, _, more = kind.partition(" and ")
    saved = [*HEAD, "word_embeddings"] if more == "embeddings" else HEAD
    shared: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "modules_to_save": saved, "task_type": "SEQ_CLS"}
    if base in ("attention", "feed-forward"):
        return LoraConfig(target_modules=ATTENTION if base == "attention" else FEED_FORWARD, **shared)
    scope = "shared" if base == "shared" else "per_expert"
    trainable = "both" if more == "routers" else "adapters"
    return MeoLoraConfig(target_modules=["up", "down", *ATTENTION], scope=scope, trainable=trainable, **shared)


def adapted(model: PreTrainedModel, kind: str, seed: int) -> PeftModel:
    """Put a kind's adapter on a model; the seed draws its factors."""
    torch.manual_seed(seed)
    return get_peft_model(model, lora(kind))


def trained_count(model: nn.Module) -> int:
    """Return the parameters that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def merged(model: nn.Module) -> nn.Module:
    """Return the model with its adapter merged into the weights, as it is without one."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
