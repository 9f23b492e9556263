"""The text that all variants of a comparison read, cut into windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from meo_hf.errors import SourceError, UsageError


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file; raises UsageError where that cannot be done."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path} is no UTF-8 text (byte {error.start}): convert it") from None
    except OSError as error:
        raise UsageError(f"--text {path} cannot be read ({error.strerror}): give a text file") from None


def load_tokenizer(folder: str | Path, name: str, **options: Any) -> Any:
    """Load the tokenizer of a model; raises SourceError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception:  # transformers raises many kinds; each means that there is no usable tokenizer
        tokenizer = None
    if tokenizer is None or not tokenizer.get_vocab():
        raise SourceError(f"{name} has no tokenizer that can be loaded: put its tokenizer files beside its weights")
    return tokenizer


def cut_windows(tokenizer: Any, text: str, window: int, limit: int) -> Tensor:
    """Return the first windows [N, window] of a text, one after the other without overlap.

    Where the tokenizer begins texts with a special token, every window does. Raises UsageError for a text that does
    not fill one.
    """
    begin = tokenizer.bos_token_id
    lead = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
    size = window - len(lead)
    count = min(len(tokens) // size, limit)
    if not count:
        raise UsageError(f"--text holds {len(tokens)} tokens, too few for a window of {window}: give more, or --window")
    rows = tokens[: count * size].reshape(count, size)
    return torch.cat([torch.tensor(lead, dtype=torch.long).expand(count, -1), rows], 1)
