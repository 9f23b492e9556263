"""Time conversions beside plain copies of the same files, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from meo_hf.benchmark.machine import Machine
from meo_hf.conversion.source import Source
from meo_hf.errors import CheckFailedError, OutputError

COPY_SOURCE, COPY_RESULT, UNCHECKED, CHECKED = "copy source", "copy result", "convert, verify none", "convert"
VARIANTS = (COPY_SOURCE, COPY_RESULT, UNCHECKED, CHECKED)

_CHILD = """
import json, os, resource, sys, time
job = json.loads(sys.argv[1])
def peak(who=resource.RUSAGE_SELF):
    if who == resource.RUSAGE_SELF:
        try:  # a child's ru_maxrss begins at its parent's
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
        except (OSError, StopIteration):
            pass
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if job["options"] is not None:
    from meo_hf import convert
for path in job["files"]:  # so that nobody waits for the disk to read
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass
os.sync()
before, began = peak(), time.perf_counter()
if job["options"] is not None:
    convert(job["source"], job["output"], **job["options"])
else:
    os.mkdir(job["output"])
    for path in job["files"]:
        with open(path, "rb") as old, open(os.path.join(job["output"], os.path.basename(path)), "wb") as new:
            while piece := old.read(1 << 24):
                new.write(piece)
wall = time.perf_counter() - began
os.sync()
flush = time.perf_counter() - began - wall
checker = peak(resource.RUSAGE_CHILDREN) if job["options"] is not None else 0
print(json.dumps({"seconds": wall, "flush_seconds": flush, "peak_bytes": peak(), "start_bytes": before,
                  "checker_bytes": checker}))
"""


@dataclass(frozen=True)
class Run:
    """One run: seconds without starting up, of the disk's flush after it, and peak resident bytes.

    `start_bytes` is what the process had before it began; `checker_bytes` what a process that it started for checks
    needed, 0 for none.
    """

    seconds: float
    flush_seconds: float
    peak_bytes: int
    start_bytes: int
    checker_bytes: int


@dataclass
class Timing:
    """The runs of one variant, and the bytes of weights that each wrote."""

    variant: str
    runs: list[Run] = field(default_factory=list)
    written: int = 0

    @property
    def median(self) -> float:
        """Seconds of a run."""
        return statistics.median(run.seconds for run in self.runs)


def time_convert(
    source: Source,
    options: dict[str, Any],
    rounds: int,
    folder: Path,
    advance: Callable[[str], None] = lambda what: None,
) -> list[Timing]:
    """Time all variants in turns, each round beginning with the next one, after one that is dropped.

    `folder` is where outputs come to lie; all but one are removed as soon as they are timed. A copy of the result is
    the least that writing it costs. Raises CheckFailedError if a conversion fails, or if a copy wrote other bytes.
    """
    files = sorted({str(ref.path) for ref in source.tensors.values()})
    kept = folder / "result"
    advance("converting once")
    _run({"source": str(source.loadable), "output": str(kept), "files": files}, {**options, "verify": "none"})
    result = sorted(map(str, kept.glob("*.safetensors")))
    timings = [Timing(variant) for variant in VARIANTS]
    for number in range(rounds + 1):
        first = number % len(timings)
        for timing in timings[first:] + timings[:first]:
            advance(f"{f'round {number}' if number else 'warm-up'}: {timing.variant}")
            job = {"source": str(source.loadable), "output": str(folder / "out")}
            job["files"] = result if timing.variant == COPY_RESULT else files  # type: ignore[assignment]
            verify = {"verify": "none"} if timing.variant == UNCHECKED else {}
            run = _run(job, None if timing.variant.startswith("copy") else {**options, **verify})
            written = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
            shutil.rmtree(folder / "out")
            if number:
                timing.runs.append(run)
            timing.written = written
    sizes = {timing.variant: timing.written for timing in timings}
    if not sizes[COPY_RESULT] == sizes[UNCHECKED] == sizes[CHECKED]:
        raise CheckFailedError(f"conversions and the copy of a result wrote different amounts: {sizes}")
    return timings


def steps_of(rounds: int) -> int:
    """Return how often a run calls `advance`."""
    return 1 + len(VARIANTS) * (rounds + 1)


def _run(job: dict[str, Any], options: dict[str, Any] | None) -> Run:
    """Copy files (no options) or convert in a new process."""
    command = [sys.executable, "-c", _CHILD, json.dumps({**job, "options": options})]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        error = OutputError if "OutputError" in reason else CheckFailedError
        raise error(f"{'copying' if options is None else 'converting'} failed: {reason}")
    return Run(**json.loads(done.stdout.strip().splitlines()[-1]))


def convert_table(name: str, timings: Sequence[Timing], machine: Machine) -> Table:
    """Show one row per variant: medians over rounds, the lowest and highest round, and peak memory."""
    rounds = len(timings[0].runs)
    title = f"Converting {name}; {rounds} round{'s' * (rounds > 1)}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=machine.noise or None)
    table.add_column("variant", no_wrap=True)
    for column in (
        "s",
        "spread",
        "flush\ns",
        "MB/s\nwritten",
        "ratio to\ncopy result",
        "start\nMB",
        "peak\nMB",
        "checker\nMB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for timing in timings:
        seconds = [run.seconds for run in timing.runs]
        checker = max(run.checker_bytes for run in timing.runs)
        table.add_row(
            timing.variant,
            f"{timing.median:.3g}",
            f"{min(seconds):.3g}..{max(seconds):.3g}",
            f"{statistics.median(run.flush_seconds for run in timing.runs):.3g}",
            f"{timing.written / timing.median / 1e6:,.0f}",
            f"{_ratio(timing, timings):.2f}",
            f"{max(run.start_bytes for run in timing.runs) / 1e6:,.0f}",
            f"{max(run.peak_bytes for run in timing.runs) / 1e6:,.0f}",
            f"{checker / 1e6:,.0f}" if checker else "",
        )
    return table


def write_results(
    command: str, name: str, timings: Sequence[Timing], options: dict[str, Any], machine: Machine, path: Path
) -> None:
    """Write the command, options, machine, and every run of every variant as JSON."""
    results = {
        "command": command,
        "source": name,
        "options": options,
        "machine": {**asdict(machine), "noisy": bool(machine.noise)},
        "variants": [
            {
                "variant": timing.variant,
                "bytes_written": timing.written,
                "seconds": round(timing.median, 4),
                "ratio_to_copy_result": round(_ratio(timing, timings), 4),
                "runs": [asdict(run) for run in timing.runs],
            }
            for timing in timings
        ],
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _ratio(timing: Timing, timings: Sequence[Timing]) -> float:
    """Return the median of the rounds' ratios to a copy of the result."""
    copies = next(one for one in timings if one.variant == COPY_RESULT)
    pairs = zip(timing.runs, copies.runs, strict=True)
    return statistics.median(mine.seconds / its.seconds for mine, its in pairs)
