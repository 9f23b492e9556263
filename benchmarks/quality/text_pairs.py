"""Texts with answers: package descriptions with their one-line synopses, and cloze questions on Wikipedia leads."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from text_data import ASSETS, Lead

from meo_hf.errors import SourceError

MASK = "<mask>"
_APT = '#clear Acquire::Languages;\nAcquire::Languages { "en"; };\n'


@dataclass(frozen=True)
class Pair:
    """A text, what is asked about it (empty for a summary), and the answer."""

    text: str
    question: str
    answer: str


def package_lists(folder: Path = ASSETS) -> Path:
    """Let apt fetch the descriptions of the system's own Debian release into a folder; the system's lists stay.

    Raises SourceError where there is no apt or it cannot connect.
    """
    lists = folder / "apt"
    found = sorted(lists.glob("*_main_i18n_Translation-en*"), key=lambda path: path.stat().st_size)
    if not found:
        if shutil.which("apt-get") is None:
            raise SourceError(
                f"package descriptions come from apt, which this system lacks: put its lists into {lists}"
            )
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        settings = lists.with_suffix(".conf")
        settings.write_text(_APT, encoding="utf-8")
        command = ["apt-get", "-c", str(settings), "update", "-o", f"Dir::State::Lists={lists.absolute()}"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(lists.glob("*_main_i18n_Translation-en*"), key=lambda path: path.stat().st_size)
        if not found:
            reason = (done.stderr.strip().splitlines() or ["no English descriptions"])[-1]
            raise SourceError(f"apt-get update failed ({reason}): connect, or put its lists into {lists}")
    return found[-1]


def read_list(path: Path) -> str:
    """Return a list's text, whatever apt packed it with."""
    if path.suffix not in (".lz4", ".xz", ".gz", ".zst"):
        return path.read_text(encoding="utf-8", errors="replace")
    done = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(path)], capture_output=True)
    if done.returncode:
        raise SourceError(f"{path} cannot be unpacked ({done.stderr.decode(errors='replace').strip()})")
    return done.stdout.decode("utf-8", "replace")


def parse_descriptions(text: str, least: int = 15) -> list[Pair]:
    """Read paragraphs of a `Translation-en` list: long description -> synopsis, by package name.

    Packages of one source often begin alike: of all that share their first paragraph only the first is kept, so that
    none is trained on and tested. Descriptions of fewer than `least` words are left out.
    """
    pairs: dict[str, Pair] = {}
    for entry in sorted(text.split("\n\n")):
        match = re.search(r"^Description-en: (.*(?:\n .*)*)", entry, re.MULTILINE)
        if match is None:
            continue
        synopsis, _, body = match[1].partition("\n")
        paragraphs = [" ".join(part.split()) for part in re.split(r"\n \.\s*(?:\n|$)", "\n" + body)]
        words = " ".join(paragraphs)
        if len(words.split()) >= least and synopsis.strip():
            pairs.setdefault(paragraphs[0], Pair(words, "", synopsis.strip()))
    return list(pairs.values())


_SENTENCE = re.compile(r"(?<=[a-z0-9)\"”][.!?]) +(?=[A-Z\"“])")
_SPAN = re.compile(r"\d[\d,.]*\d|\d+|(?:[A-Z][\w'\u2019-]+)(?: (?:of |the |de |von )?[A-Z][\w'\u2019-]+)*")


def cloze(lead: Lead, sentences: int = 2) -> Pair | None:
    """Make a question of a lead: one of its first sentences with a number or a name masked; None if there is none.

    The text is the whole lead, in which the answer stands; which of the spans is masked depends on the title alone.
    A sentence's first word is no name, unless it begins the title.
    """
    spans = []
    for sentence in _SENTENCE.split(lead.extract)[:sentences]:
        for match in _SPAN.finditer(sentence):
            if match.start() or lead.title.startswith(match[0].split()[0]):
                spans.append((sentence, match))
    if not spans:
        return None
    sentence, match = spans[_number(lead.title) % len(spans)]
    return Pair(lead.extract, sentence[: match.start()] + MASK + sentence[match.end() :], match[0])


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def split(pairs: list[Pair], every: int = 20) -> tuple[list[Pair], list[Pair]]:
    """Hold out about one pair of `every`, by its text."""
    held = [pair for pair in pairs if _number(pair.text) % every == 0]
    return [pair for pair in pairs if _number(pair.text) % every], held
