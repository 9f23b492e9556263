"""Tiny sources, MEO models, tokenizers and texts for the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from moe_tiny import VOCAB, tiny_moe
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def meo_of(stock: PreTrainedModel, **meo: Any) -> PreTrainedModel:
    """Return the MEO model with a stock model's weights."""
    known = {k: v for k, v in stock.config.to_dict().items() if k not in ("model_type", "architectures")}
    settings = {"level": "segment", "segment_length": 4, **meo}
    config = meo_config_class(type(stock.config)).from_dict({**known, "meo": settings})
    model = meo_model_class(type(stock))(config).eval()
    model.load_state_dict(stock.state_dict())
    return model


def words_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words w0, w1, ..."""
    vocabulary = {**{f"w{i}": i for i in range(VOCAB - 1)}, "<unk>": VOCAB - 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(count: int, seed: int = 0) -> str:
    """Draw a text of words that the tokenizer knows."""
    drawn = torch.randint(5, VOCAB - 1, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in drawn.tolist())


def windows_of(rows: int = 5, length: int = 16) -> Tensor:
    """Return the tokens of such a text in windows."""
    return torch.tensor([int(word[1:]) for word in words(rows * length).split()]).reshape(rows, length)


def saved_pair(folder: Path, family: str = "mixtral", text: int = 100, **meo: Any) -> tuple[Path, Path, Path]:
    """Write a source with a tokenizer, its MEO model, and a text."""
    stock = tiny_moe(family)
    stock.save_pretrained(folder / "source")
    words_tokenizer().save_pretrained(folder / "source")
    meo_of(stock, **meo).save_pretrained(folder / "meo")
    (folder / "text.txt").write_text(words(text), "utf-8")
    return folder / "source", folder / "meo", folder / "text.txt"


def silent(what: str) -> None:
    """Say nothing."""
