"""Weights that stay where they are: a repository that holds config and code alone names their pinned source."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from .errors_meo import ReferenceSourceError

_PLACE = ("revision", "code_revision", "subfolder", "_commit_hash", "trust_remote_code", "adapter_kwargs")
_ACCESS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")


def source_of(weights: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return where referenced weights lie, and what `from_pretrained` must be told beside.

    Raises ReferenceSourceError if the reference pins no commit, or if the files of a folder have changed.
    """
    if "repo" in weights:
        commit = weights.get("commit")
        if not (isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit)):
            raise ReferenceSourceError(
                f"the weights of this model are those of {weights['repo']} at {commit!r}, which is no commit: its "
                "author may change them at any time; convert it again to pin a commit"
            )
        return weights["repo"], {"revision": commit}
    folder = Path(weights["folder"])
    for name, recorded in weights["files"].items():
        if not (folder / name).is_file():
            raise ReferenceSourceError(f"the weights of this model should be in {folder}, but {name} is not there")
        found = fingerprint(folder / name)
        if found != recorded:
            raise ReferenceSourceError(
                f"{folder / name} has changed since this model was made (size or header differ): convert it again"
            )
    return os.fspath(folder), {}


def fingerprint(path: Path) -> dict[str, Any]:
    """Return a weight file's size and the sha256 of its header, which says where each tensor lies."""
    with path.open("rb") as file:
        prefix = file.read(8)
        header = file.read(int.from_bytes(prefix, "little"))
    return {"bytes": path.stat().st_size, "header_sha256": hashlib.sha256(prefix + header).hexdigest()}


def own_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a load that say how the referring repository itself is found."""
    return {name: value for name, value in options.items() if name in ("revision", "subfolder", *_ACCESS)}


def load_options(options: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the options for loading from the source: those of the load, but not the place of the repository."""
    kept = {name: value for name, value in options.items() if name not in (*_PLACE, "use_safetensors")}
    return {**kept, **{name: value for name, value in own.items() if name in _ACCESS}}


def break_links(directory: str | os.PathLike[str]) -> None:
    """Remove hard-linked weight files before others are saved in their place: writing would change the source too."""
    for path in Path(directory).glob("model*.safetensors"):  # what Transformers writes; nothing else is touched
        if path.stat().st_nlink > 1:
            path.unlink()
