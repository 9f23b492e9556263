"""Check the experts that were written as parts: by what their products are, from the files alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.report import Check
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.conversion.stored import StoredTensor, stored_in
from meo_hf.reduction.decomposing import Decomposed, composed, relative_error
from meo_hf.reduction.parted import PartedBlocks, PartedMap


def parts_check(parted: PartedBlocks, model: PreTrainedModel, written: Mapping[str, TensorRef]) -> Check:
    """Compare the products of written parts with the new experts: no farther from them than those of the plan.

    `model` is the reduced one on the meta device, which says what tensors on disk become.
    """
    stored = stored_in(written, model)
    name, worst = "experts are as near as the plan's parts allow", 0.0
    for path, one in parted.maps.items():
        try:
            found = _products(one, stored, model)
        except (KeyError, RuntimeError, IndexError, ValueError) as wrong:
            return Check(name, False, f"{path} cannot be multiplied out: {wrong!r}"[:500])
        error = relative_error(found, one.experts())
        error = error if math.isfinite(error) else math.inf
        excess = error - one.best() - 4 * torch.finfo(one.dtype).eps
        if excess > 1e-5:
            return Check(name, False, f"{path}: experts are {excess:.1e} farther off than they could be")
        worst = max(worst, error)
    return Check(name, True, f"relative error of experts at most {worst:.3g}, {len(parted.maps)} linear maps")


def _products(one: PartedMap, stored: Mapping[str, StoredTensor], model: PreTrainedModel) -> Tensor:
    """Multiply a linear map's written parts out [E', O, I]."""
    rank, columns = sum(one.parts.ranks), sum(map(len, one.parts.columns))
    _, outputs, inputs = one.module.stack(one.name)[0].shape
    empty = {"A": (rank, inputs), "B": (rank, outputs), "S": (columns, outputs), "index": (columns,)}
    found = {
        letter: stored[one.prefix + letter].load(model) if shape[0] else torch.empty(shape)
        for letter, shape in empty.items()
    }
    shared = one.view(stored[one.live].load(model))[0] if one.parts.shared else None
    index = found["index"].long()
    return composed(Decomposed(found["A"], found["B"], found["S"], index), shared, one.parts.ranks, one.parts.columns)
