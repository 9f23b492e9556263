"""What a repository needs so that Auto classes find this code: its files and the full `auto_map`."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from transformers.models.auto import modeling_auto

if TYPE_CHECKING:
    # Transformers fetches the files that a text scan for relative imports finds: this line makes a load of
    # the config alone carry the model code too, so that saving that config writes all of it.
    from .modeling_meo import MeoModelMixin  # noqa: F401


@cache
def heads_of(model_type: str) -> dict[str, str]:
    """Return Auto class name -> stock class name for every head that Transformers has for a model type."""
    heads = {}
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        names = getattr(mapping, "_model_mapping", {}).get(model_type) if name.startswith("AutoModel") else None
        stock = names[0] if isinstance(names, (list, tuple)) else names
        # some Auto classes list another family's class for a model type: Qwen2 has a `JevForDecision`
        if stock and getattr(transformers, stock).config_class.model_type == model_type:
            heads[name] = stock
    return heads


def auto_map(config_class_name: str, model_type: str) -> dict[str, str]:
    """Return the `auto_map` of a MEO repository: its config and every head the family has."""
    heads = {auto: f"modeling_meo.Meo{stock}" for auto, stock in heads_of(model_type).items()}
    return {"AutoConfig": f"configuration_meo.{config_class_name}", **heads}


def code_files() -> list[Path]:
    """Return the paths of all remote-code files, this one among them."""
    return sorted(Path(__file__).parent.glob("*_meo.py"))


def write_code_files(directory: str | os.PathLike[str]) -> None:
    """Copy all remote-code files into a directory."""
    for file in code_files():
        if file.parent.resolve() != Path(directory).resolve():
            shutil.copyfile(file, Path(directory) / file.name)
