"""Measure what a binary tensor costs over HTTP beside the engine alone; writes its section of RESULTS.md.

    python benchmarks/binary_tensor.py [--seconds 40] [--quick]

One client sends 8x224x224x3 float32 to /v2/models/NAME/infer, and between two requests this process has the same
engine compute the same tensor with all threads: what else the machine does falls on both. Ends with status 1 where a
median is not less than 1.3 times the engine's. --quick takes a few seconds, and only prints.
"""

import argparse
import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import numpy as np
from contestants import RANDOM_WEIGHTS, ROOT, command_of, environment_of, make_weights
from machine import describe_machine
from report import MODEL_TITLES, put
from servers import HERE, Server, free_port, make_picture

SHAPE = (8, 224, 224, 3)
GOAL = 1.3  # times the engine alone
JSON_LENGTH = "Inference-Header-Content-Length"


def request_of(described: dict[str, Any], batch: np.ndarray) -> tuple[dict[str, str], bytes]:
    """Return the headers and the body that send a tensor, and ask for the answer, in binary."""
    (given,), parameters = described["inputs"], {"binary_data_size": batch.nbytes}
    tensor = {"name": given["name"], "datatype": "FP32", "shape": batch.shape, "parameters": parameters}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return {JSON_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}, head + batch.tobytes()


def tensor_of(answer: http.client.HTTPResponse) -> np.ndarray:
    """Return the tensor in an answer."""
    body = answer.read()
    if answer.status != 200:
        sys.exit(f"The server answered {answer.status}: {body.decode(errors='replace')}")
    length = int(answer.headers[JSON_LENGTH])
    (output,) = json.loads(body[:length])["outputs"]
    return np.frombuffer(body, np.float32, offset=length).reshape(output["shape"])


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds that an action takes, and what it returns."""
    start = time.perf_counter()
    found = action()
    return 1000 * (time.perf_counter() - start), found


def measure(model: str, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of each request, and of each run of the engine between two of them."""
    sys.path.insert(0, str(ROOT))
    from keras_server.models.engines import OpenVINOEngine
    from keras_server.models.opening import open_model
    from keras_server.models.source import Source
    from keras_server.settings import Settings

    batch = np.random.default_rng(0).uniform(0, 255, SHAPE).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        environment = environment_of(model, port, folder)
        with Server(command_of("ours-float32", model, port, Path()), environment, port, folder) as ours:
            ours.first_answer(make_picture(folder, "dog", (500, 375)))
            settings = Settings(cache_dir=environment["KERAS_SERVER_CACHE_DIR"])  # so it is the server's own engine
            weights = str(RANDOM_WEIGHTS) if model == "resnet50" else ""
            opened = open_model(Source(model, weights), settings)
            spec, engine = opened.spec, cast(OpenVINOEngine, opened.engine).all_threads
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", f"/v2/models/{spec.name}")
            headers, body = request_of(json.loads(connection.getresponse().read()), batch)

            def ask() -> np.ndarray:
                connection.request("POST", f"/v2/models/{spec.name}/infer", body, headers)
                return tensor_of(connection.getresponse())

            found: dict[str, list[float]] = {"engine": [], "server": []}
            end = None  # the first turn warms up
            while end is None or time.perf_counter() < end:
                alone, (expected,) = timed(lambda: engine.infer([batch], share_inputs=True).to_tuple())
                over_http, answered = timed(ask)
                if not np.allclose(answered, expected, atol=1e-5):
                    sys.exit("The server and the engine differ.")
                if end is None:
                    end = time.perf_counter() + seconds
                    continue
                found["engine"].append(alone)
                found["server"].append(over_http)
            connection.close()
            return found


def line_of(model: str, found: dict[str, list[float]]) -> tuple[str, float]:
    """Return a row of the table, and the ratio of the medians."""
    engine, ours = (median(found[name]) for name in ("engine", "server"))
    ratios = [there / alone for there, alone in zip(found["server"], found["engine"], strict=True)]
    low, *_, high = quantiles(ratios, n=10)
    cells = [MODEL_TITLES[model], len(ratios), f"{engine:.1f}", f"{ours:.1f}", f"{ours - engine:+.1f}"]
    cells += [f"{ours / engine:.2f}", f"({low:.2f}, {high:.2f})", "yes" if ours < GOAL * engine else "**no**"]
    return f"| {' | '.join(map(str, cells))} |", ours / engine


def main() -> int:
    """Measure both models, and write the section. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure what a binary tensor costs beside the engine alone.")
    parser.add_argument("--seconds", type=float, default=40, help="for each model (default: 40)")
    parser.add_argument("--quick", action="store_true", help="the bundled model for five seconds; writes nothing")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    if not options.quick:
        make_weights()
    models = ["bundled"] if options.quick else [*MODEL_TITLES]
    found = {model: line_of(model, measure(model, 5 if options.quick else options.seconds)) for model in models}
    lines = [
        "## A binary tensor of 8x224x224x3 float32",
        "",
        "From one client through the Open Inference Protocol and, in turn with it, the engine alone: "
        f"{describe_machine()}. The promise is less than 1.3 times the engine alone.",
        "",
        "| model | pairs | engine alone, ms | over HTTP, ms | difference | ratio | ratios of pairs (p10, p90) | kept |",
        "|---|---:|---:|---:|---:|---:|---|---|",
        *(line for line, _ in found.values()),
    ]
    print("\n".join(lines))
    if not options.quick:
        put(HERE / "RESULTS.md", "tensors", "\n".join(lines), new="last")
    return 0 if all(ratio < GOAL for _, ratio in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
