"""What converting a mixture of experts will do: every tensor keeps its name, its place and its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from meo_hf.conversion.adapter_bank import ranks_by_ending
from meo_hf.conversion.moe_bank import MoeBank, moe_bank
from meo_hf.conversion.names import live_names
from meo_hf.conversion.options import Options, check_decoder_options, parse_layers
from meo_hf.conversion.plan import TOKENS_PER_SEQUENCE, matches
from meo_hf.conversion.source import Source, meta_model
from meo_hf.errors import CheckpointError, UnsupportedError, UsageError
from meo_hf.modeling.configuration_meo import SCHEMA_VERSION, check_level, levels_of, meo_config_class
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.modeling.moe_families_meo import MoeFamily
from meo_hf.modeling.moe_layouts_meo import expert_tensors, layer_number, moe_blocks
from meo_hf.modeling.moe_settings_meo import num_experts_of, top_k_of
from meo_hf.version import __version__


@dataclass
class MoePlan:
    """The MEO config and an account of every source tensor.

    FLOPs are per token, of linear maps; `largest_block` counts the bytes of one block's experts as fp32.
    """

    source: Source
    options: Options
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    layers: list[int]
    num_experts: int
    top_k: int
    source_top_k: int
    source_flops: int = 0
    expert_flops: int = 0
    merge_flops: int = 0
    largest_block: int = 0
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    aligned: bool = False
    bank: MoeBank | None = None

    @property
    def family(self) -> MoeFamily:
        """The family row of the source."""
        return moe_family(self.source)

    @property
    def settings(self) -> dict[str, Any]:
        """The `meo` block, with the experts that the config itself counts."""
        return {**self.config.meo, "num_experts": self.num_experts, "top_k": self.top_k}

    @property
    def tokens_per_merge(self) -> int:
        """Tokens that share a merged expert, as FLOPs count them."""
        return self.config.meo["segment_length"] if self.config.meo["level"] == "segment" else TOKENS_PER_SEQUENCE


def moe_family(source: Source) -> MoeFamily:
    """Return the family row of a mixture of experts."""
    family = source.family
    if not isinstance(family, MoeFamily):
        raise TypeError(f"{source.name} is no mixture of experts")
    return family


def build_moe_plan(source: Source, options: Options) -> MoePlan:
    """Decide from headers alone whether and how a mixture of experts converts.

    Raises UsageError, MeoConfigError, UnsupportedError or CheckpointError; nothing is written.
    """
    _check_options(source, options)
    stock = source.meta_model()
    blocks = list(moe_blocks(stock, moe_family(source).layout))
    if not blocks:
        raise UnsupportedError(f"{source.name}: found no experts in {type(stock).__name__}; its config makes it dense")
    have = sorted({layer_number(path) for path, _ in blocks})
    layers = parse_moe_layers(options.layers, have)
    config = _config(source, options, layers if layers != have else None)
    meo_class = meo_model_class(type(stock))
    meo = meta_model(meo_class, config)
    family = moe_family(source)
    plan = MoePlan(
        source, options, config, meo_class, layers,
        num_experts=num_experts_of(config, family),
        top_k=top_k_of(config, family),
        source_top_k=top_k_of(source.config, family),
    )  # fmt: skip
    _account(plan, stock, meo)
    _count_flops(plan, stock, [block for path, block in blocks if layer_number(path) in layers])
    if options.truncation:
        plan.bank = moe_bank(source, meo, options.truncation)
        config.meo |= {"expert_format": "lowrank", "expert_ranks": ranks_by_ending(plan.bank.ranks, meo)}
        meta_model(meo_class, config)  # which raises where a family cannot
        plan.merge_flops = 0
        sizes = [one.rank * sum(one.shape[1:]) for one in plan.bank.maps.values()]
        plan.expert_flops += 2 * plan.top_k * sum(sizes)
    return plan


def _check_options(source: Source, options: Options) -> None:
    family = source.config.model_type
    given = {
        "--num-experts": options.num_experts is not None,
        "--expert-init": options.expert_init != "copy",
        "--gate-scope": options.gate_scope != "ffn",
        "--task": bool(options.tasks),
        "--dtype": options.dtype is not None,
    }
    reasons = {
        "--num-experts": "its experts are its own",
        "--expert-init": "its experts are trained",
        "--gate-scope": "its router gates whole feed-forwards",
        "--task": "its router reads hidden states",
        "--dtype": "its weights are not rewritten; choose the type when you load it, with from_pretrained(dtype=...)",
    }
    if wrong := [name for name, was in given.items() if was]:
        raise UsageError(f"{wrong[0]} has no effect on a mixture of experts ({family}): {reasons[wrong[0]]}")
    if source.format != "safetensors":
        raise UnsupportedError(
            f"{source.name}: a mixture of experts keeps its weight files, which must be safetensors, not "
            f"{source.format}: load it with transformers and save it again first"
        )


def parse_moe_layers(text: str, have: list[int]) -> list[int]:
    """Return the layers that `--layers` means, of those that have experts; raises UsageError for others."""
    if text in ("all", "even", "odd"):
        return {"all": have, "even": have[0::2], "odd": have[1::2]}[text]
    if text.startswith("last:"):
        return [have[i] for i in parse_layers(text, len(have))]
    chosen = parse_layers(text, have[-1] + 1)
    if dense := sorted(set(chosen) - set(have)):
        raise UsageError(f"--layers {text}: layers {dense} have no experts; layers with experts: {have}")
    return chosen


def _config(source: Source, options: Options, layers: list[int] | None) -> PreTrainedConfig:
    level = options.level or levels_of(source.config)[0]
    if level == "unmerged":
        raise UsageError("level 'unmerged' converts nothing, as nothing merges: make experts fewer with meo_hf.reduce")
    check_level(source.config, level)
    check_decoder_options(source, options, level)
    values = source.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "_name_or_path"):  # the version tells a config its defaults
        values.pop(key, None)
    block: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "level": level,
        "layers": layers,
        "source": {"id": source.public_name, "commit": source.commit},
        "meo_hf_version": __version__,
        "pooling": options.pooling or moe_family(source).poolings[0],
    }
    for name in ("segment_length", "routing", "top_k"):
        if getattr(options, name) is not None:
            block[name] = getattr(options, name)
    config = meo_config_class(type(source.config)).from_dict({**values, "meo": block})
    config.architectures = [f"Meo{source.model_class().__name__}"]
    config.dtype = source.dtype
    return config


def _account(plan: MoePlan, stock: PreTrainedModel, meo: PreTrainedModel) -> None:
    """Follow every tensor on disk to its place in both models; raises CheckpointError where one finds none."""
    state, names = meo.state_dict(), live_names(meo, plan.source.tensors, computed=True)
    tied = set(meo.all_tied_weights_keys)
    buffers = {name for name, _ in meo.named_buffers()}
    found = set(names.values())
    unknown = {disk: live for disk, live in names.items() if live not in state}
    by_design = {d for d, n in unknown.items() if n in buffers or matches(stock._keys_to_ignore_on_load_unexpected, n)}
    plan.ignored = sorted(by_design)
    if lost := sorted(set(unknown) - by_design):
        raise CheckpointError(
            f"{plan.source.name}: {len(lost)} tensors have no place in {type(stock).__name__}, e.g. {lost[0]}"
        )
    lacking = set(state) - found - tied
    plan.missing = sorted(name for name in lacking if not matches(stock._keys_to_ignore_on_load_missing, name))
    if lost := [name for name in plan.missing if ".experts." in name]:
        raise CheckpointError(f"{plan.source.name} lacks {lost[0]}: a mixture of experts needs all of its experts")


def _count_flops(plan: MoePlan, stock: nn.Module, blocks: list[nn.Module]) -> None:
    stacks = [tensor for block in blocks for tensor in expert_tensors(block)]
    inside = {id(tensor) for tensor in stacks}
    linears = [m for m in stock.modules() if isinstance(m, nn.Linear) and id(m.weight) not in inside]
    outside = sum(2 * linear.weight.numel() for linear in linears)
    one = sum(2 * tensor.numel() for tensor in stacks) // plan.num_experts
    plan.source_flops = outside + plan.source_top_k * one
    plan.expert_flops = outside + one
    plan.merge_flops = plan.top_k * one // 2
    plan.largest_block = max(sum(4 * tensor.numel() for tensor in expert_tensors(block)) for block in blocks)
