"""Statistics that were computed before: kept on disk by a hash of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from meo_hf.conversion.linking import weight_files
from meo_hf.conversion.safetensors_files import sha256_of
from meo_hf.conversion.source import Source
from meo_hf.errors import CheckpointError
from meo_hf.reduction.statistics import State, Statistic, check_state
from meo_hf.version import versions

ENVIRONMENT = "MEO_HF_STATISTICS"


def statistics_folder(folder: str | Path | None = None) -> Path:
    """Return where statistics are kept: `folder`, what MEO_HF_STATISTICS names, or HF_HOME/meo_hf/statistics."""
    return Path(folder or os.environ.get(ENVIRONMENT) or Path(HF_HOME, "meo_hf", "statistics")).expanduser()


def weights_fingerprint(source: Source) -> str:
    """Return a hash of all weight files; no path is part of it.

    They are hashed whole: a header is the same in every checkpoint of an architecture.
    """
    found = {path.name: file_hash(path) for path in weight_files(source)}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def statistics_key(
    source: Source,
    calibration: str,
    statistics: Sequence[Statistic],
    how: Mapping[str, Any],
    fingerprint: str | None = None,
) -> str:
    """Return a hash of weights, config, calibration rows, statistics and their options, versions, and `how` it was run.

    `fingerprint` is that of the weights, where it is known.
    """
    known = versions()
    parts = {
        "weights": fingerprint or weights_fingerprint(source),
        "config": source.config.to_dict(),
        "calibration": calibration,
        "statistics": [_described(one) for one in statistics],
        "how": dict(how),
        "versions": {name: known[name] for name in ("meo_hf", "transformers", "torch")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file; the cache of the Hub names files by it."""
    blob = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", blob):
        return blob
    return sha256_of(path)


def _described(statistic: Statistic) -> list[Any]:
    options = {one.name: getattr(statistic, one.name) for one in fields(statistic) if one.init}
    return [type(statistic).__name__, options]


def read_statistics(path: Path, statistics: Sequence[Statistic]) -> bool:
    """Fill statistics with what is kept of them; returns whether there was something.

    A damaged file is as good as none, and a warning says so.
    """
    if not path.is_file():
        return False
    try:
        states: list[State] = [{} for _ in statistics]
        for name, tensor in load_file(path).items():
            at, block, part = name.split("|")
            states[int(at)].setdefault(block, {})[part] = tensor
        if not all(states):
            raise CheckpointError("some statistics are missing")
        for statistic, state in zip(statistics, states, strict=True):
            check_state(statistic, state)
    except (SafetensorError, OSError, ValueError, IndexError) as error:
        for statistic in statistics:
            statistic.state = {}
        warnings.warn(f"{path} is damaged ({error}): its statistics are computed anew", stacklevel=2)
        return False
    return True


def write_statistics(path: Path, statistics: Sequence[Statistic]) -> None:
    """Keep statistics: written beside, then renamed, so that nobody reads half a file.

    A folder that cannot be written to costs a warning, not the statistics.
    """
    tensors = {
        f"{at}|{block}|{part}": tensor.cpu().contiguous()
        for at, statistic in enumerate(statistics)
        for block, own in statistic.state.items()
        for part, tensor in own.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"statistics cannot be kept as {path} ({error}): they are computed each time", stacklevel=2)
