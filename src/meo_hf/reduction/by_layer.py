"""Let many batches pass a model layer by layer, so that a layer that does not fit beside the others is loaded once.

Each batch's forward pass runs in a thread of its own, which stops before every layer until all batches are there; only
one thread ever runs. A batch is computed exactly as it would be alone, whatever its layers take and share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass
class Step:
    """One batch: `run` computes it, `enter` is called whenever it goes on."""

    run: Callable[[], None]
    enter: Callable[[], None]


class _Stopped(BaseException):
    """Ends the threads of batches that nobody waits for any more; no `except Exception` on the way catches it."""


@dataclass(eq=False)
class _Pass:
    """The thread of one batch: the layer before which it stands, None while it runs; whether it is done, or failed."""

    step: Step
    go: threading.Event = field(default_factory=threading.Event)
    rests: threading.Event = field(default_factory=threading.Event)
    at: str | None = None
    done: bool = False
    stopped: bool = False
    error: BaseException | None = None

    def begin(self) -> threading.Thread:
        """Start the thread, which waits for its turn."""
        thread = threading.Thread(target=self._work, daemon=True, name="meo-hf batch")
        thread.start()
        return thread

    def _work(self) -> None:
        try:
            self._wait()
            with torch.no_grad():
                self.step.run()
        except _Stopped:
            pass
        except BaseException as error:  # the thread that waits raises it
            self.error = error
        finally:
            self.done, self.at = True, None
            self.rests.set()

    def _wait(self) -> None:
        self.go.wait()
        self.go.clear()
        if self.stopped:
            raise _Stopped

    def rest(self, layer: str) -> None:
        """Stand before a layer until told to go on; called in the batch's own thread."""
        self.at = layer
        self.rests.set()
        self._wait()

    def go_on(self) -> None:
        """Let the thread run until it stands before its next layer or is done; raises what it raised."""
        self.step.enter()
        self.rests.clear()
        self.at = None
        self.go.set()
        while not self.rests.wait(0.5):  # a wait without an end could not be interrupted everywhere
            pass
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the thread where it stands."""
        self.stopped = True
        self.go.set()


def run_by_layer(model: PreTrainedModel, paths: Sequence[str], steps: Sequence[Step]) -> None:
    """Run steps through all layers of the stacks in which `paths` lie, a layer after the other.

    Weights that accelerate offloads are loaded once per layer.
    """
    passes = [_Pass(step) for step in steps]
    threads: dict[threading.Thread, _Pass] = {}
    layers = layers_around(model, paths)

    def before(path: str) -> Callable[..., None]:
        return lambda *_: threads[threading.current_thread()].rest(path)

    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(before(path), prepend=True).remove)
        try:
            threads.update({one.begin(): one for one in passes})
            for one in passes:
                one.go_on()
            while waiting := [one for one in passes if not one.done]:
                path = waiting[0].at or ""
                with loaded(layers[path]):
                    for one in waiting:
                        if one.at == path:
                            one.go_on()
        finally:
            for one in passes:
                one.stop()
            for thread in threads:
                thread.join()


def layers_around(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Return all layers, by path, of the outermost lists of layers in which modules lie."""
    stacks = []
    for path in paths:
        parts = path.split(".")
        prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
        stacks += [prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), nn.ModuleList)][:1]
    return {
        f"{prefix}.{name}": layer
        for prefix in dict.fromkeys(stacks)
        for name, layer in model.get_submodule(prefix).named_children()
    }


def is_offloaded(model: nn.Module) -> bool:
    """Return whether accelerate loads some of a model's weights only for the call that needs them."""
    return any(True for module in model.modules() for _ in _offloading(module))


def _offloading(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    return (one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False))


@contextmanager
def loaded(layer: nn.Module) -> Iterator[None]:
    """Keep what accelerate offloads of a layer in memory meanwhile."""
    held: list[tuple[nn.Module, Any]] = []
    try:
        for module in layer.modules():
            for one in _offloading(module):
                one.pre_forward(module)
                one.offload = False
                held.append((module, one))
        yield
    finally:
        for module, one in held:
            one.offload = True
            one.post_forward(module, None)
