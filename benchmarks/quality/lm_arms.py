"""What the language-model comparison trains: one dense model, and the models that go on from it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from meo_hf.modeling.feedforward_meo import merged_feed_forwards
from meo_hf.modeling.router_meo import Gates, MeoRouter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils import logging

from meo_hf import convert
from meo_hf.benchmark.compare_variants import weight_bytes
from meo_hf.conversion.births import generator

NUM_EXPERTS, TOP_K = 8, 2
BALANCE = 0.01
SPREAD = 2.0
"""Standard deviation, over groups of training tokens, of the logits of a frozen random router."""


@dataclass(frozen=True)
class Arm:
    """One model that goes on from the dense one.

    `kind` is dense, moe or meo. `answers` says that the first half of each window is a prompt: no loss is taken there,
    and a MEO gate of level `sequence` reads it. `gates` are learned, uniform (the average of all experts) or random (a
    router that is drawn so that it tells groups apart, and not trained).
    """

    name: str
    kind: str
    answers: bool = False
    level: str | None = None
    segment: int = 64
    gates: str = "learned"
    birth: str = "copy"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("dense", "dense"),
        Arm("moe", "moe"),
        Arm("meo-segment-64", "meo", level="segment"),
        Arm("dense-answers", "dense", answers=True),
        Arm("meo-prompt", "meo", answers=True, level="sequence"),
        Arm("meo-frozen-random", "meo", level="segment", gates="random"),
        Arm("meo-segment-256", "meo", level="segment", segment=256),
        Arm("moe-answers", "moe", answers=True),
        Arm("meo-segment-64-drop", "meo", level="segment", birth="drop-upcycle"),
        Arm("meo-uniform", "meo", level="segment", gates="uniform"),
    )
}


def dense_config(vocabulary: int, window: int, tiny: bool = False) -> LlamaConfig:
    """Describe the dense model: 2.6 million parameters, or a few thousand for tests."""
    hidden, inner, heads, layers = (32, 64, 4, 2) if tiny else (192, 512, 6, 4)
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=window, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip


def upcycle(dense: LlamaForCausalLM, num_experts: int = NUM_EXPERTS, top_k: int = TOP_K) -> MixtralForCausalLM:
    """Build the Mixtral whose experts are copies of a Llama's feed-forwards.

    It computes the same function, as its gates sum to one. Routers are drawn from torch's global generator.
    """
    old = dense.config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_parameters",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = MixtralConfig(
        **{name: getattr(old, name) for name in names}, sliding_window=None, num_local_experts=num_experts,
        num_experts_per_tok=top_k, router_aux_loss_coef=BALANCE, output_router_logits=True, head_dim=old.head_dim,
    )  # fmt: skip
    mixture = MixtralForCausalLM(config)
    kept = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = mixture.load_state_dict(kept, strict=False)
    if unexpected or any(".mlp." not in name for name in missing):
        raise ValueError(f"the Mixtral does not fit the Llama: {unexpected} left over, {missing} missing")
    with torch.no_grad():
        for layer, old_layer in zip(mixture.model.layers, dense.model.layers, strict=True):
            mlp = old_layer.mlp
            layer.mlp.experts.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])[None])
            layer.mlp.experts.down_proj.copy_(mlp.down_proj.weight[None])
    return mixture


def build(arm: Arm, dense: Path, seed: int, sample: Tensor) -> Any:
    """Build an arm's model from the folder of the dense one; random routers are spread on sample windows [N, S]."""
    torch.manual_seed(seed)
    if arm.kind == "dense":
        return LlamaForCausalLM.from_pretrained(dense)
    if arm.kind == "moe":
        return upcycle(LlamaForCausalLM.from_pretrained(dense))
    uniform = arm.gates == "uniform"
    with tempfile.TemporaryDirectory() as folder:
        convert(
            dense, Path(folder) / "meo", num_experts=NUM_EXPERTS, top_k=NUM_EXPERTS if uniform else TOP_K,
            level=arm.level, segment_length=arm.segment, expert_init=arm.birth, seed=seed, verify="none",
        )  # fmt: skip
        with quiet():
            own = {"balance_loss": 0.0, "router": "top_k"} if uniform else {"balance_loss": BALANCE}
            model = AutoModelForCausalLM.from_pretrained(Path(folder) / "meo", meo=own)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else they would stay mapped to the folder that goes now
    if uniform:
        _freeze(model, {path: torch.zeros_like(router.weight) for path, router in routers(model).items()})
    elif arm.gates == "random":
        _freeze(model, _spread(model, sample, seed))
    return model


def _freeze(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for path, router in routers(model).items():
        router.weight.data.copy_(weights[path])
        router.requires_grad_(False)


@torch.no_grad()
def _spread(model: Any, sample: Tensor, seed: int) -> dict[str, Tensor]:
    """Draw router weights that differ by input: pooled states have much in common, which plain draws would read."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda router, args: seen.__setitem__(path, args[0].clone())

    hooks = [router.register_forward_pre_hook(keep(path)) for path, router in routers(model).items()]
    with quiet():
        model.eval()(sample, routing="segment", use_cache=False)
    for hook in hooks:
        hook.remove()
    drawn = {}
    for path, states in seen.items():
        mean = states.mean(0)
        weight = torch.randn(NUM_EXPERTS, len(mean), generator=generator(seed, "frozen", path))
        weight -= torch.outer(weight @ mean, mean) / mean.square().sum()
        drawn[path] = weight * (SPREAD / (states @ weight.t()).std(0))[:, None]
    return drawn


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Transformers from reporting what is meant to be so."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def routers(model: nn.Module) -> dict[str, MeoRouter]:
    """Return the routers of a MEO model that was dense, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MeoRouter)}


@contextmanager
def uniform_gates(model: nn.Module) -> Iterator[None]:
    """Within this context all experts of a trained MEO model are averaged, whatever its gates would say."""

    def average(router: nn.Module, args: Any, output: tuple[Gates, Any]) -> tuple[Gates, Any]:
        experts, groups = router.weight.shape[0], len(output[0].top_k_index)
        index = torch.arange(experts).expand(groups, -1)
        return Gates(index, torch.full((groups, experts), 1 / experts)), output[1]

    handles = [router.register_forward_hook(average) for router in routers(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def expert_spread(model: nn.Module) -> float | None:
    """Return how far experts are from their mean, relative to it (RMS over all maps); None without experts."""
    blocks = [module.experts for _, module in merged_feed_forwards(model)]
    blocks += [module for module in model.modules() if type(module).__name__ == "MixtralExperts"]
    if not blocks:
        return None
    apart, size = 0.0, 0.0
    for block in blocks:
        for weight in (block.gate_up_proj.double(), block.down_proj.double()):
            mean = weight.mean(0)
            apart += float((weight - mean).square().mean(0).sum())
            size += float(mean.square().sum())
    return (apart / size) ** 0.5


def sizes(model: Any) -> dict[str, float]:
    """Return how many parameters a model has, and what they take in MB."""
    return {"parameters": model.num_parameters(), "megabytes": round(weight_bytes(model) / 1e6, 2)}
