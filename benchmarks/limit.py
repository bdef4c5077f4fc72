"""Measure the limit: the engine alone and the decoding alone, without HTTP. Prints one line of JSON.

python benchmarks/limit.py EXPORT small.jpg large.jpg    # an export for pictures, which may have int8 in it
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import openvino
from machine import cores
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BATCH = 8
TARGET = (224, 224)


def durations(action: Callable[[], Any], seconds: float) -> list[float]:
    """Run the action again and again, and return how long each run took."""
    action()
    taken, end = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        action()
        taken.append(time.perf_counter() - start)
    return taken


def measure_engine(model: Path, hint: str, seconds: float) -> dict[str, float]:
    """Return the images/s of the engine in batches of 8, and the milliseconds of a batch of one.

    Once one batch at a time has all threads ("images_per_s"), once each has a thread of its own ("side_by_side_per_s").
    """
    core, options = openvino.Core(), {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cores()}
    random = np.random.default_rng(0)
    one, batch = (random.uniform(0, 255, (rows, *TARGET, 3)).astype("float32") for rows in (1, BATCH))

    request = core.compile_model(model, "CPU", options | {"NUM_STREAMS": 1}).create_infer_request()
    in_batches = durations(lambda: request.infer({0: batch}, share_inputs=True), seconds)
    alone = durations(lambda: request.infer({0: one}, share_inputs=True), seconds / 2)

    queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", options | {"NUM_STREAMS": cores()}), cores())

    def a_batch_for_each() -> None:
        for _ in range(cores()):
            queue.start_async({0: batch}, share_inputs=True)
        queue.wait_all()

    side_by_side = durations(a_batch_for_each, seconds)
    return {
        "images_per_s": BATCH * len(in_batches) / sum(in_batches),
        "side_by_side_per_s": cores() * BATCH * len(side_by_side) / sum(side_by_side),
        "one_ms": 1000 * median(alone),
    }


def measure_decoding(picture: Path, prepare: Callable[[Image.Image, tuple[int, int]], Any], seconds: float) -> float:
    """Return the milliseconds that it takes to open and prepare the picture, in one thread."""
    content = picture.read_bytes()
    return 1000 * median(durations(lambda: prepare(Image.open(io.BytesIO(content)), TARGET), seconds))


def prepare_plainly(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """Return the image as the tutorial prepares it, decoded in full, float32, shape (height, width, 3), 0 to 255."""
    return np.asarray(image.convert("RGB").resize(target), np.float32)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args()

    model, int8 = args.export / "model.xml", args.export / "int8.xml"
    engine = {"float32": measure_engine(model, "f32", args.seconds)}
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        engine["bfloat16"] = measure_engine(model, "bf16", args.seconds)
    if int8.exists():
        engine["int8"] = measure_engine(int8, "f32", args.seconds)

    sys.path.insert(0, str(ROOT))
    import run_keras_server as server

    server.configure(["--model", str(args.export), "--log-level", "error"])
    server.load_model()  # which prepare_image asks what to prepare for
    ways = {"decoding_ms": server.prepare_image, "plain_ms": prepare_plainly}
    decoding = {
        what: {picture.stem: measure_decoding(picture, way, args.seconds / 4) for picture in args.pictures}
        for what, way in ways.items()
    }
    print(json.dumps({"engine": engine} | decoding))


if __name__ == "__main__":
    main()
