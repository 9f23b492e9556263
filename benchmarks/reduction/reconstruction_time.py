"""How long `--score reconstruction` takes beside one forward pass of the MoE layers alone for every subset it tries.

python reconstruction_time.py MODEL --text FILE --json reconstruction_time.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from meo_hf.modeling.moe_meo import merged_moe

from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.source import open_source
from meo_hf.reduction.calibration import Calibration
from meo_hf.reduction.observing import BlockView, Observer, observe
from meo_hf.reduction.reconstruction import Reconstruction
from meo_hf.reduction.rerouting import SubsetRouters
from meo_hf.reduction.workbench import Workbench
from meo_hf.version import versions


class Inputs(Observer):
    """Keeps what each block read."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[BlockView]] = {}

    def see(self, block: BlockView) -> None:
        """Keep a batch."""
        self.blocks.setdefault(block.path, []).append(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=6)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = open_source(str(args.model), SourceOptions())
    read = Calibration((str(args.text),), window=args.window, samples=args.samples)
    work = Workbench(source, calibration=read)
    batches, counts = work.rows.batches(), dict.fromkeys(work.limits, args.keep)
    inputs = Inputs()
    observe(work.model, batches, [inputs])
    experts = {module._meo.path: module for _, module in merged_moe(work.model)}
    forward, whole, search = [], [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        with torch.no_grad():
            for path, blocks in inputs.blocks.items():
                for block in blocks:
                    block.call.again()
                    experts[path]._run_each(None, block.x, block.index, block.gates)
        forward.append(time.perf_counter() - start)
        start = time.perf_counter()
        observe(work.model, batches, [Observer()])
        whole.append(time.perf_counter() - start)
        start = time.perf_counter()
        routers = SubsetRouters(work.model, work.family, work.mixture)
        found = Reconstruction(routers, work.limits, counts, len(batches), 4)
        observe(work.model, batches, [found])
        search.append(time.perf_counter() - start)
    subsets = math.comb(next(iter(work.limits.values())).experts, args.keep)
    layers, model, seconds = (statistics.median(each) for each in (forward, whole, search))
    result = {
        "tokens": int(work.rows.attention_mask.sum()), "blocks": len(counts), "keep": args.keep, "subsets": subsets,
        "moe_layers_forward_seconds": layers, "model_forward_seconds": model, "search_seconds": seconds,
        "allowed_seconds": 3 * subsets * layers, "share_of_allowed": seconds / (3 * subsets * layers),
        "search_per_subset_in_forwards": seconds / (subsets * layers),
        "threads": args.threads, "device": "cpu", "versions": versions(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
