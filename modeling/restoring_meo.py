"""Restore a model's weights under the names of its files, as the Trainer does when it resumes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging


class RestoringMixin:
    """What a MEO model adds to `load_state_dict`.

    The Trainer reads a checkpoint's files and loads them with the names in them. Where files name tensors otherwise
    than the live model (one tensor per expert in Mixtral's), stock classes leave those out with a warning.
    """

    config: Any
    all_tied_weights_keys: dict[str, str]
    _keys_to_ignore_on_load_missing: list[str] | None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as PyTorch does, and what is named as in the model's files under its live name.

        Raises RuntimeError if only parts of a tensor are there, as in one file of several.
        """
        own = self.state_dict()  # type: ignore[attr-defined]
        foreign = {name: tensor for name, tensor in state_dict.items() if name not in own}
        if foreign and get_model_conversion_mapping(self):  # type: ignore[arg-type]
            live = {name: tensor for name, tensor in state_dict.items() if name in own}
            state_dict = self._under_live_names(foreign) | live
        return super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]

    def _under_live_names(self, foreign: dict[str, Any]) -> dict[str, Any]:
        """Return tensors converted as on loading; names that mean nothing to the model stay as they are."""
        config = copy.deepcopy(self.config)
        if config.meo and config.meo.get("weights"):
            config.meo = {k: v for k, v in config.meo.items() if k != "weights"}
        floats = [p.dtype for p in self.parameters() if p.is_floating_point()]  # type: ignore[attr-defined]
        with _unnoticed():
            made, info = type(self).from_pretrained(  # type: ignore[attr-defined]
                None, config=config, state_dict=foreign, output_loading_info=True,
                dtype=max(floats, key=lambda dtype: dtype.itemsize),
            )  # fmt: skip
        derived = re.compile("|".join(self._keys_to_ignore_on_load_missing or ["(?!)"]))  # never missed, nor loaded
        left = {*info["missing_keys"], *self.all_tied_weights_keys}
        kept = {n: tensor for n, tensor in made.state_dict().items() if n not in left and not derived.search(n)}
        return kept | {name: foreign[name] for name in info["unexpected_keys"] if name in foreign}


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Keep to itself what a model lacks that is made for a part of its weights alone: numbers drawn, and a report."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        logging.set_verbosity(verbosity)
