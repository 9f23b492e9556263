"""Language models: does a MEO model made from a dense one learn more than the dense one does, in the same steps?

    python lm.py run      # the grid; goes on where it stopped; prints one line per run
    python lm.py time     # times training steps and inference of all arms in turns, in CPU seconds

One dense model is pre-trained; every arm goes on from it over the same windows, for the same steps. The learning rate
is chosen for each arm on validation windows at seed 0, then seeds 1 and 2 follow with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from lm_arms import ARMS, Arm, build, dense_config, quiet
from lm_measure import HeldOut, measure, one_row
from text_data import ASSETS, Split, bytes_per_token, corpora, train_tokenizer, windows_of
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

HERE = Path(__file__).parent
RATES = (3e-4, 1e-3, 3e-3)
STAGES = (  # arms that are worth a table of their own, the most telling first
    ("dense", "moe", "meo-segment-64"),
    ("dense-answers", "meo-prompt", "meo-frozen-random"),
    ("meo-segment-256", "moe-answers", "meo-segment-64-drop", "meo-uniform"),
)


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison; a change of any makes other ledger entries."""

    vocabulary: int = 4096
    window: int = 512
    rows: int = 2
    first_steps: int = 1600
    steps: int = 300
    test_windows: int = 24
    validation_windows: int = 8
    tiny: bool = False


class Windows(Dataset[dict[str, Tensor]]):
    """Windows [N, S] as rows; with `answers` their first halves carry no label."""

    def __init__(self, windows: Tensor, answers: bool = False) -> None:
        self.windows, self.prompt = windows, windows.shape[1] // 2 if answers else 0

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.windows[index]
        labels = ids.clone()
        labels[: self.prompt] = -100
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Texts:
    """Tokenised windows: to pre-train on, to go on with, to choose by, to report; kinds of text evenly mixed."""

    first: Tensor
    more: Tensor
    validation: HeldOut
    test: HeldOut

    @classmethod
    def of(cls, splits: dict[str, Split], settings: Settings, folder: Path) -> Texts:
        """Train the tokenizer if the folder has none, and cut all texts into windows."""
        if not (folder / "tokenizer.json").exists():
            train_tokenizer([t for s in splits.values() for t in s.train], settings.vocabulary).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        kept: dict[str, list[tuple[str, Tensor]]] = {"first": [], "more": [], "validation": [], "test": []}
        share = settings.first_steps / (settings.first_steps + 2 * settings.steps)
        for kind, split in splits.items():
            cut = windows_of(tokenizer, split.train, settings.window)
            cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]
            first = int(len(cut) * share)
            kept["first"].append((kind, cut[:first]))
            kept["more"].append((kind, cut[first:]))
            held = windows_of(tokenizer, split.held_out, settings.window)
            count = settings.test_windows + settings.validation_windows
            held = held[torch.linspace(0, len(held) - 1, min(count, len(held))).long()]
            chosen = torch.zeros(len(held), dtype=torch.bool)
            chosen[torch.linspace(0, len(held) - 1, settings.validation_windows).long()] = True
            kept["validation"].append((kind, held[chosen]))
            kept["test"].append((kind, held[~chosen]))
        sizes = bytes_per_token(tokenizer)

        def held_out(name: str) -> HeldOut:
            kinds = [kind for kind, rows in kept[name] for _ in rows]
            return HeldOut(torch.cat([rows for _, rows in kept[name]]), kinds, sizes)

        first, more = (_mixed([rows for _, rows in kept[name]]) for name in ("first", "more"))
        return cls(first, more, held_out("validation"), held_out("test"))


def _mixed(kinds: list[Tensor]) -> Tensor:
    """Take windows of all kinds in turns, as many of each as the rarest has."""
    count = min(map(len, kinds))
    return torch.stack([rows[:count] for rows in kinds], 1).flatten(0, 1)


def taken(windows: Tensor, count: int, seed: int) -> Tensor:
    """Draw windows in an order that depends on the seed alone, anew when all were drawn."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(len(windows), generator=generator) for _ in range(-(-count // len(windows)))]
    return windows[torch.cat(rounds)[:count]]


class Clock(TrainerCallback):
    """Times each step, and keeps the losses that the Trainer logs."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop."""
        self.steps.append(time.perf_counter() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep a loss."""
        if logs and "loss" in logs:
            self.losses.append(round(float(logs["loss"]), 4))


def train(
    model: Any, windows: Any, rows: int, rate: float, seed: int, schedule: str, folder: Path, collate: Any = None
) -> dict[str, Any]:
    """Train on each row of a data set once, in order, with the stock Trainer; returns times and losses."""
    clock, steps = Clock(), len(windows) // rows
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=rows, max_steps=steps, learning_rate=rate,
        lr_scheduler_type=schedule, warmup_steps=max(steps // 20, 1), adam_beta2=0.95, weight_decay=0.1, seed=seed,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        logging_steps=max(steps // 10, 1), dataloader_pin_memory=False,
    )  # fmt: skip
    with quiet():
        Trainer(model, arguments, train_dataset=windows, data_collator=collate, callbacks=[clock]).train()
    return {"train_losses": clock.losses, "step_seconds": round(statistics.median(clock.steps), 4)}


@dataclass
class Study:
    """All that a run needs."""

    settings: Settings
    texts: Texts
    dense: Path
    ledger: Ledger

    @classmethod
    def prepare(cls, settings: Settings, splits: dict[str, Split], folder: Path, ledger: Ledger) -> Study:
        """Cut the texts, and pre-train the dense model if the folder has none."""
        texts = Texts.of(splits, settings, folder)
        dense = folder / "dense"
        if not dense.exists():
            torch.manual_seed(0)
            config = dense_config(settings.vocabulary, settings.window, settings.tiny)
            model = LlamaForCausalLM(config)
            windows = Windows(taken(texts.first, settings.first_steps * settings.rows, 0))
            done = train(model, windows, settings.rows, 3e-3, 0, "constant_with_warmup", folder / "log")
            done |= measure(model, ARMS["dense"], texts.test, texts.validation)
            ledger.measure({"arm": "start", "settings": asdict(settings)}, lambda: done)
            model.save_pretrained(folder / "dense.new")
            (folder / "dense.new").rename(dense)
        return cls(settings, texts, dense, ledger)

    def run(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        """Train and measure an arm, unless the ledger holds it."""
        key = {"arm": arm.name, "rate": rate, "seed": seed, "settings": asdict(self.settings)}
        return self.ledger.measure(key, lambda: self._run(arm, rate, seed))

    def _run(self, arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        model = build(arm, self.dense, seed, self.texts.first[:24])
        chosen = taken(self.texts.more, self.settings.steps * self.settings.rows, seed)
        windows = Windows(chosen, arm.answers)
        done = train(model, windows, self.settings.rows, rate, seed, "cosine", self.dense.parent / "log")
        return done | measure(model, arm, self.texts.test, self.texts.validation)

    def best_rate(self, arm: Arm) -> float:
        """Return the learning rate with the lowest validation loss at seed 0."""
        return min(RATES, key=lambda rate: self.run(arm, rate, 0)["validation"])

    def grid(self, stages: int | None = None) -> None:
        """Run the first stages, or all: each sweeps learning rates, then adds seeds."""
        for stage in STAGES[:stages]:
            arms = [ARMS[name] for name in stage]
            for rate in (RATES[1], RATES[2], RATES[0]):
                for arm in arms:
                    say(arm, rate, 0, self.run(arm, rate, 0))
            for seed in (1, 2):
                for arm in arms:
                    rate = self.best_rate(arm)
                    say(arm, rate, seed, self.run(arm, rate, seed))

    def time(self, rounds: int) -> None:
        """Time a training step and the inference of a window of every arm, in turns; appends to the ledger."""
        sample = self.texts.first[:24]
        models = {arm.name: build(arm, self.dense, 0, sample) for arm in ARMS.values() if arm.name != "moe-answers"}
        rows = next(iter(torch.utils.data.DataLoader(Windows(self.texts.more), self.settings.rows)))
        steps: dict[str, list[float]] = {name: [] for name in models}
        reads: dict[str, list[float]] = {name: [] for name in models}
        load = os.getloadavg()[0]
        for number in range(rounds + 1):
            for name, model in sorted(models.items(), reverse=number % 2 == 1):
                arm = ARMS[name]
                labels = Windows(rows["input_ids"], arm.answers)
                batch = {"input_ids": rows["input_ids"], "labels": torch.stack([row["labels"] for row in labels])}
                step = _seconds(lambda: model.train()(**batch).loss.backward())  # noqa: B023
                model.zero_grad()
                routing = None if arm.kind != "meo" else "prompt" if arm.level == "sequence" else "segment"
                arguments = one_row(self.texts.test.routing(routing))
                with torch.inference_mode(), quiet():
                    model.eval()
                    read = _seconds(lambda: model(rows["input_ids"][:1], use_cache=False, **arguments))  # noqa: B023
                if number:
                    steps[name].append(step)
                    reads[name].append(read)
        result = {
            name: {
                "step_ms": round(1e3 * statistics.median(steps[name]), 2),
                "step_ratio": _ratio(steps[name], steps["dense"]),
                "read_ms": round(1e3 * statistics.median(reads[name]), 2),
                "read_ratio": _ratio(reads[name], reads["dense"]),
            }
            for name in models
        }
        key = {"arm": "times", "rounds": rounds, "settings": asdict(self.settings)}
        self.ledger.measure(key, lambda: {"load_before": round(load, 2), "arms": result})
        print(load, result)


def _seconds(function: Any) -> float:
    """Return the CPU time of a call, which another process disturbs less than the time of day."""
    began = time.process_time()
    function()
    return time.process_time() - began


def _ratio(mine: list[float], dense: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, dense, strict=True)), 3)


def say(arm: Arm, rate: float, seed: int, result: dict[str, Any]) -> None:
    """Print one line about a run."""
    names = ("validation", "perplexity", "answers", "prompt_answers", "averaged_perplexity", "told", "step_seconds")
    shown = " ".join(f"{name} {result[name]:.4g}" for name in names if name in result)
    print(f"{arm.name:20} rate {rate:g} seed {seed}  {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "time"))
    parser.add_argument("--work", type=Path, default=ASSETS / "lm", help="for the dense model (default: %(default)s)")
    parser.add_argument("--ledger", type=Path, default=HERE / "lm.jsonl")
    parser.add_argument("--stages", type=int, help="only the first so many stages (default: all)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of `time` (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study = Study.prepare(Settings(), corpora(), args.work, Ledger(args.ledger))
    if args.what == "run":
        study.grid(args.stages)
    else:
        study.time(args.rounds)


if __name__ == "__main__":
    main()
