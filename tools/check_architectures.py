"""Serve the architectures of keras.applications with random weights, and hold the answers against Keras' own.

    python tools/check_architectures.py [--millions 30] [NAME ...]

Prints for each who computes it, and the largest difference of a probability over three random pictures. Exits with
status 1 where an answer differs by more than 1e-3. It takes from seconds to minutes an architecture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from keras_server.models.opening import open_model
from keras_server.models.source import KerasModel
from keras_server.models.spec import probabilities
from keras_server.models.tracing import import_keras
from keras_server.settings import Settings

ALLOWED = 1e-3


def classifiers() -> dict[str, Any]:
    """Return the functions that build the classifiers of keras.applications, by their names in lower case."""
    return {n.lower(): c for n, c in vars(import_keras().applications).items() if n[0].isupper()}


def shake(keras_model: Any) -> None:
    """Give a model weights under which its answers hang on the picture: as they are first, all labels are alike."""
    random = np.random.default_rng(1)
    for weight in keras_model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(random.uniform(0.7, 1.3, weight.shape))
        elif weight.name in ("beta", "moving_mean", "bias"):
            weight.assign(random.normal(0, 0.2, weight.shape))
    last = next(layer for layer in reversed(keras_model.layers) if layer.weights)
    kernel, features = last.weights[0], import_keras().Model(keras_model.input, last.input)
    deviation = np.std(features(pictures(keras_model)))
    kernel.assign(random.normal(0, 2 / max(float(deviation), 1e-6) / np.sqrt(kernel.shape[-2]), kernel.shape))


def pictures(keras_model: Any) -> np.ndarray:
    """Return three random pictures, float32, of the size that the model takes."""
    _, height, width, _ = keras_model.input_shape
    return np.random.default_rng(5).uniform(0, 255, (3, height or 224, width or 224, 3)).astype(np.float32)


def check(name: str, millions: float) -> bool:
    """Print the line of an architecture; returns whether its answers are right."""
    keras = import_keras()
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with keras.StatelessScope():  # only counts
        size = classifiers()[name](weights=None).count_params() / 1e6
    if size > millions:
        print(f"{name:24} {size:6.1f} M  passed over")
        return True
    keras_model = classifiers()[name](weights=None)
    shake(keras_model)
    opened = open_model(KerasModel(keras_model), Settings(cache_dir=""))
    engine, spec = opened.engine, opened.spec
    rows = pictures(keras_model)
    expected = np.asarray(keras_model(rows, training=False))
    apart = float(np.abs(probabilities(engine([rows])[0], spec) - probabilities(expected, spec)).max())
    print(f"{name:24} {size:6.1f} M  {spec.engine:16} {len(spec.outputs)} output  {apart:.1e} apart", end="")
    print(f"  (most probable {expected.max():.2g})", flush=True)
    return apart <= ALLOWED


def main() -> int:
    """Check the architectures that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--millions", type=float, default=30, help="weights at most (default: 30)")
    options = parser.parse_args()
    names = [name.lower() for name in options.names] or sorted(classifiers())
    results = [check(name, options.millions) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
