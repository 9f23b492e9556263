"""Run checks in one process where meo_hf cannot be imported: `python -I`, an empty cache, no terminal.

A check is a module-level function of a test module. Its source travels, so it may use nothing but its
arguments and `torch`, `transformers`, `json`, `Path`, `load_file` and the helpers that were added with it::

    fresh = Fresh(helper)
    fresh.add("bert", check, folder=str(folder))
    values = fresh.run(tmp_path)
    assert values["bert"]["missing"] == []
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class FreshError(AssertionError):
    """A check raised in the fresh process; the message is its traceback there."""


class Values(dict[str, Any]):
    """What the checks returned, by name; reading one that raised raises FreshError."""

    def __getitem__(self, name: str) -> Any:
        outcome = super().__getitem__(name)
        if outcome["error"]:
            raise FreshError(f"in the fresh process:\n{outcome['error']}")
        return outcome["value"]


class Fresh:
    """Checks that share one fresh process."""

    def __init__(self, *helpers: Callable[..., Any]) -> None:
        """Take the functions that checks call."""
        self._sources = [_source(helper) for helper in helpers]
        self._requests: list[dict[str, Any]] = []

    def add(self, name: str, check: Callable[..., Any], **arguments: Any) -> None:
        """Plan a check with arguments that JSON can hold."""
        self._requests.append({"name": name, "source": _source(check), "function": check.__name__, **_as(arguments)})

    def run(self, scratch: Path, environment: dict[str, str] | None = None) -> Values:
        """Run all planned checks in order; without an environment, the process is offline."""
        scratch = Path(tempfile.mkdtemp(prefix="fresh-", dir=scratch))
        request, answer = scratch / "request.json", scratch / "answer.json"
        request.write_text(json.dumps({"sources": self._sources, "requests": self._requests, "answer": str(answer)}))
        done = subprocess.run(
            [sys.executable, "-I", __file__, str(request)],
            env=environment or {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode or not answer.is_file():
            raise FreshError(f"the fresh process ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return Values(json.loads(answer.read_text()))


def _as(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"arguments": {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}}


def _source(function: Callable[..., Any]) -> str:
    return "from __future__ import annotations\n" + textwrap.dedent(inspect.getsource(function))


def _child(request_path: str) -> None:
    """Run the requested checks and write what they returned, or their tracebacks."""
    sys.modules["meo_hf"] = None  # type: ignore[assignment]  # any import of it fails
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    request = json.loads(Path(request_path).read_text())
    names: dict[str, Any] = {"torch": torch, "transformers": transformers, "json": json, "Path": Path}
    names["load_file"] = load_file
    for source in request["sources"]:
        exec(source, names)
    outcomes = {}
    for one in request["requests"]:
        value = error = None
        try:
            exec(one["source"], names)
            with torch.no_grad():
                value = names[one["function"]](**one["arguments"])
        except Exception:
            error = traceback.format_exc(limit=-8)
        outcomes[one["name"]] = {"value": value, "error": error}
    Path(request["answer"]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _child(sys.argv[1])
