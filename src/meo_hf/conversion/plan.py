"""What a conversion will do, decided from headers alone: every target tensor and where its bytes come from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.adapter_bank import AdapterBank, OwnExpert, Padded, Summed
from meo_hf.conversion.births import BIRTHS, ROUTER_STD, Copied, Drawn, Recipe, Stacked
from meo_hf.conversion.centroids import Fitted
from meo_hf.conversion.companions import load_tokenizer
from meo_hf.conversion.dense_tensors import check_shape, parts_of, tensors_by_live_name
from meo_hf.conversion.expert_bank import ExpertBank
from meo_hf.conversion.factorise import Factor, Mean
from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.low_rank_plan import low_rank_of
from meo_hf.conversion.names import disk_names
from meo_hf.conversion.options import Options, check_decoder_options, parse_layers
from meo_hf.conversion.safetensors_files import CHUNK, CODES, DTYPES, TensorRef, TensorSpec
from meo_hf.conversion.source import Source, meta_model
from meo_hf.errors import MeoConfigError, UnsupportedError, UsageError
from meo_hf.modeling.blocks_meo import Block, find_blocks
from meo_hf.modeling.configuration_meo import (
    SCHEMA_VERSION,
    check_level,
    levels_of,
    meo_config_class,
    settings_of,
)
from meo_hf.modeling.feedforward_meo import converts, merged_feed_forwards
from meo_hf.modeling.low_rank_meo import Factors
from meo_hf.modeling.modeling_meo import meo_model_class
from meo_hf.version import __version__

TOKENS_PER_SEQUENCE = 128  # for FLOPs, where a whole sequence shares one merged expert


@dataclass
class Plan:
    """Targets by their names on disk, the MEO config, and an account of every source tensor.

    `adapters` or `bank` are there where experts are a shared weight and low-rank parts, which `part_flops` per token
    pay for.
    """

    source: Source
    experts: list[Source]
    options: Options
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    layers: list[int]
    targets: dict[str, tuple[TensorSpec, Recipe]] = field(default_factory=dict)
    copied: list[str] = field(default_factory=list)
    expanded: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    dense_flops: int = 0
    merge_flops: int = 0
    part_flops: int = 0
    adapters: AdapterBank | None = None
    bank: ExpertBank | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The `meo` block."""
        return self.config.meo

    @property
    def tokens_per_merge(self) -> int:
        """Tokens that share a merged expert, as FLOPs count them."""
        return self.settings["segment_length"] if self.settings["level"] == "segment" else TOKENS_PER_SEQUENCE

    @property
    def nbytes(self) -> int:
        """Bytes of all target tensors."""
        return sum(spec.nbytes for spec, _ in self.targets.values())

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters before and after."""
        before = sum(ref.spec.numel for ref in self.source.tensors.values())
        return before, sum(spec.numel for spec, _ in self.targets.values())

    @property
    def working_memory(self) -> int:
        """Bytes that the writers may hold at a time, on top of the libraries: the largest tensor that is computed."""
        computed = [
            ref.spec.numel * 12
            for _, recipe in self.targets.values()
            if isinstance(recipe, Stacked) and (recipe.birth != "copy" or recipe.transposed)
            for ref in recipe.experts[0]
        ]
        if self.bank is not None:
            computed += [3 * 4 * math.prod(one.shape) for one in self.bank.maps.values()]
        return 2 * max([*computed, 2 * CHUNK])


def build_plan(
    source: Source, experts: Sequence[Source], options: Options, adapters: Sequence[LoraSource] = ()
) -> Plan:
    """Decide every target tensor from the headers of the sources; only to keep a share of energy are weights read.

    Raises UsageError, MeoConfigError, UnsupportedError or CheckpointError; nothing is written.
    """
    dense = source.meta_model()
    blocks = list(find_blocks(dense, source.family))
    if not blocks:
        raise UnsupportedError(f"{source.name}: found no feed-forward in {type(dense).__name__}")
    depth = max(block.index for block in blocks) + 1
    layers = parse_layers(options.layers, depth)
    low_rank = low_rank_of(dense, source, experts, adapters, options, blocks, layers)
    config = _meo_config(source, experts, options, layers if len(layers) < depth else None, low_rank.settings)
    meo_class = meo_model_class(type(dense))
    settings = settings_of(config)
    converted = [block for block in blocks if converts(block, settings)]
    layers = sorted({block.index for block in converted})
    plan = Plan(
        source, list(experts), options, config, meo_class, layers, adapters=low_rank.adapters, bank=low_rank.bank
    )
    meo = meta_model(meo_class, config)
    _decide(plan, dense, converted, meo)
    plan.dense_flops, plan.merge_flops = _flops(dense, meo, config.meo["top_k"])
    plan.part_flops = _part_flops(meo, config.meo["top_k"])
    return plan


def _meo_config(
    source: Source, experts: Sequence[Source], options: Options, layers: list[int] | None, own: dict[str, Any]
) -> PreTrainedConfig:
    """Build the MEO config; `own` are values of its block that low-rank experts decide."""
    if options.expert_init not in BIRTHS:
        raise UsageError(f"--expert-init {options.expert_init!r} is unknown: give one of {', '.join(BIRTHS)}")
    num_experts = options.num_experts
    if experts:
        if options.expert_init != "copy":
            raise UsageError(f"--expert-init {options.expert_init} has no effect with --expert: leave one out")
        if num_experts not in (None, len(experts)):
            raise UsageError(
                f"--num-experts {num_experts} contradicts {len(experts)} --expert checkpoints: leave it out"
            )
        num_experts = len(experts)
    level = own.get("level") or options.level or levels_of(source.config)[0]
    if level not in ("segment", "sequence", "token", "task"):
        raise MeoConfigError(f"unknown level {level!r}: give segment, sequence, token or task")
    check_level(source.config, level)
    check_decoder_options(source, options, level)
    if options.pooling is not None:
        raise UsageError(f"--pooling has no effect on a dense model ({source.config.model_type}): leave it out")
    if options.tasks and level != "task":
        raise UsageError(f"--task has no effect at level {level!r}: add --level task, or leave --task out")
    values = source.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        values.pop(key, None)
    block = {
        "schema_version": SCHEMA_VERSION,
        "level": level,
        "num_experts": 8 if num_experts is None else num_experts,
        "top_k": 2 if options.top_k is None else options.top_k,
        "gate_scope": options.gate_scope,
        "layers": layers,
        "tasks": list(options.tasks) or ["default"],
        "source": {"id": source.public_name, "commit": source.commit},
        "meo_hf_version": __version__,
        **own,
    }
    if options.descriptions:
        block["task_descriptions"] = description_tokens(source, options.tasks, options.descriptions)
    block |= {n: value for n in ("segment_length", "routing") if (value := getattr(options, n)) is not None}
    config = meo_config_class(type(source.config)).from_dict({**values, "meo": block})
    config.architectures = [f"Meo{source.model_class().__name__}"]
    config.dtype = options.dtype or source.dtype
    return config


def description_tokens(source: Source, tasks: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each task's description; raises UsageError if one has none."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UsageError(f"{source.name} has no tokenizer to read task descriptions with: give task names alone")
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if empty := [task for task, found in zip(tasks, tokens, strict=True) if not found]:
        raise UsageError(f"the description of task {empty[0]!r} is empty: describe every task, or none")
    return tokens


def _decide(plan: Plan, dense: PreTrainedModel, blocks: list[Block], meo: PreTrainedModel) -> None:
    by_live = tensors_by_live_name(dense, plan.source)
    experts = [tensors_by_live_name(dense, expert) for expert in plan.experts]
    for expert in plan.experts:
        if expert.config.model_type != plan.source.config.model_type:
            raise UnsupportedError(
                f"{expert.name} is of family {expert.config.model_type!r}, {plan.source.name} of "
                f"{plan.source.config.model_type!r}: experts must be fine-tunes of one base"
            )
    recipes: dict[str, Recipe] = {}
    used: set[str] = set()
    for block in blocks:
        for name, recipe, sources in _block_recipes(plan, block, by_live, experts):
            recipes[name] = recipe
            used.update(sources)
            plan.expanded.append(name)
    for name, recipe in plan.adapters.outside_recipes() if plan.adapters is not None else ():
        recipes[name] = recipe
        plan.expanded.append(name)
    merged = {} if plan.adapters is None else {f"{path}.weight": parts for path, parts in plan.adapters.merged.items()}
    created = {name for path, _ in merged_feed_forwards(meo) for name in _new_names(meo, path)}
    state = meo.state_dict()
    tied = set(dense.all_tied_weights_keys)
    for name in state:
        if name in recipes:
            continue
        if name in created:
            recipes[name] = _new(plan, name, tuple(state[name].shape))
            plan.created.append(name)
        elif name in by_live:
            check_shape(plan.source, by_live[name], tuple(state[name].shape))
            transposed = isinstance(dense.get_submodule(name.rpartition(".")[0]), Conv1D)
            changed = Summed(by_live[name], merged[name], transposed) if name in merged else None
            recipes[name] = changed or Copied(by_live[name])
            used.add(name)
            (plan.expanded if changed else plan.copied).append(name)
        elif name not in tied and not matches(dense._keys_to_ignore_on_load_missing, name):
            plan.missing.append(name)
    to_disk = disk_names(meo, recipes)
    buffers = {name for name, _ in dense.named_buffers()}  # those in no state dict are computed, never loaded
    for live in set(by_live) - used:
        if live in buffers or matches(dense._keys_to_ignore_on_load_unexpected, live):
            plan.ignored.append(live)
            continue
        (plan.copied if live in tied else plan.carried).append(live)
        recipes[live] = Copied(by_live[live])
        to_disk[live] = by_live[live].spec.name
    for live in [*(name for name in state if name in recipes), *sorted(set(recipes) - set(state))]:
        recipe = recipes[live]
        shape = tuple(state[live].shape) if live in state else by_live[live].spec.shape
        spec = TensorSpec(to_disk[live], _dtype_code(plan, dense, live, recipe), shape)
        plan.targets[spec.name] = (spec, recipe)
    for names in (plan.copied, plan.expanded, plan.created, plan.carried, plan.ignored, plan.missing):
        names.sort()


def _block_recipes(
    plan: Plan, block: Block, by_live: dict[str, TensorRef], experts: list[dict[str, TensorRef]]
) -> Iterator[tuple[str, Recipe, list[str]]]:
    """Yield target name, recipe and source names of one feed-forward's expert stacks."""
    first = "gate_up_proj" if block.gated else "up_proj"
    fused = block.family.fused
    transposed = isinstance(block.projection(block.down), Conv1D)
    rows = {first: (block.up, 0, 2 if fused else 1), "down_proj": ((block.down,), 1, 1)}
    count = plan.settings["num_experts"]
    for (target, (paths, axis, halves)), has_bias in zip(rows.items(), block.has_bias, strict=True):
        for leaf, suffix in (("weight", ""), ("bias", "_bias")):
            if leaf == "bias" and not has_bias:
                continue
            names = [f"{block.path}.{path}.{leaf}" for path in paths]
            shapes = [tuple(getattr(block.projection(path), leaf).shape) for path in paths]
            parts = [parts_of(one, names, shapes, refs) for one, refs in zip(plan.experts, experts, strict=True)]
            shared = leaf == "weight" and plan.settings.get("expert_format") == "lowrank"
            if shared and plan.bank is not None and plan.bank.center == "mean":
                yield f"{block.slot}.experts.{target}", Mean(tuple(parts), transposed), names
                continue
            if shared or not parts:
                parts = [parts_of(plan.source, names, shapes, by_live)] * (1 if shared else count)
            recipe = Stacked(
                experts=tuple(parts),
                layer=block.path,
                neurons=axis,
                halves=halves,
                transposed=transposed,
                birth=plan.options.expert_init,
                seed=plan.options.seed,
            )
            yield f"{block.slot}.experts.{target}{suffix}", recipe, names
    for bank in (plan.adapters, plan.bank):
        for name, factor in bank.recipes(block) if bank is not None else ():
            yield name, factor, []


def _new_names(meo: PreTrainedModel, path: str) -> Iterator[str]:
    """Yield names of the parameters that no dense checkpoint has: routers and token adapters."""
    module = meo.get_submodule(path)
    for name, _ in module.named_parameters():
        if not name.startswith("experts."):
            yield f"{path}.{name}"


def _new(plan: Plan, name: str, shape: tuple[int, ...]) -> Recipe:
    """Return where a tensor that no checkpoint has comes from."""
    gate = ".router." in name and not name.endswith("noise_weight")
    if gate and plan.adapters is not None and plan.adapters.level == "task":
        return OwnExpert()
    return Fitted() if gate and plan.options.examples else _drawn(name, shape, plan.options.seed)


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> Drawn:
    if name.endswith("adapter.down.weight"):
        return Drawn(0.0, name, seed, bound=shape[1] ** -0.5)
    is_gate = ".router." in name and not name.endswith(("noise_weight", "bias"))
    return Drawn(ROUTER_STD if is_gate else 0.0, name, seed)


def _dtype_code(plan: Plan, dense: PreTrainedModel, name: str, recipe: Recipe) -> str:
    """Type of a target: as asked for, else as in the source; modules that stock keeps in fp32 stay so under fp16."""
    asked = plan.options.dtype
    if isinstance(recipe, Stacked) and plan.experts:
        asked = asked or plan.source.dtype
    if isinstance(recipe, Padded) and plan.adapters is not None:
        return CODES[asked or plan.adapters.dtype]
    if isinstance(recipe, (Drawn, OwnExpert, Factor, Fitted, Mean)):
        return CODES[asked or plan.source.dtype]
    ref = recipe.experts[0][0] if isinstance(recipe, Stacked) else cast("Copied | Summed", recipe).source
    if asked is None or not DTYPES[ref.spec.dtype].is_floating_point:
        return ref.spec.dtype
    keep = plan.model_class._keep_in_fp32_modules or []
    if asked is torch.float16 and set(keep) & set(name.split(".")):
        return "F32"
    return CODES[asked]


def matches(patterns: Any, name: str) -> bool:
    """Return whether a name matches one of a model class's patterns."""
    return any(re.search(pattern, name) for pattern in patterns or ())


def _flops(dense: nn.Module, meo: nn.Module, top_k: int) -> tuple[int, int]:
    """FLOPs per token of all linear maps of the dense model, and FLOPs of the merges per gated group (m|W|)."""
    linears = (m for m in dense.modules() if isinstance(m, (nn.Linear, Conv1D)))
    whole = [ff.experts for _, ff in merged_feed_forwards(meo) if ff.experts.bank() is None]
    merged = sum(parameter[0].numel() * top_k for experts in whole for parameter in experts.parameters())
    return sum(2 * m.weight.numel() for m in linears), merged


def _part_flops(meo: nn.Module, top_k: int) -> int:
    """FLOPs per token of low-rank parts."""
    factors = (module for module in meo.modules() if isinstance(module, Factors))
    return sum(2 * top_k * (one.A[0].numel() + one.B[0].numel()) for one in factors)
