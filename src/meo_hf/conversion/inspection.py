"""Say what a checkpoint is, from its config and headers alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from meo_hf.conversion.fetch import SourceOptions, locate
from meo_hf.conversion.moe_plan import build_moe_plan
from meo_hf.conversion.options import Options
from meo_hf.conversion.plan import build_plan
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.conversion.source import (
    Source,
    check_supported,
    index_tensors,
    load_config,
    raw_config,
    readable,
    remote_headers,
)
from meo_hf.errors import MeoError
from meo_hf.modeling.configuration_meo import levels_of
from meo_hf.modeling.moe_families_meo import MOE_FAMILIES, MoeFamily
from meo_hf.modeling.moe_settings_meo import num_experts_of, top_k_of


@dataclass
class Inspection:
    """What `meo-hf inspect` shows. Sizes are in bytes; `convertible` holds the reason if it is not."""

    source: str
    commit: str | None
    model_type: str
    architecture: str | None
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    files: int
    meo: dict[str, Any] | None = None
    convertible: str = ""
    levels: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def inspect(source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Inspection:
    """Describe a folder or Hub id: family, levels, sizes; reads headers only and loads no weights.

    Of a Hub repository with safetensors only headers are fetched. Raises SourceError if it cannot be found.
    """
    name = os.fspath(source)
    options = SourceOptions(revision=revision, token=token)
    folder, commit, gguf_file = locate(name, options, weights=False)
    with readable(name):
        tensors = index_tensors(folder) if Path(name).expanduser().exists() else remote_headers(name, commit, token)
        raw = raw_config(folder) if gguf_file is None else load_config(folder, gguf_file, options).to_dict()
    refs = list(tensors.values())
    dtypes: dict[str, int] = {}
    for ref in refs:
        dtypes[ref.spec.dtype] = dtypes.get(ref.spec.dtype, 0) + ref.spec.numel
    found = Inspection(
        source=name,
        commit=commit,
        model_type=raw.get("model_type", "?"),
        architecture=(raw.get("architectures") or [None])[0],
        parameters=sum(ref.spec.numel for ref in refs),
        nbytes=sum(ref.spec.nbytes for ref in refs),
        dtypes=dtypes,
        files=len({ref.path for ref in refs}),
        meo=raw.get("meo"),
    )
    if found.model_type.removeprefix("meo_") in MOE_FAMILIES and found.meo is not None:
        config = AutoConfig.from_pretrained(folder)
        family = MOE_FAMILIES[found.model_type.removeprefix("meo_")]
        found.meo |= {"num_experts": num_experts_of(config, family), "top_k": top_k_of(config, family)}
    if found.meo is None:
        _say_convertible(found, folder, gguf_file, options, tensors)
    return found


def _say_convertible(
    found: Inspection, folder: Path, gguf_file: str | None, options: SourceOptions, tensors: dict[str, TensorRef]
) -> None:
    try:
        config = load_config(folder, gguf_file, options)
        check_supported(config, found.source)
        source = Source(found.source, folder, found.commit, config, tensors)
        found.levels = levels_of(source.config)
        if tensors and isinstance(source.family, MoeFamily):
            moe = build_moe_plan(source, Options())
            found.facts = {
                "experts": f"{moe.num_experts}, of which the source selects {moe.source_top_k}",
                "layers with experts": len(moe.layers),
                "weights": "stay as they are",
            }
        elif tensors:
            plan = build_plan(source, [], Options())
            found.facts = {"layers": len(plan.layers), "parameters as MEO, 8 experts": plan.parameters[1]}
    except MeoError as error:
        found.convertible = str(error)
