"""Measure this server against the tutorial's, LitServe, BentoML and Ray Serve, and against the limit of the hardware.

    python benchmarks/bench.py [--quick] [--only tutorial,ours] [--out FILE.md]

Writes FILE.md, results.json and throughput.png beside it. What is measured, and how: benchmarks/README.md.
"""

import argparse
import datetime
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
from servers import HERE, Picture, Server, StartError, free_port, load, make_picture

ROOT = HERE.parent
PEERS = HERE / "peers"
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
RANDOM_WEIGHTS = HERE / "build" / "resnet50_random.weights.h5"
BUNDLED = ROOT / "keras_server" / "bundled" / "efficientnet_lite0.keras"

CONTESTANTS = ("tutorial", "ours-float32", "ours-bfloat16", "litserve", "bentoml", "ray")
MODELS = ("resnet50", "bundled")
CLIENTS = (1, 8, 32, 128)
LARGE_CLIENTS = (1, 8)  # for the 12-megapixel picture
LONGEST = 30  # seconds of a load
SHARE = {"resnet50": 1, "bundled": 0.5}  # of the seconds: the bundled model answers ten times as often

Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# The contestants
# ----------------------------------------------------------------------------------------------------------------------


def weights_of(model: str) -> Path:
    """Return the file that a model is loaded from."""
    return RANDOM_WEIGHTS if model == "resnet50" else BUNDLED


def command_of(contestant: str, model: str, port: int, peers_python: Path) -> list[str]:
    """Return the command that starts a contestant."""
    if contestant.startswith("ours-"):
        command = [sys.executable, str(ROOT / "run_keras_server.py"), "--port", str(port), "--model", model]
        command += ["--precision", contestant.removeprefix("ours-")]
        return command + (["--weights", str(RANDOM_WEIGHTS)] if model == "resnet50" else [])
    if contestant == "bentoml":
        command = [str(peers_python), "-m", "bentoml", "serve", "bentoml_server:KerasService"]
        return [*command, "--working-dir", str(PEERS), "--host", "127.0.0.1", "--port", str(port)]
    python = sys.executable if contestant == "tutorial" else str(peers_python)
    return [python, str(PEERS / f"{contestant}_server.py")]


def environment_of(model: str, port: int, folder: Path) -> dict[str, str]:
    """Return the environment of a contestant: no GPU, nothing sent home, whatever it writes in one folder."""
    return quiet() | {
        "BENCH_MODEL": model,
        "BENCH_WEIGHTS": str(weights_of(model)),
        "BENCH_PORT": str(port),
        "KERAS_SERVER_CACHE_DIR": str(folder / "cache"),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(folder / "bentoml"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",  # as Serve's documentation advises
    }


def quiet() -> dict[str, str]:
    """Return the environment in which TensorFlow finds no GPU and says little."""
    return os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}


def output_of(command: list[str]) -> str:
    """Run a short program without a GPU and return what it prints."""
    done = subprocess.run(command, env=quiet(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def why_not(contestant: str, peers_python: Path) -> str:
    """Return why a contestant cannot run here, or nothing."""
    if contestant == "ours-bfloat16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "this processor does not compute in bfloat16"
    if contestant in report.PEERS and not peers_python.exists():
        return "its environment is missing; `make bench` sets it up"
    return ""


def make_weights(python: str = sys.executable) -> None:
    """Have a Python with Keras save ResNet50 with random weights, once: the work is that of trained ones."""
    if not RANDOM_WEIGHTS.exists():
        RANDOM_WEIGHTS.parent.mkdir(exist_ok=True)
        unfinished = RANDOM_WEIGHTS.with_name(f"unfinished_{RANDOM_WEIGHTS.name}")
        code = "import keras, sys; keras.utils.set_random_seed(0); "
        code += "keras.applications.ResNet50(weights=None).save_weights(sys.argv[1])"
        output_of([python, "-c", code, str(unfinished)])
        unfinished.rename(RANDOM_WEIGHTS)


# ----------------------------------------------------------------------------------------------------------------------
# The machine
# ----------------------------------------------------------------------------------------------------------------------

INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
PACKAGES = ("tensorflow", "keras", "openvino", "flask", "gevent", "pillow", "litserve", "bentoml", "ray")


def describe_machine() -> str:
    """Return the machine in words."""
    about = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    words = [about.get("model name", platform.machine())]
    if "cpu family" in about:  # hypervisors often shorten the name
        words[0] += f" (family {about['cpu family']}, model {about['model']})"
    words += [f"{len(os.sched_getaffinity(0))} cores"]
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


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


class Bench:
    """One run: what it was asked for, and what it has found so far."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.small = make_picture(folder, "small", (500, 375))
        self.large = make_picture(folder, "large", (4032, 3024))
        self.skipped = {name: reason for name in args.only if (reason := why_not(name, args.peers_python))}
        self.failed: dict[str, str] = {}
        self.loads: list[Row] = []
        self.starts: list[Row] = []
        self.limits: list[Row] = []

    def run(self) -> Row:
        """Measure everything, round after round, so that a slow quarter of an hour is everyone's."""
        began, busy = time.monotonic(), [others_busy()]
        for number in range(self.args.rounds):
            # In another order each time: nobody always comes first, or always after the same neighbour.
            contestants = [name for name in self.args.only if name not in self.skipped]
            random.Random(number).shuffle(contestants)
            for model in self.args.models:
                self.measure_limit({"round": number + 1, "model": model})
                for contestant in contestants:
                    self.measure({"round": number + 1, "model": model, "contestant": contestant})
            busy.append(others_busy())
        return {
            "date": datetime.date.today().isoformat(),
            "minutes": (time.monotonic() - began) / 60,
            "rounds": self.args.rounds,
            "seconds": self.args.seconds,
            "machine": describe_machine(),
            "others_busy": max(busy),
            "versions": versions(self.args.peers_python) | versions(sys.executable),
            "skipped": self.skipped,
            "failed": self.failed,
            "starts": self.starts,
            "loads": self.loads,
            "limits": self.limits,
        }

    def measure_limit(self, about: Row) -> None:
        """Measure the engine alone and the decoding alone, in a process of their own."""
        command = [sys.executable, str(HERE / "limit.py"), "--model", about["model"]]
        command += ["--weights", str(weights_of(about["model"])), "--seconds", str(self.args.seconds)]
        command += [str(self.small.path), str(self.large.path)]
        found = json.loads(output_of(command).splitlines()[-1])
        self.limits.append(about | found)
        engines = "  ".join(
            f"{precision} {engine['images_per_s']:.1f} images/s, one in {engine['one_ms']:.1f} ms"
            for precision, engine in found["engine"].items()
        )
        print(f"{about['round']} {about['model']:8} limit          {engines}", flush=True)

    def measure(self, about: Row) -> None:
        """Start one contestant, put it under each load, and end it."""
        model, contestant, port = about["model"], about["contestant"], free_port()
        folder = self.folder / contestant
        folder.mkdir(exist_ok=True)
        command = command_of(contestant, model, port, self.args.peers_python)
        try:
            with Server(command, environment_of(model, port, folder), port, folder) as server:
                seconds, label = server.first_answer(self.small)
                for clients in (1, 8):  # warms up; BentoML measures its model with its first dozen batches
                    rate = load(port, self.small, clients, seconds=2)["rps"]
                # In another order each time, as the contestants: a machine that slows down slows all of them down.
                order = random.Random(about["round"])
                aimed_at = model == "resnet50" and contestant.startswith(("tutorial", "ours"))
                turns = 2 if aimed_at else 1  # most of what was asked for is a ratio of two of their loads
                for _ in range(turns):
                    for clients in order.sample(self.args.clients, len(self.args.clients)):
                        rate = self.measure_load(server, about, self.small, clients, rate)
                self.starts.append(about | {"seconds": seconds, "label": label, "memory_mb": server.memory_mb()})
                if aimed_at:
                    for clients in LARGE_CLIENTS * turns:
                        self.measure_load(server, about, self.large, clients)
        except StartError as error:
            print(f"{about['round']} {model:8} {contestant} did not start:\n{error}", file=sys.stderr, flush=True)
            self.failed[contestant] = "it did not start"

    def measure_load(self, server: Server, about: Row, picture: Picture, clients: int, rate: float = 0) -> float:
        """Put a server under one load, keep what came of it, and return its requests/s; `rate` is what to expect."""
        server.settle()
        seconds = self.args.seconds * SHARE[about["model"]]
        if rate:  # an answer takes clients / rate seconds: long enough for eight; a quarter of them is not counted
            seconds = max(seconds, min(8 * clients / rate, LONGEST))
        row = about | {"picture": picture.path.stem} | load(server.port, picture, clients, seconds)
        self.loads.append(row)
        print(
            f"{row['round']} {row['model']:8} {row['contestant']:13} {row['picture']} {clients:3} clients "
            f"{row['rps']:7.1f}/s   p50 {row['p50_ms']:6.0f} ms   p99 {row['p99_ms']:6.0f} ms   {row['errors']} errors",
            flush=True,
        )
        return row["rps"]


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def some_of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return a converter of a comma-separated list; 'ours' stands for both of ours."""

    def convert(text: str) -> list[str]:
        wanted = text.split(",")
        if unknown := [word for word in wanted if not any(f"{name}-".startswith(f"{word}-") for name in names)]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(names)}")
        return [name for name in names if any(f"{name}-".startswith(f"{word}-") for word in wanted)]

    return convert


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=some_of(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME,...")
    parser.add_argument("--models", type=some_of(MODELS), default=list(MODELS), metavar="NAME,...")
    parser.add_argument(
        "--clients", type=lambda text: sorted(map(int, text.split(","))), default=list(CLIENTS), metavar="N,..."
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="of each load; see README.md")
    parser.add_argument("--quick", action="store_true", help="one round of 3 seconds, to try it")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="of the environment of the others")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 3
    args.peers_python = args.peers_python.absolute()  # not resolved: the link is what makes the environment
    return args


def main() -> int:
    """Run the benchmark, then write what came of it."""
    # So that servers are ended on every way out, and see Ctrl-C even if this program is run in the background.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = parse_arguments()
    if not shutil.which("wrk"):
        sys.exit("The load generator is missing: apt-get install wrk")
    make_weights()
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        bench = Bench(args, Path(folder))
        results = bench.run()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    numbers = args.out.with_name("results.json")
    numbers.write_text(json.dumps(results, indent=1) + "\n")
    plot = args.out.with_name("throughput.png")
    command = [str(args.peers_python), str(HERE / "plot.py"), str(numbers), str(plot)]
    if not args.peers_python.exists() or subprocess.run(command, check=False).returncode:
        print("No plot: it needs matplotlib in the environment of the others.", file=sys.stderr)
    report.write(results, args.out)
    print(f"\nIn {results['minutes']:.0f} minutes: {args.out}, {numbers.name}, {plot.name}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
