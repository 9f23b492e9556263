"""One batch, a different LoRA per row: all ways to serve it side by side, in one run.

    python benchmarks/adapters/train_loras.py OUT
    python benchmarks/adapters/serve.py OUT --json benchmarks/adapters/serve.json

Row r of the batch is a held-out text of adapter r's own kind, and asks for adapter r. Every arm reads the same prompts,
then the same further tokens one by one with a KV cache. The arms:

base     the dense model without adapters: the time and memory to compare with
peft     PEFT's batch of mixed adapters (`adapter_names`)
turns    PEFT, one adapter after the other: `set_adapter`, then a batch of one row
meo      a MEO model with the adapters as low-rank experts, level `task`
experts  a MEO model with 8 whole experts, each the base with one adapter merged in, level `task`
xlora    PEFT's X-LoRA over all adapters, its classifier untrained: it answers something else, so only its cost counts

Before anything is timed, every row's logits are compared with those of the base with that row's LoRA alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.router_meo import MeoRouter
from peft import PeftModel, XLoraConfig, get_peft_model
from texts import held_out, splits
from timing import detach_files, in_turns, median_ms, now, ratio, twin
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from meo_hf import convert
from meo_hf.benchmark.machine import Machine
from meo_hf.errors import CheckFailedError

ARMS = ("base", "peft", "turns", "meo", "experts", "xlora")
SAME = ("peft", "turns", "meo", "experts")
TOLERANCE = 1e-3
"""Of logits in float32: low-rank parts, or weights that they were added to, sum up in another order."""
XLORA_EVERY = 8
"""X-LoRA has no KV cache (its two passes would both fill it) and reads all tokens twice for each new one: it is timed
at every eighth token."""


@dataclass(frozen=True)
class Served:
    """Seconds to read the prompts and per further token of all rows, and the logits [R, S, V] if they were kept."""

    prefill: float
    decode: float
    logits: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Tokens [R, S] of which `prompt` are read at once; row r asks for adapter `names[r]`."""

    names: list[str]
    ids: Tensor
    prompt: int
    device: str


Arm = Callable[[bool], Served]
"""Serves the batch; the argument says whether to keep all logits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that train_loras.py wrote")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = Machine.look(args.device)
    settings = json.loads((args.out / "settings.json").read_text())
    if "experts" in args.arms and "q_proj" in settings["targets"]:
        parser.error("whole experts cannot hold what adapters change in attention: leave `experts` out with --arms")
    batch = batch_of(args)
    models, arms, failed = make(args, batch)
    differences, largest = check(args, batch, models["base"], arms)
    times = in_turns({name: lambda arm=arm: arm(False) for name, arm in arms.items()}, args.rounds)
    rows = [row_of(name, times, models, differences) for name in arms] + failed
    for row in rows:
        print(json.dumps(row), flush=True)
    print(machine)
    if args.json:
        said = [word for word in sys.argv[1:] if word != str(args.out)]
        command = shlex.join(["python", "benchmarks/adapters/serve.py", "OUT", *said])
        found = {"command": command, "machine": str(machine), "adapters": settings, "largest_logit": largest}
        found["rows"] = rows
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def batch_of(args: argparse.Namespace) -> Batch:
    """Take a held-out window of each text."""
    tokenizer = AutoTokenizer.from_pretrained(args.out / "base")
    rows = {name: held_out(split, tokenizer)[0] for name, split in splits().items()}
    ids = torch.stack(list(rows.values()))[:, : args.prompt_tokens + args.new_tokens]
    return Batch(list(rows), ids.to(args.device), args.prompt_tokens, args.device)


def make(args: argparse.Namespace, batch: Batch) -> tuple[dict[str, Any], dict[str, Arm], list[dict[str, Any]]]:
    """Build all arms and their models; X-LoRA may fail, which the third result then tells."""
    base = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=args.dtype, device_map=args.device)
    detach_files(base.eval()).requires_grad_(False)
    models: dict[str, Any] = {"base": base}
    arms: dict[str, Arm] = {"base": lambda keep: read(models["base"], batch, keep)}
    if {"peft", "turns"} & set(args.arms):
        adapted = with_adapters(base, args.out, batch.names)
        models |= {"peft": adapted, "turns": adapted}
        arms["peft"] = lambda keep: read(adapted, batch, keep, adapter_names=batch.names)
        arms["turns"] = lambda keep: turns(adapted, batch, keep)
    if "meo" in args.arms:
        places = {name: str(args.out / name) for name in batch.names}
        models["meo"] = converted(args, adapters=places)
        arms["meo"] = lambda keep: read(models["meo"], batch, keep, task_ids=task_ids(models["meo"], batch))
    if "experts" in args.arms:
        models["experts"] = whole_experts(args, base, batch.names)
        arms["experts"] = lambda keep: read(models["experts"], batch, keep, task_ids=task_ids(models["experts"], batch))
    failed = []
    if "xlora" in args.arms:
        try:
            models["xlora"] = xlora(args.out, base, batch.names)
            arms["xlora"] = lambda keep: without_cache(models["xlora"], batch, keep)
            arms["xlora"](False)
        except Exception as error:  # whatever it is, it is a result
            arms.pop("xlora", None)
            failed.append({"arm": "xlora", "failed": f"{type(error).__name__}: {error}"})
    return models, {name: arms[name] for name in ARMS if name in arms and name in ("base", *args.arms)}, failed


def with_adapters(base: Any, out: Path, names: list[str]) -> PeftModel:
    """Return the base with adapters on top, the first one active."""
    model = PeftModel.from_pretrained(twin(base), out / names[0], names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.load_adapter(out / name, name, autocast_adapter_dtype=False)
    return model.eval()


def converted(args: argparse.Namespace, **options: Any) -> Any:
    """Return the MEO model that the base becomes."""
    with tempfile.TemporaryDirectory() as folder:
        convert(args.out / "base", Path(folder) / "meo", level="task", verify="none", **options)
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "meo", dtype=args.dtype, device_map=args.device)
        return detach_files(model.eval()).requires_grad_(False)


def whole_experts(args: argparse.Namespace, base: Any, names: list[str]) -> Any:
    """Return a MEO model of merged checkpoints, in which each task selects the expert of its own number."""
    with tempfile.TemporaryDirectory() as folder:
        merged = [str(Path(folder) / name) for name in names]
        for name, place in zip(names, merged, strict=True):
            alone = AutoModelForCausalLM.from_pretrained(args.out / "base", dtype=torch.float32)
            PeftModel.from_pretrained(alone, args.out / name).merge_and_unload().save_pretrained(place)
        model = converted(args, experts=merged, tasks=names, top_k=1)
    for module in model.modules():
        if isinstance(module, MeoRouter):
            module.weight.data.copy_(torch.eye(len(names)))
    return model


def xlora(out: Path, base: Any, names: list[str]) -> Any:
    """Return an X-LoRA model, or raise whatever stops it from being built.

    It demands a model without `use_cache`, and adapters that are called by their numbers, under which it loads them.
    """
    model = twin(base)
    model.config.use_cache = False
    places = {str(number): str(out / name) for number, name in enumerate(names)}
    torch.manual_seed(0)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, adapters=places)
    return get_peft_model(model, config).eval()


def task_ids(model: Any, batch: Batch) -> Tensor:
    """Return the tasks [R] that rows ask for."""
    tasks = list(model.config.meo["tasks"])
    return torch.tensor([tasks.index(name) for name in batch.names], device=batch.device)


@torch.inference_mode()
def read(model: Any, batch: Batch, keep: bool, **options: Any) -> Served:
    """Read the prompts, then the further tokens one by one."""
    cache = DynamicCache(config=model.config)
    options |= {"past_key_values": cache, "use_cache": True, "logits_to_keep": 0 if keep else 1}
    seconds, said = [], []
    for ids in parts(batch):
        began = now(batch.device)
        logits = model(input_ids=ids, **options).logits
        seconds.append(now(batch.device) - began)
        if keep:
            said.append(logits.float())
    return Served(seconds[0], statistics.median(seconds[1:]), torch.cat(said, 1) if keep else None)


def parts(batch: Batch) -> Iterator[Tensor]:
    """Yield what one call after the other reads."""
    yield batch.ids[:, : batch.prompt]
    yield from batch.ids[:, batch.prompt :].split(1, 1)


@torch.inference_mode()
def turns(model: Any, batch: Batch, keep: bool) -> Served:
    """Serve each row by itself after a switch to its adapter, whose time counts with the prompt's."""
    served = []
    for name, ids in zip(batch.names, batch.ids, strict=True):
        began = now(batch.device)
        model.set_adapter(name, inference_mode=True)
        switched = now(batch.device) - began
        alone = read(model, Batch([name], ids[None], batch.prompt, batch.device), keep)
        served.append(Served(alone.prefill + switched, alone.decode, alone.logits))
    logits = torch.cat([one.logits for one in served if one.logits is not None]) if keep else None
    return Served(sum(one.prefill for one in served), sum(one.decode for one in served), logits)


@torch.inference_mode()
def without_cache(model: Any, batch: Batch, keep: bool) -> Served:
    """Read the prompts, then all tokens so far anew for a further one, as X-LoRA's `generate` does."""
    seconds = []
    for end in range(batch.prompt, batch.ids.shape[1] + 1, XLORA_EVERY):
        began = now(batch.device)
        model(input_ids=batch.ids[:, :end], use_cache=False, logits_to_keep=1)
        seconds.append(now(batch.device) - began)
    logits = model(input_ids=batch.ids, use_cache=False).logits.float() if keep else None
    return Served(seconds[0], statistics.median(seconds[1:]), logits)


def check(args: argparse.Namespace, batch: Batch, base: Any, arms: dict[str, Arm]) -> tuple[dict[str, float], float]:
    """Return the largest differences from the logits of the base with each row's LoRA alone, and the largest of those.

    Raises CheckFailedError if an arm that should say the same does not, or if the base does.
    """
    expected = []
    for name, ids in zip(batch.names, batch.ids, strict=True):
        alone = with_adapters(base, args.out, [name])
        expected.append(read(alone, Batch([name], ids[None], batch.prompt, batch.device), True).logits)
    wanted = torch.cat(expected)
    largest = round(float(wanted.abs().max()), 1)
    print(f"logits are up to {largest}", flush=True)
    found = {}
    for name, arm in arms.items():
        found[name] = float((arm(True).logits - wanted).abs().max())
        print(f"{name}: largest difference of logits {found[name]:.1e}", flush=True)
    if found["base"] < 100 * TOLERANCE:
        raise CheckFailedError("the adapters change nothing, so that the comparison shows nothing")
    for name in SAME:
        if args.dtype == "float32" and found.get(name, 0.0) > TOLERANCE:
            raise CheckFailedError(f"{name} differs from the base with each row's LoRA alone by {found[name]:.1e}")
    return found, largest


def row_of(
    name: str, times: dict[str, list[Served]], models: dict[str, Any], differences: dict[str, float]
) -> dict[str, Any]:
    """Return what was found of an arm; ratios are to the base."""
    row: dict[str, Any] = {"arm": name}
    for what in ("prefill", "decode"):
        mine, base = ([getattr(one, what) for one in times[arm]] for arm in (name, "base"))
        row |= {f"{what}_ms": median_ms(mine), f"{what}_ratio": ratio(mine, base)}
    size = parameter_bytes(models[name])
    row |= {"parameter_bytes": size, "bytes_ratio": round(size / parameter_bytes(models["base"]), 3)}
    row["kept_bytes"] = kept_bytes(models[name])
    return row | {"logits_differ": float(f"{differences[name]:.2g}")}


def parameter_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def kept_bytes(model: Any) -> int:
    """Return the bytes of merged experts that a MEO model keeps from one batch to the next; 0 for other models."""
    return sum(memory.nbytes for memory in model._meo_context.task_memories) if hasattr(model, "_meo_context") else 0


if __name__ == "__main__":
    main()
