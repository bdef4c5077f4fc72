"""What a measurement is made on: the processor, the packages, and who else is busy. Linux only (/proc)."""

import json
import os
import platform
import re
import time
from pathlib import Path

from contestants import output_of

INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
}
PACKAGES = (
    "tensorflow", "keras", "openvino", "flask", "gevent", "pillow", "cykooz-resizer",
    "fastapi", "uvicorn", "litserve", "bentoml", "ray",
)  # fmt: skip


def cores() -> int:
    """Return how many processors this program may use."""
    return len(os.sched_getaffinity(0))


def describe_machine() -> str:
    """Return the machine in words."""
    about = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    words = [about.get("model name", platform.machine())]
    if "cpu family" in about:  # hypervisors often shorten the name
        words[0] += f" (family {about['cpu family']}, model {about['model']})"
    words += [f"{cores()} cores"]
    words += [name for flag, name in INSTRUCTIONS.items() if flag in about.get("flags", "").split()]
    words += [f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"]
    return ", ".join([*words, f"Linux {platform.release().partition('-')[0]}", f"Python {platform.python_version()}"])


def versions(python: str | Path) -> dict[str, str]:
    """Return the versions of the packages that matter in an environment."""
    if not Path(python).exists():
        return {}
    code = "import importlib.metadata as m, json; "
    code += "print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    found = json.loads(output_of([str(python), "-c", code]))
    return {name: found[name] for name in PACKAGES if name in found}


def others_busy(seconds: float = 1) -> float:
    """Return the share of the processors that is in use while this program sleeps."""

    def ticks() -> tuple[int, int]:
        numbers = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(numbers), numbers[3] + numbers[4]  # of them idle, or waiting for a disk

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    return 1 - (idle_after - idle) / (total_after - total)
