"""The machine: how many processors and how much memory this process may use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path


def processors() -> int:
    """Return how many processors this process may use: its affinity, cut by the container's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # cgroup v2: "150000 100000" is one and a half, "max" no quota
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        quota, period = (Path("/sys/fs/cgroup") / group / "cpu.max").read_text().split()
        count = min(count, int(quota) // int(period))
    return max(1, count)


def sums_bytes() -> bool:
    """Return whether the processor has instructions that sum up products of bytes: VNNI or AMX, as Linux names them.

    Elsewhere nobody says so, and int8 is taken only where it is asked for.
    """
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return bool(flags and {"avx512_vnni", "avx_vnni", "amx_int8"} & {*flags[1].split()})
    return False


def step_back(niceness: int) -> None:
    """Lower this thread's priority, and that of the threads that it starts, where that is not the whole process's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, niceness)


def memory() -> int:
    """Return how many bytes this process may use: those of the machine, or fewer where its container has a limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [4 * 2**30]
    with contextlib.suppress(OSError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        for folder in (group, *group.parents):  # cgroup v2: a number of bytes, or "max" for no limit
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((folder / "memory.max").read_text()))
    return min(limits)


def trim() -> None:
    """Give the system back the memory that is free between what is in use, where the C library is glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Return how many bytes of memory this process has, as far as the system says."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
