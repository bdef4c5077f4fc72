"""Measure this server against others, and against what the processor can do.

    python benchmarks/bench.py [--only ours,tutorial,resnet50] [--clients 8] [--rounds 1] [--out FILE.md]

Writes FILE.md, results.json and throughput.png beside it, and prints what has changed since the committed results. What
is measured, and how: benchmarks/README.md.
"""

import argparse
import datetime
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compare
import report
from contestants import (
    PEERS_PYTHON,
    ROOT,
    command_of,
    environment_of,
    export_of,
    make_export,
    make_model_of_numbers,
    make_weights,
    output_of,
    why_not,
)
from machine import cores, describe_machine, others_busy, versions
from medians import fastest
from plan import WARM_UP, Plan, known_words, narrowed
from servers import HERE, Payload, Server, StartError, free_port, load, make_numbers, make_picture

Row = dict[str, Any]


class Bench:
    """One run: what it was asked for, and what it has found so far."""

    def __init__(self, plan: Plan, peers_python: Path, folder: Path):
        self.plan, self.peers_python, self.folder = plan, peers_python, folder
        self.small = make_picture(folder, "small", (500, 375))
        self.large = make_picture(folder, "large", (4032, 3024))
        self.payloads: dict[str, Payload] = {"small": self.small, "large": self.large, "four": make_numbers(folder)}
        self.skipped = {name: reason for name in plan.contestants if (reason := why_not(name, peers_python))}
        self.failed: dict[str, str] = {}
        self.loads: list[Row] = []
        self.starts: list[Row] = []
        self.limits: list[Row] = []

    def run(self, first: int = 1) -> Row:
        """Measure everything, round after round, so that a slow quarter of an hour is everyone's.

        `first` is the number of the first round.
        """
        began, busy = time.monotonic(), [others_busy()]
        for number in range(first, first + self.plan.rounds):
            # In another order each time: nobody always comes first, or always after the same neighbour.
            contestants = [name for name in self.plan.contestants if name not in self.skipped]
            random.Random(number).shuffle(contestants)
            for model in self.plan.models:
                if model != "numbers":  # of which the engine computes more than anybody can send
                    self.measure_limit({"round": number, "model": model})
                for contestant in contestants:
                    if self.plan.loads(model, contestant):
                        self.measure({"round": number, "model": model, "contestant": contestant})
            busy.append(others_busy())
        return {
            "date": datetime.date.today().isoformat(),
            "complete": self.plan.complete,
            "minutes": (time.monotonic() - began) / 60,
            "rounds": self.plan.rounds,
            "seconds": self.plan.seconds,
            "machine": describe_machine(),
            "cores": cores(),
            "others_busy": max(busy),
            "versions": versions(self.peers_python) | versions(sys.executable),
            "skipped": self.skipped,
            "failed": self.failed,
            "starts": self.starts,
            "loads": self.loads,
            "limits": self.limits,
        }

    def measure_limit(self, about: Row) -> None:
        """Measure the engine alone and the decoding alone, in a process of their own."""
        command = [sys.executable, str(HERE / "limit.py"), str(export_of(about["model"]))]
        command += [str(self.small.path), str(self.large.path), "--seconds", str(self.plan.seconds)]
        found = json.loads(output_of(command).splitlines()[-1])
        self.limits.append(about | found)
        engines = "  ".join(f"{name} {fastest(engine):.1f} images/s" for name, engine in found["engine"].items())
        print(f"{about['round']} {about['model']:8} limit          {engines}", flush=True)

    def measure(self, about: Row) -> None:
        """Start one contestant, put it under each load, and end it."""
        model, contestant, port = about["model"], about["contestant"], free_port()
        folder = self.folder / contestant
        folder.mkdir(exist_ok=True)
        loads = self.plan.loads(model, contestant)
        warming = self.payloads[loads[0][0]]
        command = command_of(contestant, model, port, self.peers_python)
        try:
            with Server(command, environment_of(model, port, folder), port, folder) as server:
                seconds, label = server.first_answer(warming)
                for clients, duration in WARM_UP:
                    load(port, warming, clients, duration)
                # In another order each time, as the contestants: a machine that slows down slows all of them down.
                for what, clients in random.Random(about["round"]).sample(loads, len(loads)):
                    self.measure_load(server, about | {"payload": what}, clients)
                self.starts.append(about | {"seconds": seconds, "label": label, "memory_mb": server.memory_mb()})
        except StartError as error:
            print(f"{about['round']} {model:8} {contestant} did not start:\n{error}", file=sys.stderr, flush=True)
            self.failed[contestant] = "it did not start"

    def measure_load(self, server: Server, about: Row, clients: int) -> None:
        """Put a server under one load, and keep what came of it."""
        server.settle()
        seconds = self.plan.seconds_of(about["model"], clients)
        row = about | load(server.port, self.payloads[about["payload"]], clients, seconds)
        self.loads.append(row)
        print(
            f"{row['round']} {row['model']:8} {row['contestant']:13} {row['payload']} {clients:3} clients "
            f"{row['rps']:7.1f}/s   p50 {row['p50_ms']:6.1f} ms   p99 {row['p99_ms']:6.1f} ms   {row['errors']} errors",
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD,...", help=f"a part: some of {', '.join(known_words())}")
    parser.add_argument("--clients", type=lambda text: tuple(map(int, text.split(","))), default=(), metavar="N,...")
    parser.add_argument("--rounds", type=int, default=Plan.rounds)
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of the shortest loads; see README.md")
    parser.add_argument("--quick", action="store_true", help="one round of the shortest loads, to try it")
    parser.add_argument("--more", action="store_true", help="add the rounds to those that were measured last")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--peers-python", type=Path, default=PEERS_PYTHON, help="of the environment of the others")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, 1
    try:
        fields = narrowed(args.only) if args.only else {}
    except ValueError as error:
        parser.error(f"--only {error}")
    args.plan = Plan(**fields, clients=args.clients, rounds=args.rounds, seconds=args.seconds)
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
    numbers = args.out.with_name("results.json")
    runs = report.read(numbers)
    if args.more and not runs:
        sys.exit(f"--more: {numbers} holds no run to add rounds to.")
    print(f"This takes about {args.plan.minutes():.0f} minutes.", flush=True)
    make_weights()
    make_model_of_numbers()
    for model in {"resnet50", "bundled"} & set(args.plan.models):
        make_export(model)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        run = Bench(args.plan, args.peers_python, Path(folder)).run(report.next_round(runs[0]) if args.more else 1)
    runs = report.extended(runs, run) if args.more else report.replaced(runs, run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    if runs[0]["complete"]:
        plot = [str(args.peers_python), str(HERE / "plot.py"), str(numbers), str(args.out.with_name("throughput.png"))]
        if not args.peers_python.exists() or subprocess.run(plot, check=False).returncode:
            print("No plot: it needs matplotlib in the environment of the others.", file=sys.stderr)
    report.write(runs, args.out)
    print("", *compare.changes(runs[0], committed()), sep="\n")
    print(f"\nIn {run['minutes']:.0f} minutes: {args.out}, {numbers.name}")
    return 1 if run["failed"] else 0


def committed() -> list[Row]:
    """Return the runs of the last committed results; none where there is no git, or nothing in it."""
    command = ["git", "-C", str(ROOT), "show", "HEAD:benchmarks/results.json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return json.loads(done.stdout)["runs"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
