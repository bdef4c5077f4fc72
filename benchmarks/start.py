"""How quickly the server is ready, and what memory it takes, from an export that is kept.

    python benchmarks/start.py [--turns 7]

In turn: the imports that no server of the kind can do without, with the compilation of the model; the bundled model;
and the default without internet, whose weights cannot be had. Prints medians, and the ratios to the first. On Linux it
prints the memory, too (PSS): once ready, after a prediction, and after heat maps.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import requests

ROOT = Path(__file__).resolve().parent.parent
BARE = """
import sys
sys.modules["openvino_telemetry"] = None
import flask, gevent, openvino
for streams in (2, 1):
    options = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": streams}
    openvino.Core().compile_model(sys.argv[1], "CPU", options).create_infer_request()
print("http://done/predict", flush=True)
"""
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses: what a machine without internet meets at once


def start(arguments: list[str], cache: str, home: str) -> tuple[subprocess.Popen[str], float, str]:
    """Start a program, and return it with the seconds until it names an address, and that address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_")}
    environment |= {"KERAS_SERVER_CACHE_DIR": cache, "KERAS_HOME": home, "https_proxy": NOWHERE}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if found := re.search(r"(http://\S+)/predict", line):
            return process, time.perf_counter() - began, found[1]
    sys.exit(f"{arguments} did not start.")


def memory(process: subprocess.Popen[str]) -> float:
    """Return a process' part of the memory in MB, or nan where the system does not say."""
    try:
        (kilobytes,) = re.findall(r"^Pss: +(\d+)", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.M)
    except OSError:
        return float("nan")
    return int(kilobytes) * 1024 / 1e6


def ask(url: str, path: str, times: int) -> None:
    """Send the sample photo."""
    for _ in range(times):
        requests.post(url + path, files={"image": (ROOT / "dog.jpg").read_bytes()}, timeout=60).raise_for_status()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="How quickly the server is ready, and what memory it takes.")
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    server = ["run_keras_server.py", "--port", "0", "--drain-seconds", "0"]
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as home:
        process, *_ = start([*server, "--model", "bundled"], cache, home)  # converts
        process.kill()
        (model,) = Path(cache).glob("*/model.xml")
        contestants = {
            "imports and compilation": ["-c", BARE, str(model)],
            "--model bundled": [*server, "--model", "bundled"],
            "default, offline": server,
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        held: dict[str, list[float]] = {"ready": [], "a prediction": [], "heat maps": []}
        for _ in range(turns):
            for name, arguments in contestants.items():
                process, took, url = start(arguments, cache, home)
                seconds[name].append(took)
                if name == "--model bundled":
                    held["ready"].append(memory(process))
                    for what, path, times in (("a prediction", "/predict", 1), ("heat maps", "/explain", 8)):
                        ask(url, path, times)
                        held[what].append(memory(process))
                process.kill()
                process.communicate()
    first = statistics.median(seconds["imports and compilation"])
    for name, values in seconds.items():
        print(f"{name:26} {statistics.median(values):6.2f} s  {statistics.median(values) / first:5.2f}")
    for name, values in held.items():
        print(f"{'after ' * (name != 'ready') + name:26} {statistics.median(values):6.0f} MB")


if __name__ == "__main__":
    main()
