"""What a recovery reads: files of text, JSON lines or CSV, as windows of tokens to train on and to measure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from meo_hf.errors import UsageError
from meo_hf.texts import TABLES, blocks, frame_of, read_text, records
from meo_hf.training.distillation import IGNORED
from meo_hf.training.recover_settings import HELD_OUT

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Corpus:
    """Windows [N, S] to train on and held-out ones, and what files they came from: name, bytes, sha256."""

    training: Tensor
    held_out: Tensor
    files: list[dict[str, Any]]


class Windows(Dataset):
    """Windows as rows of a batch; every token counts but a window's first, which nothing predicts.

    In a masked language model 15 % of the tokens are masked, the same in every pass, and every token counts.
    """

    def __init__(self, rows: Tensor, tokenizer: Any, masked: bool, seed: int) -> None:
        self._rows, self._inputs, self._first = rows, rows, 0 if masked else 1
        if masked:
            drawn = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
            special = torch.isin(rows, torch.tensor(tokenizer.all_special_ids, dtype=rows.dtype))
            self._inputs = torch.where(drawn & ~special, tokenizer.mask_token_id, rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        inputs, labels = self._inputs[index].long(), self._rows[index].long()
        labels[: self._first] = IGNORED
        return {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}


def read_corpus(
    data: Sequence[str | Path],
    validation: Sequence[str | Path],
    column: str,
    tokenizer: Any,
    window: int,
    masked: bool,
    held_out: float | None,
) -> Corpus:
    """Read, tokenise and cut all files.

    Documents are put one behind the other, with the tokenizer's end-of-text token between them where it has one.
    Raises UsageError for a file that cannot be read, a column that is missing, too little text, or a tokenizer that
    has no mask for a masked language model.
    """
    if not data:
        raise UsageError("there is no --data: give a file of text")
    if validation and held_out is not None:
        raise UsageError("--validation and --held-out both say what to measure on: leave one of them out")
    if masked and tokenizer.mask_token_id is None:
        raise UsageError("the tokenizer has no mask token, which a masked language model needs: give one that has")
    rows = _rows(data, "--data", column, tokenizer, window, masked)
    files = [_described(path) for path in [*data, *validation]]
    if validation:
        return Corpus(rows, _rows(validation, "--validation", column, tokenizer, window, masked), files)
    count = math.ceil(len(rows) * (HELD_OUT if held_out is None else held_out))
    if count >= len(rows):
        raise UsageError(
            f"--data fills {len(rows)} window(s) of {window} tokens, of which {count} would be held out: give more "
            "text, a smaller --window, or --held-out 0"
        )
    return Corpus(rows[: len(rows) - count], rows[len(rows) - count :], files)


def _rows(paths: Sequence[str | Path], option: str, column: str, tokenizer: Any, window: int, masked: bool) -> Tensor:
    end = [] if masked or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    for path in paths:
        for document in documents(path, option, column):
            if document.strip():
                separator = end if pieces else []
                ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
                pieces.append(torch.tensor(separator + ids, dtype=torch.int32))
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
    lead, tail = frame_of(tokenizer)
    rows = blocks(tokens, lead, tail if masked else [], window)
    if not len(rows):
        raise UsageError(
            f"{option} holds {len(tokens)} tokens, too few for a window of {window}: give more, or a smaller --window"
        )
    return rows


def documents(path: str | Path, option: str, column: str) -> Iterator[str]:
    """Yield the texts of a file: of .json, .jsonl and .csv a column, any other file as a whole."""
    if Path(path).suffix.lower() not in TABLES:
        yield read_text(path, option)
        return
    for number, row in enumerate(records(path, option), 1):
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            have = ", ".join(map(str, row)) if isinstance(row, dict) else "no columns"
            raise UsageError(
                f"{option} {path}: row {number} has no text in column {column!r} (it has {have}): name the right one "
                "with --text-column"
            )
        yield text


def _described(path: str | Path) -> dict[str, Any]:
    """Name a file by what it holds; where it lies is nobody's business."""
    content = Path(path).read_bytes()
    return {"file": Path(path).name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
