"""Models for tests, made on the spot: tiny, deterministic, of the kinds that people bring."""

from __future__ import annotations

import atexit
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import absl.logging
import numpy as np
import pytest
from flask.testing import FlaskClient

import run_keras_server as server
from keras_server.models.registry import serve_source
from keras_server.models.served import Served
from keras_server.models.source import Source
from keras_server.settings import Settings


def keras() -> Any:
    """Import Keras quietly, with the same weights each time."""
    from keras_server.models.tracing import import_keras

    found = import_keras()
    found.utils.set_random_seed(1)
    return found


def digits() -> Any:
    """Grey pictures of 28x28 pixels to ten probabilities."""
    k = keras()
    x = image = k.Input((28, 28, 1), name="digit")
    x = k.layers.Rescaling(1 / 255)(x)
    x = k.layers.Conv2D(4, 5, strides=4, activation="relu")(x)
    return k.Model(image, k.layers.Dense(10, activation="softmax", name="digits")(k.layers.Flatten()(x)))


def photos() -> Any:
    """Colour pictures of more numbers than anybody would write in JSON, to three probabilities."""
    k = keras()
    x = image = k.Input((48, 40, 3), name="photo")
    x = k.layers.Conv2D(4, 5, strides=4, activation="relu")(k.layers.Rescaling(1 / 255)(x))
    return k.Model(image, k.layers.Dense(3, activation="softmax")(k.layers.GlobalAveragePooling2D()(x)))


def colours() -> Any:
    """Colour pictures to which of three colours is the most in them: softmax(20 * means of the pixels in 0..1)."""
    k = keras()
    x = picture = k.Input((24, 24, 3), name="picture")
    x = k.layers.Rescaling(1 / 255)(x)
    first = k.layers.Conv2D(8, 3, padding="same", activation="relu")
    x = k.layers.GlobalAveragePooling2D()(first(x))
    last = k.layers.Dense(3, activation="softmax", name="colour")
    model = k.Model(picture, last(x))
    kernel = np.zeros((3, 3, 3, 8), np.float32)
    kernel[1, 1, range(3), range(3)] = 1
    first.set_weights([kernel, np.zeros(8, np.float32)])
    last.set_weights([20 * np.eye(8, 3, dtype=np.float32), np.zeros(3, np.float32)])
    return model


def hairline() -> Any:
    """Two numbers to whether the second is more than the first by a thousandth, of which 8 bits know nothing."""
    k = keras()
    x = pair = k.Input((2,), name="pair")
    dense = k.layers.Dense(2, activation="softmax", name="which")
    model = k.Model(pair, dense(x))
    dense.set_weights([np.array([[4000, 0], [0, 4000]], np.float32), np.array([4, 0], np.float32)])
    return model


def sum_of() -> Any:
    """Four numbers to ten times their sum: a regression."""
    k = keras()
    x = numbers = k.Input((4,), name="numbers")
    first, last = k.layers.Dense(8), k.layers.Dense(1, name="sum")
    model = k.Model(numbers, last(first(x)))
    first.set_weights([np.tile(np.eye(4, dtype=np.float32), 2), np.zeros(8, np.float32)])
    last.set_weights([np.full((8, 1), 5, np.float32), np.zeros(1, np.float32)])
    return model


def logits() -> Any:
    """Small colour pictures to five scores that are no probabilities."""
    k = keras()
    image = k.Input((8, 8, 3), name="image")
    return k.Model(image, k.layers.Dense(5, name="scores")(k.layers.Flatten()(image)))


def tokens() -> Any:
    """Token numbers, any number of them, to one probability."""
    k = keras()
    x = text = k.Input((None,), dtype="int32", name="tokens")
    x = k.layers.GlobalAveragePooling1D()(k.layers.Embedding(100, 8)(x))
    return k.Model(text, k.layers.Dense(1, activation="sigmoid", name="positive")(x))


def tabular() -> Any:
    """Two named inputs and two named outputs; not in the order of their names."""
    k = keras()
    inputs = {"sizes": k.Input((3,), name="sizes"), "age": k.Input((1,), name="age")}
    x = k.layers.Concatenate()([inputs["sizes"], inputs["age"]])
    return k.Model(inputs, {"risk": k.layers.Dense(2, activation="softmax")(x), "price": k.layers.Dense(1)(x)})


def half_plus_two() -> Any:
    """TensorFlow Serving's toy: numbers without any axis but the batch."""
    k = keras()
    x = k.Input((), name="x")
    return k.Model(x, k.layers.Rescaling(0.5, offset=2, name="y")(x))


def mixed() -> Any:
    """An input of each kind of type."""
    k = keras()
    kinds = {"flag": "bool", "byte": "uint8", "long": "int64", "half": "float16"}
    inputs = {name: k.Input((2,), dtype=dtype, name=name) for name, dtype in kinds.items()}
    wide = [k.ops.cast(tensor, "float32") for tensor in inputs.values()]
    return k.Model(inputs, {"sum": k.ops.sum(k.ops.stack(wide), axis=0), "flag_again": inputs["flag"]})


def many() -> Any:
    """More inputs and outputs than their numbers have digits for, each output known by its factor."""
    k = keras()
    inputs = [k.Input((1,), name=f"input{number}") for number in range(12)]
    return k.Model(inputs, [k.layers.Rescaling(number + 1.0, name=f"by{number}")(x) for number, x in enumerate(inputs)])


def h5() -> Any:
    """The digits, which are saved in the old format."""
    return digits()


@functools.cache
def file_of(name: str) -> Path:
    """Return the file of the model that the function `name` builds; it goes when Python ends."""
    folder = tempfile.TemporaryDirectory(prefix="tiny-models-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, f"{name}{'.h5' if name == 'h5' else '.keras'}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras finds the old format old
        absl.logging.set_verbosity(absl.logging.ERROR)
        globals()[name]().save(path)
    return path


@functools.cache
def loaded(name: str, engine: str = "auto") -> Served:
    """Return what is served of a model."""
    return serve_source(Source(str(file_of(name))), Settings(engine=engine, cache_dir=""))


def serve(monkeypatch: pytest.MonkeyPatch, name: str, engine: str = "auto") -> FlaskClient:
    """Serve a model for one test."""
    monkeypatch.setattr(server, "model", loaded(name, engine))
    return server.app.test_client()


@functools.cache
def keras_model(name: str) -> Any:
    """Return a model as Keras itself loads it."""
    return keras().saving.load_model(file_of(name), compile=False)


def predict(name: str, *inputs: Any) -> list[np.ndarray]:
    """Return the outputs that Keras itself computes, in the order of the spec, as are the inputs."""
    model = keras_model(name)
    arrays = [np.array(given, tensor.dtype) for given, tensor in zip(inputs, model.inputs, strict=True)]
    given = dict(zip(sorted(model.input), arrays, strict=True)) if isinstance(model.input, dict) else arrays
    outputs = model.predict(given if len(given) > 1 else arrays[0], verbose=0)
    if isinstance(outputs, dict):
        return [outputs[name] for name in sorted(outputs)]
    return outputs if isinstance(outputs, list) else [outputs]
