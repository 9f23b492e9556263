"""What the decoding benchmark runs: its settings, its two models, and the variants that they serve."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel

from meo_hf.benchmark.moe import token_experts
from meo_hf.benchmark.options import DTYPES, at_least, check_place, option
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.families_meo import family_of
from meo_hf.modeling.router_meo import MeoRouter

Method = Literal["dense", "meo", "meo (prompt)", "meo (segment)", "moe"]


@dataclass(frozen=True)
class DecodeSettings:
    """The options of a run. Raises UsageError for one that makes no sense."""

    num_experts: int = 8
    top_k: tuple[int, ...] = (2, 4, 8)
    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"num_experts": 1, "batch": 1, "prompt_tokens": 1, "new_tokens": 2, "rounds": 1}
        for name, low in lowest.items():
            at_least(name, getattr(self, name), low)
        if not self.top_k or min(self.top_k) < 1 or len(set(self.top_k)) < len(self.top_k):
            raise UsageError(f"--top-k is {_listed(self.top_k)!r}: give numbers from 1 on, each once")
        if max(self.top_k) > self.num_experts:
            raise UsageError(f"--top-k {max(self.top_k)} is more than --num-experts {self.num_experts}: lower one")
        check_place(self.dtype, self.device)

    @property
    def total_tokens(self) -> int:
        """The length of the text, prompt included."""
        return self.prompt_tokens + self.new_tokens

    def check_model(self, config: PreTrainedConfig, name: str) -> None:
        """Raise UnsupportedError for a model that is no decoder, UsageError for a text that it cannot take."""
        kind = family_of(config.model_type).kind
        if kind != "decoder":
            raise UnsupportedError(f"{name} is an {kind} ({config.model_type}): decoding needs a decoder-only model")
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and self.total_tokens > room:
            raise UsageError(
                f"--prompt-tokens {self.prompt_tokens} and --new-tokens {self.new_tokens} are more than the "
                f"{room} positions of {name}: lower one"
            )

    def command(self, source: str) -> str:
        """Return the command line that repeats the run, every option spelled out."""
        words = ["meo-hf", "bench", "decode", source]
        for field in fields(self):
            value = getattr(self, field.name)
            words += [option(field.name), _listed(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@dataclass(frozen=True)
class Variant:
    """One row of the result; `top_k` None for the dense model."""

    method: Method
    top_k: int | None = None

    def __str__(self) -> str:
        return self.method if self.top_k is None else f"{self.method}, top_k {self.top_k}"


def variants_of(settings: DecodeSettings) -> list[Variant]:
    """List what is timed. Between merges top_k costs `meo (segment)` nothing, so one of them is enough."""
    listed: list[tuple[Method, tuple[int, ...]]] = [
        ("meo (prompt)", settings.top_k),
        ("meo (segment)", settings.top_k[:1]),
        ("moe", settings.top_k),
    ]
    return [Variant("dense"), *(Variant(method, top_k) for method, numbers in listed for top_k in numbers)]


@dataclass(frozen=True)
class Models:
    """The dense model, and its MEO model, whose experts serve every other variant."""

    dense: PreTrainedModel
    meo: PreTrainedModel

    @property
    def segment_length(self) -> int:
        """Tokens per segment of `meo (segment)`."""
        return int(self.meo.config.meo["segment_length"])

    def describe(self) -> dict[str, Any]:
        """Name the model and count its parameters."""
        counts = [sum(p.numel() for p in model.parameters()) for model in (self.dense, self.meo)]
        return {"class": type(self.dense).__name__, "parameters": counts[0], "parameters_meo": counts[1]}

    @contextmanager
    def serving(self, variant: Variant, prompt_lengths: Tensor) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
        """Yield the model of a variant and what else its forward takes, for as long as the context lasts."""
        if variant.top_k is None:
            yield self.dense, {}
            return
        arguments: dict[Method, dict[str, Any]] = {
            "meo (prompt)": {"prompt_lengths": prompt_lengths},
            "meo (segment)": {"routing": "segment"},
        }
        with ExitStack() as stack:
            stack.enter_context(selecting(self.meo, variant.top_k))
            if variant.method == "moe":
                stack.enter_context(token_experts(self.meo))
            yield self.meo, arguments.get(variant.method, {})


@contextmanager
def selecting(model: PreTrainedModel, top_k: int) -> Iterator[None]:
    """Within this context every router selects `top_k` experts."""
    routers = {module: module.top_k for module in model.modules() if isinstance(module, MeoRouter)}
    for router in routers:
        router.top_k = top_k
    try:
        yield
    finally:
        for router, before in routers.items():
            router.top_k = before


def load_models(settings: DecodeSettings, dense: Path, meo: Path) -> Models:
    """Load a dense model and its MEO model of level `sequence`, whose routers are drawn anew so that gates vary.

    All weights are copied into memory of their own: some would stay mapped files, whose small pages read slower.
    """
    decodes = family_of(AutoConfig.from_pretrained(dense).model_type).kind == "decoder"
    auto = AutoModelForCausalLM if decodes else AutoModel
    loaded: list[Any] = [
        auto.from_pretrained(folder, dtype=DTYPES[settings.dtype], device_map=settings.device).eval()
        for folder in (dense, meo)
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    for model in loaded:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for module in model.modules():
            if isinstance(module, MeoRouter):
                module.weight.data.copy_(torch.randn(module.weight.shape, generator=generator))
    return Models(*loaded)


def draw_text(settings: DecodeSettings, vocabulary: int) -> Tensor:
    """Draw the token ids [batch, total] that every variant reads, whatever it would answer itself."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(vocabulary, (settings.batch, settings.total_tokens), generator=generator)
    return ids.to(settings.device)


def answer(
    model: PreTrainedModel, arguments: dict[str, Any], ids: Tensor, prompt_tokens: int, cache: Cache
) -> Iterator[Tensor]:
    """Yield the logits [batch, vocabulary] after the prompt, then after each further token, with a KV cache."""
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True, **arguments}
    yield model(ids[:, :prompt_tokens], logits_to_keep=1, **options).logits[:, -1]
    for place in range(prompt_tokens, ids.shape[1]):
        yield model(ids[:, place : place + 1], **options).logits[:, -1]
