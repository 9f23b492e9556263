"""Text as models read it: files, tokenizers, and windows of as many tokens each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from meo_hf.errors import SourceError, UsageError

TABLES = (".json", ".jsonl", ".csv")
"""Endings of files of text that hold rows."""


def read_text(path: str | Path, option: str = "--text") -> str:
    """Read a UTF-8 file; raises UsageError where that cannot be done."""
    try:
        return Path(path).read_text("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {path} is no UTF-8 text (byte {error.start}): convert it") from None
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror}): give a text file") from None


def records(path: str | Path, option: str = "--text") -> Iterator[Any]:
    """Yield the rows of a .json, .jsonl or .csv file; raises UsageError where it cannot be read."""
    suffix, content = Path(path).suffix.lower(), read_text(path, option)
    try:
        if suffix == ".csv":
            yield from _csv_records(content)
        elif content.lstrip().startswith("["):
            yield from json.loads(content)
        else:
            yield from (json.loads(line) for line in content.split("\n") if line.strip())
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{option} {path} cannot be read as {suffix[1:]} ({error}): repair it") from None


def _csv_records(content: str) -> list[dict[str, Any]]:
    """Read rows whose fields may be whole books; the limit of fields is the process's, so it is set back."""
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(content) + 1))
    try:
        return list(csv.DictReader(io.StringIO(content, newline="")))
    finally:
        csv.field_size_limit(limit)


def load_tokenizer(folder: str | Path, name: str, **options: Any) -> Any:
    """Load the tokenizer of a model; raises SourceError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:  # transformers raises many kinds; each means that there is no usable tokenizer
        tokenizer = None
    if tokenizer is None or not tokenizer.get_vocab():
        raise SourceError(f"{name} has no tokenizer that can be loaded: put its tokenizer files beside its weights")
    return tokenizer


def frame_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    at = next(starts, None)
    return ([], []) if at is None else (whole[:at], whole[at + len(bare) :])


def cut_windows(tokenizer: Any, text: str, window: int, limit: int) -> Tensor:
    """Return the first windows [N, window] of a text, one after the other without overlap.

    Where the tokenizer begins texts with a special token, every window does. Raises UsageError for a text that does
    not fill one.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    rows = blocks(tokens, frame_of(tokenizer)[0], [], window)[:limit]
    if not len(rows):
        raise UsageError(f"--text holds {len(tokens)} tokens, too few for a window of {window}: give more, or --window")
    return rows


def blocks(tokens: Tensor, lead: list[int], tail: list[int], window: int) -> Tensor:
    """Cut tokens [T] into windows [N, window], each between the same first and last tokens; a rest is left out."""
    size = window - len(lead) - len(tail)
    count = len(tokens) // size
    rows = tokens[: count * size].reshape(count, size)
    before, behind = (torch.tensor(end, dtype=tokens.dtype).expand(count, -1) for end in (lead, tail))
    return torch.cat([before, rows, behind], 1)
