"""Measure the limit: the engine alone and the decoding alone, without HTTP. Prints one line of JSON.

python benchmarks/limit.py --model resnet50 --weights FILE small.jpg large.jpg
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

import keras
import numpy as np
import openvino
import tensorflow as tf
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


def measure_engine(model: keras.Model, precision: str, seconds: float) -> dict[str, float]:
    """Return images/s in batches and the milliseconds of a batch of one, in one thread that calls the engine."""
    signature = [tf.TensorSpec((None, *TARGET, 3), tf.float32)]
    function = tf.function(lambda batch: model(batch, training=False), input_signature=signature)
    converted = openvino.convert_model(function.get_concrete_function())
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
    one, batch = (np.random.default_rng(0).uniform(0, 255, (n, *TARGET, 3)).astype("float32") for n in (1, BATCH))
    in_batches = durations(lambda: request.infer({0: batch}, share_inputs=True), seconds)
    alone = durations(lambda: request.infer({0: one}, share_inputs=True), seconds / 2)
    return {"images_per_s": BATCH * len(in_batches) / sum(in_batches), "one_ms": 1000 * median(alone)}


def measure_decoding(picture: Path, prepare: Callable[[Image.Image, tuple[int, int]], Any], seconds: float) -> float:
    """Return the milliseconds that it takes to open and prepare the picture."""
    content = picture.read_bytes()
    return 1000 * median(durations(lambda: prepare(Image.open(io.BytesIO(content)), TARGET), seconds))


def prepare_plainly(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """Return the image as the tutorial prepares it, decoded in full, float32, shape (height, width, 3), 0 to 255."""
    return np.asarray(image.convert("RGB").resize(target), np.float32)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["resnet50", "bundled"], required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("pictures", type=Path, nargs="+")
    args = parser.parse_args()

    if args.model == "resnet50":
        model = keras.applications.ResNet50(weights=args.weights)
    else:
        model = keras.saving.load_model(args.weights, compile=False)
    precisions = {"float32": "f32"}
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        precisions["bfloat16"] = "bf16"
    engine = {name: measure_engine(model, hint, args.seconds) for name, hint in precisions.items()}
    sys.path.insert(0, str(ROOT))
    from run_keras_server import prepare_image

    ways = {"decoding_ms": prepare_image, "plain_ms": prepare_plainly}
    decoding = {
        what: {picture.stem: measure_decoding(picture, way, args.seconds / 4) for picture in args.pictures}
        for what, way in ways.items()
    }
    print(json.dumps({"engine": engine} | decoding))


if __name__ == "__main__":
    main()
