"""Rows to train tiny models on, and a tokenizer of words for them."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from moe_contracts import meo_of_moe
from moe_tiny import tiny_moe
from tiny import meo_of, spread, tiny_config, tiny_dense
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

WORDS = 90


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0 to w89, with the special tokens of the tiny models."""
    special = {"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3}
    words = {f"w{i}": i + len(special) for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def sentence(drawn: random.Random, low: int = 3, high: int = 9) -> str:
    """Draw words."""
    return " ".join(f"w{drawn.randrange(WORDS)}" for _ in range(drawn.randint(low, high)))


def labelled_rows(count: int, seed: int = 0, classes: int = 3) -> Dataset:
    """Return rows of different lengths whose label can be learned from their first word."""
    drawn, tokenizer = random.Random(seed), word_tokenizer()
    texts = [sentence(drawn) for _ in range(count)]
    return Dataset.from_list([{**tokenizer(t), "label": int(t.split()[0][1:]) % classes} for t in texts])


def text_rows(count: int, seed: int = 0) -> Dataset:
    """Return rows of different lengths without labels."""
    drawn, tokenizer = random.Random(seed), word_tokenizer()
    return Dataset.from_list([dict(tokenizer(sentence(drawn, 6, 14))) for _ in range(count)])


def classifier(seed: int = 0, **meo: Any) -> PreTrainedModel:
    """Return a BERT classifier whose experts differ in nothing but what they will learn."""
    torch.manual_seed(seed)
    dense = spread(BertForSequenceClassification(tiny_config("bert", num_labels=3)), seed)
    return meo_of(dense, **{"level": "sequence", "top_k": 2, **meo})


def mixture(seed: int = 0, **meo: Any) -> PreTrainedModel:
    """Return a converted mixture of experts whose files hold one tensor per expert."""
    torch.manual_seed(seed)
    return meo_of_moe(tiny_moe("mixtral", seed), segment_length=4)


def decoder(seed: int = 0, **meo: Any) -> PreTrainedModel:
    """Return a causal language model with short segments."""
    torch.manual_seed(seed)
    return meo_of(tiny_dense("llama"), **{"level": "segment", "segment_length": 4, "top_k": 2, **meo})
