"""What the child process that checks a conversion is asked: where everything stands that it compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.adapter_bank import AdapterBank
from meo_hf.conversion.births import Stacked
from meo_hf.conversion.dense_tensors import tensors_by_live_name
from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.names import disk_names
from meo_hf.conversion.plan import Plan
from meo_hf.conversion.safetensors_files import DTYPES, TensorRef
from meo_hf.conversion.source import Source, auto_class_of, meta_model
from meo_hf.modeling.blocks_meo import Block, find_blocks, oriented
from meo_hf.modeling.configuration_meo import settings_of
from meo_hf.modeling.feedforward_meo import MeoFeedForward, converts
from meo_hf.modeling.merger_meo import bank_key
from meo_hf.modeling.remote_meo import auto_map, heads_of


def request_of(plan: Plan, folder: Path, written: dict[str, TensorRef], mode: str) -> dict[str, Any]:
    """Return the request of a mode for `verification_child.py`."""
    dense = plan.source.meta_model()
    meo = meta_model(plan.model_class, plan.config)
    settings = settings_of(plan.config)
    blocks = [block for block in find_blocks(dense, plan.source.family) if converts(block, settings)]
    to_disk = disk_names(meo, meo.state_dict())
    origins = [tensors_by_live_name(dense, origin) for origin in _origins(plan)]
    heads = heads_of(plan.source.family.model_type)
    stock = type(dense).__name__
    auto = auto_class_of(plan.source.family.model_type, stock)
    return {
        "mode": mode,
        "source": str(plan.source.loadable),
        "output": str(folder),
        "kind": plan.source.family.kind,
        "dense_class": stock if auto != "AutoModel" else heads["AutoModel"],
        "auto_class": auto,
        "auto_map_class": auto_map(type(plan.config).__name__, plan.source.family.model_type)[auto],
        "dtype": str(plan.config.dtype).removeprefix("torch."),
        "missing": plan.missing,
        "copies": not plan.experts and not plan.adapters and plan.options.expert_init == "copy",
        "experts": _expert_sources(plan, blocks, written, to_disk),
        "adapters": [] if plan.adapters is None else [_adapter_request(one) for one in plan.adapters.adapters],
        "factor_type": _factor_type(plan),
        "changed": {} if plan.adapters is None else _changed(plan.adapters, written, to_disk),
        "files": {name: str(ref.path) for name, ref in written.items()},
        "live_names": [live for live, disk in to_disk.items() if disk in written],
        "blocks": [_block_request(block, meo, to_disk, written, origins) for block in blocks],
    }


def _adapter_request(adapter: LoraSource) -> dict[str, Any]:
    return {"folder": str(adapter.folder), "prefix": adapter.prefix, "task": adapter.task}


def _factor_type(plan: Plan) -> str | None:
    """Return the type that adapters' factors were rounded to, None where they were not."""
    asked = plan.options.dtype
    return None if plan.adapters is None or asked is None else str(asked).removeprefix("torch.")


def _changed(bank: AdapterBank, written: dict[str, TensorRef], to_disk: dict[str, str]) -> dict[str, dict[str, str]]:
    """Say where the linear maps are that got the mean of all adapters' parts."""
    disks = {path: to_disk[f"{path}.weight"] for path in bank.merged}
    return {path: {"file": str(written[disk].path), "name": disk} for path, disk in disks.items()}


def _block_request(
    block: Block,
    meo: torch.nn.Module,
    to_disk: dict[str, str],
    written: dict[str, TensorRef],
    origins: list[dict[str, TensorRef]],
) -> dict[str, Any]:
    module = cast(MeoFeedForward, meo.get_submodule(block.slot))
    names = {name: to_disk[f"{block.slot}.{name}"] for name, _ in module.named_parameters()}
    own = {n.removeprefix("experts."): disk for n, disk in names.items() if n.startswith("experts.")}
    stacks = {n: disk for n, disk in own.items() if not n.startswith("low_rank.")}
    return {
        "slot": block.slot,
        "first": module.experts.first,
        "gated": block.gated,
        "stacks": stacks,
        "dtypes": {n: _torch_name(written[disk]) for n, disk in stacks.items()},
        "factors": _factors(block, own),
        "origins": [_dense_parts(block, module.experts.first, origin) for origin in origins],
        "transposed": isinstance(block.projection(block.down), Conv1D),
        "parameters": names,
    }


def _factors(block: Block, names: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Say for each stack which rows of its shared weight get which factors."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, _, stack, rows in _places(block):
        key = f"low_rank.{bank_key(name)}"
        if f"{key}.A" in names:
            found.setdefault(stack, []).append({"rows": rows, "A": names[f"{key}.A"], "B": names[f"{key}.B"]})
    return found


def _places(block: Block) -> Iterator[tuple[str, str, str, list[int]]]:
    """Yield each linear map's name, its path, its stack, and the rows that it has in there."""
    end = 0
    for name, path in block.paths.items():
        stack = "down_proj" if name == "down_proj" else "gate_up_proj" if block.gated else "up_proj"
        start = 0 if name == "down_proj" else end
        end = start + oriented(block.projection(path)).shape[0]
        yield name, path, stack, [start, end]


def _torch_name(ref: TensorRef) -> str:
    return str(DTYPES[ref.spec.dtype]).removeprefix("torch.")


def _origins(plan: Plan) -> list[Source]:
    """The checkpoints whose feed-forwards the experts are: one each, or one for all; none if experts were drawn."""
    if plan.adapters is not None or plan.bank is not None:
        return []
    if plan.experts or plan.options.expert_init != "copy":
        return plan.experts
    return [plan.source]


def _dense_parts(block: Block, first: str, origin: dict[str, TensorRef]) -> dict[str, list[dict[str, str]]]:
    """Where a checkpoint holds what an expert of each stack is joined from, by the family's row alone."""
    parts = {}
    for stack, paths in ((first, block.up), ("down_proj", (block.down,))):
        for leaf, suffix in (("weight", ""), ("bias", "_bias")):
            refs = [origin.get(f"{block.path}.{path}.{leaf}") for path in paths]
            parts[f"{stack}{suffix}"] = [{"file": str(ref.path), "name": ref.spec.name} for ref in refs if ref]
    return parts


def _expert_sources(
    plan: Plan, blocks: list[Block], written: dict[str, TensorRef], to_disk: dict[str, str]
) -> list[dict[str, dict[str, Any]]]:
    """For each expert, where the dense weights of every converted feed-forward stand.

    Given checkpoints are read as they are; experts made by noise or drop-upcycling only exist in the output.
    """
    if plan.adapters is not None or (not plan.experts and plan.options.expert_init == "copy"):
        return []
    if plan.bank is not None:
        return _factorised_sources(plan, blocks, written, to_disk)
    experts: list[dict[str, dict[str, Any]]] = [{} for _ in range(plan.settings["num_experts"])]
    for block in blocks:
        first = "gate_up_proj" if block.gated else "up_proj"
        for target, paths in ((first, block.up), ("down_proj", (block.down,))):
            for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                disk = to_disk.get(f"{block.slot}.experts.{target}{suffix}")
                if disk is None:
                    continue
                recipe = plan.targets[disk][1]
                if not isinstance(recipe, Stacked):
                    raise TypeError(f"{disk} should be an expert stack")
                start = 0
                for number, path in enumerate(paths):
                    rows = recipe.experts[0][number].spec.shape[0]
                    for expert, parts in enumerate(recipe.experts):
                        own = plan.experts and {"file": str(parts[number].path), "name": parts[number].spec.name}
                        made = {"file": str(written[disk].path), "name": disk}
                        experts[expert][f"{block.path}.{path}.{leaf}"] = {
                            **(own or made),
                            "dtype": _torch_name(written[disk]),
                            "index": None if own else expert,
                            "rows": [start, start + rows] if len(paths) > 1 else None,
                            "transposed": recipe.transposed,
                        }
                    start += rows
    return experts


def _factorised_sources(
    plan: Plan, blocks: list[Block], written: dict[str, TensorRef], to_disk: dict[str, str]
) -> list[dict[str, dict[str, Any]]]:
    """For each expert of low rank, where its dense weights stand in the output."""
    experts: list[dict[str, dict[str, Any]]] = [{} for _ in range(plan.settings["num_experts"])]
    for block in blocks:
        for name, path, stack, rows in _places(block):
            transposed = isinstance(block.projection(path), Conv1D)
            for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                disk = to_disk.get(f"{block.slot}.experts.{stack}{suffix}")
                if disk is None:
                    continue
                key = f"{block.slot}.experts.low_rank.{bank_key(name)}"
                factors = {letter: to_disk[f"{key}.{letter}"] for letter in "AB"} if leaf == "weight" else None
                for expert, row in enumerate(experts):
                    row[f"{block.path}.{path}.{leaf}"] = {
                        "file": str(written[disk].path),
                        "name": disk,
                        "dtype": "float32",
                        "index": 0 if leaf == "weight" else expert,
                        "rows": rows,
                        "transposed": transposed,
                        "factors": factors and {"expert": expert, **factors},
                    }
    return experts
