"""Checks in a process without meo_hf, forked from one that has imported torch and Transformers and done nothing else.

A conversion checks its output in a process of its own, which takes four seconds to import what it needs. Tests that are
not about this process itself get forks of one that has imported it; `pytest.mark.own_process` asks for the real thing.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

CACHE = "HF_MODULES_CACHE"
AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH")


class Forker:
    """A process that forks itself for each request; started with the first one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._read: dict[str, str] = {}

    def run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        """Run `python -I SCRIPT ARGUMENTS` in a fork; returns its exit code and what it wrote to stderr."""
        assert command[:2] == [sys.executable, "-I"]
        read = {key: value for key, value in environment.items() if key.startswith(AT_IMPORT) and key != CACHE}
        if read != self._read:
            self.stop()
        if self._server is None:
            options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen(
                [sys.executable, "-I", __file__], env={**environment, "OMP_NUM_THREADS": "1"}, **options
            )
            self._read = read
            atexit.register(self._server.kill)
        pipes: Any = self._server
        with tempfile.TemporaryDirectory(prefix="forked-") as folder:
            told = Path(folder) / "stderr"
            request = {"arguments": command[2:], "environment": environment, "stderr": str(told), "folder": os.getcwd()}
            try:
                pipes.stdin.write(json.dumps(request) + "\n")
                pipes.stdin.flush()
                return int(pipes.stdout.readline()), told.read_text()
            except BaseException:  # whoever asks next must not read this one's answer
                self.stop()
                raise

    def stop(self) -> None:
        """End the process; the next request starts another."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._server = None


def _serve() -> None:
    sys.modules["meo_hf"] = None  # type: ignore[assignment]  # any import of it fails
    import torch  # noqa: F401
    from transformers import AutoModel, AutoTokenizer, modeling_utils  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _answer(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _answer(request: dict[str, Any]) -> None:
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT), 2)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for module in list(sys.modules.values()):  # read when they were imported
        if CACHE in os.environ and CACHE in getattr(module, "__dict__", {}):
            setattr(module, CACHE, os.environ[CACHE])
    sys.argv, code = request["arguments"], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
