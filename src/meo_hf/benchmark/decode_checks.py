"""Checks before the decoding benchmark times anything: that each variant computes what it claims to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from meo_hf.benchmark.decode_variants import DecodeSettings, Models, Variant, answer, selecting
from meo_hf.benchmark.moe import token_experts
from meo_hf.benchmark.options import DTYPES
from meo_hf.errors import CheckFailedError
from meo_hf.modeling.cache_meo import merged_bytes
from meo_hf.modeling.feedforward_meo import MeoFeedForward, merged_feed_forwards

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Relative root mean square by which results that should be equal may differ."""

TOKENS = 16


def check_cached(settings: DecodeSettings, models: Models, variant: Variant, ids: Tensor) -> float:
    """Compare a variant's cached steps with its uncached forward over the whole text; return the difference.

    Raises CheckFailedError if they differ, or if a MEO variant did not keep its merged experts.
    """
    prompt = settings.prompt_tokens
    cache = DynamicCache(config=models.dense.config)
    with torch.inference_mode(), models.serving(variant, torch.full_like(ids[:, 0], prompt)) as (model, arguments):
        cached = torch.stack(list(answer(model, arguments, ids, prompt, cache)), 1)
        uncached = model(ids, use_cache=False, **arguments).logits[:, prompt - 1 :]
    if variant.method.startswith("meo") and not merged_bytes(cache):
        raise CheckFailedError(
            f"{variant}: merged experts were not kept beside the KV cache, so nothing was timed: free memory, or lower "
            "--batch"
        )
    return _equal(f"{variant}: cached logits", cached, uncached, settings.dtype)


def check_rival(settings: DecodeSettings, models: Models, top_k: int) -> float:
    """Compare the mixture of experts with a loop over tokens and experts, in one layer; return the difference.

    Raises CheckFailedError if they differ, for many tokens at once or for one alone.
    """
    _, module = next(merged_feed_forwards(models.meo))
    generator = torch.Generator().manual_seed(settings.seed)
    features = module.experts.down_proj.shape[1]
    x = torch.randn(TOKENS, features, generator=generator) * features**-0.5  # so small that no gate rules alone
    x = x.to(settings.device, DTYPES[settings.dtype])
    with torch.inference_mode(), selecting(models.meo, top_k), token_experts(models.meo):
        together, alone = module(x), torch.cat([module(token) for token in x.split(1)])
        looped = torch.stack([mixture_of(module, token) for token in x])
    name = f"moe, top_k {top_k}: one layer's outputs"
    return max(_equal(name, found, looped, settings.dtype) for found in (together, alone))


def mixture_of(module: MeoFeedForward, x: Tensor) -> Tensor:
    """Return what a mixture of experts makes of one token [D], computed the plain way, in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)

    def linear(name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = module.experts.stack(name)
        return F.linear(x, weight[expert].to(wide), None if bias is None else bias[expert].to(wide))

    x = x.to(wide)
    logits = module.router.weight.to(wide) @ x  # type: ignore[operator, arg-type]
    chosen = logits.argsort(descending=True)[: module.router.top_k]  # type: ignore[misc]
    total = torch.zeros_like(x)
    for gate, expert in zip(logits[chosen].softmax(0), chosen.tolist(), strict=True):
        if module.gated:
            h = module.activation(linear("gate_proj", expert, x)) * linear("up_proj", expert, x)
        else:
            h = module.activation(linear("up_proj", expert, x))
        total += gate * linear("down_proj", expert, h)
    return total


def _equal(name: str, found: Tensor, expected: Tensor, dtype: str) -> float:
    difference = relative_rms(found, expected)
    if not difference <= TOLERANCES[dtype]:  # so that NaN fails too
        raise CheckFailedError(
            f"{name} differ from what they should be by {difference:.1e} (relative RMS; {TOLERANCES[dtype]:.0e} is "
            "allowed), so nothing was timed"
        )
    return difference


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square of a difference, relative to what was expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
