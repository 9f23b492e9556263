"""The folder beside an output where a recovery keeps its checkpoints, so that it can go on after an interruption."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from meo_hf.errors import OutputError, UsageError

_RUN = "run.json"


class Work:
    """`OUT.partial`: what the run is, in `run.json`, and the Trainer's checkpoints."""

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.partial")
        self._missing = [parent for parent in output.parents if not parent.exists()]

    def open(self, run: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Begin a run, or go on with one.

        Raises OutputError where an interrupted run is in the way, UsageError where there is none to resume or it was
        begun with other models, data or options.
        """
        known = self._known()
        if resume:
            if known is None:
                raise UsageError(f"{self.folder} holds no interrupted run: leave out --resume")
            _check_same(known["run"], json.loads(json.dumps(run)))
            return
        if self.folder.exists() and not overwrite:
            raise OutputError(
                f"{self.folder} holds an interrupted run: pass --resume to go on, --overwrite to begin anew"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.write({"run": run})

    def _known(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / _RUN).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, values: dict[str, Any]) -> None:
        """Add what is known of the run."""
        beside = self.folder / f"{_RUN}.new"
        beside.write_text(json.dumps({**(self._known() or {}), **values}, indent=2) + "\n", "utf-8")
        beside.replace(self.folder / _RUN)

    def read(self, name: str) -> Any:
        """Return something that was written, None if it was not."""
        return (self._known() or {}).get(name)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint that is complete."""
        steps = {
            int(found[1]): path
            for path in self.folder.glob("checkpoint-*")
            if (found := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / "trainer_state.json").is_file()
        }
        return steps[max(steps)] if steps else None

    def leave(self) -> None:
        """Remove the folder unless it holds a checkpoint to go on from."""
        if self.checkpoint is None:
            self.remove()

    def remove(self) -> None:
        """Remove the folder, and those above it that were made for it and hold nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._missing:
            with suppress(OSError):  # it holds the output
                parent.rmdir()


def _check_same(known: Any, asked: Any, name: str = "") -> None:
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in {**known, **asked}:
            _check_same(known.get(key), asked.get(key), f"{name} {key}".strip())
    elif known != asked:
        raise UsageError(
            f"the interrupted run was begun with another {name} ({known}, now {asked}): repeat its command line with "
            "--resume, or begin anew with --overwrite"
        )


class Stopping(TrainerCallback):
    """Stops at the end of a step, with a checkpoint, once a signal has asked for it; a second signal does not wait."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if that was asked for."""
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within this context SIGINT and SIGTERM ask to stop; elsewhere than in the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            for each, handler in before.items():
                signal.signal(each, handler)
            say("stopping after this step")

        for number in numbers:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
