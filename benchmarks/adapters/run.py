"""What an adapter costs: decoding and training with adapters of experts, ours and PEFT's own, in one run.

    python benchmarks/adapters/run.py MODEL --json benchmarks/adapters/results.json

The MEO model is made of a dense decoder; its adapters reach all experts. Every variant is checked before it is timed:
all unmerged forms of one adapter must say the same. Ratios are medians over rounds in which all variants run in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.router_meo import MeoRouter
from peft import LoraConfig, get_peft_model
from timing import detach_files, in_turns, median_ms, now, ratio, twin
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from meo_hf import MeoLoraConfig, convert
from meo_hf.adapters.targets import stacks
from meo_hf.benchmark.machine import Machine
from meo_hf.errors import CheckFailedError

TOLERANCE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="dense decoder: Hub id or folder")
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--train-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="rows of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = Machine.look(args.device)
    variants = make(args)
    names = list(variants)
    decode = in_turns({name: decoding(model, args) for name, model in variants.items()}, args.rounds)
    train = in_turns({name: training(model, args) for name, model in variants.items() if name != "merged"}, args.rounds)
    rows = []
    for name in names:
        trained = sum(p.numel() for p in variants[name].parameters() if p.requires_grad)
        row = {"variant": name, "trained": 0 if name in ("none", "merged") else trained}
        row |= {"decode_ms": median_ms(decode[name]), "decode_ratio": ratio(decode[name], decode["none"])}
        if name in train:
            row |= {"train_ms": median_ms(train[name]), "train_ratio": ratio(train[name], train["none"])}
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(machine)
    if args.json:
        options = {k: str(v) for k, v in vars(args).items() if k not in ("json", "model")}
        found = {"machine": str(machine), "options": options, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def make(args: argparse.Namespace) -> dict[str, Any]:
    """Build every variant; `none` is the MEO model without adapters, of which a step trains the routers alone."""
    with tempfile.TemporaryDirectory() as folder:
        convert(
            args.model, Path(folder) / "meo", num_experts=args.num_experts, top_k=args.top_k, level="sequence",
            dtype=args.dtype, verify="none",
        )  # fmt: skip
        base = AutoModelForCausalLM.from_pretrained(Path(folder) / "meo", device_map=args.device).eval()
        detach_files(base)
    generator = torch.Generator().manual_seed(0)
    for module in base.modules():
        if isinstance(module, MeoRouter):
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
            if module.noise_weight is not None:
                module.noise_weight = None  # so that steps of all variants select the same experts
    names = [name for role in ("up", "down") for name in stacks(base, role)]
    lora = {"r": args.rank, "lora_alpha": 2 * args.rank, "init_lora_weights": False}

    def adapted(config: Any) -> Any:
        torch.manual_seed(0)
        made = get_peft_model(twin(base), config)
        for name, parameter in made.named_parameters():
            if ".lora_B" in name:
                parameter.data.mul_(4)
        return made.eval()

    plain = LoraConfig(target_modules=[], target_parameters=names, **lora)
    made: dict[str, Any] = {"none": twin(base).requires_grad_(False)}
    for module in made["none"].modules():
        if isinstance(module, MeoRouter):
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
    made["ours, per expert"] = adapted(MeoLoraConfig(**lora))
    made["ours, shared"] = adapted(MeoLoraConfig(scope="shared", **lora))
    made["PEFT, by our block"] = adapted(plain)
    made["PEFT, its own forward"] = as_peft(adapted(plain))
    alone = copy.deepcopy(made["PEFT, by our block"])  # its weights change
    made["merged"] = alone.merge_and_unload()
    check(made, args)
    return made


def as_peft(model: Any) -> Any:
    """Let PEFT's wrappers run as they would anywhere else."""
    for module in model.modules():
        if hasattr(module, "parameter_name"):
            module.__class__ = next(base for base in type(module).__mro__ if base.__module__.startswith("peft."))
    return model


@torch.inference_mode()
def check(models: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise CheckFailedError unless all forms of one adapter say the same, and something else than the base."""
    ids = text(models["none"], args.prompt_tokens, 1, args.device)
    lengths = torch.full_like(ids[:, 0], args.prompt_tokens // 2)
    said = {name: model(ids, prompt_lengths=lengths).logits.float() for name, model in models.items()}
    expected = said["PEFT, its own forward"]
    for name in ("ours, per expert", "PEFT, by our block", "merged"):
        error = float((said[name] - expected).norm() / expected.norm())
        if error > TOLERANCE:
            raise CheckFailedError(f"{name} differs from PEFT's own forward by {error:.1e}")
    if float((said["none"] - expected).norm() / expected.norm()) < 10 * TOLERANCE:
        raise CheckFailedError("the adapter changes nothing, so that the comparison shows nothing")


def text(model: Any, tokens: int, rows: int, device: str) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def decoding(model: Any, args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that decodes and returns the seconds per token."""
    ids = text(model, args.prompt_tokens + args.new_tokens, 1, args.device)

    @torch.inference_mode()
    def run() -> float:
        model.eval()
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "prompt_lengths": torch.full_like(ids[:, 0], args.prompt_tokens)}
        model(ids[:, : args.prompt_tokens], **options)
        seconds = []
        for place in range(args.prompt_tokens, ids.shape[1]):
            began = now(args.device)
            model(ids[:, place : place + 1], **options)
            seconds.append(now(args.device) - began)
        return statistics.median(seconds[1:])  # the first merges

    return run


def training(model: Any, args: argparse.Namespace) -> Callable[[], float]:
    """Return a function that makes a training step, without the optimiser's, and returns its seconds."""
    ids = text(model, args.train_tokens, args.batch, args.device)
    labels = ids.clone()
    labels[:, : args.train_tokens // 2] = -100
    prompt_lengths = torch.full_like(ids[:, 0], args.train_tokens // 2)

    def run() -> float:
        model.train()
        began = now(args.device)
        model(ids, labels=labels, prompt_lengths=prompt_lengths).loss.backward()
        seconds = now(args.device) - began
        model.zero_grad(set_to_none=True)
        return seconds

    return run


if __name__ == "__main__":
    main()
