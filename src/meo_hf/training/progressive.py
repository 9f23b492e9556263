"""Drop experts of a stock mixture while it is fine-tuned, until one per layer is left (TSEP, arXiv 2206.00277).

Legend: T tokens, E experts of a block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from meo_hf.conversion.fetch import SourceOptions
from meo_hf.conversion.report import source_entry
from meo_hf.conversion.source import open_source
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.errors_meo import MeoConfigError
from meo_hf.modeling.moe_layouts_meo import layer_number
from meo_hf.modeling.moe_settings_meo import top_k_of
from meo_hf.reduction.budget import Limits, highest
from meo_hf.reduction.kept_statistics import weights_fingerprint
from meo_hf.reduction.outcome import limits_of
from meo_hf.reduction.plan import BlockPlan, ReductionPlan, one_hot
from meo_hf.training.narrowing import Narrowing
from meo_hf.training.routers import RouterTap, gates_of, stock_mixture

PROFICIENCIES = ("weight", "hits")
RELATIVE_TO = ("best", "uniform")


def stay(
    scores: Sequence[float], kept: Sequence[int], threshold: float, relative_to: str, limits: Limits, final: int
) -> list[int]:
    """Return which of a block's kept experts stay: those whose score reaches the threshold, but `final` at least.

    The threshold is a share of the best expert's score, or of what each would have if all had the same (`uniform`).
    A router that chooses among groups of experts keeps equally many of each, as many as the group where most stay.
    """
    own = [scores[expert] for expert in kept]
    bar = threshold * (max(own) if relative_to == "best" else sum(own) / len(own))
    good = [limits.group_of(expert) for expert in kept if scores[expert] >= bar]
    each = max([final // limits.groups, *(good.count(group) for group in range(limits.groups))])
    return best(scores, kept, each * limits.groups, limits)


def best(scores: Sequence[float], kept: Sequence[int], count: int, limits: Limits) -> list[int]:
    """Return the best of a block's kept experts, equally many of each group; of equal ones the first."""
    known = {expert: scores[expert] for expert in kept}
    return highest([known.get(expert, -math.inf) for expert in range(limits.experts)], count, limits)


class ProgressiveExperts(TrainerCallback, ExportableState):
    """Make the routers of a stock mixture forget experts that the task does not need, while a Trainer fine-tunes it.

    After every `window` steps each expert's proficiency in that window is compared: the mean gate that real tokens
    gave it (`weight`), or the share of them that selected it (`hits`). What is below `threshold` times the best one's,
    or the mean's (`relative_to`), is dropped for good. At the last end of a window within the share `force_at` of all
    steps each block keeps its best `final` experts; the rest of the training runs with those. `layers` limits it to
    some layers.

    A dropped expert is out of its router's sight: it gets no token, no gate and no gradient, and its tokens are gated
    as the family does where there are only the others. All weights stay where they are, in the model, the optimiser
    and checkpoints; `plan` says what `meo_hf.reduce` should leave out. It is used like any callback, and goes on after
    a resumption by what the checkpoint says. One process or DDP.

    Raises UsageError or UnsupportedError when training begins, where it cannot end as it should.
    """

    def __init__(
        self,
        window: int = 100,
        threshold: float = 0.5,
        relative_to: str = "best",
        proficiency: str = "weight",
        force_at: float = 0.5,
        final: int = 1,
        layers: Sequence[int] | None = None,
    ) -> None:
        self.window, self.threshold, self.force_at, self.final = window, threshold, force_at, final
        self.relative_to, self.proficiency = relative_to, proficiency
        self.layers = None if layers is None else list(layers)
        self.kept: dict[str, list[int]] = {}
        self.scores: dict[str, list[float]] = {}
        self._sums: dict[str, Tensor] = {}  # [E + 1] of the window, in all processes; the last counts tokens
        self._new: dict[str, Tensor] = {}  # the same of this step, in this process
        self._restored: dict[str, list[float]] = {}
        self._narrowing: Narrowing | None = None
        self._tap: RouterTap | None = None
        self._check()

    def _check(self) -> None:
        if not isinstance(self.window, int) or self.window < 1 or not isinstance(self.final, int) or self.final < 1:
            raise UsageError(f"window is {self.window!r}, final {self.final!r}: give whole numbers >= 1")
        if not 0 <= self.threshold <= 1 or not 0 < self.force_at <= 1:
            raise UsageError(f"threshold is {self.threshold!r}, force_at {self.force_at!r}: give shares up to 1")
        if self.relative_to not in RELATIVE_TO or self.proficiency not in PROFICIENCIES:
            raise UsageError(
                f"relative_to is {self.relative_to!r}, proficiency {self.proficiency!r}: give one of "
                f"{', '.join(RELATIVE_TO)}, and one of {', '.join(PROFICIENCIES)}"
            )

    @property
    def fields(self) -> dict[str, Any]:
        """What it was made with."""
        names = ("window", "threshold", "relative_to", "proficiency", "force_at", "final", "layers")
        return {name: getattr(self, name) for name in names}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        sums = {path: sums.tolist() for path, sums in self._sums.items()}
        attributes = {"kept": self.kept, "scores": self.scores, "_restored": sums}
        return {"args": self.fields, "attributes": attributes}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check that the model can end as asked, and begin to count."""
        if args.n_gpu > 1:
            raise UsageError("this Trainer would copy the model to several GPUs in one process: start it with torchrun")
        self.close()
        self._resume(state)
        inner, self._family = stock_mixture(model)
        if self._narrowing is None:
            self._narrowing = Narrowing(inner, self._family)
        self._narrowing.release()
        self._top_k = top_k_of(inner.config, self._family)
        self._limits = self._allowed(inner, self._narrowing)
        self._force_step = int(self.force_at * state.max_steps) // self.window * self.window
        if self._force_step < 1:
            raise UsageError(
                f"no window of {self.window} steps fits into {self.force_at:g} of {state.max_steps} steps: "
                "make it shorter"
            )
        self._try(inner)
        for path, kept in self.kept.items():
            self._narrowing.keep(path, kept)
        self.kept = {path: self._narrowing.kept[path] for path in self._limits}
        for path, one in self._limits.items():
            self._sums[path] = torch.tensor(self._restored.get(path, [0.0] * (one.experts + 1)), dtype=torch.float64)
        self._restored = {}
        if state.global_step < self._force_step:
            self._tap = RouterTap(model, list(self._limits), self._count)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up what the step's tokens did; at the end of a window drop experts."""
        if self._tap is None:
            return
        self._add_up()
        if state.global_step % self.window == 0:
            self._drop(state.global_step >= self._force_step)
        if state.global_step >= self._force_step:
            self.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the number of experts left, over all blocks, to the logs of a training step."""
        if logs is None or "loss" not in logs:
            return
        logs["experts/left"] = sum(map(len, self.kept.values()))
        if state.log_history:
            state.log_history[-1]["experts/left"] = logs["experts/left"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting; the model goes on with the experts that are left."""
        self.close()

    def close(self) -> None:
        """Stop counting."""
        if self._tap is not None:
            self._tap.close()
        self._tap = None

    def release(self) -> None:
        """Let the model choose among all experts again."""
        if self._narrowing is not None:
            self._narrowing.release()

    def plan(self, saved: str | os.PathLike[str]) -> ReductionPlan:
        """Return what `meo_hf.reduce` should make of the trained model that was saved in a folder.

        Raises UsageError before experts were dropped, or where blocks keep fewer than the family selects, and not
        equally many: such a model cannot be written.
        """
        counts = sorted({len(kept) for kept in self.kept.values()})
        if not counts:
            raise UsageError("nothing was trained yet: train first")
        lowered = counts[0] if counts[0] < self._top_k else None
        if lowered is not None and len(counts) > 1:
            raise UsageError(
                f"blocks keep from {counts[0]} to {counts[-1]} experts, and each token selects {self._top_k}: train "
                f"past step {self._force_step}, where all keep {self.final}"
            )
        source = open_source(os.fspath(saved), SourceOptions(None, None, False, False))
        try:
            entry = {**source_entry(source), "fingerprint": weights_fingerprint(source)}
        finally:
            source.close()
        blocks = {path: BlockPlan(one_hot(kept), one_hot(kept)) for path, kept in self.kept.items()}
        method = {"name": "progressive", **self.fields}
        return ReductionPlan(method, entry, blocks, top_k=lowered, scores=self.scores)

    def _resume(self, state: Any) -> None:
        if not state.global_step:
            self.kept, self.scores, self._restored = {}, {}, {}
            return
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        if not isinstance(kept, dict):
            raise UsageError("the checkpoint does not say which experts were dropped: train from the beginning")
        if kept["args"] != self.fields:
            raise UsageError(f"the checkpoint was trained with {kept['args']}, not with {self.fields}")
        for name, value in kept["attributes"].items():
            setattr(self, name, value)

    def _allowed(self, model: PreTrainedModel, narrowing: Narrowing) -> dict[str, Limits]:
        """Return what each block to be narrowed allows."""
        mixture = narrowing.mixture
        limits = limits_of(model.config, self._family, mixture, min(self._top_k, self.final))
        have = sorted({layer_number(path) for path in limits})
        if self.layers is not None and (beyond := sorted(set(self.layers) - set(have))):
            raise UsageError(f"layers {beyond} have no experts; layers with experts: {have}")
        own = {p: one for p, one in limits.items() if self.layers is None or layer_number(p) in self.layers}
        for path, one in own.items():
            if path in mixture.by_token:
                raise UnsupportedError(
                    f"the router of {path} looks experts up by the token's number, so none can be left out: leave its "
                    "layer out with `layers`"
                )
            if not one.least <= self.final <= one.experts or self.final % one.groups:
                raise UnsupportedError(
                    f"{path} cannot end with {self.final} of {one.experts} experts: its router chooses among "
                    f"{one.groups} groups and needs {one.least} at least; give a `final` that the groups share"
                )
        if own != limits and self.final < self._top_k:
            raise UsageError(
                f"`layers` leaves blocks as they are, whose tokens select {self._top_k} experts: give final >= that"
            )
        return own

    def _try(self, model: PreTrainedModel) -> None:
        """Run two tokens with `final` experts per block; raises UnsupportedError where that makes no gates."""
        if self._narrowing is None:
            return
        name, training = type(model).__name__, model.training
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}
        ends: list[Tensor] = []

        def look(path: str, block: Any, output: Any, real: Tensor | None) -> None:
            ends.append(gates_of(self._family.layout, block, output, self._limits[path].experts).isfinite().all())

        tap = RouterTap(model, list(self._limits), look, training=False)
        try:
            for path, one in self._limits.items():
                self._narrowing.keep(path, best([0.0] * one.experts, range(one.experts), self.final, one))
            with torch.no_grad():
                model.eval()(**inputs)
            if not torch.stack(ends).all():
                raise UnsupportedError(
                    f"{name} has no gates with {self.final} experts per block: give a larger `final`"
                )
        except (RuntimeError, ValueError, IndexError, MeoConfigError) as error:
            if isinstance(error, UnsupportedError):
                raise
            raise UnsupportedError(
                f"{name} does not run with {self.final} experts per block ({error}): give a larger `final`"
            ) from None
        finally:
            tap.close()
            model.train(training)
            self._narrowing.release()

    @torch.no_grad()
    def _count(self, path: str, block: Any, output: Any, real: Tensor | None) -> None:
        gates = gates_of(self._family.layout, block, output, self._limits[path].experts).detach()
        seen = (gates != 0) if self.proficiency == "hits" else gates
        seen = torch.cat([seen.double(), seen.new_ones(len(seen), 1, dtype=torch.float64)], 1)
        sums = (seen if real is None else seen[real]).sum(0)
        self._new[path] = self._new[path] + sums if path in self._new else sums

    def _add_up(self) -> None:
        for path, sums in self._sums.items():
            new = self._new.pop(path, torch.zeros_like(sums))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(new)
            self._sums[path] = sums.to(new.device) + new

    def _drop(self, force: bool) -> None:
        """End a window."""
        narrowing: Any = self._narrowing
        for path, limits in self._limits.items():
            *sums, tokens = self._sums[path].tolist()
            self._sums[path] = torch.zeros_like(self._sums[path])
            if not tokens:
                raise UsageError(
                    f"no token reached the router of {path} in {self.window} steps: this Trainer runs the model past "
                    "its forward, where nothing can be counted"
                )
            scores = self.scores[path] = [total / tokens for total in sums]
            kept = self.kept[path]
            self.kept[path] = (
                best(scores, kept, self.final, limits)
                if force
                else stay(scores, kept, self.threshold, self.relative_to, limits, self.final)
            )
            narrowing.keep(path, self.kept[path])
