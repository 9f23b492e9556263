"""Checks before the prefill benchmark times anything: that each variant computes what it claims to.

Legend: T tokens of a row, D hidden features, O output features, K selected experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meo_hf.benchmark.decode_checks import check_rival
from meo_hf.benchmark.decode_variants import Models, Variant
from meo_hf.benchmark.layer_checks import check_equal
from meo_hf.benchmark.prefill_setup import PrefillSettings, Text, is_decoder, read
from meo_hf.errors import CheckFailedError
from meo_hf.modeling.feedforward_meo import MeoFeedForward, merged_feed_forwards

APART = 1e-3
"""Relative root mean square by which experts must differ at least, or a wrong merge would not show."""

SAMPLED = 1 << 16
"""Weights of each expert that are compared for it, about."""


def check_variant(settings: PrefillSettings, models: Models, variant: Variant, text: Text, ids: Tensor) -> float:
    """Return by how much a variant differs from what it should compute.

    Raises CheckFailedError if that is too much.
    """
    if variant.method == "dense":
        return _check_pair(models)
    if variant.method == "moe":  # a token's rounding may tip its gate: only one layer is compared
        return check_rival(settings.shared, models, variant.top_k or 1)
    return _check_merged(settings, models, variant, text, ids)


@torch.inference_mode()
def check_experts(models: Models) -> float:
    """Return by how much the experts that are most alike differ. Raises CheckFailedError if that is too little."""
    least = float("inf")
    for path, module in merged_feed_forwards(models.meo):
        weights = module.experts.down_proj.flatten(1)
        some = weights[:, :: max(1, weights.shape[1] // SAMPLED)].double()
        apart = torch.cdist(some, some) / some.norm(dim=1)
        least = min(least, float(apart.fill_diagonal_(torch.inf).min()))
        if not least >= APART:
            raise CheckFailedError(
                f"{path}: two experts are alike, so a wrong merge would not show, and nothing was timed"
            )
    return 0.0 if least == float("inf") else least  # one expert is like no other


def _check_pair(models: Models) -> float:
    """Compare what both models have beside feed-forwards: a rival with another body would be another model."""
    mine, its = (dict(model.named_parameters()) for model in (models.meo, models.dense))
    for name in mine.keys() & its.keys():
        if mine[name].dtype != its[name].dtype or not torch.equal(mine[name], its[name]):
            raise CheckFailedError(f"dense: {name} is not that of the MEO model, so nothing was timed")
    ways = [model.config._attn_implementation for model in (models.meo, models.dense)]
    if ways[0] != ways[1]:
        raise CheckFailedError(f"dense: attention is {ways[1]}, the MEO model's {ways[0]}, so nothing was timed")
    return 0.0


def _check_merged(settings: PrefillSettings, models: Models, variant: Variant, text: Text, ids: Tensor) -> float:
    """Compare each merged feed-forward with the plainest plan in all rows, and with float64 arithmetic in the last.

    Both plans are given the same inputs: in half precision, rounding in the layers before may tip a gate.
    """
    prompt = {"meo (prompt)": text.prompt, "meo (segment)": text.tokens}.get(variant.method)
    segment = models.segment_length if is_decoder(models) else None
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    found: list[float] = []

    def note(module: MeoFeedForward, args: Any, output: Tensor, path: str) -> None:
        x, y = (t.reshape(text.batch, text.tokens, -1)[-1] for t in (args[0], output))
        expected = _reference(module, x.double(), prompt, segment)
        found.append(check_equal(f"{variant}: outputs of {path}", y, expected, settings.dtype))
        seen[path] = args[0].cpu(), output.cpu()

    def replace(module: MeoFeedForward, args: Any, path: str) -> Tensor:
        return seen[path][0].to(args[0].device)

    def compare(module: MeoFeedForward, args: Any, output: Tensor, path: str) -> None:
        found.append(check_equal(f"{variant}: outputs of {path}", output.cpu(), seen[path][1], settings.dtype))

    lengths = torch.full_like(ids[:, 0], text.prompt)
    with torch.inference_mode(), models.serving(variant, lengths) as (model, arguments), ExitStack() as stack:
        for path, module in merged_feed_forwards(model):
            stack.callback(module.register_forward_hook(partial(note, path=path)).remove)
        read(model, arguments, ids)
        stack.pop_all().close()
        for path, module in merged_feed_forwards(model):
            stack.callback(module.register_forward_pre_hook(partial(replace, path=path)).remove)
            stack.callback(module.register_forward_hook(partial(compare, path=path)).remove)
        stack.callback(model.set_meo_plan, None)  # type: ignore[arg-type]
        model.set_meo_plan("accumulate")  # type: ignore[operator]
        read(model, arguments, ids)
    return max(found)


def _reference(module: MeoFeedForward, x: Tensor, prompt: int | None, segment: int | None) -> Tensor:
    """Return what a merged feed-forward makes of one row [T, D], computed the plain way in float64."""
    made = []
    for tokens, known in _groups(x, prompt or len(x), segment):
        logits = module.router.weight.double() @ known  # type: ignore[operator]
        chosen = logits.argsort(descending=True)[: module.router.top_k]  # type: ignore[misc]
        gates = logits[chosen].softmax(0)
        linear = partial(_merged_linear, module, chosen.tolist(), gates)
        if module.gated:
            hidden = module.activation(linear("gate_proj", x[tokens])) * linear("up_proj", x[tokens])
        else:
            hidden = module.activation(linear("up_proj", x[tokens]))
        made.append(linear("down_proj", hidden))
    return torch.cat(made)


def _merged_linear(module: MeoFeedForward, chosen: list[int], gates: Tensor, name: str, x: Tensor) -> Tensor:
    weight, bias = module.experts.stack(name)
    merged = sum(g * weight[expert].double() for g, expert in zip(gates, chosen, strict=True))
    added = None if bias is None else sum(g * bias[expert].double() for g, expert in zip(gates, chosen, strict=True))
    return F.linear(x, merged, added)  # type: ignore[arg-type]


def _groups(x: Tensor, prompt: int, segment: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield which tokens of a row [T, D] share a gate, and what it reads: all, or what came before."""
    if segment is None:
        yield slice(None), x.mean(0)
        return
    for start in range(0, prompt, segment):
        known = x[start - segment : start].mean(0) if start else x[0]
        yield slice(start, min(start + segment, prompt)), known
    if prompt < len(x):
        yield slice(prompt, None), x[:prompt].mean(0)
