"""Whether routers find the right adapter: eight LoRAs of SmolLM2 as one model that reads its prompt.

    python benchmarks/adapters/route.py OUT [--json FILE]

OUT is what `train_loras.py` wrote. Held-out windows are cut into a prompt and an answer, of which only the answer's
loss counts. Routers are made of example texts that the adapters were trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.router_meo import MeoRouter
from texts import WINDOW, held_out, splits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import meo_hf
from meo_hf import convert
from meo_hf.version import versions

COMMAND = "python benchmarks/adapters/route.py OUT --json benchmarks/adapters/route.json"
PROMPT = WINDOW // 2
CHARACTERS = 20_000
ROUTED = {"examples, top-1": (True, 1), "examples, top-2": (True, 2), "untrained routers, top-2": (False, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path, help="also write the results there")
    args = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.out / "base")
    texts = {name: split for name, split in splits().items() if (args.out / name).is_dir()}
    windows = {name: held_out(split, tokenizer) for name, split in texts.items()}
    adapters = {name: args.out / name for name in texts}
    found: dict[str, Any] = {"prompt": PROMPT, "answer": WINDOW - PROMPT, "losses": {}, "right": {}}
    base = AutoModelForCausalLM.from_pretrained(args.out / "base").eval()
    found["losses"]["base"] = {name: loss_of(base, ids) for name, ids in windows.items()}
    del base
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        examples = write_examples(Path(folder), texts)
        own = converted(args.out / "base", Path(folder) / "task", adapters=adapters)
        found["losses"]["own adapter (told)"] = {
            name: loss_of(own, ids, task_ids=torch.full((len(ids),), number))
            for number, (name, ids) in enumerate(windows.items())
        }
        del own
        for arm, (reads, top_k) in ROUTED.items():
            options = {"examples": examples} if reads else {}
            model = converted(
                args.out / "base", Path(folder) / arm, adapters=adapters, level="sequence", top_k=top_k, **options
            )
            chosen = watch(model)
            found["losses"][arm], found["right"][arm] = {}, {}
            for number, (name, ids) in enumerate(windows.items()):
                chosen.clear()
                found["losses"][arm][name] = loss_of(model, ids)
                found["right"][arm][name] = float((torch.cat(chosen) == number).float().mean())
            print(arm, found["losses"][arm], found["right"][arm], flush=True)
            del model
    found |= {"command": COMMAND, "versions": versions(), "threads": torch.get_num_threads()}
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def converted(base: Path, folder: Path, **options: Any) -> Any:
    """Convert and load."""
    report = convert(base, folder, verify="none", **options)
    if report.routed:
        print(f"examples: {report.routed}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert meo_hf.__version__
    return model.eval()


def write_examples(folder: Path, texts: dict[str, Any]) -> dict[str, Path]:
    """Write a file of training text per adapter."""
    found = {}
    for name, split in texts.items():
        found[name] = folder / f"{name}.txt"
        found[name].write_text("\n\n".join(split.train)[:CHARACTERS], "utf-8")
    return found


@torch.inference_mode()
def loss_of(model: Any, ids: Tensor, **gates: Any) -> float:
    """Return the mean loss per token of the answers."""
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return round(float(model(input_ids=ids, labels=labels, use_cache=False, **gates).loss), 4)


def watch(model: Any) -> list[Tensor]:
    """Note which expert each router selects first for an answer, over all layers and rows."""
    chosen: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        index = output[0].top_k_index
        chosen.append(index.view(-1, 2, index.shape[1])[:, -1, 0])  # of a row's prompt and its answer

    for module in model.modules():
        if isinstance(module, MeoRouter):
            module.register_forward_hook(note)
    return chosen


def table(found: dict[str, Any]) -> str:
    """Return the losses as Markdown, and how many routers chose the right adapter for an answer."""
    arms = list(found["losses"])
    lines = ["| text | " + " | ".join(arms) + " |", "| --- |" + " ---: |" * len(arms)]
    names = list(found["losses"]["base"])
    for name in names:
        cells = [f"{found['losses'][arm][name]:.3f}" for arm in arms]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = [sum(found["losses"][arm].values()) / len(names) for arm in arms]
    lines.append("| mean | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    right = {arm: sum(shares.values()) / len(names) for arm, shares in found["right"].items()}
    return "\n".join(
        [*lines, "", *(f"{arm}: {share:.1%} of gates choose the right adapter" for arm, share in right.items())]
    )


if __name__ == "__main__":
    main()
