"""Compare a mixture of experts with its MEO model and cheaper variants: quality, speed and memory on given text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from meo_hf.benchmark.compare_quality import (
    GateTally,
    LayerError,
    Quality,
    check_causal,
    layer_errors,
    measure_quality,
    tallied_gates,
)
from meo_hf.benchmark.compare_speed import Speed, flops_per_token, peak_bytes, time_beside
from meo_hf.benchmark.compare_variants import (
    CompareSettings,
    Subject,
    averaged,
    gates_of,
    load,
    load_also,
    with_top_k,
)
from meo_hf.conversion.fetch import SourceOptions, locate
from meo_hf.conversion.source import Source, first_line, open_source, public_name, quiet_transformers, raw_config
from meo_hf.errors import SourceError, UnsupportedError, UsageError
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.moe_settings_meo import top_k_of
from meo_hf.texts import cut_windows, load_tokenizer, read_text

Advance = Callable[[str, int, int], None]
"""Called before each step of a run with what it does, its number from 0 on, and how many there are."""


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; `source_speed` was timed in turns with it."""

    name: str
    quality: Quality
    speed: Speed
    source_speed: Speed
    flops: float
    nbytes: int


@dataclass(frozen=True)
class Layer:
    """How one merged MoE block answers to what the source's block read, and how its gates mix."""

    path: str
    error: LayerError
    gates: GateTally


@dataclass
class Comparison:
    """All rows, the source's first. `skipped` says why a variant is missing, `gates` how MEO's gates were formed."""

    settings: CompareSettings
    windows: Tensor
    model_class: str
    experts_implementation: str
    gates: str
    segment: int
    rows: list[Row] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def compare(
    source: str,
    out: str,
    text: str | Path,
    settings: CompareSettings | None = None,
    also: Sequence[str] = (),
    advance: Advance = lambda what, done, total: None,
) -> Comparison:
    """Measure a mixture of experts, its MEO model and cheaper variants on the same windows of a text.

    One model at a time is loaded beside the source. Raises UsageError for options, text or models that do not fit each
    other, SourceError and UnsupportedError for models that cannot be used, CheckFailedError for one that reads tokens
    which it is to predict.
    """
    settings = settings or CompareSettings()
    content = read_text(text)
    opened = open_source(source, SourceOptions(trust_remote_code=settings.trust_remote_code))
    try:
        with quiet_transformers():
            return _compare(opened, out, content, settings, also, advance)
    finally:
        opened.close()


def _compare(
    opened: Source, out: str, text: str, settings: CompareSettings, also: Sequence[str], advance: Advance
) -> Comparison:
    family = _decoder(opened)
    folder = _meo_folder(out, opened)
    meo_class: Any = meo_model_class(opened.model_class())
    tokenizer = load_tokenizer(opened.folder, opened.name, **_gguf(opened))
    configs = {out: meo_class.config_class.from_pretrained(folder)}
    configs |= {name: _also_config(name, tokenizer, settings) for name in also}
    windows = _windows(opened, configs, tokenizer, text, settings)

    top_ks, skipped = _top_ks(opened, family)
    model: Any = load(opened.model_class(), opened.loadable, settings)
    run = _Run(settings, windows, Subject.of("source", model), advance, 3 + len(top_ks) + len(also))
    rows = [run.row(run.source)]
    meo: Any = load(meo_class, folder, settings)
    of_meo, layers = run.meo_rows(Subject.of("MEO", meo))
    result = Comparison(
        settings, windows, type(model).__name__, model.config._experts_implementation, gates_of(meo),
        meo._meo_context.settings.segment_length, rows + of_meo, layers, skipped,
    )  # fmt: skip
    del meo
    for top_k in top_ks:
        subject = Subject.of(f"source, top-{top_k}", with_top_k(model, family, top_k))
        if reason := _fails(subject, run.windows[:1]):
            skipped[subject.name] = reason
        else:
            result.rows.append(run.row(subject))
    for name in also:
        result.rows.append(run.row(Subject.of(public_name(name), load_also(name, settings))))
    return result


class _Run:
    """Measures variants one by one, and counts the steps."""

    def __init__(
        self, settings: CompareSettings, windows: Tensor, source: Subject, advance: Advance, variants: int
    ) -> None:
        self.settings, self.windows, self.source = settings, windows.to(settings.device), source
        batches = -(-len(windows) // settings.batch_size)
        self._advance, self._done = advance, 0
        self._total = variants * (batches + settings.rounds + 1) + batches

    def step(self, what: str) -> None:
        """Say what is done next."""
        self._advance(what, self._done, self._total)
        self._done += 1

    def check(self, subject: Subject) -> None:
        """Refuse a model that reads what it predicts."""
        check_causal(subject, self.windows[:1], self.settings.seed, self.settings.dtype)

    def quality(self, subject: Subject) -> Quality:
        """Compare predictions with the source's."""
        return measure_quality(self.source, subject, self.windows, self.settings.batch_size, self.step)

    def row(self, subject: Subject, quality: Quality | None = None) -> Row:
        """Check and measure everything, but for a quality that is known."""
        if quality is None:
            self.check(subject)
            quality = self.quality(subject)
        window = self.windows[:1]
        source_speed, speed = time_beside(self.source, subject, window, self.settings.rounds, self.step)
        flops, nbytes = flops_per_token(subject, window), peak_bytes(subject, window)
        return Row(subject.name, quality, speed, source_speed, flops, nbytes)

    def meo_rows(self, meo: Subject) -> tuple[list[Row], list[Layer]]:
        """Measure a MEO model and the average of its experts, and each of its blocks."""
        self.check(meo)
        with tallied_gates(meo.model) as tallies:
            quality = self.quality(meo)
        rows = [self.row(meo, quality)]
        errors = layer_errors(self.source, meo, self.windows, self.settings.batch_size, self.step)
        sites = {path: module._meo.path for path, module in merged_moe(meo.model)}
        with averaged(meo.model, {path: tally.totals for path, tally in tallies.items()}) as average:
            rows.append(self.row(average))
        return rows, [Layer(sites[path], errors[sites[path]], tally) for path, tally in tallies.items()]


def _decoder(opened: Source) -> MoeFamily:
    """Return the family of a source; raises UnsupportedError unless it is a mixture of experts that decodes."""
    family = opened.family
    if not isinstance(family, MoeFamily):
        raise UnsupportedError(
            f"{opened.name} is no mixture of experts ({opened.config.model_type}): give the one that OUT was made from"
        )
    if family.kind != "decoder":
        raise UnsupportedError(
            f"{opened.name} is an {family.kind} ({family.model_type}): perplexity needs a decoder-only model"
        )
    return family


def _meo_folder(out: str, opened: Source) -> Path:
    """Find the MEO model of a source; raises UnsupportedError or UsageError for any other model."""
    folder, _, _ = locate(out, SourceOptions())
    found = str(raw_config(folder).get("model_type", ""))
    if not found.startswith("meo_"):
        raise UnsupportedError(f"{out} is no MEO model (model type {found!r}): give what meo-hf convert wrote")
    if found != (wanted := f"meo_{opened.config.model_type}"):
        raise UsageError(f"{out} is of type {found}, but {opened.name} becomes {wanted}: give its own MEO model")
    return folder


def _gguf(opened: Source) -> dict[str, Any]:
    return {} if opened.gguf_file is None else {"gguf_file": opened.gguf_file}


def _also_config(name: str, tokenizer: Any, settings: CompareSettings) -> PreTrainedConfig:
    """Read the config of a further model; raises UsageError if it has another tokenizer than the source."""
    code = {"trust_remote_code": settings.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **code)
    except Exception as error:  # transformers raises many kinds; each means that the model cannot be used
        raise SourceError(f"--also {name} cannot be read ({first_line(error)}): check it") from None
    try:
        own = load_tokenizer(name, name, **code)
    except SourceError:  # then it is meant for the source's
        return config
    if own.get_vocab() != tokenizer.get_vocab():
        raise UsageError(f"--also {name} has another tokenizer than the source: their predictions cannot be compared")
    return config


def _windows(
    opened: Source, configs: dict[str, PreTrainedConfig], tokenizer: Any, text: str, settings: CompareSettings
) -> Tensor:
    """Cut the text into windows that every model can take; raises UsageError where vocabularies differ."""
    size = opened.config.get_text_config(decoder=True).vocab_size
    room = settings.window
    for name, config in {opened.name: opened.config, **configs}.items():
        part = config.get_text_config(decoder=True)
        if part.vocab_size != size:
            raise UsageError(
                f"{name} has {part.vocab_size} tokens, {opened.name} {size}: give models of one vocabulary"
            )
        room = min(room, getattr(part, "max_position_embeddings", None) or room)
    return cut_windows(tokenizer, text, room, settings.limit)


def _fails(subject: Subject, window: Tensor) -> str:
    """Return why a family's code cannot run with another number of experts, as some cannot with one."""
    try:
        with torch.inference_mode():
            subject.logits(window)
    except Exception as error:  # whatever it is, it is that code's own
        return f"{type(subject.model).__name__} fails with it ({first_line(error)})"
    return ""


def _top_ks(opened: Source, family: MoeFamily) -> tuple[list[int], dict[str, str]]:
    """Return smaller numbers of experts that the source can select, and why others cannot be tried."""
    own = top_k_of(opened.config, family)
    chosen, skipped = [], {}
    for name, top_k in (("source, top-1", 1), ("source, half of top-k", own // 2)):
        if own == 1:
            skipped[name] = "the source selects one expert already"
        elif name != "source, top-1" and top_k < 2:
            skipped[name] = f"half of {own} is {top_k}"
        elif isinstance(family.top_k, int) or not family.chooses_top_k:
            skipped[name] = f"the router of {family.model_type} fixes the number of selected experts"
        else:
            chosen.append(top_k)
    return chosen, skipped
