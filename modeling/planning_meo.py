"""What a model would do in a call: the plan of every linear map of merged experts, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .configuration_meo import is_causal, settings_of
from .errors_meo import MeoConfigError
from .families_meo import family_of
from .kernels_meo import usable
from .merger_meo import Merger
from .moe_families_meo import MoeFamily
from .moe_settings_meo import top_k_of
from .plans_meo import PLANS, Work, possible, saved_by_keeping, work_of_stack

STAGES = ("prefill", "decode")


@dataclass(frozen=True)
class PlannedMap:
    """One linear map: its path, its work in a call, its plan, and the seconds that each possible plan would take.

    The plan is `cached` where the call finds merged experts that an earlier one has left.
    """

    path: str
    work: Work
    plan: str
    seconds: dict[str, float]


class PlannedModel(tuple[PlannedMap, ...]):
    """Plans of all maps of a model; prints as a table in which maps that do the same share a line."""

    __slots__ = ()

    def __str__(self) -> str:
        alike: dict[tuple[Any, ...], list[PlannedMap]] = {}
        for row in self:
            alike.setdefault((row.path.rpartition(".")[2], row.work, row.plan), []).append(row)
        lines = [("layers", "map", "gates", "tokens", "plan", "estimate", "next best")]
        for (name, work, plan), rows in alike.items():
            seconds = rows[0].seconds
            others = sorted((cost, other) for other, cost in seconds.items() if other != plan)
            best = f"{others[0][1]} {_time(others[0][0])}" if others else "-"
            counts = (str(work.gates), str(work.tokens))
            lines.append((str(len(rows)), name, *counts, plan, _time(seconds.get(plan)), best))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    __repr__ = __str__


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds * 1e3:.3g} ms"


def check_plan(plan: str | None) -> None:
    """Raise MeoConfigError for the name of a plan that there is not."""
    if plan is not None and plan not in PLANS:
        raise MeoConfigError(f"plan is {plan!r}; allowed: {', '.join(PLANS)}, or None to choose by shapes")


def check_merges(level: str | None) -> None:
    """Raise MeoConfigError for a level at which nothing is merged."""
    if level == "unmerged":
        raise MeoConfigError("at level 'unmerged' nothing is merged, so no plan has an effect: choose how experts run "
                             "with `set_experts_implementation`")  # fmt: skip


def plan_model(model: Any, batch: int, tokens: int, stage: str) -> PlannedModel:
    """Plan a forward pass without gradients over `batch` rows of `tokens` new tokens, or one step of decoding.

    Raises MeoConfigError for an unknown stage, one that the model does not have, or a model that merges nothing.
    """
    settings = settings_of(model.config)
    check_merges(settings.level)
    family = family_of(model.config.model_type)
    if stage not in STAGES or (stage == "decode" and family.kind == "encoder"):
        known = STAGES if family.kind != "encoder" else STAGES[:1]
        raise MeoConfigError(f"stage is {stage!r}; this model has: {', '.join(known)}")
    decoding = stage == "decode"
    segments = -(-tokens // settings.segment_length) if is_causal(model.config) and not decoding else 1
    gates = 1 if settings.level == "task" else batch * segments
    top_k = top_k_of(model.config, family) if isinstance(family, MoeFamily) else settings.top_k
    keeps = decoding or settings.level == "task"
    rows = []
    for path, module in model.named_modules():
        if not isinstance(module, Merger):
            continue
        for name in module.maps:
            stack = module.stack(name)[0]
            work = work_of_stack(stack, gates, batch if decoding else batch * tokens, top_k)
            if module.bank() is not None:
                rows.append(PlannedMap(f"{path}.{name}", work, "low rank", {}))
                continue
            seconds = possible(work, usable(stack))
            rows.append(
                _planned(f"{path}.{name}", work, seconds, _forced(module, model), keeps, settings.level == "task")
            )
    return PlannedModel(rows)


def _forced(module: Any, model: nn.Module) -> str | None:
    return "combine" if module.combine == "outputs" else model._meo_context.plan  # type: ignore[union-attr, return-value]


def _planned(
    path: str, work: Work, seconds: dict[str, float], forced: str | None, keeps: bool, always: bool
) -> PlannedMap:
    plan = forced or min(seconds, key=lambda name: seconds[name])
    if keeps and forced != "combine":
        saved = saved_by_keeping(work)
        seconds["cached"] = min(seconds.values()) - saved
        plan = "cached" if always or saved >= 0 else plan
    return PlannedMap(path, work, plan, seconds)
