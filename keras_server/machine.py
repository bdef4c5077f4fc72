"""The machine: how many processors this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def processors() -> int:
    """Return how many processors this process may use: its affinity, cut by the container's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: "150000 100000" is one and a half, "max" no quota
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        quota, period = (Path("/sys/fs/cgroup") / group / "cpu.max").read_text().split()
        count = min(count, int(quota) // int(period))
    return max(1, count)
