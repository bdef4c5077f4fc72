"""Measure the service on Ray: what the proxy costs, and how throughput grows with replicas; rewrites docs/scaling.md.

    python benchmarks/scaling.py [--seconds 8] [--rounds 3] [--dry]

Runs in an environment with requirements-ray.txt, has the Python of `make serve` export the models, needs wrk, and takes
a quarter of an hour on two quiet cores. The plain server and Ray take turns, so that what else the machine does falls
on both; medians of the rounds are compared. Only processor time compares where the machine is not quiet.
Figures of processor time count every process of Ray, also those that work without requests.
"""

import argparse
import datetime
import math
import os
import platform
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from contestants import RANDOM_WEIGHTS, ROOT, make_weights, output_of
from report import put
from servers import Picture, Server, StartError, free_port, load, make_picture, used

DOCUMENT = ROOT / "docs" / "scaling.md"
SMALL = RANDOM_WEIGHTS.with_name("small.keras")
CLIENTS = (1, 8, 32)
REPLICAS = (1, 2, 4)
RAY = {"haproxy": "1", "ray": "0"}  # RAY_SERVE_ENABLE_HA_PROXY: HAProxy, or Ray's Python proxy in its place
WITH_KERAS = str(ROOT / ".venv" / "bin" / "python")
MODELS = {"resnet50": ("resnet50", "--weights", str(RANDOM_WEIGHTS)), "bundled": ("bundled",), "small": (str(SMALL),)}
SIZES = {"resnet50": (640, 480), "bundled": (640, 480), "small": (64, 48)}
LOADED = 0.6  # of a processor, at most, in the plan: the rest is for peaks and for a lost machine
CORES = 32  # of a machine in the plan
TARGETS = (1_000, 100_000)

Row = dict[str, Any]


def build_models(folder: Path) -> None:
    """Write an export of each model that is measured into a folder."""
    make_weights(WITH_KERAS)
    if not SMALL.exists():
        code = "import sys; from keras import Input, Sequential, layers, utils; utils.set_random_seed(0); "
        code += "some = [Input((32, 32, 3)), layers.Rescaling(1 / 255), layers.GlobalAveragePooling2D()]; "
        code += "Sequential([*some, layers.Dense(1000, 'softmax')]).save(sys.argv[1])"
        output_of([WITH_KERAS, "-c", code, str(SMALL)])
    for name, arguments in MODELS.items():
        output_of([WITH_KERAS, str(ROOT / "run_keras_server.py"), "export", *arguments, str(folder / name)])


def environment(export: Path, port: int, kind: str = "plain") -> dict[str, str]:
    """Return the environment of a server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_SERVER_")}
    own = {"KERAS_SERVER_MODEL": str(export), "KERAS_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    # Ray runs its workers with less priority otherwise, and would lose to whatever else runs.
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    ray |= {"RAY_SERVE_ENABLE_HA_PROXY": RAY[kind]} if kind in RAY else {}
    return kept | ray | own


def ray_config(folder: Path, port: int, kind: str, replicas: int, cpus: float) -> Path:
    """Write serve_config.yaml with a fixed number of replicas and without settings, which the environment has."""
    config = yaml.safe_load((ROOT / "serve_config.yaml").read_text("utf-8"))
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    config["controller_options"]["runtime_env"]["env_vars"]["RAY_SERVE_ENABLE_HA_PROXY"] = RAY[kind]
    application = config["applications"][0]
    application.pop("runtime_env")
    deployment = application["deployments"][0]
    deployment.pop("autoscaling_config")
    deployment |= {"num_replicas": replicas, "ray_actor_options": {"num_cpus": cpus}}
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def proxy_seconds(server: Server) -> float:
    """Return the processor time of Ray's proxy."""
    seconds = 0.0
    for pid in server.pids():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if command.startswith(b"ray::ProxyActor") or b"/haproxy\0" in command:
                seconds += used(Path(f"/proc/{pid}/stat").read_text())
        except OSError:
            continue
    return seconds


def measure(kind: str, model: str, exports: Path, seconds: float, replicas: int = 1, cpus: float = 0) -> list[Row]:
    """Start a server, put it under load from some numbers of clients, and end it. Raises StartError."""
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = make_picture(folder, "dog", SIZES[model])
        command = [sys.executable, str(ROOT / "run_keras_server.py")]
        if kind in RAY:
            command = [str(Path(sys.executable).parent / "serve"), "run", "--app-dir", str(ROOT)]
            command.append(str(ray_config(folder, port, kind, replicas, cpus or os.cpu_count() or 1)))
        with Server(command, environment(exports / model, port, kind), port, folder) as server:
            server.first_answer(picture)
            load(port, picture, 8, 2)
            rows = [measure_load(server, port, picture, clients, seconds) for clients in CLIENTS]
            return [{"kind": kind, "model": model, "replicas": replicas, **row} for row in rows]


def measure_load(server: Server, port: int, picture: Picture, clients: int, seconds: float) -> Row:
    """Return the figures of one number of clients, with the processor time of an answer."""
    server.settle()
    before, proxy_before = server.cpu_seconds(), proxy_seconds(server)
    row = load(port, picture, clients, seconds)
    answers = max(row["answers"], 1)
    row["cpu_ms"] = 1000 * (server.cpu_seconds() - before) / answers
    row["proxy_ms"] = 1000 * (proxy_seconds(server) - proxy_before) / answers
    return row


def median(rows: list[Row], **wanted: Any) -> Row:
    """Return the medians of the rows that agree with `wanted`."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    keys = ("rps", "p50_ms", "p99_ms", "cpu_ms", "proxy_ms")
    return {key: statistics.median(row[key] for row in found) for key in keys} | {
        "errors": sum(row["errors"] for row in found),
        "low": min(row["rps"] for row in found),
        "high": max(row["rps"] for row in found),
    }


def tables(rows: list[Row], rounds: int, busy: float) -> str:
    """Return what was measured, as Markdown; `busy` is the load average from before."""
    now, cores = datetime.datetime.now(datetime.UTC), os.cpu_count()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("ray", "openvino"))
    lines = [
        f"Measured on {now:%Y-%m-%d}: {cores} cores ({platform.machine()}), load average {busy:.1f} beforehand, "
        f"Python {platform.python_version()}, {versions}; medians of {rounds} rounds, lowest and highest behind them.",
        *([] if busy < 0.5 else ["", "**The machine was busy with other work: these figures compare nothing.**"]),
        "",
        "| model | served by | clients | requests/s | p50 ms | p99 ms | core ms a request | of these, proxy | errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, kind, replicas in dict.fromkeys((row["model"], row["kind"], row["replicas"]) for row in rows):
        for clients in CLIENTS:
            m = median(rows, model=model, kind=kind, replicas=replicas, clients=clients)
            through = {"plain": "plain server", "ray": "Ray with its Python proxy", "haproxy": "Ray"}[kind]
            served = through if kind == "plain" else f"{through}, {replicas} replica{'s' * (replicas > 1)}"
            spread = f"{m['rps']:.1f} ({m['low']:.1f}-{m['high']:.1f})"
            lines.append(
                f"| {model} | {served} | {clients} | {spread} | {m['p50_ms']:.0f} | {m['p99_ms']:.0f} "
                f"| {m['cpu_ms']:.1f} | {m['proxy_ms']:.1f} | {m['errors']} |"
            )
    lines.append("")
    for model in MODELS:
        plain = median(rows, model=model, kind="plain", clients=8)
        for kind, name in zip(RAY, ("HAProxy", "Ray's Python proxy"), strict=True):
            found = median(rows, model=model, kind=kind, replicas=1, clients=8)
            share, more = found["rps"] / plain["rps"], found["cpu_ms"] - plain["cpu_ms"]
            lines.append(
                f"- **{model}**: with 8 clients a replica behind {name} answers {share:.0%} of what the plain server "
                f"does, and takes {more:+.1f} ms of a core a request."
            )
    return "\n".join(lines)


def plan(rows: list[Row]) -> str:
    """Return what follows for the targets, as Markdown: computed, not measured."""
    lines = [
        f"With {LOADED:.0%} of every processor used, {CORES} of them a machine, and 8 clients' figures from above.",
        "",
        "| model | requests/s | core-seconds a second | cores | machines | of the cores, HAProxy |",
        "|---|---|---|---|---|---|",
    ]
    for model in ("resnet50", "bundled"):
        m = median(rows, model=model, kind="haproxy", replicas=1, clients=8)
        for target in TARGETS:
            cores = math.ceil(target * m["cpu_ms"] / 1000 / LOADED)
            proxies = math.ceil(target * m["proxy_ms"] / 1000 / LOADED)
            lines.append(
                f"| {model} | {target:,} | {target * m['cpu_ms'] / 1000:,.0f} | {cores:,} "
                f"| {math.ceil(cores / CORES):,} | {proxies:,} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and rewrite the document. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure the service on Ray and rewrite docs/scaling.md.")
    parser.add_argument("--seconds", type=float, default=8, help="of load for each figure (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of plain server and Ray in turn (default: 3)")
    parser.add_argument("--dry", action="store_true", help="print the tables, leave the document as it is")
    options = parser.parse_args()
    rows: list[Row] = []
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        exports = Path(name)
        build_models(exports)
        try:
            for round_ in range(options.rounds):
                for model in MODELS:
                    for kind in ("plain", *RAY):
                        rows += measure(kind, model, exports, options.seconds)
                        print(f"round {round_ + 1}: {model}, {kind}: {rows[-2]['rps']:.1f}/s", flush=True)
                for replicas in REPLICAS[1:]:
                    rows += measure("haproxy", "small", exports, options.seconds, replicas, cpus=1 / max(REPLICAS))
                    print(f"round {round_ + 1}: small, {replicas} replicas: {rows[-2]['rps']:.1f}/s", flush=True)
        except StartError as error:
            print(f"error: a server did not start:\n{error}", file=sys.stderr)
            return 1
    measured, computed = tables(rows, options.rounds, busy), plan(rows)
    print(f"\n{measured}\n\n{computed}")
    if not options.dry:
        put(DOCUMENT, "measured", measured)
        put(DOCUMENT, "plan", computed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
