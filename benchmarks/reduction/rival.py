"""Prune a mixture with LLM Compressor's REAP, from the text and with the rows that `run.py` gives ours.

    pip install "llmcompressor==0.14.*" meo_hf && python rival.py MODEL --text calibration.txt OUT

Writes OUT/0.25 and OUT/0.5 (shares of experts that go) and OUT/rival.json: seconds, and the experts that stayed.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

from meo_hf.reduction.calibration import Calibration, read_calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = read_calibration(Calibration((str(args.text),), args.window, args.samples), tokenizer).input_ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * args.window] * len(rows)})
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"llmcompressor": version("llmcompressor"), "transformers": version("transformers")}
    for share in (0.25, 0.5):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        report = args.output / f"{share}.json"
        start = time.perf_counter()
        oneshot(
            model=model, dataset=data, tokenizer=tokenizer, num_calibration_samples=args.samples,
            max_seq_length=args.window, recipe=REAPPruningModifier(sparsity=share, report_path=str(report)),
        )  # fmt: skip
        found[str(share)] = {"seconds": time.perf_counter() - start, "kept": json.loads(report.read_text("utf-8"))}
        model.save_pretrained(args.output / str(share))
        tokenizer.save_pretrained(args.output / str(share))
    (args.output / "rival.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
