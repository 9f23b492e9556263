"""Which experts a dense conversion keeps as low-rank parts: adapters, truncated checkpoints, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from meo_hf.conversion.adapter_bank import AdapterBank, bank_of, rank, ranks_by_ending
from meo_hf.conversion.dense_tensors import parts_of, tensors_by_live_name
from meo_hf.conversion.expert_bank import ExpertBank, expert_bank
from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.options import Options
from meo_hf.conversion.safetensors_files import TensorRef
from meo_hf.conversion.source import Source
from meo_hf.errors import UsageError
from meo_hf.modeling.blocks_meo import Block


@dataclass
class LowRankExperts:
    """The experts, and what they decide of the `meo` block; both None where experts are whole."""

    adapters: AdapterBank | None = None
    bank: ExpertBank | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def low_rank_of(
    dense: PreTrainedModel,
    source: Source,
    experts: Sequence[Source],
    adapters: Sequence[LoraSource],
    options: Options,
    blocks: Sequence[Block],
    layers: Sequence[int],
) -> LowRankExperts:
    """Prepare experts that are kept as parts; `dense` is the source's model without memory.

    Raises UsageError for options that contradict them.
    """
    if adapters:
        return _of_adapters(dense, experts, adapters, options, blocks)
    if options.outside is not None or options.examples:
        idle = "--example" if options.examples else "--outside"
        raise UsageError(f"{idle} has no effect without --adapter: leave it out")
    if options.truncation:
        return _of_checkpoints(dense, source, experts, options, [block for block in blocks if block.index in layers])
    return LowRankExperts()


def _of_adapters(
    dense: PreTrainedModel,
    experts: Sequence[Source],
    adapters: Sequence[LoraSource],
    options: Options,
    blocks: Sequence[Block],
) -> LowRankExperts:
    _check_adapter_options(options, experts)
    _check_examples(options, [adapter.task for adapter in adapters])
    level = options.level or "task"
    bank = bank_of(adapters, blocks, dense, level, options.outside)
    ranks = ranks_by_ending({path: rank(parts) for path, parts in bank.gated.items()}, dense)
    return LowRankExperts(bank, None, {**bank.settings(options.top_k), "level": level, "expert_ranks": ranks})


def _of_checkpoints(
    dense: PreTrainedModel, source: Source, experts: Sequence[Source], options: Options, blocks: Sequence[Block]
) -> LowRankExperts:
    if not experts:
        raise UsageError("--expert-rank and --expert-energy need experts that differ: give --expert checkpoints")
    found = [tensors_by_live_name(dense, one) for one in (source, *experts)]
    for one, refs in zip((source, *experts), found, strict=True):
        _check_feed_forwards(one, blocks, refs)
    bank = expert_bank(blocks, found[0], found[1:], options.truncation)
    ranks = ranks_by_ending(bank.ranks, dense)
    return LowRankExperts(None, bank, {"expert_format": "lowrank", "expert_ranks": ranks})


def _check_adapter_options(options: Options, experts: Sequence[Source]) -> None:
    """Raise UsageError for an option that contradicts adapters."""
    given = {
        "--expert": bool(experts),
        "--num-experts": options.num_experts is not None,
        "--expert-init": options.expert_init != "copy",
        "--layers": options.layers != "all",
        "--task": bool(options.tasks),
        "--expert-rank": bool(options.truncation),
    }
    reasons = {
        "--num-experts": "each adapter is an expert",
        "--expert-init": "the adapters are the experts",
        "--layers": "the adapters say what they change",
        "--task": "a task is named after its adapter: give --adapter NAME=ADAPTER",
    }
    if wrong := [name for name, was in given.items() if was]:
        reason = reasons.get(wrong[0], "experts come from checkpoints or from adapters")
        raise UsageError(f"{wrong[0]} has no effect with --adapter ({reason}): leave one out")


def _check_examples(options: Options, names: list[str]) -> None:
    """Raise UsageError for example texts that name no adapter, or not all."""
    given = [name for name, _ in options.examples]
    if not given:
        return
    if (options.level or "task") == "task":
        raise UsageError("--example has no effect at level task, where rows say their task: add --level sequence")
    if lost := [name for name in (*names, *given) if name not in names or given.count(name) != 1]:
        raise UsageError(f"--example is needed once for each of the adapters {', '.join(names)}: check {lost[0]!r}")


def _check_feed_forwards(source: Source, blocks: Sequence[Block], refs: dict[str, TensorRef]) -> None:
    for block in blocks:
        for path in block.paths.values():
            parts_of(source, [f"{block.path}.{path}.weight"], [tuple(block.projection(path).weight.shape)], refs)
