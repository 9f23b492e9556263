"""Check a conversion: bytes against the plan, then behaviour in a fresh process without meo_hf."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from meo_hf.conversion.births import Stacked
from meo_hf.conversion.centroids import Fitted
from meo_hf.conversion.factorise import Factor, Factorised
from meo_hf.conversion.plan import Plan
from meo_hf.conversion.report import Check
from meo_hf.conversion.safetensors_files import CHUNK, DTYPES, TensorRef
from meo_hf.conversion.source import index_tensors
from meo_hf.conversion.verification_request import request_of
from meo_hf.conversion.write import Targets

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
    return [same, *kept, *run_child("verification_child.py", request_of(plan, folder, written, mode))]


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
        error = error if math.isfinite(error) else math.inf
        worst, excess = max(worst, error), max(excess, error - best - 4 * torch.finfo(dtype).eps)
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


def run_child(script: str | Path, request: dict[str, Any]) -> list[Check]:
    """Run a script, by its name one beside this file, where meo_hf cannot be imported; returns its checks."""
    with tempfile.TemporaryDirectory(prefix="meo-hf-") as scratch:
        answer = Path(scratch) / "answer.json"
        (Path(scratch) / "request.json").write_text(json.dumps({**request, "answer": str(answer)}))
        environment = {
            **os.environ,
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-I", str(Path(__file__).parent / script), str(Path(scratch) / "request.json")]
        code, told = run_alone(command, environment)
        if code or not answer.is_file():
            last = (told.strip().splitlines() or [f"exit code {code}"])[-1].split("Error: ", 1)[-1]
            return [Check("loads without meo_hf", False, last[:500])]
        return [Check(**check) for check in json.loads(answer.read_text())]


def run_alone(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run a command in a process of its own; returns its exit code and what it wrote to stderr."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.returncode, done.stderr


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
