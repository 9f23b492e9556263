"""What a reduced checkpoint is: one of the base family where all blocks are alike, else one of our classes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from meo_hf.conversion.source import Source
from meo_hf.errors import UnsupportedError, UsageError
from meo_hf.modeling.configuration_meo import SCHEMA_VERSION, meo_config_class
from meo_hf.modeling.errors_meo import MeoConfigError
from meo_hf.modeling.fewer_meo import resized_config
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_settings_meo import set_num_experts, set_top_k, top_k_of
from meo_hf.reduction.budget import Limits
from meo_hf.reduction.counted import Mixture
from meo_hf.reduction.plan import MapParts, ReductionPlan, one_hot
from meo_hf.version import __version__


@dataclass(frozen=True)
class Outcome:
    """Config and class of a reduced checkpoint, its experts by block, and why it needs our class, if it does."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    counts: dict[str, int]
    why_own: str | None

    @property
    def is_own(self) -> bool:
        """Whether loading takes code of our own."""
        return self.why_own is not None


def limits_of(config: PreTrainedConfig, family: MoeFamily, mixture: Mixture, top_k: int | None) -> dict[str, Limits]:
    """Return what each block allows."""
    text: Any = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    groups = getattr(text, "n_group", None) or 1
    least = top_k or top_k_of(config, family)
    if groups > 1:  # the router adds up the two best scores of a group, and chooses within the best groups
        within = -(-least // (getattr(text, "topk_group", None) or 1))
        least = max(least, groups * max(2, within))
    return {path: Limits(experts, least, groups) for path, experts in mixture.blocks.items()}


def outcome_of(source: Source, family: MoeFamily, plan: ReductionPlan, mixture: Mixture) -> Outcome:
    """Return what a plan makes of a source.

    Raises UsageError for a plan of another model, or one that changes nothing; UnsupportedError for a family that it
    does not work with.
    """
    if lost := sorted(set(plan.blocks) - set(mixture.blocks)):
        raise UsageError(f"the plan names {lost[0]}, which has no experts in {source.name}: was it made for another?")
    for path, block in plan.blocks.items():
        block.check(path, mixture.blocks[path])
        if block.how == "given" and any(
            len(row) > 1 and f"{path}.{new}" not in plan.matrices for new, row in enumerate(block.experts)
        ):
            raise UsageError(f"the plan for {path} lacks down projections that it is to be given: make it anew")
        if path in mixture.by_token and block.router not in (None, one_hot([*range(mixture.blocks[path])])):
            raise UnsupportedError(
                f"the router of {path} looks experts up by the token's number, so none can be left out: leave its "
                "layer out with --layers, or merge experts with --router map"
            )
    counts = {path: plan.blocks[path].count if path in plan.blocks else had for path, had in mixture.blocks.items()}
    why = _why_own(plan, mixture, counts)
    top_k = plan.top_k or top_k_of(source.config, family)
    routed = {path: count for path, count in counts.items() if _routed(plan, path, count, mixture) < top_k}
    if routed:
        path, count = next(iter(routed.items()))
        raise UsageError(f"{path} would have {count} experts, but each token selects {top_k}: lower --top-k too")
    config = _config(source, family, plan, mixture, counts, why is not None)
    stock = source.model_class()
    try:
        model_class = stock if why is None else meo_model_class(stock)
    except MeoConfigError as error:
        raise UnsupportedError(f"{source.name}: {why}, which is not possible here: {error}") from None
    return Outcome(config, model_class, counts, why)


def _routed(plan: ReductionPlan, path: str, count: int, mixture: Mixture) -> int:
    """Return how many experts a block's router knows."""
    block = plan.blocks.get(path)
    return mixture.blocks[path] if block is not None and block.stands_for is not None else count


def _why_own(plan: ReductionPlan, mixture: Mixture, counts: dict[str, int]) -> str | None:
    if plan.skip is not None:
        return "a rule skips experts at run time"
    if any(block.parts for block in plan.blocks.values()):
        return "experts are kept as parts of less memory"
    if any(block.stands_for is not None for block in plan.blocks.values()):
        return "one expert stands for several that the router knows"
    if len(set(counts.values())) > 1:
        return "blocks have different numbers of experts"
    if mixture.outside and counts != mixture.blocks:
        return f"the config counts other experts too ({mixture.outside[0].rpartition('.')[0]})"
    return None


def _config(
    source: Source, family: MoeFamily, plan: ReductionPlan, mixture: Mixture, counts: dict[str, int], own: bool
) -> PreTrainedConfig:
    if not own:
        config = copy.deepcopy(source.config)
        if counts != mixture.blocks:
            set_num_experts(config, family, next(iter(counts.values())))
        _select(config, family, plan)
        config.architectures = [source.model_class().__name__]
        config.dtype = source.dtype
        return config
    values = resized_config(source.config, family, next(iter(mixture.blocks.values()))).to_dict()
    for key in ("model_type", "architectures", "auto_map", "_name_or_path"):
        values.pop(key, None)
    differing = {path: count for path, count in counts.items() if count != mixture.blocks[path]}
    maps = {path: list(b.stands_for) for path, b in plan.blocks.items() if b.stands_for is not None}
    parts = {name: _sizes(one) for block in plan.blocks.values() for name, one in block.parts.items()}
    block: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "level": "unmerged",
        "source": {"id": source.public_name, "commit": source.commit},
        "meo_hf_version": __version__,
        **({"expert_counts": differing} if differing else {}),
        **({"expert_maps": maps} if maps else {}),
        **({"expert_format": "parts", "expert_parts": parts} if parts else {}),
        **({"skip": plan.skip} if plan.skip else {}),
        **({"top_k": plan.top_k} if plan.top_k else {}),
    }
    config = meo_config_class(type(source.config)).from_dict({**values, "meo": block})
    config.architectures = [f"Meo{source.model_class().__name__}"]
    config.dtype = source.dtype
    return config


def _sizes(parts: MapParts) -> dict[str, Any]:
    """Return a linear map's entry of `expert_parts`, one number where that is every expert's."""
    lists = {"ranks": list(parts.ranks), "columns": list(map(len, parts.columns))}
    sizes = {key: each[0] if len(set(each)) == 1 else each for key, each in lists.items()}
    return {"shared": parts.shared, **{key: value for key, value in sizes.items() if key == "ranks" or value != 0}}


def _select(config: PreTrainedConfig, family: MoeFamily, plan: ReductionPlan) -> None:
    if plan.top_k is None:
        return
    try:
        set_top_k(config, family, plan.top_k)
    except MeoConfigError as error:
        raise UsageError(f"--top-k: {error}") from None
