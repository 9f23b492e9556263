"""Time a random OLMoE whose experts run one by one: all that its router selects, fewer, or what a rule leaves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from meo_hf.modeling.configuration_meo import meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.unmerged_meo import chosen

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
from timing import in_turns

HIDDEN, EXPERTS, INTERMEDIATE, LAYERS, VOCAB = 512, 16, 1024, 4, 2048


def base_config(top_k: int) -> Any:
    """Return the config of a mid-size OLMoE whose gates are clear enough for rules to skip."""
    return transformers.OlmoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, num_experts=EXPERTS, num_experts_per_tok=top_k,
        max_position_embeddings=1024, eos_token_id=None,
    )  # fmt: skip


def made(top_k: int, state: dict[str, Any] | None, experts: str, device: str, meo: dict[str, Any]) -> Any:
    """Return a model with common weights; without a block of its own the stock one."""
    config = base_config(top_k)
    if meo:
        config = meo_config_class(type(config)).from_dict({**config.to_dict(), "meo": meo})
    config._experts_implementation = experts
    stock = transformers.OlmoeForCausalLM
    model = (meo_model_class(stock) if meo else stock)(config).eval()
    if state is not None:
        model.load_state_dict(state)
    return model.to(device)


def spread(model: Any) -> None:
    """Make routers' logits as far apart as those of trained models: a standard deviation of about 1.5."""
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=1.5 * HIDDEN**-0.5)


def share_that_runs(model: Any, ids: torch.Tensor) -> float:
    """Return the share of selected (token, expert) pairs that a model computes."""
    counts = [0, 0]

    def count(module: Any, args: tuple[Any, ...]) -> None:
        index, weights = (a.reshape(-1, a.shape[-1]) for a in args[1:3])
        _, _, runs = chosen(index, weights, module.stands_for(index.device), module.skips)
        counts[0] += index.numel() if runs is None else int(runs.sum())
        counts[1] += index.numel()

    handles = [module.register_forward_pre_hook(count) for _, module in merged_moe(model)]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return counts[0] / counts[1]


def timed(model: Any, ids: torch.Tensor, steps: int) -> Callable[[], float]:
    """Return a call that takes the seconds of a prefill, or of `steps` greedy steps behind one."""
    cuda = ids.is_cuda

    @torch.no_grad()
    def run() -> float:
        outputs = model(ids, use_cache=True) if steps else None
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            token = outputs.logits[:, -1:].argmax(-1)
            outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)
        if not steps:
            model(ids, use_cache=False)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / max(steps, 1)

    return run


def variants(top_k: int, experts: str, device: str) -> dict[str, Any]:
    """Return models by name, with common weights."""
    torch.manual_seed(0)
    stock = made(top_k, None, experts, device, {})
    spread(stock)
    state = {name: value.cpu() for name, value in stock.state_dict().items()}
    options = {
        "no rule": {},
        "ratio 0.5": {"skip": {"rule": "ratio", "threshold": 0.5}},
        "cumulative 0.6": {"skip": {"rule": "cumulative", "threshold": 0.6}},
        "top_k 1": {"top_k": 1},
    }
    models = {
        name: made(top_k, state, experts, device, {"level": "unmerged", **each}) for name, each in options.items()
    }
    return {"stock": stock, **models}


def main() -> None:
    """Time all variants, print a table and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    results: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": device, "threads": args.threads, "load_average": os.getloadavg()[0],
        "shape": {"hidden": HIDDEN, "experts": EXPERTS, "intermediate": INTERMEDIATE, "layers": LAYERS},
        "batch": args.batch, "tokens": args.tokens, "runs": [],
    }  # fmt: skip
    ids = torch.randint(VOCAB, (args.batch, args.tokens), generator=torch.Generator().manual_seed(1)).to(args.device)
    print(f"{'top_k':>5} {'experts':>10} {'stage':>8} {'variant':>15} {'pairs':>6} {'ms':>9} {'to no rule':>10}")
    for top_k in args.top_k:
        for experts in args.experts:
            models = variants(top_k, experts, args.device)
            shares = {name: share_that_runs(m, ids) for name, m in models.items() if name != "stock"}
            shares = {"stock": 1.0, **shares, "top_k 1": 1 / top_k}
            for stage, steps in (("prefill", 0), ("decode", args.steps)):
                found = in_turns({name: timed(model, ids, steps) for name, model in models.items()}, args.rounds)
                for name, seconds in found.items():
                    pairs = zip(seconds, found["no rule"], strict=True)
                    ratio = statistics.median(mine / base for mine, base in pairs)
                    ms = 1e3 * statistics.median(seconds)
                    row = f"{top_k:5} {experts:>10} {stage:>8} {name:>15} {shares[name]:6.2f} {ms:9.2f} {ratio:10.3f}"
                    print(row, flush=True)
                    results["runs"].append(
                        {
                            "top_k": top_k,
                            "experts": experts,
                            "stage": stage,
                            "variant": name,
                            "share_of_pairs": round(shares[name], 4),
                            "median_ms": round(ms, 3),
                            "ratio_to_no_rule": round(ratio, 4),
                            "seconds": seconds,
                        }
                    )
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
