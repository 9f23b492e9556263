"""Tiny LoRA adapters that change what their base says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.blocks_meo import find_blocks
from meo_hf.modeling.families_meo import FAMILIES
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def feed_forward_maps(model: PreTrainedModel) -> list[str]:
    """Return the paths of all linear maps of feed-forwards."""
    blocks = find_blocks(model, FAMILIES[model.config.model_type])
    return [f"{block.path}.{path}" for block in blocks for path in block.paths.values()]


def attention_maps(model: PreTrainedModel) -> list[str]:
    """Return the paths of all linear maps of attention."""
    inside = set(feed_forward_maps(model))
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in linears if "att" in name.lower() and name not in inside]


def save_lora(model: PreTrainedModel, folder: Path, targets: list[str] | str, seed: int = 0, **options: Any) -> Path:
    """Write a LoRA of some linear maps, drawn by seed."""
    torch.manual_seed(seed)
    fan = {"fan_in_fan_out": True} if model.config.model_type == "gpt2" else {}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**{"target_modules": targets, **fan, **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2)
    adapted.save_pretrained(folder)
    return folder


def save_loras(model: PreTrainedModel, folder: Path, *, attention: bool = True) -> dict[str, Path]:
    """Write three LoRAs of different ranks and scales, one of them of fewer maps."""
    inside, around = feed_forward_maps(model), attention_maps(model) if attention else []
    few = [*inside[:2], *around[:1]]
    return {
        "law": save_lora(model, folder / "law", inside, 1, r=2, lora_alpha=5),
        "code": save_lora(model, folder / "code", [*inside, *around], 2, r=4, lora_alpha=3, use_rslora=True),
        "chat": save_lora(
            model, folder / "chat", few, 3, r=3, lora_alpha=4, rank_pattern={few[0]: 1}, alpha_pattern={few[1]: 9}
        ),
    }


def row_by_row(base: PreTrainedModel, adapters: list[Path], inputs: dict[str, Tensor]) -> Tensor:
    """Return each row's logits as PEFT computes them with that row's adapter."""
    rows = []
    for row, adapter in enumerate(adapters):
        model = PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()
        rows.append(model.base_model.model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits)
    return torch.cat(rows)
