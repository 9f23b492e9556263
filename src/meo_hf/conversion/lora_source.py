"""Open LoRA adapters that become experts: their factors by the module they belong to, and what they are scaled by.

What a low-rank part cannot express is refused, never left out: a merged bank must compute what its adapters do.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.dense_tensors import tensors_by_live_name
from meo_hf.conversion.fetch import SourceOptions, locate_adapter
from meo_hf.conversion.safetensors_files import TensorRef, read_header
from meo_hf.conversion.source import Origin, Source
from meo_hf.errors import CheckpointError, SourceError, UnsupportedError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
LEAVES_BASE = ("true", "false", "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA that do not write to its base."""
PLAIN = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version",
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "velora_config", "ensure_weight_tying",
}  # fmt: skip
"""Keys of an adapter's config that are read here, or tell only how it was trained."""
REASONS = {  # key of the config -> what an adapter with it would need
    "use_dora": "DoRA scales rows of the base's weights",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "block-diagonal LoRA has factors of another shape",
    "lora_bias": "its factors carry biases",
    "modules_to_save": "it replaces whole modules",
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts parameters that are no linear modules",
    "trainable_token_indices": "it trains embeddings of tokens",
    "alora_invocation_tokens": "activated LoRA begins at a token",
    "arrow_config": "it carries a router",
}


@dataclass(frozen=True)
class LoraPart:
    """Factors of one linear map, A [R, I] and B [O, R], and what their product is scaled by."""

    down: TensorRef
    up: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        """Rank R."""
        return self.down.spec.shape[0]


@dataclass(frozen=True)
class LoraSource(Origin):
    """A LoRA adapter on disk: the task it is named after, and its parts by paths of modules."""

    name: str
    task: str
    folder: Path
    commit: str | None
    base: str | None
    parts: dict[str, LoraPart]
    prefix: str = ""
    """What stands before its paths in the base checkpoint's model; with a leading `-`, what they have too much."""

    @property
    def ranks(self) -> list[int]:
        """The different ranks of its parts."""
        return sorted({part.rank for part in self.parts.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(part.down.spec.nbytes + part.up.spec.nbytes for part in self.parts.values())


def named_adapters(adapters: Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    """Return adapters by the names of their tasks: the last parts of their paths where none are given.

    Raises UsageError for names that are not different.
    """
    if isinstance(adapters, Mapping):
        return {name: os.fspath(place) for name, place in adapters.items()}
    places = [os.fspath(place) for place in adapters]
    named = {Path(place.rstrip("/")).expanduser().name: place for place in places}
    if len(named) < len(places):
        raise UsageError("two adapters have the same name: give each one as NAME=ADAPTER")
    return named


def open_adapter(task: str, name: str, options: SourceOptions, base: Source, model: PreTrainedModel) -> LoraSource:
    """Open an adapter of a dense base, whose `model` needs no memory for its weights.

    Raises SourceError if it cannot be found, CheckpointError if it is damaged or fits no such model, UnsupportedError
    for what is no plain LoRA.
    """
    folder, commit = locate_adapter(name, options)
    config = _config(folder, name)
    _check_plain(config, name)
    if not (folder / WEIGHTS).is_file():
        pickled = " (pickles are not read: save it again with PEFT)" if (folder / "adapter_model.bin").is_file() else ""
        raise SourceError(f"adapter {name} has no {WEIGHTS}{pickled}")
    tensors = read_header(folder / WEIGHTS)
    copies = {key: ref for key, ref in tensors.items() if key.endswith(".base_layer.weight") and key.startswith(ROOT)}
    parts = _parts({key: ref for key, ref in tensors.items() if key not in copies}, config, name)
    trained_on = config.get("base_model_name_or_path")
    named = trained_on if isinstance(trained_on, str) else None
    opened = _placed(LoraSource(name, task, folder, commit, named, parts), model)
    _check_copies(opened, copies, base, model)
    return opened


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{name} has no {CONFIG}: give the folder or repository of a PEFT adapter") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged ({error}): download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} is damaged (no object): download it again")
    return config


def _check_plain(config: dict[str, Any], name: str) -> None:
    """Raise UnsupportedError for an adapter that W_0 + s B A does not describe."""
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"adapter {name} has type {config.get('peft_type')!r}: only LORA can become an expert")
    if found := [key for key, value in config.items() if value and key not in PLAIN]:
        reason = REASONS.get(found[0], "which is not known here")
        raise UnsupportedError(
            f"adapter {name} has {found[0]}, so it is more than low-rank parts of linear maps ({reason}): merge it "
            "into its base with PEFT and give the result as --expert"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"adapter {name} trains biases of its base (bias {config['bias']!r}): merge it into its base with PEFT and "
            "give the result as --expert"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in LEAVES_BASE:
        raise UnsupportedError(
            f"adapter {name} began with {start!r}, which may change its base: save it as a plain LoRA "
            "(`save_pretrained(..., path_initial_model_for_weight_conversion=...)`)"
        )


def _check_copies(adapter: LoraSource, copies: dict[str, TensorRef], base: Source, model: PreTrainedModel) -> None:
    """Raise CheckpointError for a weight of the base that PEFT saved beside the factors, and that is another here."""
    own = tensors_by_live_name(model, base) if copies else {}
    for key, ref in copies.items():
        path = _moved(key.removeprefix(ROOT).removesuffix(".base_layer.weight"), adapter.prefix)
        stored = own.get(f"{path}.weight") or own.get(model.all_tied_weights_keys.get(f"{path}.weight", ""))
        if stored is None or not torch.equal(stored.load().float(), ref.load().float()):
            raise CheckpointError(
                f"adapter {adapter.name} brings a weight of its base, {key}, that is not this base's: was it trained "
                f"on {adapter.base or 'another base'}? (PEFT leaves it out with save_embedding_layers=False)"
            )


def _parts(tensors: dict[str, TensorRef], config: dict[str, Any], name: str) -> dict[str, LoraPart]:
    paths: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        path, _, which = key.removesuffix(".weight").rpartition(".")
        if which not in ("lora_A", "lora_B") or not key.startswith(ROOT) or len(ref.spec.shape) != 2:
            raise UnsupportedError(f"adapter {name} holds {key}, which is no factor of a linear map")
        paths.setdefault(path.removeprefix(ROOT), {})[which] = ref
    if not paths:
        raise CheckpointError(f"adapter {name} holds no factors")
    if half := [path for path, pair in paths.items() if len(pair) < 2]:
        raise CheckpointError(f"adapter {name} holds only one factor of {half[0]}: download it again")
    return {
        path: LoraPart(pair["lora_A"], pair["lora_B"], _scale(path, pair, config, name)) for path, pair in paths.items()
    }


def _scale(path: str, pair: dict[str, TensorRef], config: dict[str, Any], name: str) -> float:
    """Return alpha / r, or alpha / sqrt(r) in rsLoRA (arXiv 2312.03732), as PEFT finds both by patterns."""
    try:
        rank = _by_pattern(path, config.get("rank_pattern"), config.get("r"))
        alpha = _by_pattern(path, config.get("alpha_pattern"), config.get("lora_alpha"))
    except (re.error, AttributeError, TypeError) as error:
        raise CheckpointError(f"adapter {name} has a damaged rank_pattern or alpha_pattern ({error})") from None
    shapes = pair["lora_A"].spec.shape, pair["lora_B"].spec.shape
    number = isinstance(alpha, (int, float)) and math.isfinite(alpha)
    if not isinstance(rank, int) or not number or shapes[0][0] != rank or shapes[1][1] != rank:
        raise CheckpointError(
            f"adapter {name}: {path} has factors {list(shapes[0])} and {list(shapes[1])}, its config asks for rank "
            f"{rank!r} and alpha {alpha!r}"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(path: str, patterns: dict[str, Any] | None, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key  # PEFT takes a while to import, and few conversions need it

    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), path), otherwise)


def _placed(adapter: LoraSource, model: PreTrainedModel) -> LoraSource:
    """Return the adapter with the paths of a model; it may have been trained with another head."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    for lead in ("", prefix, f"-{prefix}"):
        parts = {_moved(path, lead): part for path, part in adapter.parts.items()}
        if all(path in modules for path in parts):
            for path, part in parts.items():
                _check_shapes(adapter, path, part, modules[path])
            return replace(adapter, parts=parts, prefix=lead)
    lost = next(path for path in adapter.parts if path not in modules)
    raise CheckpointError(
        f"adapter {adapter.name} adapts {lost}, which {type(model).__name__} does not have: was it trained on "
        f"{adapter.base or 'another base'}?"
    )


def _moved(path: str, prefix: str) -> str:
    """Return a path with a prefix more, or, of one that begins with `-`, less."""
    return path.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + path


def _check_shapes(adapter: LoraSource, path: str, part: LoraPart, module: nn.Module) -> None:
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UnsupportedError(
            f"adapter {adapter.name} adapts {path}, which is no linear map but {type(module).__name__}"
        )
    rows, columns = module.weight.shape
    rows, columns = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    found = part.up.spec.shape[0], part.down.spec.shape[1]
    if found != (rows, columns):
        raise CheckpointError(
            f"adapter {adapter.name}: {path} maps {found[1]} to {found[0]} features, the base's {columns} to {rows}: "
            f"was it trained on {adapter.base or 'another base'}?"
        )
