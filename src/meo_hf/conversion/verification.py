"""Check a conversion: bytes against the plan, then behaviour in a fresh process without meo_hf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.adapter_bank import AdapterBank
from meo_hf.conversion.births import Stacked
from meo_hf.conversion.centroids import Fitted
from meo_hf.conversion.factorise import Factor, Factorised
from meo_hf.conversion.lora_source import LoraSource
from meo_hf.conversion.names import disk_names
from meo_hf.conversion.plan import Plan, tensors_by_live_name
from meo_hf.conversion.report import Check
from meo_hf.conversion.safetensors_files import CHUNK, DTYPES, TensorRef
from meo_hf.conversion.source import Source, auto_class_of, index_tensors, meta_model
from meo_hf.conversion.write import Targets
from meo_hf.modeling.blocks_meo import Block, find_blocks, oriented
from meo_hf.modeling.configuration_meo import settings_of
from meo_hf.modeling.feedforward_meo import MeoFeedForward, converts
from meo_hf.modeling.merger_meo import bank_key
from meo_hf.modeling.remote_meo import auto_map, heads_of

MODES = ("full", "sample", "none")


def mode_that_fits(plan: Plan, asked: str) -> str:
    """Return `full` only if both models fit in memory as fp32, else `sample`."""
    if asked != "full":
        return asked
    needed = 4 * sum(plan.parameters) + 2**30
    return "full" if needed < 0.8 * psutil.virtual_memory().available else "sample"


def verify_files(plan: Plan, folder: Path, mode: str, on_bytes: Callable[[int], None] = lambda _: None) -> list[Check]:
    """Run the checks of a mode on a written conversion."""
    if mode == "none":
        return []
    written = index_tensors(folder)
    same = bytes_check(plan.targets, written, on_bytes)
    if set(written) != set(plan.targets):  # nothing could be said about a model that lacks tensors
        return [same]
    kept = [] if plan.bank is None else [products_check(plan.bank.maps.values(), plan.targets, written)]
    return [same, *kept, *run_child("verification_child.py", _request(plan, folder, written, mode))]


def bytes_check(
    targets: Targets, written: dict[str, TensorRef], on_bytes: Callable[[int], None] = lambda _: None
) -> Check:
    """Derive every target from the sources again and compare it with the file, streaming."""
    name = "every tensor holds the bytes that the sources give"
    if set(written) != set(targets):
        wrong = sorted(set(written) ^ set(targets))
        return Check(name, False, f"{len(wrong)} tensors are too many or missing, e.g. {wrong[0]}")
    for tensor, (spec, recipe) in targets.items():
        if written[tensor].spec != spec:
            return Check(name, False, f"{tensor} is {written[tensor].spec}, planned was {spec}")
        if isinstance(recipe, (Factor, Fitted)):  # what was computed is checked by what it is for
            continue
        if not _same(recipe.chunks(spec), written[tensor].chunks(), on_bytes):
            return Check(name, False, f"{tensor} differs from its sources")
    factors = sum(isinstance(recipe, Factor) for _, recipe in targets.values())
    nbytes = sum(spec.nbytes for spec, _ in targets.values())
    besides = f"; {factors} factors of experts are checked by their products" if factors else ""
    return Check(name, True, f"{len(written) - factors} tensors of {nbytes:,} bytes in all{besides}")


def products_check(maps: Iterable[Factorised], targets: Targets, written: dict[str, TensorRef]) -> Check:
    """Compare the written factors' products with the experts: no farther from them than the best of their rank."""
    files: dict[str, dict[str, TensorRef]] = {}
    for tensor, (_, recipe) in targets.items():
        if isinstance(recipe, Factor):
            files.setdefault(recipe.experts.path, {})[recipe.letter] = written[tensor]
    name, worst, excess = "experts are as near as their ranks allow", 0.0, 0.0
    for one in maps:
        refs = files[one.path]
        dtype = DTYPES[refs["A"].spec.dtype]
        error, best = one.error({letter: ref.load() for letter, ref in refs.items()}, dtype), one.best().error
        worst, excess = max(worst, best), max(excess, error - best - 4 * torch.finfo(dtype).eps)
    if excess > 1e-5:
        return Check(name, False, f"a linear map's experts are {excess:.1e} farther off than the best of that rank")
    return Check(name, True, f"relative error of experts at most {worst:.3g}, {len(files)} linear maps")


def _same(left: Iterator[memoryview], right: Iterator[memoryview], on_bytes: Callable[[int], None]) -> bool:
    """Compare two byte streams whose pieces may be cut differently."""
    a = b = memoryview(b"")
    while True:
        a = a or next(left, memoryview(b""))
        b = b or next(right, memoryview(b""))
        size = min(len(a), len(b))
        if not size:
            return not a and not b
        if a[:size] != b[:size]:
            return False
        on_bytes(size)
        a, b = a[size:], b[size:]


def run_child(script: str, request: dict[str, Any]) -> list[Check]:
    """Run a script beside this file in a process where meo_hf cannot be imported; returns its checks."""
    with tempfile.TemporaryDirectory(prefix="meo-hf-") as scratch:
        answer = Path(scratch) / "answer.json"
        (Path(scratch) / "request.json").write_text(json.dumps({**request, "answer": str(answer)}))
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name(script)), str(Path(scratch) / "request.json")],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].split("Error: ", 1)[-1]
            return [Check("loads without meo_hf", False, last[:500])]
        return [Check(**check) for check in json.loads(answer.read_text())]


def _request(plan: Plan, folder: Path, written: dict[str, TensorRef], mode: str) -> dict[str, Any]:
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
        "changed": {} if plan.adapters is None else _changed(plan.adapters, written, to_disk),
        "files": {name: str(ref.path) for name, ref in written.items()},
        "live_names": [live for live, disk in to_disk.items() if disk in written],
        "blocks": [_block_request(block, meo, to_disk, written, origins) for block in blocks],
    }


def _adapter_request(adapter: LoraSource) -> dict[str, Any]:
    return {"folder": str(adapter.folder), "prefix": adapter.prefix, "task": adapter.task}


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
        "factors": _factors(block, module, own),
        "origins": [_dense_parts(block, module.experts.first, origin) for origin in origins],
        "transposed": isinstance(block.projection(block.down), Conv1D),
        "parameters": names,
    }


def _factors(block: Block, module: MeoFeedForward, names: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """Say for each stack which rows of its shared weight get which factors."""
    found: dict[str, list[dict[str, Any]]] = {}
    start = 0
    for name, path in block.paths.items():
        stack = "down_proj" if name == "down_proj" else module.experts.first
        start = 0 if name == "down_proj" else start
        width = _rows(block, path)
        key = f"low_rank.{bank_key(name)}"
        if f"{key}.A" in names:
            rows = [start, start + width]
            found.setdefault(stack, []).append({"rows": rows, "A": names[f"{key}.A"], "B": names[f"{key}.B"]})
        start += width
    return found


def _rows(block: Block, path: str) -> int:
    """Return the number of outputs of a projection."""
    return oriented(block.projection(path)).shape[0]


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
        first, start = "gate_up_proj" if block.gated else "up_proj", 0
        for name, path in block.paths.items():
            stack = "down_proj" if name == "down_proj" else first
            start = 0 if name == "down_proj" else start
            rows = [start, start + _rows(block, path)]
            transposed = isinstance(block.projection(path), Conv1D)
            start = rows[1]
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


def outside_differences(plan: Plan) -> list[dict[str, Any]]:
    """Count, for each given expert checkpoint, tensors outside its feed-forwards that differ from the source's."""
    taken = {
        ref for _, recipe in plan.targets.values() if isinstance(recipe, Stacked) for e in recipe.experts for ref in e
    }
    names = {ref.spec.name for ref in taken}
    rows = []
    for expert in plan.experts:
        differing, only = [], []
        for name, ref in expert.tensors.items():
            if name in names:
                continue
            other = plan.source.tensors.get(name)
            if other is None or other.spec != ref.spec:
                only.append(name)
            elif other.path != ref.path and not _same(ref.chunks(CHUNK), other.chunks(CHUNK), lambda _: None):
                differing.append(name)
        rows.append(
            {
                "id": expert.lasting_name,
                "commit": expert.commit,
                "outside_differing": len(differing),
                "outside_only_here": len(only),
            }
        )
    return rows
