"""Check a conversion: bytes against the plan, then behaviour in a fresh process without meo_hf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers.pytorch_utils import Conv1D

from meo_hf.conversion.births import Stacked
from meo_hf.conversion.names import disk_names
from meo_hf.conversion.plan import Plan, tensors_by_live_name
from meo_hf.conversion.report import Check
from meo_hf.conversion.safetensors_files import CHUNK, DTYPES, TensorRef
from meo_hf.conversion.source import Source, auto_class_of, index_tensors, meta_model
from meo_hf.modeling.blocks_meo import Block, find_blocks
from meo_hf.modeling.feedforward_meo import MeoFeedForward
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
    same = _bytes_check(plan, written, on_bytes)
    if set(written) != set(plan.targets):  # nothing could be said about a model that lacks tensors
        return [same]
    return [same, *run_child("verification_child.py", _request(plan, folder, written, mode))]


def _bytes_check(plan: Plan, written: dict[str, TensorRef], on_bytes: Callable[[int], None]) -> Check:
    """Derive every target from the sources again and compare it with the file, streaming."""
    name = "every tensor holds the bytes that the sources give"
    if set(written) != set(plan.targets):
        wrong = sorted(set(written) ^ set(plan.targets))
        return Check(name, False, f"{len(wrong)} tensors are too many or missing, e.g. {wrong[0]}")
    for tensor, (spec, recipe) in plan.targets.items():
        if written[tensor].spec != spec:
            return Check(name, False, f"{tensor} is {written[tensor].spec}, planned was {spec}")
        if not _same(recipe.chunks(spec), written[tensor].chunks(), on_bytes):
            return Check(name, False, f"{tensor} differs from its sources")
    return Check(name, True, f"{len(written)} tensors, {plan.nbytes:,} bytes")


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
    blocks = [block for block in find_blocks(dense, plan.source.family) if block.index in plan.layers]
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
        "copies": not plan.experts and plan.options.expert_init == "copy",
        "experts": _expert_sources(plan, blocks, written, to_disk),
        "files": {name: str(ref.path) for name, ref in written.items()},
        "live_names": [live for live, disk in to_disk.items() if disk in written],
        "blocks": [_block_request(block, meo, to_disk, written, origins) for block in blocks],
    }


def _block_request(
    block: Block,
    meo: torch.nn.Module,
    to_disk: dict[str, str],
    written: dict[str, TensorRef],
    origins: list[dict[str, TensorRef]],
) -> dict[str, Any]:
    module = cast(MeoFeedForward, meo.get_submodule(block.slot))
    names = {name: to_disk[f"{block.slot}.{name}"] for name, _ in module.named_parameters()}
    stacks = {n.removeprefix("experts."): disk for n, disk in names.items() if n.startswith("experts.")}
    return {
        "slot": block.slot,
        "first": module.experts.first,
        "gated": block.gated,
        "stacks": stacks,
        "dtypes": {n: _torch_name(written[disk]) for n, disk in stacks.items()},
        "origins": [_dense_parts(block, module.experts.first, origin) for origin in origins],
        "transposed": isinstance(block.projection(block.down), Conv1D),
        "parameters": names,
    }


def _torch_name(ref: TensorRef) -> str:
    return str(DTYPES[ref.spec.dtype]).removeprefix("torch.")


def _origins(plan: Plan) -> list[Source]:
    """The checkpoints whose feed-forwards the experts are: one each, or one for all; none if experts were drawn."""
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
    if not plan.experts and plan.options.expert_init == "copy":
        return []
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
