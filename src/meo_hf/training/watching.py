"""Watch the experts of a model in training: balance loss, load of each expert, entropy of the gates, dead experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging

from meo_hf.errors import UsageError
from meo_hf.training.balance import add_balance
from meo_hf.training.load_plot import plot_load
from meo_hf.training.usage import Load, Usage

logger = logging.get_logger(__name__)
MOST_SCALARS = 512


class ExpertCallback(TrainerCallback):
    """Add what the experts did since the last log to the Trainer's training logs; made by `watch`.

    `aux_loss` is the mean balance loss; `experts/entropy` the mean entropy of the gates in nats and `experts/dead` the
    number of experts that no group selected, over all layers. `experts/PATH/...` are those of one router, with
    `load_E`, expert E's share of all gates, or only `load_max` where there would be more than 512 numbers. Groups of
    padding don't count, nor does evaluation. When training ends, `expert_load.json` and a heat map, `expert_load.png`,
    go to the output folder; after a resumption they count from there.
    """

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._whole: dict[str, list[float]] = {}
        self._last: list[Load] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._whole, self._last = {}, []
        self._usage.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to the logs of a training step."""
        if logs is None or "loss" not in logs:
            return
        values = self._read()
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting; write the loads of the whole run and since the last log."""
        self._read()
        self._usage.stop()
        if state.is_world_process_zero:
            self._write(Path(args.output_dir))

    def _read(self) -> dict[str, float]:
        loads, balance = self._usage.read()
        for load in loads:
            sums = self._whole.setdefault(load.layer, [0.0] * len(load.shares))
            self._whole[load.layer] = [s + share * load.groups for s, share in zip(sums, load.shares, strict=True)]
        if any(load.groups for load in loads) or not self._last:
            self._last = loads
        values = {} if balance is None else {"aux_loss": balance}
        values["experts/entropy"] = sum(load.entropy for load in loads) / len(loads)
        values["experts/dead"] = sum(load.dead for load in loads)
        every = sum(len(load.shares) for load in loads) <= MOST_SCALARS
        for load in loads:
            name = f"experts/{load.layer}"
            values |= {f"{name}/entropy": load.entropy, f"{name}/dead": load.dead}
            values |= {f"{name}/load_{e}": s for e, s in enumerate(load.shares)} if every else {}
            values |= {} if every else {f"{name}/load_max": max(load.shares)}
        return values

    def _write(self, folder: Path) -> None:
        whole = {layer: [s / (sum(sums) or 1) for s in sums] for layer, sums in self._whole.items()}
        last = {load.layer: load.shares for load in self._last}
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"whole run": whole, "since the last log": last}, indent=1)
        (folder / "expert_load.json").write_text(text + "\n", encoding="utf-8")
        try:
            plot_load(whole, last, folder / "expert_load.png")
        except ImportError as error:
            logger.warning(f"No heat map of the experts' load: {error}")


class _ShortScreen(TrainerCallback):
    """Keep single layers' numbers from the screen; trackers and `log_history` have got them by then."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = {} if logs is None else logs
        for name in [name for name in values if name.startswith("experts/") and name.count("/") > 1]:
            del values[name]


def watch(trainer: Trainer) -> ExpertCallback:
    """Make a Trainer log what the experts of its model do, to all its trackers; returns the callback.

    It also sees to it that the loss carries the balance loss where the Trainer takes the labels from the model: label
    smoothing, a `compute_loss_func`, TRL; nobody else should add `outputs.aux_loss` then. A function, because trackers
    only hear what a callback before them adds to the logs. Raises UsageError for a model without merged feed-forwards,
    and for several GPUs in one process.
    """
    if trainer.args.n_gpu > 1:
        raise UsageError(
            "this Trainer would copy the model to several GPUs in one process, where nothing can be counted: start it "
            "with torchrun or accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES)"
        )
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, ExpertCallback) for callback in callbacks):
        raise UsageError("this Trainer is watched already")
    usage = Usage(trainer.model)  # type: ignore[arg-type]
    callback = ExpertCallback(usage)
    add_balance(trainer, usage.context)
    screens = [i for i, c in enumerate(callbacks) if isinstance(c, (ProgressCallback, PrinterCallback)) or _notebook(c)]
    callbacks.insert(min(screens, default=len(callbacks)), _ShortScreen())
    callbacks.insert(0, callback)
    return callback


def _notebook(callback: TrainerCallback) -> bool:
    return type(callback).__name__ == "NotebookProgressCallback"
