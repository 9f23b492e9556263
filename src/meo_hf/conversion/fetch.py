"""Find a checkpoint: a folder or file here, or a Hub repository whose needed files are fetched."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from meo_hf.errors import SourceError, UsageError

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_SMALL = ("*.json", "*.md", "*.txt", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges*", "*.spm", "*/config.json")


@dataclass(frozen=True)
class SourceOptions:
    """How a source may be read. `allow_pickle` admits `.bin` files (read with weights_only)."""

    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


def locate(name: str, options: SourceOptions, weights: bool = True) -> tuple[Path, str | None, str | None]:
    """Return the local folder of a source, its commit if it came from the Hub, and its GGUF file if it is one.

    Raises SourceError if it can be neither found nor fetched, UsageError for a revision of a local folder.
    """
    path = Path(name).expanduser()
    if path.exists() and options.revision is not None:
        raise UsageError(f"{name} is here on disk, where --source-revision has no effect: leave it out")
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, None, path.name
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(ggufs) == 1:
            return path, None, ggufs[0].name
        return path, None, None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SourceError(f"{name} does not exist: give a folder with config.json and weights, or a Hub id")
    folder = _fetch(name, options, _SMALL)
    commit = folder.name if folder.parent.name == "snapshots" else None
    if weights:  # of the same commit, even if the branch has moved on
        fixed = replace(options, revision=commit or options.revision)
        modules = [f"{path}/*" for path in module_folders(folder)]
        folder = _fetch(name, fixed, [*_SMALL, *modules, *_weight_files(folder, options.allow_pickle)])
    return folder, commit, None


def locate_adapter(name: str, options: SourceOptions) -> tuple[Path, str | None]:
    """Return the local folder of a PEFT adapter, and its commit if it came from the Hub; raises SourceError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SourceError(f"{name} is no folder: give the folder of an adapter, or a Hub id")
    folder = _fetch(name, options, ("adapter_config.json", "adapter_model.safetensors", "*.md"))
    return folder, folder.name if folder.parent.name == "snapshots" else None


def module_folders(folder: Path) -> list[str]:
    """Name the folders of sentence-transformers' modules beside the model: some hold weights of their own."""
    try:
        paths = [module["path"] for module in json.loads((folder / "modules.json").read_text("utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"\w+", path)]


def _weight_files(folder: Path, allow_pickle: bool) -> list[str]:
    """Name the weight files that loading would read: repositories hold the same weights in other formats beside."""
    names = []
    wanted = [(SAFETENSORS_INDEX, "model.safetensors"), *([(PICKLE_INDEX, "pytorch_model.bin")] * allow_pickle)]
    for index, single in wanted:
        names.append(single)
        if (folder / index).is_file():
            try:
                names += sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged index gets its own error when it is read
    return [name for name in names if isinstance(name, str)]


def _fetch(name: str, options: SourceOptions, patterns: list[str] | tuple[str, ...]) -> Path:
    try:
        return Path(
            snapshot_download(name, revision=options.revision, token=options.token, allow_patterns=list(patterns))
        )
    except RevisionNotFoundError:
        raise SourceError(f"{name} has no revision {options.revision!r}: check --source-revision") from None
    except GatedRepoError:
        raise SourceError(f"{name} is gated: ask for access on its page, then log in or give --token") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{name} is neither a folder here nor a repository you can see: check it, or give --token"
        ) from None
    except LocalEntryNotFoundError:
        raise SourceError(
            f"{name} is not in the cache and the Hub cannot be reached: connect, or give a folder"
        ) from None
    except HFValidationError:
        raise SourceError(f"{name} is neither a folder here nor a valid Hub id (user/name)") from None
    except Exception as error:  # the HTTP library below has errors of its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(f"{name} could not be fetched ({reason}): try again, or give a folder") from None
