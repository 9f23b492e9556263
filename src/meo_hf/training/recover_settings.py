"""The options of a recovery."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from meo_hf.errors import UsageError
from meo_hf.training.distillation import DistillationWeights

Train = Literal["all", "routers", "adapters"]
WINDOW = 512
HELD_OUT = 0.05
_RATES = {"all": 1e-4, "routers": 1e-3, "adapters": 1e-3}


@dataclass(frozen=True)
class RecoverySettings:
    """What is trained, on how much, and how. Raises UsageError for values that make no sense.

    `tokens` or `steps` say how long, by default one pass over the data; a shorter corpus is repeated. `window` None
    means 512 tokens, or as many as the models have positions. `held_out` is the share of the windows, the last ones,
    that is measured before and after, and not trained on. `learning_rate` None means 1e-4, for routers and adapters
    1e-3. `dtype` is that of computation, by default bfloat16 on a GPU that has it and float32 elsewhere; weights are
    trained in float32 and written in the type that they had.
    """

    train: Train = "all"
    tokens: int | None = None
    steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    window: int | None = None
    learning_rate: float | None = None
    warmup_ratio: float = 0.05
    kl_weight: float = 1.0
    lm_weight: float = 0.0
    hidden_weight: float = 0.0
    ffn_weight: float = 0.0
    temperature: float = 1.0
    rank: int | None = None
    held_out: float | None = None
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    gradient_checkpointing: bool = False
    save_steps: int | None = None

    def __post_init__(self) -> None:
        if self.train not in get_args(Train):
            raise UsageError(f"--train {self.train!r} is unknown: give one of {', '.join(get_args(Train))}")
        if self.tokens is not None and self.steps is not None:
            raise UsageError("--tokens and --steps both say how long to train: leave one of them out")
        for name in ("tokens", "steps", "batch_size", "accumulation", "rank", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_option(name)} is {value}: give a whole number from 1 on")
        if self.window is not None and self.window < 4:
            raise UsageError(f"--window is {self.window}: give a whole number from 4 on")
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"--learning-rate is {self.learning_rate}: give a number above 0")
        for name in ("warmup_ratio", "held_out"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{_option(name)} is {value}: give a share from 0 to below 1")
        if self.rank is not None and self.train != "adapters":
            raise UsageError(f"--rank has no effect with --train {self.train}: leave it out")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UsageError(f"--dtype {self.dtype!r} is unknown: give one of float32, bfloat16")
        self._check_device()
        _ = self.weights

    def _check_device(self) -> None:
        try:
            kind = self.place.type
            torch.ones(1, device=self.place).item()
        except (RuntimeError, AssertionError):  # no such device, or one that this torch cannot use
            raise UsageError(f"--device {self.device!r} cannot be used here: give another, like cpu") from None
        if kind == "cuda" and self.place.index not in (None, torch.cuda.current_device()):
            raise UsageError(
                f"--device {self.device!r}: the Trainer uses the first GPU; choose with CUDA_VISIBLE_DEVICES"
            )

    @property
    def place(self) -> torch.device:
        """The device: the first GPU unless told, the CPU where there is none."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def bf16(self) -> bool:
        """Whether computation runs in bfloat16."""
        if self.dtype is not None:
            return self.dtype == "bfloat16"
        return self.place.type == "cuda" and torch.cuda.is_bf16_supported()

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return _RATES[self.train] if self.learning_rate is None else self.learning_rate

    @property
    def weights(self) -> DistillationWeights:
        """The parts of the loss."""
        return DistillationWeights(
            self.kl_weight, self.lm_weight, self.hidden_weight, self.ffn_weight, self.temperature
        )

    def as_run(self) -> dict[str, Any]:
        """Return every option with the value that a run uses, as JSON has it."""
        place = {"device": self.place.type, "dtype": "bfloat16" if self.bf16 else "float32"}
        return {**asdict(self), "learning_rate": self.rate, **place}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
