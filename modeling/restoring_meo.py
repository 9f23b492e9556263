"""Restore a model's weights under the names of its files, as the Trainer does when it resumes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping


class RestoringMixin:
    """What a MEO model adds to `load_state_dict`.

    The Trainer reads a checkpoint's files and loads them with the names in them. Where files name tensors otherwise
    than the live model (one tensor per expert in Mixtral's), stock classes leave those out with a warning.
    """

    config: Any
    dtype: Any

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as PyTorch does, and what is named as in the model's files under its live name.

        Raises RuntimeError if only parts of a tensor are there, as in one file of several.
        """
        own = self.state_dict()  # type: ignore[attr-defined]
        if any(name not in own for name in state_dict) and self._has_other_names_on_disk():
            state_dict = self._under_live_names(dict(state_dict))
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]

    def _has_other_names_on_disk(self) -> bool:
        names = (type(self).__name__, self.config.model_type)
        return any(get_checkpoint_conversion_mapping(name) for name in names)

    def _under_live_names(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors converted as on loading, those that the dictionary does not hold left out."""
        config = copy.deepcopy(self.config)
        if config.meo and config.meo.get("weights"):
            config.meo = {k: v for k, v in config.meo.items() if k != "weights"}
        made, info = type(self).from_pretrained(  # type: ignore[attr-defined]
            None, config=config, state_dict=state_dict, dtype=self.dtype, output_loading_info=True
        )
        kept = {name: value for name, value in made.state_dict().items() if name not in info["missing_keys"]}
        return kept | {name: state_dict[name] for name in info["unexpected_keys"] if name in state_dict}
