"""How much memory is free for merged experts."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_UNKNOWN = 1 << 30


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device; on a CPU no more than the container's limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return _UNKNOWN
    free = [_available()]
    for folder, limit, used in _CGROUPS:
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            free.append(left + _file_cache(folder / "memory.stat"))
        except (OSError, ValueError):  # no such group, or no limit
            continue
    return max(min(free), 0)


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # not Linux
        return _UNKNOWN


def _file_cache(stat: Path) -> int:
    """Return the bytes of cached files, which count as used but give way."""
    values = dict(line.split() for line in stat.read_text().splitlines())
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))
