"""A JSON-lines ledger of measurements: a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

Key = dict[str, Any]


class Ledger:
    """Measurements by key; several processes may share the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all entries: `key`, `result`, `seconds`, `versions`, `device`. A line cut short is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue

    def find(self, key: Key) -> dict[str, Any] | None:
        """Return the result of a key, None if it was not measured."""
        wanted = _canonical(key)
        return next((entry["result"] for entry in self if _canonical(entry["key"]) == wanted), None)

    def measure(self, key: Key, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of a key; if there is none, call the function and append what it returns."""
        found = self.find(key)
        if found is not None:
            return found
        began = time.perf_counter()
        result = function()
        self._append({"key": key, "result": result, "seconds": round(time.perf_counter() - began, 1), **setting()})
        return result

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a line cut short by a kill
                    file.write(b"\n")
            file.write((json.dumps(entry) + "\n").encode())


def setting() -> dict[str, Any]:
    """Return the versions and the device of this process."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
    }


def _canonical(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
