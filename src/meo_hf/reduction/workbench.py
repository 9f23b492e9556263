"""What methods work with: an opened mixture of experts, what its blocks allow, and what calibration text shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.moe_plan import moe_family, parse_moe_layers
from meo_hf.conversion.progress import SILENT, Progress
from meo_hf.conversion.source import Source, public_name
from meo_hf.conversion.stored import stored_tensors
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_layouts_meo import layer_number
from meo_hf.reduction.budget import Limits
from meo_hf.reduction.calibration import Calibration, CalibrationRows, read_calibration
from meo_hf.reduction.counted import Mixture, mixture_of
from meo_hf.reduction.kept_statistics import (
    read_statistics,
    statistics_folder,
    statistics_key,
    weights_fingerprint,
    write_statistics,
)
from meo_hf.reduction.loading import load_options, load_unmerged
from meo_hf.reduction.observing import Observer, observe
from meo_hf.reduction.outcome import limits_of
from meo_hf.reduction.plan import BlockPlan, ReductionPlan
from meo_hf.reduction.statistics import Frequency, Statistic, untouched
from meo_hf.texts import load_tokenizer


@dataclass
class Workbench:
    """A source that is to be reduced; `layers` and `top_k` as the command takes them, `reading` how it was opened."""

    source: Source
    layers: str = "all"
    top_k: int | None = None
    calibration: Calibration | None = None
    device: str = "cpu"
    progress: Progress = SILENT
    reading: SourceOptions = field(default_factory=SourceOptions)
    untouched: dict[str, list[int]] = field(default_factory=dict)

    @property
    def family(self) -> MoeFamily:
        """The family row of the source."""
        return moe_family(self.source)

    @cached_property
    def stock(self) -> PreTrainedModel:
        """The stock model, on the meta device."""
        return self.source.meta_model()

    @cached_property
    def mixture(self) -> Mixture:
        """Blocks and counted tensors of the whole model; raises UnsupportedError if there are none."""
        found = mixture_of(self.stock, self.family)
        if not found.blocks:
            raise UnsupportedError(
                f"{self.source.name}: found no experts in {type(self.stock).__name__}; its config makes it dense"
            )
        return found

    @cached_property
    def limits(self) -> dict[str, Limits]:
        """What each block to be reduced allows."""
        have = sorted({layer_number(path) for path in self.mixture.blocks})
        chosen = parse_moe_layers(self.layers, have)
        allowed = limits_of(self.source.config, self.family, self.mixture, self.top_k)
        return {path: one for path, one in allowed.items() if layer_number(path) in chosen}

    def router_weights(self) -> dict[str, Tensor]:
        """Read the weight [E, D] by which each block's router scores its experts, as float32."""
        stored = stored_tensors(self.source, self.stock)
        found = {}
        for path in self.limits:
            own = [one for one in self.mixture.of(path) if not one.of_experts]
            matrices = [one for one in own if self.stock.state_dict()[one.live].dim() == 2 and one.axis == 0]
            if not matrices:
                raise UnsupportedError(f"the router of {path} has no weight with a row per expert")
            one = matrices[0]
            found[path] = stored[one.live].load(self.stock)[: one.experts].float()
        return found

    @cached_property
    def fingerprint(self) -> str:
        """What the weights are, hashed once."""
        self.progress.stage("hashing weights", 0)
        return weights_fingerprint(self.source)

    @cached_property
    def rows(self) -> CalibrationRows:
        """The calibration text in tokens; raises UsageError where none was given."""
        if self.calibration is None:
            raise UsageError("this method reads text: give --calibration FILE, text like the model's own use")
        tokenizer = load_tokenizer(self.source.folder, self.source.name)
        text: Any = self.source.config.get_text_config(decoder=True)
        room, size = getattr(text, "max_position_embeddings", None) or self.calibration.window, text.vocab_size
        rows = read_calibration(replace(self.calibration, window=min(self.calibration.window, room)), tokenizer)
        if (most := int(rows.input_ids.max())) >= size:
            raise UsageError(
                f"the tokenizer of {self.source.name} makes token {most}, but the model knows {size}: put the "
                "tokenizer that belongs to it beside its weights"
            )
        return rows

    @property
    def has_read(self) -> bool:
        """Whether a method has read the calibration text."""
        return "rows" in self.__dict__

    @cached_property
    def model(self) -> PreTrainedModel:
        """The source's model of level `unmerged` with its weights, loaded for calibration.

        It selects as many experts for each token as the result will.
        """
        self.progress.stage("loading", self.source.nbytes)
        return load_unmerged(self.source, self.family, self.mixture, self.device, self.top_k)

    def observe(self, *observers: Observer, blocks: Sequence[str] | None = None) -> None:
        """Show calibration text to observers, of some blocks or all; experts that no token selects are noted."""
        usage = Frequency()
        paths = list(self.limits) if blocks is None else list(blocks)
        plain = [one for one in observers if isinstance(one, Statistic)]
        place = self._kept([*plain, usage], paths) if len(plain) == len(observers) else None
        if place is None or not read_statistics(place, [*plain, usage]):
            observe(self.model, self.rows.batches(), [*observers, usage], self.progress, paths)
            if place is not None:
                write_statistics(place, [*plain, usage])
        self.untouched |= untouched(usage.result())

    def _kept(self, statistics: Sequence[Statistic], paths: Sequence[str]) -> Path:
        """Return where statistics of these rows are kept, by a hash of all that they depend on."""
        how: dict[str, Any] = {"blocks": sorted(paths), "batch": self.rows.settings.batch_size, "device": self.device}
        how["type"] = str(load_options(self.source, self.device)["dtype"])
        how["top_k"] = self.top_k
        key = statistics_key(self.source, self.rows.sha256, statistics, how, self.fingerprint)
        return statistics_folder() / f"{key}.safetensors"

    def planned(self, method: Any, blocks: dict[str, BlockPlan], **more: Any) -> ReductionPlan:
        """Return a plan of this source by a method."""
        name, commit = self.source.public_name, self.source.commit
        source = {"id": name, "commit": commit, "fingerprint": self.fingerprint}
        options = {"name": method.name, **asdict(method), "layers": self.layers}
        options.pop("state", None)  # where a search is kept says nothing of what it found
        options |= {key: public_name(options[key]) for key in ("pretrained", "metric", "after") if options.get(key)}
        found = self.rows.describe() if self.has_read else None
        return ReductionPlan(options, source, blocks, top_k=self.top_k, calibration=found, **more)
