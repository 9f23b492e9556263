"""Eight kinds of text that differ clearly, from registry packages and Python's own library, and windows of them."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[1] / "quality"))

import data
from text_data import WIKI, Split, corpora, parse_leads

from meo_hf.demo import fetch

WINDOW = 128
HELD_OUT = 8


def to_train_on(split: Split, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """Return windows [count, WINDOW] in a fixed random order; raises ValueError if the text has fewer."""
    windows = cut(split.train, tokenizer)
    if len(windows) < count:
        raise ValueError(f"{count} windows wanted, the text has {len(windows)}")
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:count]]


def held_out(split: Split, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return windows [HELD_OUT, WINDOW] of other documents, evenly spread."""
    windows = cut(split.held_out, tokenizer)
    return windows[torch.linspace(0, len(windows) - 1, HELD_OUT).long()]


def cut(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return windows [N, WINDOW] of all documents one after the other, each followed by the end token."""
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def splits() -> dict[str, Split]:
    """Return all texts by name, sorted; documents of a text are split once and for all."""
    found = {
        **corpora(),
        "code": Split.of(shuffled(standard_library()), 10),
        "french": Split.of(shuffled(french_leads()), 20),
        "reviews": labelled("rotten_tomatoes"),
        "sport": labelled("bbc", "sports"),
        "tweets": labelled("tweets"),
    }
    return dict(sorted(found.items()))


def standard_library() -> list[str]:
    """Return the sources of the top-level modules of this Python's own library."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text("utf-8") for path in paths]


def french_leads() -> list[str]:
    """Return the first paragraphs of French Wikipedia articles."""
    text = (fetch(WIKI, data.CACHE) / "summaries_fr-fr.json").read_text("utf-8")
    return [f"{lead.title}\n{lead.extract}" for lead in parse_leads(text)]


def labelled(name: str, label: str | None = None) -> Split:
    """Return the texts of a classification set, of one label or of all."""
    found = data.load(name)
    wanted = range(len(found.labels)) if label is None else [found.labels.index(label)]
    train, test = ([text for text, number in part if number in wanted] for part in (found.train, found.test))
    return Split(train, test)


def shuffled(documents: list[str]) -> list[str]:
    """Return documents in a fixed random order."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))
    return [documents[i] for i in order.tolist()]
