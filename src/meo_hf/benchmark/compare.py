"""Compare a mixture of experts with what was made of it and cheaper variants: quality, speed and memory on text."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from meo_hf.benchmark.compare_outputs import Output, also_config, listed, open_outputs, windows_of
from meo_hf.benchmark.compare_pairs import depends_on_text, mean_pairs, tallied_pairs
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
from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.source import Source, first_line, open_source, public_name, quiet_transformers
from meo_hf.errors import UnsupportedError
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_meo import merged_moe
from meo_hf.modeling.moe_settings_meo import top_k_of
from meo_hf.texts import load_tokenizer, read_text

Advance = Callable[[str, int, int], None]
"""Called before each step of a run with what it does, its number from 0 on, and how many there are."""


Kind = Literal["source", "MEO", "uniform average", "output", "top-k", "also"]


@dataclass(frozen=True)
class Row:
    """What was measured of one variant; `source_speed` was timed in turns with it.

    `flops` are per token, of one window, or of the whole text where they `depend_on_text`. `nbytes` is what it takes
    here, `weight_bytes` and `parameters` the model alone. `experts_per_token` is known where experts run one by one in
    a class of ours: a mean over the whole text and all blocks.
    """

    name: str
    kind: Kind
    quality: Quality
    speed: Speed
    source_speed: Speed
    flops: float
    nbytes: int
    weight_bytes: int
    parameters: int
    experts_per_token: float | None = None
    depends_on_text: bool = False


@dataclass(frozen=True)
class Layer:
    """How one merged MoE block answers to what the source's block read, and how its gates mix."""

    path: str
    error: LayerError
    gates: GateTally


@dataclass(frozen=True)
class Merging:
    """A MEO model by the name of its row: how its gates were formed, its segments, its blocks."""

    name: str
    gates: str
    segment: int
    layers: list[Layer]


@dataclass
class Comparison:
    """All rows, the source's first, and more of each MEO model. `skipped` says why a variant is missing."""

    settings: CompareSettings
    windows: Tensor
    model_class: str
    experts_implementation: str
    rows: list[Row] = field(default_factory=list)
    merging: list[Merging] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[Layer]:
        """The merged blocks of all MEO models."""
        return [layer for merging in self.merging for layer in merging.layers]

    @property
    def only_meo(self) -> bool:
        """Whether one MEO model is all that was made of the source."""
        return len(self.merging) == 1 and not any(row.kind == "output" for row in self.rows)


def compare(
    source: str,
    out: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    text: str | Path,
    settings: CompareSettings | None = None,
    also: Sequence[str] = (),
    advance: Advance = lambda what, done, total: None,
) -> Comparison:
    """Measure a mixture of experts, what was made of it and cheaper variants on the same windows of a text.

    `out` names one model or several: MEO models, and those that `meo_hf.reduce` made or that are like them, of level
    `unmerged` or stock models of the source's family. One model at a time is loaded beside the source. Raises
    UsageError for options, text or models that do not fit each other, SourceError and UnsupportedError for models that
    cannot be used, CheckFailedError for one that reads tokens which it is to predict.
    """
    settings, names = settings or CompareSettings(), listed(out)
    content = read_text(text)
    opened = open_source(source, SourceOptions(trust_remote_code=settings.trust_remote_code))
    try:
        with quiet_transformers():
            return _compare(opened, names, content, settings, also, advance)
    finally:
        opened.close()


def _compare(
    opened: Source, names: Sequence[str], text: str, settings: CompareSettings, also: Sequence[str], advance: Advance
) -> Comparison:
    family = _decoder(opened)
    tokenizer = load_tokenizer(opened.folder, opened.name, **_gguf(opened))
    outputs = open_outputs(names, opened, tokenizer, settings)
    configs = {output.name: output.config for output in outputs}
    configs |= {name: also_config(name, tokenizer, settings) for name in also}
    windows = windows_of(opened, configs, tokenizer, text, settings)

    top_ks, skipped = _top_ks(opened, family)
    model: Any = load(opened.model_class(), opened.loadable, settings)
    merging = sum(output.merges for output in outputs)
    variants = 1 + len(outputs) + merging + len(top_ks) + len(also)
    run = _Run(settings, windows, Subject.of("source", model), advance, variants, merging)
    result = Comparison(settings, windows, type(model).__name__, model.config._experts_implementation, skipped=skipped)
    result.rows.append(run.row(run.source, "source"))
    for output in outputs:
        _add_output(result, run, output, len(outputs) == 1)
    for top_k in top_ks:
        subject = Subject.of(f"source, top-{top_k}", with_top_k(model, family, top_k))
        if reason := _fails(subject, run.windows[:1]):
            skipped[subject.name] = reason
        else:
            result.rows.append(run.row(subject, "top-k"))
    for name in also:
        result.rows.append(run.row(Subject.of(public_name(name), load_also(name, settings)), "also"))
    return result


def _add_output(result: Comparison, run: _Run, output: Output, alone: bool) -> None:
    """Load a model that was made of the source, and measure it; a MEO model that is `alone` needs no name."""
    model: Any = load(output.model_class, output.folder, run.settings)
    if not output.merges:
        result.rows.append(run.row(Subject.of(output.label, model), "output"))
        return
    ending = "" if alone else f", {output.label}"
    rows, layers = run.meo_rows(Subject.of(f"MEO{ending}", model), f"uniform average{ending}")
    result.rows += rows
    segment = model._meo_context.settings.segment_length
    result.merging.append(Merging(rows[0].name, gates_of(model), segment, layers))


class _Run:
    """Measures variants one by one, and counts the steps."""

    def __init__(
        self,
        settings: CompareSettings,
        windows: Tensor,
        source: Subject,
        advance: Advance,
        variants: int,
        merging: int,
    ) -> None:
        self.settings, self.windows, self.source = settings, windows.to(settings.device), source
        batches = -(-len(windows) // settings.batch_size)
        self._advance, self._done = advance, 0
        self._total = variants * (batches + settings.rounds + 1) + merging * batches

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

    def row(self, subject: Subject, kind: Kind, quality: Quality | None = None) -> Row:
        """Check and measure everything, but for a quality that is known."""
        experts = None
        if quality is None:
            self.check(subject)
            with tallied_pairs(subject.model) as tallies:
                quality = self.quality(subject)
            experts = mean_pairs(tallies)
        window, depends = self.windows[:1], depends_on_text(subject.model)
        source_speed, speed = time_beside(self.source, subject, window, self.settings.rounds, self.step)
        flops, nbytes = flops_per_token(subject, self.windows if depends else window), peak_bytes(subject, window)
        return Row(
            subject.name, kind, quality, speed, source_speed, flops, nbytes, subject.nbytes, subject.parameters,
            experts, depends,
        )  # fmt: skip

    def meo_rows(self, meo: Subject, average_name: str) -> tuple[list[Row], list[Layer]]:
        """Measure a MEO model and the average of its experts, and each of its blocks."""
        self.check(meo)
        with tallied_gates(meo.model) as tallies:
            quality = self.quality(meo)
        rows = [self.row(meo, "MEO", quality)]
        errors = layer_errors(self.source, meo, self.windows, self.settings.batch_size, self.step)
        sites = {path: module._meo.path for path, module in merged_moe(meo.model)}
        with averaged(meo.model, {path: tally.totals for path, tally in tallies.items()}, average_name) as average:
            rows.append(self.row(average, "uniform average"))
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


def _gguf(opened: Source) -> dict[str, Any]:
    return {} if opened.gguf_file is None else {"gguf_file": opened.gguf_file}


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
