"""What the layer benchmarks time: shapes of experts, and a grid of cells, each a shape with a batch and a level.

Legend: B rows, T tokens per row, D hidden features, F intermediate features, E experts, K selected.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from meo_hf.benchmark.options import DTYPES, at_least, check_place, option
from meo_hf.errors import UsageError

LEVELS = ("sequence", "segment", "task")
SEGMENT_LENGTH = 256
_FLAGS = ("gated", "biases", "transposed")


@dataclass(frozen=True)
class Shape:
    """Experts of one feed-forward; gated ones compute silu(gate) * up, others gelu(up)."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool = False
    biases: bool = False
    transposed: bool = False
    """whether experts are stored [E, I, O]"""

    @property
    def first_outputs(self) -> int:
        """Output features of the first projection."""
        return self.intermediate * (1 + self.gated)

    @property
    def weights(self) -> int:
        """Elements of one expert's two weights."""
        return self.hidden * (self.first_outputs + self.intermediate)

    @property
    def parameters(self) -> int:
        """Elements of one expert, biases included."""
        return self.weights + self.biases * (self.first_outputs + self.hidden)

    def __str__(self) -> str:
        flags = "".join(f", {flag}" for flag in _FLAGS if getattr(self, flag))
        return f"{self.name} ({self.hidden} x {self.intermediate}, {self.experts} experts{flags})"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("bert-base", 768, 3072, 16, 4, biases=True),
        Shape("olmoe", 2048, 1024, 64, 8, gated=True),
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, gated=True),
        Shape("gpt-oss-20b", 2880, 2880, 32, 4, gated=True, biases=True, transposed=True),
        Shape("mixtral", 4096, 14336, 8, 2, gated=True),
    )
}


def shape_of(text: str) -> Shape:
    """Return a shape of SHAPES, or one spelled out as HIDDENxINTERMEDIATExEXPERTSxTOP_K[xgated][xbiases][xtransposed].

    Raises UsageError for any other text.
    """
    if text in SHAPES:
        return SHAPES[text]
    found = re.fullmatch(rf"(\d+)x(\d+)x(\d+)x(\d+)((?:x(?:{'|'.join(_FLAGS)}))*)", text)
    if found is None:
        raise UsageError(
            f"--shape {text!r} is unknown: give {', '.join(SHAPES)}, or numbers like 64x96x4x2 or 64x96x4x2xgated "
            f"(hidden, intermediate, experts, top_k; then {', '.join(_FLAGS)})"
        )
    hidden, intermediate, experts, top_k = map(int, found.groups()[:4])
    if min(hidden, intermediate, experts, top_k) < 1 or top_k > experts:
        raise UsageError(f"--shape {text!r}: give numbers from 1 on, and no higher top_k than experts")
    return Shape(text, hidden, intermediate, experts, top_k, **{flag: True for flag in found[5].split("x") if flag})


@dataclass(frozen=True)
class Cell:
    """One point of the grid. Raises UsageError for one that makes no sense."""

    shape: Shape
    batch: int
    tokens: int
    top_k: int
    level: str
    dtype: str
    segment_length: int = SEGMENT_LENGTH

    def __post_init__(self) -> None:
        if self.top_k > self.shape.experts:
            raise UsageError(
                f"--top-k {self.top_k} is more than the {self.shape.experts} experts of {self.shape.name}: lower it"
            )
        if self.level == "segment" and self.tokens % self.group_tokens:
            raise UsageError(
                f"--tokens {self.tokens} is no multiple of --segment-length {self.segment_length}: give whole segments"
            )

    @property
    def group_tokens(self) -> int:
        """Tokens that share a gate."""
        if self.level == "task":
            return self.batch * self.tokens
        return min(self.tokens, self.segment_length) if self.level == "segment" else self.tokens

    @property
    def all_tokens(self) -> int:
        """Tokens of all rows."""
        return self.batch * self.tokens

    @property
    def groups(self) -> int:
        """Groups of tokens that share a gate."""
        return self.all_tokens // self.group_tokens

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize

    def key(self) -> dict[str, Any]:
        """Return what tells this cell from all others; segments only where there are some."""
        key = asdict(self)
        if self.level != "segment":
            del key["segment_length"]
        return key

    @classmethod
    def of(cls, key: dict[str, Any]) -> Cell:
        """Return the cell that `key` described."""
        return cls(**{**key, "shape": Shape(**key["shape"])})

    def __str__(self) -> str:
        segments = f" of {self.group_tokens} tokens" if self.level == "segment" else ""
        return (
            f"{self.shape}, batch {self.batch}, {self.tokens} tokens, top_k {self.top_k}, {self.level}{segments}, "
            f"{self.dtype}"
        )


@dataclass(frozen=True)
class LayerSettings:
    """The options of a run. Raises UsageError for one that makes no sense."""

    shape: tuple[str, ...] = ("bert-base",)
    batch: tuple[int, ...] = (8,)
    tokens: tuple[int, ...] = (128,)
    top_k: tuple[int, ...] = ()
    """empty for each shape's own"""
    level: tuple[str, ...] = ("sequence",)
    dtype: tuple[str, ...] = ("float32",)
    segment_length: int = SEGMENT_LENGTH
    device: str = "cpu"
    rounds: int = 7
    seed: int = 0
    graphs: bool = False
    """whether a GPU replays captured calls"""

    def __post_init__(self) -> None:
        for name in ("shape", "batch", "tokens", "top_k", "level", "dtype"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not (values or name == "top_k"):
                raise UsageError(f"{option(name)} is {_listed(values)!r}: give each value once")
            for value in values:
                if isinstance(value, int):
                    at_least(name, value, 1)
        for name in ("segment_length", "rounds"):
            at_least(name, getattr(self, name), 1)
        for level in self.level:
            if level not in LEVELS:
                raise UsageError(f"--level {level!r} is unknown: give one of {', '.join(LEVELS)}")
        for dtype in self.dtype:
            check_place(dtype, self.device)
        if self.graphs and not self.device.startswith("cuda"):
            raise UsageError(f"--graphs needs a CUDA device, and --device is {self.device!r}: leave it out")
        self.cells()

    def cells(self) -> list[Cell]:
        """Return the grid; cells that share their experts follow each other."""
        return [
            Cell(
                shape, batch, tokens, top_k, level, dtype, self.segment_length if level == "segment" else SEGMENT_LENGTH
            )
            for shape in map(shape_of, self.shape)
            for dtype, level, top_k, batch, tokens in product(
                self.dtype, self.level, self.top_k or (shape.top_k,), self.batch, self.tokens
            )
        ]

    def lasting(self) -> dict[str, Any]:
        """Return the options that all cells of a file must share."""
        return {name: getattr(self, name) for name in ("device", "rounds", "seed", "graphs")}

    def command(self, name: str) -> str:
        """Return the command line that repeats the run, every option spelled out."""
        words = ["meo-hf", "bench", name]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "graphs":  # of a GPU only
                words += [] if self.device == "cpu" or name != "layer" else [f"--{'' if value else 'no-'}graphs"]
            elif value != () and (field.name != "segment_length" or "segment" in self.level):
                words += [option(field.name), _listed(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


def _listed(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))
