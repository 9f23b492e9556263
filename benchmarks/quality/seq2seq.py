"""Summaries and answers: a small encoder-decoder learns both, dense or as a MEO model.

    python seq2seq.py run     # the grid; goes on where it stopped

A T5 is trained from scratch on both tasks and on filling gaps; every arm goes on from it over the same pairs, for the
same steps. Summaries are the synopses of Debian packages, questions are cloze sentences of Wikipedia leads, whose
answer stands in the lead.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from lm import train
from lm_arms import NUM_EXPERTS, TOP_K, quiet, sizes
from rouge_score.rouge_scorer import RougeScorer
from text_data import ASSETS, train_tokenizer, wiki_leads
from text_pairs import MASK, Pair, cloze, package_lists, parse_descriptions, read_list, split
from torchmetrics.text import SQuAD
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
)

from meo_hf import convert
from meo_hf.benchmark.flops import count_run

HERE = Path(__file__).parent
RATES = (1e-3, 3e-3, 3e-4)
SEEDS = (1, 2)
TASKS = ("summary", "answer")
GAPS = tuple(f"<gap{number}>" for number in range(8))
SPECIAL = ("<pad>", "</s>", MASK, "<summary>", "<answer>", "<fill>", *GAPS)
ARMS = ("dense", "meo-sequence", "meo-task")


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison; a change of any makes other ledger entries."""

    vocabulary: int = 4096
    source_tokens: int = 160
    target_tokens: int = 24
    rows: int = 16
    first_steps: int = 1500
    steps: int = 400
    test_pairs: int = 300
    validation_pairs: int = 100
    tiny: bool = False


@dataclass(frozen=True)
class Pairs:
    """Pairs of both tasks: to train on, to choose by, to report."""

    train: dict[str, list[Pair]]
    validation: dict[str, list[Pair]]
    test: dict[str, list[Pair]]

    @classmethod
    def of(cls, pairs: dict[str, list[Pair]], settings: Settings) -> Pairs:
        """Hold out pairs by their text."""
        parts = {task: split(found) for task, found in pairs.items()}
        one, two = settings.validation_pairs, settings.validation_pairs + settings.test_pairs
        return cls(
            {task: kept for task, (kept, _) in parts.items()},
            {task: held[:one] for task, (_, held) in parts.items()},
            {task: held[one:two] for task, (_, held) in parts.items()},
        )


def all_pairs(folder: Path = ASSETS) -> dict[str, list[Pair]]:
    """Return the pairs of both tasks, from package registries."""
    made = [cloze(lead) for lead in wiki_leads(folder)]
    return {
        "summary": parse_descriptions(read_list(package_lists(folder))),
        "answer": [pair for pair in made if pair is not None],
    }


class Coder:
    """Turns pairs into rows of token ids."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))

    def row(self, task: str, pair: Pair) -> dict[str, Any]:
        """Return source ids (a task's token, the question, the text) and the answer's as labels."""
        end = self.ids["</s>"]
        question = [*self._tokens(pair.question), end] if pair.question else []
        source = [self.ids[f"<{task}>"], *question, *self._tokens(pair.text)][: self.settings.source_tokens - 1]
        answer = self._tokens(pair.answer)[: self.settings.target_tokens - 1]
        return {"input_ids": [*source, end], "labels": [*answer, end], "task_ids": TASKS.index(task)}

    def gaps(self, text: str, generator: torch.Generator) -> dict[str, Any]:
        """Return a text with a few spans of one to three tokens replaced by gaps, and what fills them."""
        tokens, end = self._tokens(text)[: self.settings.source_tokens - 2], self.ids["</s>"]
        step = max(len(tokens) // len(GAPS), 4)
        source, target = [self.ids["<fill>"]], []
        for gap, begin in zip(GAPS, range(0, len(tokens), step), strict=False):
            part = tokens[begin : begin + step]
            width = int(torch.randint(1, 4, (), generator=generator))
            at = int(torch.randint(max(len(part) - width, 1), (), generator=generator))
            source += [*part[:at], self.ids[gap], *part[at + width :]]
            target += [self.ids[gap], *part[at : at + width]]
        return {"input_ids": [*source, end], "labels": [*target[: self.settings.target_tokens - 1], end], "task_ids": 0}

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def mixed(pairs: dict[str, list[Pair]], coder: Coder, count: int, seed: int, gaps: bool) -> list[dict[str, Any]]:
    """Draw rows of both tasks in turns, in an order that depends on the seed alone; with gaps to fill between them."""
    generator = torch.Generator().manual_seed(seed)
    streams = [_endless(task, pairs[task], generator) for task in TASKS]
    rows = []
    while len(rows) < count:
        for stream in streams:
            task, pair = next(stream)
            rows.append(coder.row(task, pair))
            if gaps:
                rows.append(coder.gaps(pair.text, generator))
    return rows[:count]


def _endless(task: str, pairs: list[Pair], generator: torch.Generator) -> Iterator[tuple[str, Pair]]:
    while True:
        for index in torch.randperm(len(pairs), generator=generator).tolist():
            yield task, pairs[index]


def stock(coder: Coder, settings: Settings) -> T5ForConditionalGeneration:
    """Build the dense model: 3.8 million parameters, or a few thousand for tests."""
    width, layers = (32, 1) if settings.tiny else (192, 3)
    config = T5Config(
        vocab_size=settings.vocabulary, d_model=width, d_kv=32, d_ff=width * 8 // 3, num_layers=layers,
        num_decoder_layers=layers, num_heads=width // 32, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        pad_token_id=coder.ids["<pad>"], eos_token_id=coder.ids["</s>"], decoder_start_token_id=coder.ids["<pad>"],
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def build(arm: str, dense: Path, seed: int) -> Any:
    """Build an arm's model from the folder of the dense one."""
    torch.manual_seed(seed)
    if arm == "dense":
        return T5ForConditionalGeneration.from_pretrained(dense)
    level = arm.removeprefix("meo-")
    with tempfile.TemporaryDirectory() as folder:
        tasks = TASKS if level == "task" else ()
        convert(
            dense, Path(folder) / "meo", num_experts=NUM_EXPERTS, top_k=TOP_K, level=level, tasks=tasks, seed=seed,
            verify="none",
        )  # fmt: skip
        model = AutoModelForSeq2SeqLM.from_pretrained(Path(folder) / "meo")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else they would stay mapped to the folder that goes now
    return model


@dataclass
class Study:
    """All that a run needs."""

    settings: Settings
    pairs: Pairs
    coder: Coder
    dense: Path
    ledger: Ledger

    @classmethod
    def prepare(cls, settings: Settings, pairs: dict[str, list[Pair]], folder: Path, ledger: Ledger) -> Study:
        """Train the tokenizer and the dense model, unless the folder has them."""
        parts = Pairs.of(pairs, settings)
        if not (folder / "tokenizer.json").exists():
            texts = [text for found in parts.train.values() for pair in found for text in (pair.text, pair.answer)]
            tokenizer = train_tokenizer(texts, settings.vocabulary, SPECIAL)
            tokenizer.eos_token = "</s>"
            tokenizer.save_pretrained(folder)
        coder = Coder(AutoTokenizer.from_pretrained(folder), settings)
        study = cls(settings, parts, coder, folder / "dense", ledger)
        if not study.dense.exists():
            torch.manual_seed(0)
            model = stock(coder, settings)
            rows = mixed(parts.train, coder, settings.first_steps * settings.rows, 0, gaps=True)
            done = study._train("dense", model, rows, 3e-3, 0, "constant_with_warmup")
            done |= study.measure("dense", model)
            ledger.measure({"arm": "start", "settings": asdict(settings)}, lambda: done)
            model.save_pretrained(folder / "dense.new")
            (folder / "dense.new").rename(study.dense)
        return study

    def _collator(self, model: Any) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(self.coder.tokenizer, model=model)

    def _train(self, arm: str, model: Any, rows: list[Any], rate: float, seed: int, schedule: str) -> dict[str, Any]:
        kept = rows if arm == "meo-task" else [{k: v for k, v in row.items() if k != "task_ids"} for row in rows]
        log = self.dense.parent / "log"
        return train(model, kept, self.settings.rows, rate, seed, schedule, log, self._collator(model))

    def run(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        """Train and measure an arm, unless the ledger holds it."""
        key = {"arm": arm, "rate": rate, "seed": seed, "settings": asdict(self.settings)}
        return self.ledger.measure(key, lambda: self._run(arm, rate, seed))

    def _run(self, arm: str, rate: float, seed: int) -> dict[str, Any]:
        model = build(arm, self.dense, seed)
        rows = mixed(self.pairs.train, self.coder, self.settings.steps * self.settings.rows, seed, gaps=False)
        return self._train(arm, model, rows, rate, seed, "cosine") | self.measure(arm, model)

    @torch.inference_mode()
    def measure(self, arm: str, model: Any) -> dict[str, Any]:
        """Return losses per predicted token, ROUGE of summaries, exact match and F1 of answers, sizes and FLOPs."""
        model.eval()
        result: dict[str, Any] = {}
        for task in TASKS:
            if arm == "meo-task":
                model.set_task(task)
            result[f"{task}_validation"] = round(self._loss(model, task, self.pairs.validation[task]), 5)
            result[f"{task}_loss"] = round(self._loss(model, task, self.pairs.test[task]), 5)
            result |= self._scores(task, self._written(model, task))
        result["validation"] = round(sum(result[f"{task}_validation"] for task in TASKS) / len(TASKS), 5)
        batch = next(self._batches(model, "summary", self.pairs.test["summary"]))
        batch = {name: rows[:1] for name, rows in batch.items()}
        result["flops"] = count_run(model, batch).total("mul_add")
        if arm == "meo-task":
            model.set_task(None)
        return result | sizes(model)

    def _batches(self, model: Any, task: str, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        rows = [self.coder.row(task, pair) for pair in pairs]
        collate = self._collator(model)
        for begin in range(0, len(rows), 25):
            batch = collate([{k: v for k, v in row.items() if k != "task_ids"} for row in rows[begin : begin + 25]])
            yield dict(batch)

    def _loss(self, model: Any, task: str, pairs: Sequence[Pair]) -> float:
        total, count = 0.0, 0
        for batch in self._batches(model, task, pairs):
            labelled = int((batch["labels"] != -100).sum())
            total, count = total + float(model(**batch).loss) * labelled, count + labelled
        return total / count

    def _written(self, model: Any, task: str) -> list[str]:
        """Return what the model writes, greedily, for each test pair of a task."""
        found: list[str] = []
        for batch in self._batches(model, task, self.pairs.test[task]):
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
            ids = model.generate(**batch, max_new_tokens=self.settings.target_tokens, do_sample=False, num_beams=1)
            found += self.coder.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in found]

    def _scores(self, task: str, written: list[str]) -> dict[str, float]:
        pairs = self.pairs.test[task]
        if task == "summary":
            scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
            scores = [scorer.score(pair.answer, text) for pair, text in zip(pairs, written, strict=True)]
            names = ("rouge1", "rouge2", "rougeL")
            return {name: round(100 * sum(s[name].fmeasure for s in scores) / len(scores), 2) for name in names}
        metric = SQuAD()
        metric.update(
            [{"prediction_text": text, "id": str(i)} for i, text in enumerate(written)],
            [
                {"answers": {"answer_start": [0], "text": [pair.answer]}, "id": str(i)}
                for i, pair in enumerate(pairs)
            ],
        )  # fmt: skip
        return {name: round(float(value), 2) for name, value in metric.compute().items()}

    def best_rate(self, arm: str) -> float:
        """Return the learning rate with the lowest mean validation loss at seed 0."""
        return min(RATES, key=lambda rate: self.run(arm, rate, 0)["validation"])

    def grid(self) -> None:
        """Sweep learning rates, then add seeds."""
        for rate in RATES:
            for arm in ARMS:
                say(arm, rate, 0, self.run(arm, rate, 0))
        for seed in SEEDS:
            for arm in ARMS:
                rate = self.best_rate(arm)
                say(arm, rate, seed, self.run(arm, rate, seed))


def say(arm: str, rate: float, seed: int, result: dict[str, Any]) -> None:
    """Print one line about a run."""
    names = ("validation", "summary_loss", "answer_loss", "rougeL", "exact_match", "f1", "step_seconds")
    shown = " ".join(f"{name} {result[name]:.4g}" for name in names)
    print(f"{arm:14} rate {rate:g} seed {seed}  {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run",))
    parser.add_argument("--work", type=Path, default=ASSETS / "seq2seq", help="for the dense model")
    parser.add_argument("--ledger", type=Path, default=HERE / "seq2seq.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        Study.prepare(Settings(), all_pairs(), args.work, Ledger(args.ledger)).grid()


if __name__ == "__main__":
    main()
