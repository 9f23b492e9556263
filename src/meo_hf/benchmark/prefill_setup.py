"""What the prefill benchmark runs: its options, a grid of whole texts, and the variants that read them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

from meo_hf.benchmark.decode_variants import DecodeSettings, Method, Models, Variant
from meo_hf.benchmark.options import at_least, option
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.families_meo import family_of

PRESETS: dict[str, dict[str, Any]] = {
    "bert-base": {},
    "bert-tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2},
}
"""BERT encoders by what differs from the base size."""


@dataclass(frozen=True)
class PrefillSettings:
    """The options of a run. Raises UsageError for one that makes no sense."""

    num_experts: int = 8
    top_k: tuple[int, ...] = (2, 4, 8)
    batch: tuple[int, ...] = (8,)
    tokens: tuple[int, ...] = (128,)
    rounds: int = 5
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "tokens"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{option(name)} is {_listed(values)!r}: give each value once")
            for value in values:
                at_least(name, value, 1)
        _ = self.shared

    @property
    def shared(self) -> DecodeSettings:
        """The options that decoding has too, checked as there."""
        return DecodeSettings(
            self.num_experts, self.top_k, rounds=self.rounds, dtype=self.dtype, device=self.device, seed=self.seed
        )

    def texts(self) -> list[Text]:
        """Return the grid."""
        return [Text(batch, tokens) for batch in self.batch for tokens in self.tokens]

    def check_model(self, config: PreTrainedConfig, name: str) -> None:
        """Raise UnsupportedError for a model that reads no single text, UsageError for a text that it cannot take."""
        kind = family_of(config.model_type).kind
        if kind == "encoder-decoder" or not hasattr(config, "vocab_size"):
            what = "reads no tokens" if kind != "encoder-decoder" else "is an encoder-decoder"
            raise UnsupportedError(f"{name} ({config.model_type}) {what}: give an encoder of texts or a decoder")
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and max(self.tokens) > room:
            raise UsageError(f"--tokens {max(self.tokens)} is more than the {room} positions of {name}: lower it")

    def command(self, source: list[str]) -> str:
        """Return the command line that repeats the run, every option spelled out."""
        words = ["meo-hf", "bench", "prefill", *source]
        for field in fields(self):
            value = getattr(self, field.name)
            words += [option(field.name), _listed(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


class Text(NamedTuple):
    """The size of what is read at once: rows, and tokens per row."""

    batch: int
    tokens: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt of `meo (prompt)`, which gates the rest: the first half."""
        return -(-self.tokens // 2)

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.tokens} tokens"


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def is_decoder(models: Models) -> bool:
    """Whether gates may read only what came before."""
    return family_of(models.dense.config.model_type).kind == "decoder"


def variants_of(settings: PrefillSettings, models: Models) -> list[Variant]:
    """List what is timed, the dense model first."""
    methods: tuple[Method, ...] = ("meo (prompt)", "meo (segment)", "moe") if is_decoder(models) else ("meo", "moe")
    return [Variant("dense"), *(Variant(method, top_k) for method in methods for top_k in settings.top_k)]


def draw_texts(settings: PrefillSettings, models: Models, text: Text) -> Tensor:
    """Draw the token ids [batch, tokens] that every variant reads."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(models.dense.config.get_text_config().vocab_size, tuple(text), generator=generator)
    return ids.to(settings.device)


def read(model: PreTrainedModel, arguments: dict[str, Any], ids: Tensor) -> Tensor:
    """Return what one forward pass makes of whole texts: an encoder's states, a decoder's last logits."""
    if family_of(model.config.model_type).kind != "decoder":
        return model(ids, **arguments).last_hidden_state
    return model(ids, use_cache=False, logits_to_keep=1, **arguments).logits


def draw_preset(name: str, seed: int) -> PreTrainedModel:
    """Return an encoder with random weights. Raises UsageError for a name that PRESETS lacks."""
    if name not in PRESETS:
        raise UsageError(f"--config {name!r} is unknown: give one of {', '.join(PRESETS)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(BertConfig(**PRESETS[name]))
