"""What a comparison is given beside its source: which models these are, and whether they can be compared with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from meo_hf.benchmark.compare_variants import CompareSettings
from meo_hf.conversion.fetch import SourceOptions, locate
from meo_hf.conversion.source import Source, first_line, public_name, raw_config
from meo_hf.errors import SourceError, UsageError
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.texts import cut_windows, load_tokenizer


@dataclass(frozen=True)
class Output:
    """A model that was made of the source; `label` tells it from others that are compared."""

    name: str
    label: str
    folder: Path
    model_class: Any
    config: PreTrainedConfig

    @property
    def merges(self) -> bool:
        """Whether it merges experts for each input, as stock models and those of level `unmerged` do not."""
        block = getattr(self.config, "meo", None)
        return block is not None and block.get("level") != "unmerged"


def listed(out: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the names of one or several models; raises UsageError where there is none, or one twice."""
    names = [os.fspath(one) for one in ([out] if isinstance(out, (str, os.PathLike)) else out)]
    if not names:
        raise UsageError("OUT is missing: give at least one model that was made of SOURCE")
    if twice := next((name for at, name in enumerate(names) if name in names[:at]), None):
        raise UsageError(f"OUT names {twice} twice: give each model once")
    return names


def labels_of(names: Sequence[str]) -> list[str]:
    """Return what tells models apart: Hub ids and the last parts of paths, no more of them than it takes."""
    labels = [public_name(name) for name in names]
    paths = [Path(name).expanduser().absolute().parts for name in names]
    for length in range(2, max(map(len, paths)) + 1):
        alike = {label for label in labels if labels.count(label) > 1}
        labels = [
            "/".join(parts[-length:]) if label in alike else label for label, parts in zip(labels, paths, strict=True)
        ]
    return labels


def open_outputs(names: Sequence[str], opened: Source, tokenizer: Any, settings: CompareSettings) -> list[Output]:
    """Find models that were made of a source.

    Raises SourceError for those that cannot be read, UsageError for those of another family or tokenizer.
    """
    found = [_open(name, label, opened) for name, label in zip(names, labels_of(names), strict=True)]
    for output in found:
        code = {"config": output.config, "trust_remote_code": settings.trust_remote_code}
        if _differs(output.folder, output.name, tokenizer, code):
            raise UsageError(
                f"{output.name} has another tokenizer than {opened.name}: give a model that was made of it"
            )
    return found


def _open(name: str, label: str, opened: Source) -> Output:
    folder, _, _ = locate(name, SourceOptions())
    found, family = str(raw_config(folder).get("model_type", "")), opened.config.model_type
    stock = opened.model_class()
    if found == f"meo_{family}":
        made: Any = meo_model_class(stock)
        return Output(name, label, folder, made, made.config_class.from_pretrained(folder))
    if found.startswith("meo_"):
        raise UsageError(f"{name} is of type {found}, but {opened.name} becomes meo_{family}: give its own MEO model")
    if found != family:
        raise UsageError(
            f"{name} is no MEO model (model type {found!r}), nor of {opened.name}'s family ({family}): give what "
            "meo-hf convert or meo-hf reduce made of it, and anything else with --also"
        )
    if folder.resolve() == opened.folder.resolve():
        raise UsageError(f"{name} is SOURCE itself: give what meo-hf convert or meo-hf reduce made of it")
    return Output(name, label, folder, stock, _config(folder, name))


def _config(name: str | Path, shown: str, **options: Any) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        raise SourceError(f"{shown} cannot be read ({first_line(error)}): check it") from None


def also_config(name: str, tokenizer: Any, settings: CompareSettings) -> PreTrainedConfig:
    """Read the config of a further model; raises UsageError if it has another tokenizer than the source."""
    code = {"trust_remote_code": settings.trust_remote_code}
    config = _config(name, f"--also {name}", **code)
    if _differs(name, name, tokenizer, code):
        raise UsageError(f"--also {name} has another tokenizer than the source: their predictions cannot be compared")
    return config


def _differs(folder: str | Path, name: str, tokenizer: Any, options: dict[str, Any]) -> bool:
    """Whether a model has a tokenizer of another vocabulary; one without any is meant for the source's."""
    try:
        own = load_tokenizer(folder, name, **options)
    except SourceError:
        return False
    return bool(own.get_vocab() != tokenizer.get_vocab())


def windows_of(
    opened: Source, configs: dict[str, PreTrainedConfig], tokenizer: Any, text: str, settings: CompareSettings
) -> Tensor:
    """Cut the text into windows that every model can take; raises UsageError where vocabularies differ."""
    size = opened.config.get_text_config(decoder=True).vocab_size
    room = settings.window
    for name, config in {opened.name: opened.config, **configs}.items():
        part = config.get_text_config(decoder=True)
        if part.vocab_size != size:
            raise UsageError(
                f"{name} has {part.vocab_size} tokens, {opened.name} {size}: give models of one vocabulary"
            )
        room = min(room, getattr(part, "max_position_embeddings", None) or room)
    return cut_windows(tokenizer, text, room, settings.limit)
