"""Convert a sharded synthetic Llama of about 2 GB and measure memory, and writing against `cp`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

SHARD_BYTES = 500_000_000


def make_checkpoint(folder: Path) -> None:
    """Write a Llama of about 2 GB in bf16, sharded at 500 MB, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=SHARD_BYTES)


def run_measured(command: list[str]) -> dict[str, float | int]:
    """Run a command; return its wall seconds, peak resident bytes and exit code."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    return {"wall_s": round(wall, 2), "peak_rss_mb": usage.ru_maxrss // 1024, "exit": os.waitstatus_to_exitcode(status)}


def weights(folder: Path) -> int:
    """Return the bytes of all weight files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def copy_rate(folder: Path, target: Path) -> float:
    """Return the bytes per second at which `cp` copies a folder's weights."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    files = sorted(map(str, folder.glob("*.safetensors")))
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *files, str(target)], check=True)
    rate = weights(folder) / (time.perf_counter() - start)
    shutil.rmtree(target)
    return rate


def measure(meo_hf: str, source: Path, work: Path, verify: str) -> dict[str, object]:
    """Convert once and return what was measured; `cp` copies the output right before and after."""
    output = work / "out"
    command = [meo_hf, "convert", str(source), str(output), "--num-experts", "2", "--verify", verify]
    command += ["--max-shard-size", "500MB", "--overwrite"]
    for file in source.glob("*.safetensors"):
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    rates = [copy_rate(output, work / "copy")] if output.exists() else []
    os.sync()
    result: dict[str, object] = dict(run_measured(command))
    report = json.loads((output / "meo_report.json").read_text())
    os.sync()
    rates.append(copy_rate(output, work / "copy"))
    written = weights(output)
    result |= {
        "verify": verify,
        "bytes_written": written,
        "write_s": report["write_seconds"],
        "write_mb_per_s": round(written / report["write_seconds"] / 1e6),
        "cp_mb_per_s": [round(rate / 1e6) for rate in rates],
        "write_relative_to_cp": round(written / report["write_seconds"] / statistics.mean(rates), 2),
    }
    return result


def main() -> None:
    """Make the checkpoint if need be, measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="directory for the checkpoint and the outputs, about 10 GB")
    parser.add_argument("--meo-hf", default=str(Path(sys.executable).with_name("meo-hf")))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file that receives the results")
    args = parser.parse_args()
    source = args.work / "source"
    if not source.exists():
        subprocess.run([sys.executable, __file__, str(args.work), "--make"], check=True)
    measure(args.meo_hf, source, args.work, "none")  # a warm-up, which also makes the files that `cp` copies
    rows = [measure(args.meo_hf, source, args.work, "none") for _ in range(args.repeats)]
    rows.append(measure(args.meo_hf, source, args.work, "sample"))
    versions = {name: version(name) for name in ("meo_hf", "torch", "transformers", "safetensors")}
    results = {"source_bytes": weights(source), "cpus": os.cpu_count(), "versions": versions, "runs": rows}
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if "--make" in sys.argv:  # in a process of its own: a child's peak memory starts at its parent's
        make_checkpoint(Path(sys.argv[1]) / "source")
    else:
        main()
