"""Load a mixture so that all families' experts look alike: as a MEO model of level `unmerged`."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from meo_hf.conversion.source import Source, first_line, meta_model, quiet_transformers
from meo_hf.errors import CheckpointError, MeoError, SourceError, UsageError
from meo_hf.modeling.configuration_meo import SCHEMA_VERSION, meo_config_class
from meo_hf.modeling.fewer_meo import resized_config
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.reduction.counted import Mixture


def unmerged_class(
    source: Source, family: MoeFamily, mixture: Mixture, top_k: int | None = None
) -> tuple[type[Any], PreTrainedConfig]:
    """Return class and config of a source's model of level `unmerged`, with another number of selected experts."""
    values = resized_config(source.config, family, next(iter(mixture.blocks.values()))).to_dict()
    values = {key: value for key, value in values.items() if key not in ("model_type", "architectures", "auto_map")}
    block = {"schema_version": SCHEMA_VERSION, "level": "unmerged", **({"top_k": top_k} if top_k else {})}
    config = meo_config_class(type(source.config)).from_dict({**values, "meo": block})
    return meo_model_class(source.model_class()), config


def unmerged_model(source: Source, family: MoeFamily, mixture: Mixture) -> PreTrainedModel:
    """Return a source's model of level `unmerged` on the meta device."""
    return meta_model(*unmerged_class(source, family, mixture))


def load_unmerged(
    source: Source, family: MoeFamily, mixture: Mixture, device: str = "cpu", top_k: int | None = None
) -> PreTrainedModel:
    """Load a source's weights: as float32 where that fits in memory, else in their own type, offloaded to disk.

    `auto` spreads them over all devices. Raises SourceError if that fails, CheckpointError if weights are missing.
    """
    made, config = unmerged_class(source, family, mixture, top_k)
    options = load_options(source, device)
    if options["device_map"] == "auto":
        folder = tempfile.TemporaryDirectory(prefix="meo-hf-offload-")
        options["offload_folder"] = folder.name
    try:
        with quiet_transformers():
            model, info = made.from_pretrained(source.loadable, config=config, output_loading_info=True, **options)
    except MeoError:
        raise
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        raise SourceError(f"{source.name} cannot be loaded ({first_line(error)}): check it") from None
    if lost := [name for name in sorted(info["missing_keys"]) if name in mixture.tensors]:
        raise CheckpointError(
            f"{source.name} lacks {len(lost)} tensors of its experts, e.g. {lost[0]}: download it again"
        )
    if options["device_map"] == "auto":
        weakref.finalize(model, folder.cleanup)
    return model.eval().requires_grad_(False)


def check_device(device: str) -> None:
    """Raise UsageError for a device that is not here, or is no name of one."""
    if device == "auto":
        return
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise UsageError(f"--device {device} cannot be used here ({reason}): give cpu, cuda or auto") from None


def load_options(source: Source, device: str) -> dict[str, Any]:
    """Return type and place of a source's weights here: float32 on a CPU with room for it, else their own type."""
    parameters, free = sum(ref.spec.numel for ref in source.tensors.values()), psutil.virtual_memory().available
    wide = device == "cpu" and 4 * parameters < 0.6 * free
    spread = device == "auto" or (device == "cpu" and source.nbytes > 0.7 * free)
    return {"dtype": torch.float32 if wide else source.dtype, "device_map": "auto" if spread else device}
