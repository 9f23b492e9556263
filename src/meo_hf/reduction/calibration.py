"""Text that shows what experts do: rows of tokens of one or several domains, weighted.

Legend: N rows of all domains, B of a batch, S positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meo_hf.errors import UsageError
from meo_hf.reduction.calibration_rows import domain_rows, is_plain


@dataclass(frozen=True)
class Calibration:
    """What to read: `texts` as `--calibration` takes them, and `samples` rows of at most `window` tokens of each.

    A text is FILE or FILE=WEIGHT. A .jsonl, .json, .csv or .parquet file, and a data set of the Hub (`owner/name`,
    `owner/name:config` or `owner/name:config:split`), holds a row in `column`, by default `messages` where there is
    one, else `text`; a list of messages is formatted by the tokenizer's chat template. Any other file is UTF-8 text
    and cut into windows. Where a text has more rows, `seed` draws them.
    """

    texts: tuple[str, ...]
    window: int = 512
    samples: int = 128
    seed: int = 0
    batch_size: int = 4
    column: str | None = None

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError("there is no --calibration: give a file of text like the model's own use")
        for name in ("window", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} of the calibration is too small: give at least 1")


@dataclass(frozen=True)
class Domain:
    """One text: its share of all weight, and how many rows and tokens it gave."""

    name: str
    weight: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class Batch:
    """Rows of tokens [B, S], padded on the right: which are real, and what each weighs, 0 for padding."""

    input_ids: Tensor
    attention_mask: Tensor
    token_weights: Tensor


@dataclass(frozen=True)
class CalibrationRows:
    """Rows [N, S] of all domains, longest first. Weights are float64; on average a token weighs 1."""

    input_ids: Tensor
    attention_mask: Tensor
    token_weights: Tensor
    domains: tuple[Domain, ...]
    settings: Calibration

    def batches(self) -> list[Batch]:
        """Return the rows in batches, each as wide as its longest row."""
        made = []
        for at in range(0, len(self.input_ids), self.settings.batch_size):
            rows = slice(at, at + self.settings.batch_size)
            width = int(self.attention_mask[rows].sum(1).max())
            parts = (self.input_ids, self.attention_mask, self.token_weights)
            made.append(Batch(*(part[rows, :width] for part in parts)))
        return made

    @property
    def sha256(self) -> str:
        """A hash of what is read: tokens, which are real, and their weights."""
        found = hashlib.sha256(str(tuple(self.input_ids.shape)).encode())
        for part in (self.input_ids, self.attention_mask, self.token_weights):
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what a report says of it; of files their names alone."""
        settings = {key: value for key, value in asdict(self.settings).items() if key not in ("texts", "batch_size")}
        return {
            **settings,
            "domains": [asdict(domain) for domain in self.domains],
            "rows": len(self.input_ids),
            "tokens": int(self.attention_mask.sum()),
            "sha256": self.sha256,
        }


def read_calibration(settings: Calibration, tokenizer: Any) -> CalibrationRows:
    """Read and tokenise all texts; every one is used.

    The tokens of a text weigh its weight together, relative to the others'. Raises UsageError for a text that cannot
    be read or gives no row, UnsupportedError where the package `datasets` is needed and missing.
    """
    parsed = [parse_text(text) for text in settings.texts]
    if settings.column is not None and all(is_plain(name) for name, _ in parsed):
        raise UsageError("--column has no effect on plain text: leave it out")
    found = []
    for name, _ in parsed:
        rows = domain_rows(name, tokenizer, settings.window, settings.samples, settings.seed, settings.column)
        if not rows:
            raise UsageError(f"--calibration {name} gives no row of text: give one that does, or leave it out")
        found.append(rows)
    return weighted_rows(settings, [(_label(name), weight) for name, weight in parsed], found, _padding(tokenizer))


def weighted_rows(
    settings: Calibration, named: Sequence[tuple[str, float]], found: Sequence[list[list[int]]], padding: int = 0
) -> CalibrationRows:
    """Return rows of tokens of domains, by their names and weights, as one padded whole."""
    tokens = [sum(map(len, rows)) for rows in found]
    shares = [weight / sum(weight for _, weight in named) for _, weight in named]
    each = [share * sum(tokens) / own if len(named) > 1 else 1.0 for share, own in zip(shares, tokens, strict=True)]
    rows = [(row, weight) for own, weight in zip(found, each, strict=True) for row in own]
    rows.sort(key=lambda pair: -len(pair[0]))
    width = len(rows[0][0])
    ids = torch.full((len(rows), width), padding)
    mask, weights = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.float64)
    for at, (row, weight) in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
        weights[at, : len(row)] = weight
    domains = tuple(
        Domain(name, share, len(own), count)
        for (name, _), share, own, count in zip(named, shares, found, tokens, strict=True)
    )
    return CalibrationRows(ids, mask, weights, domains, settings)


def parse_text(spec: str) -> tuple[str, float]:
    """Return name and weight of `FILE` or `FILE=WEIGHT`; a file whose whole name it is comes first."""
    name, equals, tail = spec.rpartition("=")
    if not equals or not name or Path(spec).expanduser().exists():
        return spec, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return spec, 1.0
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"--calibration {spec}: a weight is above 0; leave the text out instead")
    return name, weight


def _label(name: str) -> str:
    """Name a text without saying where it lies."""
    path = Path(name).expanduser()
    return path.name if path.exists() else name


def _padding(tokenizer: Any) -> int:
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in found if number is not None), 0)
