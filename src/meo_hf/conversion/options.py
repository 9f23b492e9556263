"""What the user asked a conversion for, and what of it makes no sense for a source."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meo_hf.conversion.expert_bank import Truncation
from meo_hf.conversion.source import Source
from meo_hf.errors import UsageError
from meo_hf.modeling.configuration_meo import is_causal


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `meo_hf.convert` for each."""

    num_experts: int | None = None
    top_k: int | None = None
    level: str | None = None
    pooling: str | None = None
    segment_length: int | None = None
    routing: str | None = None
    gate_scope: str = "ffn"
    expert_init: str = "copy"
    layers: str = "all"
    tasks: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    seed: int = 0
    outside: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    expert_rank: int | None = None
    expert_energy: float | None = None
    expert_center: str | None = None

    @property
    def truncation(self) -> Truncation:
        """How much of full experts is kept; raises UsageError for what makes no sense."""
        return Truncation(self.expert_rank, self.expert_energy, self.expert_center)


def parse_layers(text: str, depth: int) -> list[int]:
    """Read `all`, `even`, `odd`, `last:N` or `i,j,...` for a model of some depth; raises UsageError."""
    everything = list(range(depth))
    named = {"all": everything, "even": everything[0::2], "odd": everything[1::2]}
    chosen: list[int] | None = named.get(text)
    if chosen is None and text.startswith("last:") and text[5:].isdigit():
        chosen = everything[-int(text[5:]) :] if int(text[5:]) else []
        if int(text[5:]) > depth:
            raise UsageError(f"--layers {text}: the model has only {depth} layers (0 to {depth - 1})")
    elif chosen is None and all(part.strip().isdigit() for part in text.split(",")):
        chosen = sorted({int(part) for part in text.split(",")})
        if beyond := [i for i in chosen if i >= depth]:
            raise UsageError(f"--layers {text}: no layer {beyond[0]}; the model has layers 0 to {depth - 1}")
    if chosen is None:
        raise UsageError(f"--layers {text!r} is not understood: give all, even, odd, last:N or indices like 0,2,5")
    if not chosen:
        raise UsageError(f"--layers {text} names no layer of a model with layers 0 to {depth - 1}")
    return chosen


def check_decoder_options(source: Source, options: Options, level: str) -> None:
    """Raise UsageError for an option of decoders' gates where gates read no past."""
    for name in ("segment_length", "routing"):
        if getattr(options, name) is not None and (level == "task" or not is_causal(source.config)):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} has no effect at level {level!r} of {source.config.model_type}: leave it out")
