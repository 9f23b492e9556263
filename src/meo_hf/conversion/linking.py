"""Put a checkpoint's untouched weight files into another folder: hard links, or copies across file systems."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meo_hf.conversion.fetch import SAFETENSORS_INDEX
from meo_hf.conversion.source import Source
from meo_hf.modeling.reference_meo import fingerprint


def weight_files(source: Source) -> list[Path]:
    """Return the files that hold a source's tensors."""
    return sorted({ref.path for ref in source.tensors.values()})


def can_link(source: Source, folder: Path) -> bool:
    """Return whether a folder (or its nearest parent) lies on the file system of a source's weights."""
    while not folder.exists():
        folder = folder.parent
    return all(path.resolve().stat().st_dev == folder.stat().st_dev for path in weight_files(source))


def place_weights(
    source: Source, folder: Path, copy: bool, on_bytes: Callable[[int], None] = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Link or copy a source's weight files and their index; returns what each file is.

    A file that cannot be linked is copied. Files that the Hub's cache links to are linked themselves.
    """
    placed = {}
    for path in weight_files(source):
        target, real = folder / path.name, path.resolve()
        how = "copied" if copy or not _link(real, target) else "linked"
        if how == "copied":
            shutil.copyfile(real, target)
        placed[path.name] = {**fingerprint(target), "how": how}
        on_bytes(placed[path.name]["bytes"])
    index = source.folder / SAFETENSORS_INDEX
    if index.is_file():
        shutil.copyfile(index, folder / SAFETENSORS_INDEX)
    return placed


def _link(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:  # another file system, or one that has no links
        return False
    return True
