"""The machine and the versions that a timing was taken with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from meo_hf.version import versions

QUIET = 0.5
"""Load average per CPU up to which a machine counts as quiet."""


@dataclass(frozen=True)
class Machine:
    """What timings depend on; look at it before any work of one's own adds to the load."""

    device: str
    cpus: int
    threads: int
    load_average: float | None
    versions: dict[str, str]

    @classmethod
    def look(cls, device: str) -> Machine:
        """Describe this machine as it is now; `load_average` (of one minute) is None where nobody keeps it."""
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        return cls(_device_name(device), os.cpu_count() or 1, torch.get_num_threads(), load, versions())

    @property
    def noise(self) -> str:
        """A warning if others were at work, else an empty string."""
        if self.load_average is None or self.load_average <= QUIET * self.cpus:
            return ""
        return f"noisy machine: load average {self.load_average} on {self.cpus} CPUs before the start"

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{versions}; {self.device}, {self.threads} threads, load average {self.load_average}"


def _device_name(device: str) -> str:
    kind = torch.device(device).type
    if kind != "cpu":
        return torch.cuda.get_device_name(device) if kind == "cuda" else device
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an architecture that does not say
        return platform.processor() or platform.machine()
