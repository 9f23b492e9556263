"""Time the conversion of a large synthetic mixture of experts, whose weight files are holes: nothing should be read."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from transformers import Qwen3MoeConfig, __version__

WAYS = {"linked": [], "--reference": ["--reference"], "--dry-run": ["--dry-run"]}


def sparse_mixture(folder: Path, gigabytes: float) -> Path:
    """Write a synthetic Qwen3-MoE whose weights are holes in files."""
    config = Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=max(2, int(gigabytes * 1.5)), num_attention_heads=32, num_experts=64,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts_per_tok=8, vocab_size=151936,
        architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens.weight": (151936, 2048), "lm_head.weight": (151936, 2048)}
    shapes["model.norm.weight"] = (2048,)
    maps = {"q_proj": (4096, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 4096)}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}.weight": shape for name, shape in maps.items()}
        shapes |= {f"{at}self_attn.{name}_norm.weight": (128,) for name in "qk"}
        shapes |= {f"{at}{name}_layernorm.weight": (2048,) for name in ("input", "post_attention")}
        shapes[f"{at}mlp.gate.weight"] = (64, 2048)
        for expert in range(64):
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (2048, 768) if name == "down_proj" else (768, 2048)
                shapes[f"{at}mlp.experts.{expert}.{name}.weight"] = shape
    names, per_file, weight_map = list(shapes), 1000, {}
    for number in range(0, len(names), per_file):
        file, header, end = f"model-{number:05d}.safetensors", {}, 0
        for name in names[number : number + per_file]:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [end, end + size]}
            weight_map[name], end = file, end + size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; returns seconds and peak resident memory in MB, as the kernel counted them."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss / 1000


def main() -> None:
    """Make the checkpoint, convert it in each way several times, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="directory for the checkpoint and the outputs")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    source = args.work / "source"
    if not source.exists():
        source.mkdir(parents=True)
        sparse_mixture(source, args.gigabytes)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    results = {"bytes": size, "transformers": __version__, "load_average": os.getloadavg()[0], "runs": {}}
    for way, options in WAYS.items():
        runs = []
        for _ in range(args.repeats + 1):
            shutil.rmtree(args.work / "out", ignore_errors=True)
            program = str(Path(sys.executable).with_name("meo-hf"))
            runs.append(
                measure([program, "convert", str(source), str(args.work / "out"), "--verify", "none", *options])
            )
        seconds, memory = zip(*runs[1:], strict=True)  # the first one reads the libraries from disk
        results["runs"][way] = {"seconds": seconds, "peak_rss_mb": memory}
        print(f"{way}: {sorted(seconds)[len(seconds) // 2]:.2f} s ({min(seconds):.2f} - {max(seconds):.2f})", end=", ")
        print(f"{max(memory):.0f} MB")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
