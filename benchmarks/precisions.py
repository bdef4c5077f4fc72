"""What the precisions of one export gain: the engine alone, and through the server, in turn.

    python benchmarks/precisions.py out    # what keras-server export MODEL out --precision int8 --calibrate ... wrote

Both are counted by the processor time that they take, whose ratios other programs on the machine change little.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from servers import Server, free_port, load, make_picture  # noqa: E402

from keras_server.models.engines import OpenVINOEngine, has_bfloat16, processor  # noqa: E402
from keras_server.models.export import Export  # noqa: E402
from keras_server.settings import Precision  # noqa: E402


def engine_seconds(export: Export, precisions: list[Precision], rows: int, rounds: int) -> dict[Precision, float]:
    """Return the processor seconds that a batch of so many random rows takes, for each precision: medians."""
    models = {name: export.folder / ("int8.xml" if name == "int8" else "model.xml") for name in precisions}
    engines = {name: OpenVINOEngine(model, name, 1, 1) for name, model in models.items()}
    random = np.random.default_rng(0)
    batch = [random.uniform(0, 255, (rows, *size)).astype(np.float32) for size in export.spec.sizes]
    seconds: dict[Precision, list[float]] = {name: [] for name in precisions}
    for _ in range(rounds + 1):
        for name, engine in engines.items():
            begin = time.process_time()
            engine(batch)
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def server_seconds(
    export: Export, precisions: list[Precision], clients: int, rounds: int, seconds: float
) -> dict[Precision, float]:
    """Return the processor seconds that a server takes for a request with a photo, for each precision: medians."""
    found: dict[Precision, list[float]] = {name: [] for name in precisions}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        picture = make_picture(folder, "photo", (500, 375))
        servers: dict[Precision, Server] = {}
        for precision in precisions:
            (folder / precision).mkdir()
            port = free_port()
            command = [sys.executable, str(HERE.parent / "run_keras_server.py"), "--model", str(export.folder)]
            command += ["--precision", precision, "--port", str(port), "--log-level", "error"]
            servers[precision] = stack.enter_context(Server(command, dict(os.environ), port, folder / precision))
        for server in servers.values():
            server.first_answer(picture)
        for _ in range(rounds):
            for precision, server in servers.items():
                before = server.cpu_seconds()
                answers = load(server.port, picture, clients, seconds)["answers"]
                found[precision].append((server.cpu_seconds() - before) / answers)
    return {name: statistics.median(values) for name, values in found.items()}


def line(what: str, seconds: dict[Precision, float]) -> str:
    """Return a row of the table: milliseconds, and how many times as fast as float32."""
    cells = [f"{1000 * each:.1f} ms, {seconds['float32'] / each:.2f}x" for each in seconds.values()]
    return f"| {what} | {' | '.join(cells)} |"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of load, for each server and round")
    options = parser.parse_args()
    export = Export.read(options.export)
    precisions: list[Precision] = ["float32", *(["bfloat16"] if has_bfloat16() else []), "int8"]  # type: ignore[list-item]
    print(f"{export.spec.name} on {processor()}\n\n| processor time | {' | '.join(precisions)} |")
    print("|---" * (len(precisions) + 1) + "|")
    for rows in (1, 8):
        print(line(f"engine, a batch of {rows}", engine_seconds(export, precisions, rows, 3 * options.rounds)))
    took = server_seconds(export, precisions, options.clients, options.rounds, options.seconds)
    print(line(f"server, a request, {options.clients} clients", took))


if __name__ == "__main__":
    main()
