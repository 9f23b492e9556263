"""A process with meo_hf and Hub settings of its own: the client library reads them only when it is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from checkpoints import Ran


class Client:
    """Run commands of `meo-hf`, and functions of test modules, in one process."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start the process; it ends with `close`."""
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def cli(self, *arguments: object, **environment: str | None) -> Ran:
        """Run `meo-hf`; environment variables hold for this command, None takes one away."""
        return Ran(*self._ask({"cli": [str(argument) for argument in arguments], "environment": environment}))

    def python(self, source: str, **values: object) -> Any:
        """Run statements; returns what they leave in `result`."""
        return self._ask({"python": source, "values": {k: str(v) for k, v in values.items()}})

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the client ended"}')
        assert "error" not in answer, answer["error"]
        return answer["value"]


def _serve() -> None:
    import os
    import traceback

    sys.path.insert(0, str(Path(__file__).parent))
    answers = sys.stdout
    sys.stdout = sys.stderr
    import torch
    from checkpoints import run_cli

    torch.set_num_threads(1)
    for line in sys.stdin:
        order, kept = json.loads(line), dict(os.environ)
        for name, value in order.get("environment", {}).items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        try:
            if "cli" in order:
                answer = {"value": run_cli(*order["cli"])}
            else:
                names = dict(order["values"])
                exec(order["python"], names)
                answer = {"value": names.get("result")}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.environ.clear()
        os.environ.update(kept)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
