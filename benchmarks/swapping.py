"""Fifty new versions of a model under load, and three models of which one sleeps and one raises.

    python benchmarks/swapping.py [--swaps 50] [--seconds 3] [--clients 16] [--megabytes 4]

Prints what was lost, what was mixed, and what memory, threads and files the server has before and after; then the
times that the third model takes alone, and beside the two others.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from multiplying import times  # noqa: E402 - the models of the tests


@contextmanager
def serving(*command: str, **environment: str) -> Iterator[tuple[int, str]]:
    """Start a server; gives its process' number and its address."""
    process = subprocess.Popen(
        [sys.executable, "-u", *command, "--port", "0", "--drain-seconds", "0", "--log-level", "error"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # one of them raises, and its tracebacks are long
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout
    url = next(found[1] for line in process.stdout if (found := re.search(r"Try: .*(http://\S+)/predict", line)))
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield process.pid, url
    finally:
        process.terminate()
        process.wait()


def figures(pid: int) -> dict[str, int]:
    """Return what a process has: kilobytes of its own memory, threads, open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return {
        "PSS kB": int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]),  # type: ignore[index]
        "RSS kB": int(re.search(r"^VmRSS:\s+(\d+)", status, re.M)[1]),  # type: ignore[index]
        "threads": int(re.search(r"^Threads:\s+(\d+)", status, re.M)[1]),  # type: ignore[index]
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def at_rest(pid: int) -> dict[str, int]:
    """Return the least of ten figures in ten seconds: what is being loaded or answered meanwhile is not counted."""
    rows = []
    for _ in range(10):
        time.sleep(1)
        rows.append(figures(pid))
    return {key: min(row[key] for row in rows) for key in rows[0]}


def ask(url: str, name: str, body: bytes, session: requests.Session) -> tuple[int, str, list[float]]:
    """Return the status, the version that an answer names, and its numbers."""
    answer = session.post(f"{url}/v2/models/{name}/infer", data=body, timeout=60)
    found: Any = answer.json() if answer.ok else {"model_version": "", "outputs": [{"data": []}]}
    return answer.status_code, found["model_version"], found["outputs"][0]["data"]


def body_of(size: int) -> bytes:
    """Return a request of ones."""
    data = ", ".join(["1"] * size)
    return f'{{"inputs": [{{"name": "x", "shape": [1, {size}], "datatype": "FP32", "data": [{data}]}}]}}'.encode()


def swap(args: argparse.Namespace) -> None:
    """Measure the swaps."""
    ballast = int(args.megabytes * 2**20 / 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times(folder / "ballast/1/model.xml", 1, ballast)
        times(folder / "m/1/model.xml", 1)
        options = ("--model-dir", name, "--watch", "0.5", "--cache-dir", "")
        with serving(str(ROOT / "run_keras_server.py"), *options) as (pid, url):
            counts, seconds, asking = Counter[str](), list[float](), True
            body, seen = body_of(3), set[str]()

            def client() -> None:
                with requests.Session() as session:
                    while asking:
                        started = time.perf_counter()
                        try:
                            status, version, numbers = ask(url, "m", body, session)
                        except requests.RequestException as error:
                            counts[f"lost: {type(error).__name__}"] += 1
                            continue
                        seconds.append(time.perf_counter() - started)
                        seen.add(version)
                        right = status == 200 and numbers == [float(version)] * 3
                        counts["right" if right else f"lost: {status}" if status != 200 else "mixed"] += 1

            with ThreadPoolExecutor(args.clients) as pool:
                clients = [pool.submit(client) for _ in range(args.clients)]
                time.sleep(10)
                before = at_rest(pid)
                for number in range(2, args.swaps + 2):
                    times(folder / f"m/{number}/model.xml", number)
                    times(folder / f"ballast/{number}/model.xml", number, ballast)
                    time.sleep(args.seconds)
                    if number % 10 == 0:
                        print(f"after {number} versions: {figures(pid)}", flush=True)
                    for model in ("m", "ballast"):
                        shutil.rmtree(folder / model / str(number - 1))
                time.sleep(10)
                after = at_rest(pid)
                asking = False
                for each in clients:
                    each.result()
            last = requests.get(f"{url}/v1/models/m", timeout=60).json()["model_version_status"][0]["version"]
    print(f"{args.swaps} new versions of two models, one of {args.megabytes:g} MB, {args.clients} clients")
    print(f"{len(seen)} of {args.swaps + 1} versions have answered; the last: {last}")  # a busy machine skips some
    print(f"answers: {dict(counts)}; median {1e3 * statistics.median(seconds):.1f} ms, p99 {p99(seconds):.1f} ms")
    print(f"before: {before}\nafter:  {after}")
    print(f"PSS {100 * after['PSS kB'] / before['PSS kB'] - 100:+.1f} %")


def p99(seconds: list[float]) -> float:
    """Return the 99th percentile, in milliseconds."""
    return 1e3 * statistics.quantiles(seconds, n=100)[98]


def beside(args: argparse.Namespace) -> None:
    """Measure one model alone and beside two others, in turn."""
    body = body_of(3)
    with serving(str(ROOT / "tests" / "three_models.py"), STUCK_SECONDS="5") as (_, url):

        def run(name: str, until: Callable[[], bool], seconds: list[float]) -> None:
            with requests.Session() as session:
                while not until():
                    started = time.perf_counter()
                    status, _, _ = ask(url, name, body, session)
                    seconds.append(time.perf_counter() - started)
                    if status == 503:
                        time.sleep(1)  # as Retry-After has it
                    elif status != 200:
                        time.sleep(0.1)

        def measure(others: dict[str, int]) -> list[float]:
            ended, fast = threading.Event(), list[float]()
            with ThreadPoolExecutor(200) as pool:
                loads = [pool.submit(run, name, ended.is_set, []) for name, n in others.items() for _ in range(n)]
                time.sleep(1)
                stop = time.monotonic() + 10
                asked = [pool.submit(run, "fast", lambda: time.monotonic() > stop, fast) for _ in range(4)]
                for each in asked:
                    each.result()
                ended.set()
                for each in loads:
                    each.result()
            return fast

        rows = [(measure({}), measure({"stuck": 60, "raises": 4})) for _ in range(3)]
    for alone, others in rows:
        medians = [1e3 * statistics.median(seconds) for seconds in (alone, others)]
        print(
            f"the third alone: median {medians[0]:.1f}, p99 {p99(alone):.1f} ms; beside the others: {medians[1]:.1f}, "
            f"{p99(others):.1f} ms ({p99(others) / p99(alone):.2f} times)"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--megabytes", type=float, default=4)
    args = parser.parse_args()
    if args.swaps:
        swap(args)
    beside(args)


if __name__ == "__main__":
    main()
