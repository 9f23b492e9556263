"""Rows of tokens out of files of text, tables of texts or conversations, and data sets of the Hub."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.texts import TABLES, blocks, frame_of, read_text, records

OPTION = "--calibration"
_SHUFFLED = 10_000
"""Rows of a streamed data set among which each next one is drawn."""


def domain_rows(name: str, tokenizer: Any, window: int, samples: int, seed: int, column: str | None) -> list[list[int]]:
    """Return up to `samples` rows of at most `window` tokens, drawn by `seed` where there are more."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UsageError(f"{OPTION} {name} is a folder: give the files in it")
    if is_plain(name):
        return _windows(read_text(path, OPTION), tokenizer, window, samples, seed)
    if path.exists() and path.suffix.lower() in TABLES:
        found: Iterable[Any] = _drawn(list(records(path, OPTION)), seed)
    else:
        found = _data_set(name, path, seed)
    rows = (_row(one, column, name, tokenizer) for one in found)
    return [row[:window] for row in itertools.islice(filter(None, rows), samples)]


def is_plain(name: str) -> bool:
    """Return whether a text is a file without rows and columns."""
    path = Path(name).expanduser()
    return path.exists() and path.suffix.lower() not in (*TABLES, ".parquet")


def _windows(text: str, tokenizer: Any, window: int, samples: int, seed: int) -> list[list[int]]:
    """Cut a text into windows, each with the tokens that begin a text; one that fills none is one short row."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    lead = frame_of(tokenizer)[0]
    if window <= len(lead):
        raise UsageError(f"a window of {window} tokens has no room beside the {len(lead)} that begin every text")
    if len(tokens) < window - len(lead):
        return [lead + tokens.tolist()] if len(tokens) else []
    rows = blocks(tokens, lead, [], window)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
    return rows[drawn.sort().values].tolist()


def _drawn(rows: list[Any], seed: int) -> Iterator[Any]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return (rows[at] for at in order.tolist())


def _data_set(name: str, path: Path, seed: int) -> Iterable[Any]:
    """Read a parquet file or a data set of the Hub as a stream."""
    is_file = path.exists()
    if not is_file and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UsageError(f"{OPTION} {name} is neither a file here nor a data set of the Hub (owner/name)")
    try:
        import datasets
    except ImportError:
        raise UnsupportedError(f"{OPTION} {name} needs the package datasets: pip install datasets") from None
    try:
        if is_file:
            found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        else:
            hub, config, split = [*name.split(":"), "", ""][:3]
            found = datasets.load_dataset(hub, config or None, split=split or "train", streaming=True)
        return found.shuffle(seed=seed, buffer_size=_SHUFFLED)
    except Exception as error:  # datasets raises many kinds; each means that there is nothing to read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{OPTION} {name} cannot be opened as a data set ({reason})") from None


def _row(one: Any, column: str | None, name: str, tokenizer: Any) -> list[int]:
    """Tokenise one row of a table; empty where it holds no text."""
    own = column or ("messages" if isinstance(one, dict) and one.get("messages") else "text")
    value = one.get(own) if isinstance(one, dict) else None
    if isinstance(value, str):
        return list(tokenizer(value, verbose=False)["input_ids"]) if value.strip() else []
    if isinstance(value, list):
        return _conversation(value, name, tokenizer) if value else []
    have = ", ".join(map(str, one)) if isinstance(one, dict) else "no columns"
    raise UsageError(f"{OPTION} {name}: a row has no text or messages in column {own!r} (it has {have}): name another")


def _conversation(messages: list[Any], name: str, tokenizer: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            f"{OPTION} {name} holds conversations, but the tokenizer has no chat template: give plain text"
        )
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    except Exception as error:  # a template raises what its author chose
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{OPTION} {name}: the chat template refuses a conversation ({reason})") from None
