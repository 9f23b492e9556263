"""Tiny mixtures on disk to reduce, and plans written by hand."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES
from moe_tiny import tiny_moe
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.source import open_source
from meo_hf.reduction.plan import BlockPlan, ReductionPlan
from meo_hf.reduction.reduce import reduce
from meo_hf.reduction.report import ReductionReport
from meo_hf.reduction.workbench import Workbench

LAYOUTS = ("mixtral", "gpt_oss", "dbrx", "jetmoe", "llama4_text", "switch_transformers", "nllb-moe", "longcat_flash")
BY_TOKEN = ("deepseek_v4",)
# tiny groups of two experts: their routers add up the two best of each, so none can go
GROUPED = ("axk1", "bailing_hybrid", "beam", "deepseek_v2", "deepseek_v3", "deepseek_v32")


@lru_cache(maxsize=4)
def _model(family: str) -> PreTrainedModel:
    return tiny_moe(family)


def source_of(family: str, folder: Path, dtype: torch.dtype | None = None, **overrides: Any) -> Path:
    """Write a tiny stock mixture."""
    model = tiny_moe(family, **overrides) if overrides else _model(family)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder)
    return folder


def bench_of(source: Path, **options: Any) -> Workbench:
    """Open a mixture for methods."""
    return Workbench(open_source(str(source), SourceOptions(None, None, False, False)), **options)


def apply(
    source: Path, output: Path, blocks: dict[str, BlockPlan], verify: str = "none", **plan: Any
) -> ReductionReport:
    """Reduce by a plan that is given by hand."""
    found = bench_of(source).fingerprint
    made = ReductionPlan({"name": "by hand"}, {"id": source.name, "fingerprint": found}, blocks, **plan)
    return reduce(source, output, plan=made, verify=verify)


def load_stock(folder: Path, like: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint through its stock class, with what loading said."""
    return type(like).from_pretrained(folder, output_loading_info=True)


def kept_numbers(experts: int, groups: int = 1) -> list[int]:
    """Keep all but the first expert of each group, out of the middle of what there is."""
    size = experts // groups
    return [group * size + at for group in range(groups) for at in range(size) if at != 0]


def is_router(name: str) -> bool:
    """Whether a tensor of a block that has a slice per expert belongs to the router."""
    return not any(part in name for part in (".experts.", "input_linear", "output_linear"))


def sliced(tensor: Tensor, other: Tensor, experts: int, kept: list[int]) -> Tensor:
    """Take experts' slices of a tensor along the axis by which another one with fewer experts differs."""
    axis = next(at for at, (old, new) in enumerate(zip(tensor.shape, other.shape, strict=True)) if old != new)
    per = (tensor.shape[axis] - other.shape[axis]) // (experts - len(kept))
    index = [number * per + at for number in kept for at in range(per)]
    index += range(experts * per, tensor.shape[axis])
    return tensor.index_select(axis, torch.tensor(index))


def reducible() -> list[str]:
    """Families whose tiny models can lose an expert in every block."""
    return [
        name
        for name, row in MOE_FAMILIES.items()
        if row.refused is None and name not in (*GROUPED, *BY_TOKEN, "jetmoe")
    ]
