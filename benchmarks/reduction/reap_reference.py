"""Score the experts of a small mixture with LLM Compressor's REAP and with ours, over the same windows, and compare.

    pip install "llmcompressor==0.14.*" meo_hf && python reap_reference.py MODEL --text FILE --json results.json

LLM Compressor takes gates as experts get them, which is `Reap(renormalise=False)`, and counts padding, so all windows
are full here. It prunes each layer before it scores the next one; here all layers are scored in the whole model. It
needs an older Transformers than the newest, and has no support for experts that are modules or read weighted inputs.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompressor.core import State
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from torch import Tensor
from transformers import AutoModelForCausalLM

from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.source import open_source
from meo_hf.reduction.calibration import Calibration, CalibrationRows, read_calibration, weighted_rows
from meo_hf.reduction.observing import observe
from meo_hf.reduction.statistics import Reap
from meo_hf.reduction.workbench import Workbench
from meo_hf.texts import load_tokenizer

SHARE = 0.5


def theirs(folder: Path, rows: CalibrationRows) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Return LLM Compressor's saliency of every expert [E], and which experts it keeps, by block."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    linearize_moe(model)
    modifier: Any = REAPPruningModifier(sparsity=SHARE)
    state = State(model=model)
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    with torch.no_grad():
        for batch in rows.batches():
            model(input_ids=batch.input_ids, use_cache=False)
    scores = {path: tracker.mean_saliency.clone() for path, tracker in modifier._saliency_trackers.items()}
    modifier.on_sequential_epoch_end(state, None)
    return scores, dict(modifier._retained_experts)


def ours(folder: Path, rows: CalibrationRows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return our saliencies [E] by block, with gates as they are and renormalised."""
    work = Workbench(open_source(str(folder), SourceOptions(None, None, False, False)))
    plain, renormalised = Reap(renormalise=False), Reap()
    observe(work.model, rows.batches(), [plain, renormalised])
    return plain.result(), renormalised.result()


def highest(scores: Tensor, groups: int = 1) -> list[int]:
    """Return the experts that are kept: the better half, of each group of experts where there are several."""
    size = len(scores) // groups
    parts = scores.reshape(groups, size).topk(size - int(size * SHARE), dim=1).indices
    return sorted((parts + torch.arange(groups)[:, None] * size).flatten().tolist())


def compared(folder: Path, rows: CalibrationRows) -> dict[str, Any]:
    """Return how far scores are apart, relative to the largest of a block, and whether the same experts are kept."""
    (their, kept), (plain, renormalised) = theirs(folder, rows), ours(folder, rows)
    assert their.keys() == plain.keys(), (list(their), list(plain))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    groups = config.get("n_group") or 1
    return {
        "model": config["model_type"],
        "tokens": int(rows.attention_mask.sum()),
        "blocks": len(their),
        "experts": len(next(iter(their.values()))),
        "largest difference": max(float((their[k] - plain[k]).abs().max() / their[k].max()) for k in their),
        "same experts kept": sum(kept[k] == highest(plain[k], groups) for k in kept),
        "same with renormalised gates": sum(kept[k] == highest(renormalised[k], groups) for k in kept),
        "largest change by renormalising": max(
            float((renormalised[k] / renormalised[k].sum() - plain[k] / plain[k].sum()).abs().max()) for k in their
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="folders of mixtures")
    parser.add_argument("--text", help="a file of text; random tokens if none is given")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--json", type=Path, help="results; what it holds already stays")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = []
    for folder in options.models:
        settings = Calibration((options.text or "random tokens",), options.window, options.samples)
        if options.text:
            rows = read_calibration(settings, load_tokenizer(folder, str(folder)))
        else:
            vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
            draw = torch.Generator().manual_seed(0)
            ids = torch.randint(5, vocabulary - 10, (options.samples, options.window), generator=draw).tolist()
            rows = weighted_rows(settings, [("random tokens", 1.0)], [ids])
        found.append(compared(folder, rows))
        print(json.dumps(found[-1], indent=1))
    if options.json is not None:
        packages = ("llmcompressor", "transformers", "torch")
        known = json.loads(options.json.read_text("utf-8"))["runs"] if options.json.exists() else []
        result = {"versions": {name: version(name) for name in packages}, "runs": [*known, *found]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
