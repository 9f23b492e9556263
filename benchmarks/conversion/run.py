"""Time the conversion of three fine-tunes into one multi-expert model with up to three tools.

Only the standard library is imported: the peak memory that the kernel reports for a child starts at
what its parent held when it forked, so this process has to stay small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OURS, MERGEKIT, MIXTUREKIT = "meo-hf", "mergekit-moe", "mixturekit"
EXPERTS = ("expert-a", "expert-b", "expert-c")
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
SAMPLE_SECONDS = 0.005
READ_BYTES = 8 << 20

Summaries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Tool:
    """A converter: its name, its distribution on the index, its command and what the command writes."""

    name: str
    distribution: str
    command: tuple[str, ...]
    output: Path


@dataclass(frozen=True)
class Run:
    """What one measured run of one tool took."""

    tool: str
    round: int
    wall_seconds: float
    flush_seconds: float
    user_seconds: float
    system_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int | None
    output_bytes: int
    load_average: float


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, help="directory that make_checkpoints.py wrote")
    parser.add_argument("work", type=Path, help="directory for the outputs, the configurations and the logs")
    parser.add_argument("--ours", type=Path, metavar="EXECUTABLE", help="path to meo-hf")
    parser.add_argument("--mergekit-moe", type=Path, metavar="EXECUTABLE", help="path to mergekit-moe")
    parser.add_argument("--mixturekit", type=Path, metavar="EXECUTABLE", help="path to mixturekit")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds (default: %(default)s)")
    parser.add_argument("--warmups", type=int, default=1, help="discarded first rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="result file (default: WORK/results.json)")
    args = parser.parse_args()
    if not (args.ours or args.mergekit_moe or args.mixturekit):
        parser.error("give at least one of --ours, --mergekit-moe and --mixturekit")
    if args.repeats < 1 or args.warmups < 0:
        parser.error("--repeats must be at least 1 and --warmups at least 0")
    # Not resolve(): the executable of a virtual environment may be a link out of it.
    args.checkpoints, args.work = args.checkpoints.absolute(), args.work.absolute()
    return args


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a tool's YAML configuration as JSON, which is YAML too and needs no package."""
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def ours_tool(executable: Path, checkpoints: Path, work: Path) -> Tool:
    """Describe our own converter."""
    output = work / "out-ours"
    experts = [part for name in EXPERTS for part in ("--expert", str(checkpoints / name))]
    options = [*experts, "--verify", "none", "--overwrite"]
    command = (str(executable.absolute()), "convert", str(checkpoints / "base"), str(output), *options)
    return Tool(OURS, "meo-hf", command, output)


def mergekit_tool(executable: Path, checkpoints: Path, work: Path) -> Tool:
    """Describe mergekit-moe with random gates, the mode that runs no prompt through a model."""
    output = work / "out-mergekit"
    config: dict[str, Any] = {
        "base_model": str(checkpoints / "base"),
        "architecture": "mixtral",
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "experts": [{"source_model": str(checkpoints / name)} for name in EXPERTS],
    }
    path = write_config(work / "mergekit.yaml", config)
    return Tool(MERGEKIT, "mergekit", (str(executable.absolute()), str(path), str(output)), output)


def mixturekit_tool(executable: Path, checkpoints: Path, work: Path) -> Tool:
    """Describe MixtureKit's mixture of whole feed-forward blocks, streamed as it is by default."""
    output = work / "out-mixturekit"
    config: dict[str, Any] = {
        "moe_method": "traditional",
        "model_type": "syntheticmoe3x",
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
        "experts": [{"expert_name": name, "model_id": str(checkpoints / name)} for name in EXPERTS],
    }
    path = write_config(work / "mixturekit.yaml", config)
    command = (str(executable.absolute()), "build", str(path), "--output", str(output))
    return Tool(MIXTUREKIT, "MixtureKit", command, output)


def build_tools(args: argparse.Namespace) -> list[Tool]:
    """Describe every tool whose executable was given."""
    builders: list[tuple[Path | None, Callable[[Path, Path, Path], Tool]]] = [
        (args.ours, ours_tool),
        (args.mergekit_moe, mergekit_tool),
        (args.mixturekit, mixturekit_tool),
    ]
    return [build(path, args.checkpoints, args.work) for path, build in builders if path is not None]


def checkpoint_files(checkpoints: Path) -> list[Path]:
    """List the weight files that the tools read."""
    directories = [checkpoints / name for name in ("base", *EXPERTS)]
    paths = [path for directory in directories for path in sorted(directory.glob("*.safetensors"))]
    if len(paths) <= len(EXPERTS):
        raise SystemExit(f"{checkpoints}: expected weights in base, {', '.join(EXPERTS)}")
    return paths


def read_through(paths: Iterable[Path]) -> None:
    """Read files to their end, so that every tool finds them in the page cache."""
    buffer = bytearray(READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def anonymous_bytes(pid: int) -> int | None:
    """Return the anonymous resident memory of a process, or None where the kernel doesn't tell."""
    try:
        with Path(f"/proc/{pid}/status").open(encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("RssAnon:")), None)
    except OSError:
        return None
    return int(line.split()[1]) * 1024 if line else None


class AnonymousSampler:
    """Sample the anonymous memory of a process from a thread and keep the highest sample.

    Peak RSS counts pages of mapped input files, which the kernel can drop at any time; this doesn't.
    """

    def __init__(self, pid: int) -> None:
        self.peak: int | None = None
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> AnonymousSampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        """Sample until told to stop."""
        while not self._stop.wait(SAMPLE_SECONDS):
            sample = anonymous_bytes(self._pid)
            if sample is not None:
                self.peak = max(self.peak or 0, sample)


def directory_bytes(directory: Path) -> int:
    """Sum the sizes of the weight files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def last_lines(path: Path, count: int = 20) -> str:
    """Return the end of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def child_environment() -> dict[str, str]:
    """Return the environment of a tool: this one's, without look-ups on a model hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def measure(tool: Tool, round_number: int, work: Path, inputs: Sequence[Path]) -> Run:
    """Run one tool once, from warm inputs and with nothing left to write back, and measure it."""
    shutil.rmtree(tool.output, ignore_errors=True)
    read_through(inputs)
    os.sync()
    load_average = os.getloadavg()[0]
    log = work / f"{tool.name}.log"
    with log.open("wb") as stream:
        start = time.perf_counter()
        child = subprocess.Popen(
            tool.command,
            cwd=work,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
        with AnonymousSampler(child.pid) as sampler:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
    # Popen must not wait for a process that wait4 has already collected.
    child.returncode = os.waitstatus_to_exitcode(status)
    output_bytes = directory_bytes(tool.output)
    if child.returncode != 0 or output_bytes == 0:
        raise SystemExit(f"{tool.name} failed with status {child.returncode}:\n{last_lines(log)}")
    start = time.perf_counter()
    os.sync()
    return Run(
        tool=tool.name,
        round=round_number,
        wall_seconds=wall,
        flush_seconds=time.perf_counter() - start,
        user_seconds=usage.ru_utime,
        system_seconds=usage.ru_stime,
        # Linux counts in KiB, macOS in bytes.
        peak_rss_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        peak_anonymous_bytes=sampler.peak,
        output_bytes=output_bytes,
        load_average=load_average,
    )


def run_rounds(tools: Sequence[Tool], args: argparse.Namespace) -> list[Run]:
    """Run the tools in turn, starting each round with the next one, and return the measured runs."""
    inputs = checkpoint_files(args.checkpoints)
    runs = []
    for number in range(1 - args.warmups, args.repeats + 1):
        first = number % len(tools)
        for tool in (*tools[first:], *tools[:first]):
            run = measure(tool, number, args.work, inputs)
            label = f"round {number}" if number > 0 else "warm-up"
            peak = megabytes(run.peak_rss_bytes)
            print(f"{label}: {tool.name} {run.wall_seconds:.2f} s, {peak} MB", flush=True)
            if number > 0:
                runs.append(run)
    return runs


def versions(tool: Tool) -> dict[str, str]:
    """Ask the interpreter beside a tool's executable for the versions of what it uses."""
    code = (
        "import importlib.metadata as metadata, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n"
        "        pass\n"
        "print(json.dumps(found))"
    )
    python = Path(tool.command[0]).parent / "python"
    command = [str(python), "-c", code, tool.distribution, *LIBRARIES]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, str] = json.loads(answer)
    return found


def machine() -> dict[str, Any]:
    """Describe the machine as far as it bears on the numbers."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "usable_cpu_count": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def summarise(runs: Iterable[Run]) -> dict[str, Any]:
    """Reduce the runs of one tool to medians and ranges."""
    rows = list(runs)
    walls = [run.wall_seconds for run in rows]
    anonymous = [run.peak_anonymous_bytes for run in rows if run.peak_anonymous_bytes is not None]
    return {
        "runs": len(rows),
        "wall_seconds": statistics.median(walls),
        "wall_seconds_range": [min(walls), max(walls)],
        "flush_seconds": statistics.median(run.flush_seconds for run in rows),
        "cpu_seconds": statistics.median(run.user_seconds + run.system_seconds for run in rows),
        "peak_rss_bytes": int(statistics.median(run.peak_rss_bytes for run in rows)),
        "peak_anonymous_bytes": int(statistics.median(anonymous)) if anonymous else None,
        "output_bytes": rows[-1].output_bytes,
    }


def ratios(summaries: Summaries) -> dict[str, dict[str, float]]:
    """Divide what each rival took by what ours took; empty unless ours ran."""
    ours = summaries.get(OURS)
    if ours is None:
        return {}
    keys = ("wall_seconds", "cpu_seconds", "peak_rss_bytes", "peak_anonymous_bytes", "output_bytes")
    return {
        name: {key: row[key] / ours[key] for key in keys if row[key] and ours[key]}
        for name, row in summaries.items()
        if name != OURS
    }


def megabytes(size: int | None) -> str:
    """Format a size in MB, or a dash where it isn't known."""
    return "-" if size is None else f"{size / 1e6:.0f}"


def print_table(tools: Sequence[Tool], summaries: Summaries, found: dict[str, dict[str, str]]) -> None:
    """Print one line for each tool."""
    columns = "{:<13} {:>9} {:>7} {:>15} {:>7} {:>8} {:>7} {:>8} {:>7}"
    print()
    print(columns.format("tool", "version", "wall s", "range", "cpu s", "flush s", "RSS MB", "anon MB", "out MB"))
    for tool in tools:
        row = summaries[tool.name]
        low, high = row["wall_seconds_range"]
        print(
            columns.format(
                tool.name,
                found[tool.name].get(tool.distribution, "-"),
                f"{row['wall_seconds']:.2f}",
                f"{low:.2f} - {high:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{row['flush_seconds']:.2f}",
                megabytes(row["peak_rss_bytes"]),
                megabytes(row["peak_anonymous_bytes"]),
                megabytes(row["output_bytes"]),
            )
        )


def print_ratios(rows: dict[str, dict[str, float]]) -> None:
    """Print how many times as much as ours each rival took."""
    for name, row in rows.items():
        parts = (f"{key.rsplit('_', 1)[0].replace('_', ' ')} x{value:.2f}" for key, value in row.items())
        print(f"{name} / {OURS}: {', '.join(parts)}")


def portable(tool: Tool, args: argparse.Namespace) -> list[str]:
    """Return a tool's command with the directories of this run replaced by their names."""
    names = {str(args.checkpoints): "CHECKPOINTS", str(args.work): "WORK"}
    parts = [Path(tool.command[0]).name, *tool.command[1:]]
    for directory in sorted(names, key=len, reverse=True):
        parts = [part.replace(directory, names[directory]) for part in parts]
    return parts


def main() -> None:
    """Measure the tools, print the table and write the results."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    tools = build_tools(args)
    found = {tool.name: versions(tool) for tool in tools}
    runs = run_rounds(tools, args)
    summaries = {tool.name: summarise(run for run in runs if run.tool == tool.name) for tool in tools}
    relative = ratios(summaries)
    print_table(tools, summaries, found)
    print_ratios(relative)
    results = {
        "machine": machine(),
        "checkpoint_bytes": {name: directory_bytes(args.checkpoints / name) for name in ("base", *EXPERTS)},
        "versions": found,
        "commands": {tool.name: portable(tool, args) for tool in tools},
        "repeats": args.repeats,
        "warmups": args.warmups,
        "summary": summaries,
        "ratios_to_ours": relative,
        "runs": [asdict(run) for run in runs],
    }
    path = args.json or args.work / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\nresults: {path}")


if __name__ == "__main__":
    main()
