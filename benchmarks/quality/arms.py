"""What is compared: each arm makes a model to train from one and the same dense start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.feedforward_meo import merged_feed_forwards
from token_mixture import make_token_mixture
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from meo_hf import convert
from meo_hf.conversion.births import generator

NUM_EXPERTS = 8
SPREAD = 2.0
"""Standard deviation, over training rows, of the logits of a frozen random router."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    `kind` is dense, moe (a gate per token, outputs added), sequence, token or task (MEO), uniform (all experts with
    equal weights) or frozen (MEO level sequence, a random router that is not trained). `birth` says how experts differ
    at the start: copy, noise, drop-upcycle or fine-tunes. `length` is a multiple of the other arms' steps. `adapter` is
    a kind of LoRA that is trained with the head in the place of all weights.
    """

    kind: str
    top_k: int | None = None
    birth: str | None = None
    length: int = 1
    adapter: str | None = None

    @property
    def name(self) -> str:
        """The arm in words."""
        name = self.kind if self.kind in ("dense", "moe", "uniform", "frozen") else f"MEO {self.kind}"
        name += "" if self.top_k is None else f" k={self.top_k}"
        name += "" if self.birth in (None, "copy") else f", {self.birth}"
        name += "" if self.adapter is None else f", LoRA {self.adapter}"
        return name + ("" if self.length == 1 else f", {self.length}x steps")

    def key(self) -> dict[str, Any]:
        """The arm's part of a ledger key."""
        key = {"arm": self.kind, "top_k": self.top_k, "birth": self.birth, "length": self.length}
        return key if self.adapter is None else {**key, "adapter": self.adapter}


DENSE = Arm("dense")
MAIN = (
    DENSE,
    Arm("sequence", 2, "copy"),
    Arm("moe", 2, "copy"),
    Arm("uniform", None, "copy"),
    Arm("frozen", 2, "copy"),
    Arm("task", 2, "copy"),
    Arm("token", 2, "copy"),
    Arm("sequence", 4, "copy"),
    Arm("moe", 4, "copy"),
    Arm("token", 4, "copy"),
    Arm("task", 4, "copy"),
)
SMALL = tuple(arm for arm in MAIN if arm.top_k in (None, 2) and arm.kind in ("dense", "moe", "sequence", "task"))
"""For models that take long to train."""
SYMMETRY = (
    Arm("sequence", 2, "noise"),
    Arm("sequence", 2, "drop-upcycle"),
    Arm("sequence", 2, "fine-tunes"),
    Arm("uniform", None, "fine-tunes"),
    Arm("moe", 2, "fine-tunes"),
    replace(DENSE, length=2),
)
ADAPTERS = (
    Arm("sequence", 2, "copy", adapter="per expert"),
    Arm("sequence", 2, "copy", adapter="shared"),
    Arm("sequence", 2, "copy", adapter="attention"),
    replace(DENSE, adapter="attention"),
    replace(DENSE, adapter="feed-forward"),
    Arm("sequence", 2, "copy", adapter="per expert and routers"),
)
"""What is trained in the place of all weights, for the arms of the same kind in MAIN."""
EMBEDDINGS = (
    Arm("sequence", 2, "copy", adapter="per expert and embeddings"),
    replace(DENSE, adapter="attention and embeddings"),
)
"""The same with word embeddings: a control."""


def dense_start(checkpoint: str | Path, labels: int, seed: int, folder: Path) -> Path:
    """Write the dense model that all arms of a seed begin with: same body, same fresh head."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=labels, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def build(
    arm: Arm,
    start: Path,
    scratch: Path,
    seed: int,
    sample: Sequence[dict[str, Tensor]] = (),
    tasks: Sequence[str] = (),
    experts: Sequence[Path] = (),
) -> PreTrainedModel:
    """Return an arm's model, ready to train.

    `sample` are batches of training rows, by which a frozen router is spread; `tasks` name the tasks of level `task`;
    `experts` are fine-tunes of the start for the birth of that name.
    """
    if arm.kind == "dense":
        return AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    level = {"moe": "sequence", "frozen": "sequence", "uniform": "task"}.get(arm.kind, arm.kind)
    if arm.birth == "fine-tunes":
        how: dict[str, Any] = {"experts": experts}
    else:
        how = {"num_experts": NUM_EXPERTS, "expert_init": arm.birth}
    top_k = arm.top_k or NUM_EXPERTS
    folder = scratch / "converted"
    convert(
        start, folder, level=level, top_k=top_k, tasks=tasks, seed=seed, verify="none", overwrite=True, **how
    )  # fmt: skip
    still = {"router": "top_k", "balance_loss": 0.0} if arm.kind == "uniform" else {}
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, meo=still)
    if arm.kind == "moe":
        make_token_mixture(model)
    elif arm.kind == "uniform":
        _fix_routers(model, lambda path, router: torch.zeros_like(router.weight))
    elif arm.kind == "frozen":
        _spread_routers(model, sample, seed)
    return model


def _fix_routers(model: nn.Module, draw: Any) -> None:
    for path, module in merged_feed_forwards(model):
        router: Any = module.router
        router.weight.data.copy_(draw(path, router))
        for parameter in router.parameters():
            parameter.requires_grad_(False)


def _spread_routers(model: nn.Module, sample: Sequence[dict[str, Tensor]], seed: int) -> None:
    """Draw routers that differ by input: pooled states have much in common, which random rows would mostly read."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.router.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0]))
        for path, module in merged_feed_forwards(model)
    ]
    model.eval()
    with torch.no_grad():
        for batch in sample:
            model(**{name: x for name, x in batch.items() if name != "labels"})
    for hook in hooks:
        hook.remove()

    def draw(path: str, router: Any) -> Tensor:
        states = torch.cat(seen[path])
        mean = states.mean(0)
        weight = torch.randn(router.weight.shape, generator=generator(seed, "frozen", path))
        weight -= torch.outer(weight @ mean, mean) / mean.square().sum()
        return weight * (SPREAD / (states @ weight.t()).std(0))[:, None]

    _fix_routers(model, draw)


def parameter_count(model: nn.Module) -> int:
    """Return all parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def expert_distance(model: nn.Module) -> float | None:
    """Return how far experts lie from their mean, relative to the mean's norm; None without experts."""
    distances = []
    for _, module in merged_feed_forwards(model):
        stack = module.experts.down_proj.detach()
        mean = stack.mean(0, keepdim=True)
        distances.append(((stack - mean).flatten(1).norm(dim=1) / mean.norm()).mean())
    return float(torch.stack(distances).mean()) if distances else None
