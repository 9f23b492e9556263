"""Open a checkpoint to convert: a Hub id or a folder, its config, and an index of its tensors."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from meo_hf.conversion.fetch import PICKLE_INDEX, SAFETENSORS_INDEX, SourceOptions, locate
from meo_hf.conversion.safetensors_files import DTYPES, TensorRef, known_spec, read_header, within
from meo_hf.errors import CheckpointError, MeoConfigError, MeoError, SourceError, UnsupportedError
from meo_hf.modeling.blocks_meo import describe_unknown
from meo_hf.modeling.families_meo import FAMILIES, Family, family_of, has_row
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.remote_meo import heads_of

_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class Origin:
    """What names something that came from the Hub or a folder here."""

    name: str
    commit: str | None

    @property
    def public_name(self) -> str:
        """The Hub id, or the last part of a local path: the rest of it is nobody's business."""
        return public_name(self.name)

    @property
    def lasting_name(self) -> str:
        """The Hub id, or the whole of a local path: what a later `verify` opens from another folder."""
        return self.name if self.commit else str(Path(self.name).expanduser().absolute())


@dataclass
class Source(Origin):
    """A checkpoint on disk: where it came from, its config, its tensors by their names on disk."""

    name: str
    folder: Path
    commit: str | None
    config: PreTrainedConfig
    tensors: dict[str, TensorRef]
    format: str = "safetensors"
    gguf_file: str | None = None
    staging: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    @property
    def loadable(self) -> Path:
        """The folder that `from_pretrained` of the stock class loads: the staged one, if any."""
        return self.folder if self.staging is None else Path(self.staging.name)

    @property
    def family(self) -> Family | MoeFamily:
        """The family row of the source."""
        return family_of(self.config.model_type)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.spec.nbytes for ref in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the checkpoint's weights have."""
        sizes: dict[str, int] = {}
        for ref in self.tensors.values():
            if DTYPES[ref.spec.dtype].is_floating_point:
                sizes[ref.spec.dtype] = sizes.get(ref.spec.dtype, 0) + ref.spec.numel
        return DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else torch.float32

    def model_class(self) -> type[PreTrainedModel]:
        """The stock class that the config names; if none, the family's language model, for encoders the base class."""
        for name in self.config.architectures or ():
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, PreTrainedModel):
                return found
        heads = heads_of(self.config.model_type)
        auto = {"decoder": "AutoModelForCausalLM", "encoder-decoder": "AutoModelForSeq2SeqLM"}.get(self.family.kind, "")
        return getattr(transformers, heads.get(auto) or heads["AutoModel"])

    def meta_model(self) -> PreTrainedModel:
        """Build the stock model without memory for its weights."""
        return meta_model(self.model_class(), self.config)

    def close(self) -> None:
        """Remove what was staged for reading."""
        if self.staging is not None:
            self.staging.cleanup()


def public_name(name: str) -> str:
    """Return a Hub id as it is, and of a local path only its last part."""
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
    return name if is_hub_id else Path(name).expanduser().absolute().name


def auto_class_of(model_type: str, stock: str) -> str:
    """Return the Auto class that loads a stock class, `AutoModel` if none does."""
    autos = [auto for auto, name in heads_of(model_type).items() if name == stock]
    specific = [auto for auto in autos if auto not in ("AutoModelForPreTraining", "AutoModelForTextEncoding")]
    return next(iter([*specific, *autos]), "AutoModel")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' log and progress bars: this tool says what matters itself."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device."""
    with torch.device("meta"):
        return model_class(config)


def open_source(name: str, options: SourceOptions, weights: bool = True) -> Source:
    """Open a checkpoint for conversion; without `weights`, a Hub repository's headers are enough.

    Raises SourceError if it cannot be found or fetched, CheckpointError if its files are damaged,
    UnsupportedError if it is sound but cannot be converted.
    """
    folder, commit, gguf_file = locate(name, options, weights)
    with readable(name):
        config = load_config(folder, gguf_file, options)
        check_supported(config, name)
        if gguf_file is not None:
            return _open_gguf(name, folder, gguf_file, config)
        here = weights or commit is None
        tensors = index_tensors(folder) if here else remote_headers(name, commit, options.token)
        if tensors:
            return Source(name, folder, commit, config, tensors)
        return _open_pickles(name, folder, commit, config, options.allow_pickle)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what the file system refuses into a SourceError."""
    try:
        yield
    except MeoError:
        raise
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise SourceError(f"{name} cannot be read ({reason}): check its files and their permissions") from None


def load_config(folder: Path, gguf_file: str | None, options: SourceOptions) -> PreTrainedConfig:
    """Read a source's config; never runs its code unless the options say so."""
    if gguf_file is not None:
        with _gguf(folder / gguf_file):
            return AutoConfig.from_pretrained(folder, gguf_file=gguf_file)
    raw = raw_config(folder)
    model_type = str(raw.get("model_type", ""))
    if isinstance(raw.get("meo"), dict) and raw["meo"].get("expert_format") == "parts":
        raise UnsupportedError(f"{folder} keeps its experts as parts, which only run one by one: start from its source")
    if isinstance(raw.get("meo"), dict) and raw["meo"].get("level") == "unmerged":
        raise UnsupportedError(
            f"{folder} was reduced already, and its experts run one by one (level 'unmerged'): to reduce it otherwise "
            "start from its source; to merge its experts load it with from_pretrained(..., trust_remote_code=True, "
            "meo={'level': 'segment'}) and save that"
        )
    if model_type.startswith("meo_") or "meo" in raw:
        raise UnsupportedError(f"{folder} is a MEO model already: nothing to convert; `meo-hf inspect` shows it")
    if not has_row(model_type) and "auto_map" in raw and not options.trust_remote_code:
        raise UnsupportedError(
            f"{folder} brings its own code (model type {model_type!r}), which is not run unless you trust it: "
            "read it, then pass --trust-remote-code"
        )
    try:
        code = {"trust_remote_code": True} if options.trust_remote_code and not has_row(model_type) else {}
        return AutoConfig.from_pretrained(folder, **code)
    except Exception as error:  # transformers raises many kinds; each means that the config is unusable
        raise UnsupportedError(f"transformers cannot read the config of {folder}: {first_line(error)}") from None


def raw_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it stands; raises SourceError if there is none, CheckpointError if it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no config.json: give the folder that save_pretrained wrote")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): download it again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is damaged (no object): download it again")
    return raw


def check_supported(config: PreTrainedConfig, name: str) -> None:
    """Raise UnsupportedError, with what to do, for a model that cannot be converted."""
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name} is quantised: convert the unquantised checkpoint, then quantise the result")
    try:
        family = family_of(config.model_type)
    except MeoConfigError:
        experts = next((key for key in _EXPERT_KEYS if (getattr(config, key, None) or 0) > 1), None)
        what = f"it is a mixture of experts ({experts}) of a family without a row; " if experts else ""
        raise UnsupportedError(f"{name}: {what}{_propose_row(config)}") from None
    if isinstance(family, MoeFamily) and family.refused is not None:
        raise UnsupportedError(f"{name}: {config.model_type} is refused: {family.refused}")


def _propose_row(config: PreTrainedConfig) -> str:
    text = f"no family row for model type {config.model_type!r}"
    nested = [key for key in config.sub_configs if getattr(getattr(config, key), "model_type", "") in FAMILIES]
    if nested:
        return f"{text}; its {nested[0]} is of a known family: save that part as a model of its own and convert it"
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        proposal = describe_unknown(model)[0]
    except Exception:  # a proposal is a courtesy: any failure only means that there is none
        return f"{text}; see `meo-hf families` for those that have one"
    up = tuple(proposal["up"])
    return (
        f"{text}; found {proposal['path']} with {', '.join(up)} and {proposal['down']}. If that is its feed-forward, "
        f"add to families_meo.py: Family({config.model_type!r}, kind=..., up=({up!r},), down={proposal['down']!r}, "
        "activation=...)"
    )


def index_tensors(folder: Path) -> dict[str, TensorRef]:
    """Read the headers of all safetensors files of a checkpoint; empty if there are none.

    Raises CheckpointError for a missing, truncated or damaged shard, or an index that leads elsewhere.
    """
    index_path = folder / SAFETENSORS_INDEX
    if (folder / "model.safetensors").is_file() and not index_path.is_file():
        return read_header(folder / "model.safetensors")
    if not index_path.is_file():
        return {}
    weight_map = _weight_map(index_path)
    tensors: dict[str, TensorRef] = {}
    for path in _shards(folder, weight_map):
        tensors.update(read_header(path))
    if lost := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{index_path} names {len(lost)} tensors that no shard holds, e.g. {lost[0]}")
    return tensors


def remote_headers(name: str, commit: str | None, token: str | None) -> dict[str, TensorRef]:
    """Read the headers of a Hub repository's safetensors files without their weights."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = HfApi(token=token).get_safetensors_metadata(name, revision=commit)
    except NotASafetensorsRepoError:
        return {}
    except Exception as error:  # the HTTP library below has errors of its own kind
        raise SourceError(f"{name}: headers could not be fetched ({first_line(error)}): try again") from None
    return {
        tensor: TensorRef(known_spec(name, tensor, info.dtype, info.shape), Path(file), 0)
        for file, parsed in metadata.files_metadata.items()
        for tensor, info in parsed.tensors.items()
    }


def _weight_map(index_path: Path) -> dict[str, str]:
    """Read an index: tensor name -> file name."""
    try:
        weight_map = json.loads(index_path.read_text("utf-8"))["weight_map"]
        if all(isinstance(name, str) for name in weight_map.values()):
            return weight_map
        reason = "file names are no text"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise CheckpointError(f"{index_path} is damaged ({reason}): download it again")


def _shards(folder: Path, weight_map: dict[str, str]) -> list[Path]:
    """Return the files that an index names, none of them missing or outside the folder."""
    paths = [within(folder, name) for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"shard {path.name} is missing from {folder}: download it again")
    return paths


def stage(
    config: PreTrainedConfig, tensor_dicts: Iterable[dict[str, torch.Tensor]]
) -> tuple[tempfile.TemporaryDirectory, dict[str, TensorRef]]:
    """Write tensors of another format as a temporary safetensors checkpoint, so that they stream like any other."""
    from safetensors.torch import save_file

    staging = tempfile.TemporaryDirectory(prefix="meo-hf-")
    folder = Path(staging.name)
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(tensor_dicts):
        name = f"model-{number:05d}.safetensors"
        save_file({key: t.detach().clone().contiguous() for key, t in tensors.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / SAFETENSORS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return staging, index_tensors(folder)


def _open_pickles(name: str, folder: Path, commit: str | None, config: Any, allow_pickle: bool) -> Source:
    index_path = folder / PICKLE_INDEX
    files = sorted(folder.glob("pytorch_model*.bin"))
    if index_path.is_file() and allow_pickle:
        files = _shards(folder, _weight_map(index_path))
    if not files and not allow_pickle:
        raise SourceError(f"{name} has no *.safetensors weights (with --allow-pickle, .bin files are read too)")
    if not files:
        raise SourceError(f"{name} has neither *.safetensors nor pytorch_model*.bin weights")
    if not allow_pickle:
        raise UnsupportedError(
            f"{name} holds its weights as pickles (.bin), which are not read by default: pass --allow-pickle to read "
            "them with torch.load(weights_only=True)"
        )
    try:
        staging, refs = stage(
            config, (torch.load(file, weights_only=True, map_location="cpu", mmap=True) for file in files)
        )
    except Exception as error:  # unpicklers raise anything
        raise CheckpointError(f"{name}: {files[0].name} cannot be read as plain weights ({error})") from None
    return Source(name, folder, commit, config, refs, "pytorch", staging=staging)


@contextmanager
def _gguf(path: Path) -> Iterator[None]:
    """Turn what Transformers' GGUF reader raises into UnsupportedError."""
    try:
        yield
    except ImportError:
        raise UnsupportedError(f"{path} needs the package gguf: pip install 'meo_hf[gguf]'") from None
    except Exception as error:  # the reader raises many kinds; each means that it cannot read this file
        raise UnsupportedError(f"transformers cannot read {path}: {first_line(error)}") from None


def _open_gguf(name: str, folder: Path, gguf_file: str, config: PreTrainedConfig) -> Source:
    model_class = Source(name, folder, None, config, {}).model_class()
    with _gguf(folder / gguf_file), quiet_transformers():
        model = model_class.from_pretrained(folder, gguf_file=gguf_file, dtype=torch.float32)
    state = {k: v for k, v in model.state_dict().items() if k not in model.all_tied_weights_keys}
    config.architectures = [model_class.__name__]
    staging, refs = stage(config, [state])
    return Source(name, folder, None, config, refs, "gguf", gguf_file, staging)
