"""Which mixture-of-experts families the installed Transformers has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from meo_hf.modeling.moe_families_meo import MOE_FAMILIES

_EXPERTS = re.compile(rb"^class \w*(?:Experts|MoE|Moe|MOE|SparseMLP)\w*\(", re.MULTILINE)
_MODEL_TYPE = re.compile(r"""^\s+model_type(?:\s*:\s*\w+)?\s*=\s*["']([^"']+)["']""", re.MULTILINE)


def installed_rows() -> list[str]:
    """Return the model types of our rows that this Transformers knows."""
    return [name for name in MOE_FAMILIES if name in CONFIG_MAPPING_NAMES]


def moe_folders() -> Iterator[tuple[str, list[str]]]:
    """Yield the name of every family folder whose modeling file has experts, and its model types.

    Only a listing rests on this search in source text, no behaviour: importing all families would take minutes.
    """
    for folder in sorted(Path(transformers.__file__).parent.glob("models/*/")):
        if any(_EXPERTS.search(file.read_bytes()) for file in folder.glob("modeling_*.py")):
            configs = [file.read_text("utf-8") for file in folder.glob("configuration_*.py")]
            yield folder.name, [name for text in configs for name in _MODEL_TYPE.findall(text)]


def families_without_row() -> list[str]:
    """Return the MoE families of this Transformers that no row covers."""
    return [name for name, types in moe_folders() if types and not set(types) & set(MOE_FAMILIES)]
