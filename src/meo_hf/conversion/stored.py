"""Live tensors as they are stored: the tensors on disk that each is loaded from, and how loading joins them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from meo_hf.conversion.names import live_places
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.conversion.source import Source


@dataclass
class StoredTensor:
    """The tensors on disk that a live one is loaded from, by the pattern they match, in the experts' order."""

    live: str
    converter: WeightConverter | None
    refs: dict[str, list[TensorRef]] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The type on disk, by its safetensors code."""
        return self.first.spec.dtype

    @property
    def first(self) -> TensorRef:
        """The first of its tensors on disk; of one that is only renamed the only one."""
        return next(ref for refs in self.refs.values() for ref in refs)

    def load(self, model: PreTrainedModel) -> Tensor:
        """Read the live tensor."""
        return self.join(model, {pattern: [ref.load() for ref in refs] for pattern, refs in self.refs.items()})

    def join(self, model: PreTrainedModel, tensors: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Return the live tensor that tensors, by pattern, become."""
        if self.converter is None:
            return next(tensor for found in tensors.values() for tensor in found)
        converter: Any = copy.deepcopy(self.converter)
        for pattern, found in tensors.items():
            for tensor in found:
                converter.add_tensor(self.live, pattern, pattern, tensor)
        made = converter.convert(self.live, model=model, config=model.config)[self.live]
        return made[0] if isinstance(made, list) else made


def stored_tensors(source: Source, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Return what each live tensor of a model is loaded from, as `from_pretrained` would."""
    return stored_in(source.tensors, model)


def stored_in(tensors: Mapping[str, TensorRef], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Return what each live tensor of a model is loaded from, of tensors on disk by name."""
    found: dict[str, StoredTensor] = {}
    for name, live, pattern, converter in live_places(model, tensors):
        one = found.setdefault(live, StoredTensor(live, converter))
        one.refs.setdefault(pattern or name, []).append(tensors[name])
    return found
