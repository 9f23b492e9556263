"""What is measured of a language model: losses on held-out windows, how its gates mix, what it costs.

Legend: N windows, S tokens per window, G groups that share a gate, E experts, K selected experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_arms import NUM_EXPERTS, Arm, expert_spread, quiet, routers, sizes, uniform_gates
from torch import Tensor
from torch.nn import functional as F

from meo_hf.benchmark.compare_quality import check_causal
from meo_hf.benchmark.compare_speed import flops_per_token
from meo_hf.benchmark.compare_variants import Subject

BATCH = 4


@dataclass(frozen=True)
class HeldOut:
    """Windows [N, S] that nobody trains on, their kinds of text, and the bytes of every token of the vocabulary."""

    windows: Tensor
    kinds: list[str]
    token_bytes: Tensor

    @property
    def half(self) -> int:
        """Tokens of a window's first half, which is a prompt where one is asked for."""
        return self.windows.shape[1] // 2

    def routing(self, name: str | None) -> dict[str, Any]:
        """Return the arguments that gate by segments, by the window's first half, or None."""
        if name == "prompt":
            return {"routing": "prompt", "prompt_lengths": torch.full((BATCH,), self.half)}
        return {} if name is None else {"routing": name}


@torch.inference_mode()
def losses(model: Any, held_out: HeldOut, routing: str | None) -> Tensor:
    """Return the loss in nats of every predicted token [N, S - 1]."""
    model.eval()
    found = []
    for ids in held_out.windows.split(BATCH):
        arguments = held_out.routing(routing)
        if "prompt_lengths" in arguments:
            arguments["prompt_lengths"] = arguments["prompt_lengths"][: len(ids)]
        with quiet():
            logits = model(ids, use_cache=False, **arguments).logits[:, :-1]
        found.append(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"))
    return torch.cat(found).view(len(held_out.windows), -1)


def summary(found: Tensor, held_out: HeldOut, prefix: str) -> dict[str, Any]:
    """Return perplexity over whole windows and over their second halves (the answers), per kind of text, and bits."""
    size = held_out.token_bytes[held_out.windows[:, 1:]]
    answers = found[:, held_out.half - 1 :]
    result = {
        f"{prefix}perplexity": math.exp(found.double().mean()),
        f"{prefix}bits_per_byte": float(found.double().sum()) / math.log(2) / int(size.sum()),
        f"{prefix}answers": math.exp(answers.double().mean()),
    }
    for kind in dict.fromkeys(held_out.kinds):
        rows = torch.tensor([k == kind for k in held_out.kinds])
        result[f"{prefix}{kind}"] = math.exp(found[rows].double().mean())
    return {name: round(value, 4) for name, value in result.items()}


@torch.inference_mode()
def gate_usage(model: Any, held_out: HeldOut, routing: str | None) -> dict[str, Any]:
    """Describe the gates on the held-out windows, averaged over layers.

    `gate_entropy` is that of the K weights in nats, `distance` their total variation from 1 / K. Per layer, over all E
    experts: `used_entropy` of the mean gate, relative to log E; `told` is the mutual information of groups and experts
    in nats, zero if all groups have the same gate; `dead` counts experts that no group selects.
    """
    with _recorded(model) as seen:
        losses(model, held_out, routing)
    rows = []
    for index, weights in ((torch.cat(i), torch.cat(w)) for i, w in seen.values()):
        dense = torch.zeros(len(weights), NUM_EXPERTS, dtype=torch.float64).scatter_add(1, index, weights.double())
        own, mean = torch.special.entr(dense).sum(1).mean(), dense.mean(0)
        used = torch.special.entr(mean).sum()
        rows.append(
            [
                float(own),
                float((weights - 1 / weights.shape[1]).abs().sum(1).mean() / 2),
                float(used) / math.log(NUM_EXPERTS),
                float(used - own),
                int((mean == 0).sum()),
            ]
        )
    names = ("gate_entropy", "distance", "used_entropy", "told", "dead")
    return dict(zip(names, torch.tensor(rows, dtype=torch.float64).mean(0).round(decimals=4).tolist(), strict=True))


@contextmanager
def _recorded(model: Any) -> Iterator[dict[str, tuple[list[Tensor], list[Tensor]]]]:
    """Keep the gates of every router of a MEO or Mixtral model that runs within this context."""
    seen: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    modules = dict(routers(model))
    modules |= {path: m for path, m in model.named_modules() if type(m).__name__ == "MixtralTopKRouter"}

    def keep(path: str) -> Any:
        indices, weights = seen.setdefault(path, ([], []))

        def hook(module: Any, args: Any, output: Any) -> None:
            index, weight = output[0] if isinstance(output[0], tuple) else (output[2], output[1])
            indices.append(index.clone())
            weights.append(weight.clone())

        return hook

    handles = [module.register_forward_hook(keep(path)) for path, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def measure(model: Any, arm: Arm, held_out: HeldOut, validation: HeldOut) -> dict[str, Any]:
    """Return all measurements of a trained arm; refuses one that reads what it predicts.

    MEO models are measured with gates that go on reading (`segment`), with gates frozen at the window's middle
    (`prompt_...`), and with the average of all experts in the place of what the gates choose (`averaged_...`).
    """
    model.eval()
    own: str | None = None if arm.kind != "meo" else "prompt" if arm.level == "sequence" else "segment"
    for routing in ("segment", "prompt") if own else (None,):
        arguments = one_row(held_out.routing(routing))
        check_causal(Subject(arm.name, model, arguments, 0), held_out.windows[:1], 0, "float32")
    found = losses(model, held_out, own and "segment")
    result = summary(found, held_out, "")
    begin = held_out.half - 1 if arm.answers else 0
    result["validation"] = round(float(losses(model, validation, own)[:, begin:].mean()), 5)
    chosen = found
    if arm.kind == "meo":
        at_prompt = losses(model, held_out, "prompt")
        result |= summary(at_prompt, held_out, "prompt_")
        with uniform_gates(model):
            averaged = losses(model, held_out, "segment")
        result |= summary(averaged, held_out, "averaged_")
        chosen = at_prompt if own == "prompt" else found
    if arm.kind != "dense":
        result |= gate_usage(model, held_out, own)
    result["windows"] = [round(x, 4) for x in chosen.mean(1).tolist()]
    result["answer_windows"] = [round(x, 4) for x in chosen[:, held_out.half - 1 :].mean(1).tolist()]
    result["flops_per_token"] = round(flops(model, arm, held_out))
    return result | sizes(model) | {"expert_spread": expert_spread(model)}


def flops(model: Any, arm: Arm, held_out: HeldOut) -> float:
    """Return what a token of a whole window costs."""
    routing = None if arm.kind != "meo" else "prompt" if arm.level == "sequence" else "segment"
    with quiet():
        return flops_per_token(Subject(arm.name, model, one_row(held_out.routing(routing)), 0), held_out.windows[:1])


def one_row(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a batch's arguments for a batch of one row."""
    return {name: value[:1] if isinstance(value, Tensor) else value for name, value in arguments.items()}
