"""Names on disk and names in the live model: the one place that uses Transformers' private renaming."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from meo_hf.errors import UnsupportedError


def live_names(model: PreTrainedModel, disk_names: Iterable[str], computed: bool = False) -> dict[str, str]:
    """Return disk name -> live name, as `from_pretrained` of this model would rename them.

    With `computed`, several tensors may become one. Raises UnsupportedError where loading would compute without it.
    """
    names = {}
    for name, live, pattern, _ in live_places(model, disk_names):
        if pattern is not None and not computed:
            raise UnsupportedError(f"{name} is converted, not only renamed, when {type(model).__name__} loads it")
        names[name] = live
    return names


def live_places(
    model: PreTrainedModel, disk_names: Iterable[str]
) -> Iterator[tuple[str, str, str | None, WeightConverter | None]]:
    """Yield disk name, live name and, where loading computes, the pattern and the converter that it matches."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    for name in sorted(disk_names, key=dot_natural_key):  # some renamings begin where another was seen
        live, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if live not in state and name in state:  # Transformers' own exception for names that were live already
            live, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        yield name, live, pattern, by_pattern.get(pattern or "")


def disk_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return live name -> disk name, as `save_pretrained` of this model would write them."""
    tokens = {name: torch.empty((), device="meta") for name in names}
    written = revert_weight_conversion(model, dict(tokens))
    by_tensor = {id(tensor): disk for disk, tensor in written.items()}
    return {name: by_tensor[id(tensor)] for name, tensor in tokens.items()}
