"""Finds the model that the settings name, loads it with Keras, describes it, and gives it its engine.

Keras is imported only where a model is really loaded: a start from the cache of converted models does without.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import sys
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.models.engines import (
    Engine,
    KerasEngine,
    OpenVINOEngine,
    accelerated,
    convert,
    has_bfloat16,
    processors,
    structures,
)
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.export import Cache
from keras_server.models.labels import read_labels

log = logging.getLogger("keras_server")

MODELS = Path(__file__).resolve().parents[1] / "bundled"
BUNDLED = MODELS / "efficientnet_lite0.keras"
IMAGENET = MODELS / "imagenet_classes.json"  # {"0": ["n01440764", "tench"], ...}: Keras' class index
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names, by number of channels

# What the preprocess_input of keras.applications does to pixels in 0..255, as (pixels - mean) / deviation with the
# channels in this order. In figures, for a start from the cache has no Keras; a test holds them against Keras' own.
PREPROCESS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "none": ("RGB", (0, 0, 0), (1, 1, 1)),
    "caffe": ("BGR", (103.939, 116.779, 123.68), (1, 1, 1)),
    "tf": ("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "torch": ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


@dataclass
class Tensor:
    """An input or output of the model; the shape is that of one row, without the batch."""

    name: str
    shape: list[int | None]
    dtype: str


@dataclass
class Spec:
    """What is served and how to speak to it. The defaults are ResNet50's."""

    name: str = "resnet50"
    inputs: list[Tensor] = field(default_factory=lambda: [Tensor("image", [224, 224, 3], "float32")])
    outputs: list[Tensor] = field(default_factory=lambda: [Tensor("predictions", [1000], "float32")])
    preprocess: str = "caffe"  # a key of PREPROCESS
    activation: str = "none"  # what makes probabilities of the output: none, softmax or sigmoid
    labels: list[str] = field(default_factory=lambda: [*read_labels(IMAGENET)])
    engine: str = "none"

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Spec:
        """Return the spec that asdict() and JSON made of one."""
        tensors = {key: [Tensor(**tensor) for tensor in found[key]] for key in ("inputs", "outputs")}
        return cls(**found | tensors)

    @property
    def image(self) -> tuple[int, int, int, bool] | None:
        """Height, width, channels, and whether the channels come first; None where this is no image classifier."""
        shape = self.inputs[0].shape
        if len(self.inputs) != 1 or len(shape) != 3 or len(self.outputs[0].shape) != 1:
            return None
        first = shape[2] not in MODES
        height, width, channels = shape[1:] + shape[:1] if first else shape
        return (height or 224, width or 224, channels, first) if channels in MODES else None

    @property
    def target(self) -> tuple[int, int]:
        """Width and height of the pictures that the model takes, as Pillow orders them."""
        height, width, *_ = self.image or (224, 224)
        return width, height

    @property
    def classes(self) -> int:
        """How many classes an answer can name: two where one output says how probable the second is."""
        return max(2, self.outputs[0].shape[-1] or 0)


class Source:
    """A model as the settings name it: an architecture with weights, a file, or a SavedModel folder."""

    def __init__(self, wanted: str, weights: str = "", unsafe: bool = False):
        """Look whether it can be there at all. Raises StartupError."""
        is_path = re.search(r"[./\\]", wanted) or Path(wanted).exists()
        self.path = BUNDLED if wanted == "bundled" else Path(wanted) if is_path else None
        self.name = self.path.stem if self.path else wanted.lower()
        self.weights, self.unsafe = weights, unsafe
        if self.path and weights:
            raise StartupError("--weights is for an architecture that --model names; a model file brings its own.")
        given = self.path or (Path(weights) if weights else None)
        if given and not given.exists():
            raise StartupError(f"There is no file {given}.")
        if self.path and not (self.is_saved_model or is_keras_file(self.path)):
            raise StartupError(f"{self.path} is not a Keras model: save one with model.save('name.keras').")

    @property
    def is_saved_model(self) -> bool:
        """Whether it is TensorFlow's folder format."""
        return bool(self.path) and (Path(self.path or "") / "saved_model.pb").is_file()

    @property
    def files(self) -> list[Path]:
        """The files that make the model what it is, as far as they are here already."""
        if self.path or self.weights:
            given = self.path or Path(self.weights)
            return sorted(file for file in given.rglob("*") if file.is_file()) if given.is_dir() else [given]
        folder = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models"
        # Keras keeps MobileNetV2 in mobilenet_v2_weights_....h5.
        return sorted(file for file in folder.glob("*.h5") if self.name in re.sub("[-_]", "", file.name.lower()))

    def load(self) -> Any:
        """Return the Keras model. Raises StartupError."""
        keras = import_keras()
        if self.path:
            try:
                if self.is_saved_model:
                    return load_saved_model(self.path)
                return keras.saving.load_model(self.path, compile=False, safe_mode=not self.unsafe)
            except Exception as error:  # noqa: BLE001 - Keras raises whatever the file's content trips over
                raise StartupError(f"{self.path} cannot be loaded as a Keras model: {first_line(error)}") from None
        build = architecture(self.name)
        try:
            return build(weights=self.weights or "imagenet")
        except Exception as error:  # noqa: BLE001 - likewise, and a failed download is a bare Exception
            if self.weights:
                raise StartupError(f"{self.weights} does not fit {self.name}: {first_line(error)}") from None
            raise DownloadError(self.name, first_line(error).rpartition(" -- ")[2]) from None

    def describe(self, keras_model: Any) -> Spec:
        """Return the spec of the loaded model. Raises StartupError where it does not know its inputs."""
        spec = Spec(self.name, [], [], "none" if self.path else preprocess_of(self.name))
        try:
            for tensors, structure, found in zip(
                (keras_model.inputs, keras_model.outputs),
                structures(keras_model),
                (spec.inputs, spec.outputs),
                strict=True,
            ):
                names = sorted(structure) if isinstance(structure, dict) else [t.name for t in tensors]
                found += [Tensor(n, list(t.shape[1:]), t.dtype) for n, t in zip(names, tensors, strict=True)]
        except (AttributeError, TypeError, ValueError):
            raise StartupError(
                f"{self.name} does not know the shape of its input: call it on a batch, then save it again."
            ) from None
        if self.path and self.path != BUNDLED:
            spec.labels = []
        return spec


def open_engine(source: Source, settings: Any) -> tuple[Engine, Spec]:
    """Return the engine that runs a model as the settings say, and the model's spec. Raises StartupError."""
    if settings.precision == "bfloat16" and not has_bfloat16():
        raise StartupError("This processor has no bfloat16 arithmetic: leave --precision at float32.")
    on_openvino = settings.engine == "openvino" or (settings.engine == "auto" and not accelerated())
    how = (settings.precision, settings.engine_threads or processors(), settings.max_batch)
    cache = Cache(settings.cache_dir, source.name, source.files)
    if on_openvino and (kept := cache.read()):
        with contextlib.suppress(Exception):  # whatever is wrong with the copy, the original is still there
            return OpenVINOEngine(kept[0], *how), Spec.from_json(kept[1])
    keras_model = source.load()
    found = source.describe(keras_model)
    if on_openvino:
        try:
            converted = convert(keras_model)
            found.engine = OpenVINOEngine.name
            engine = OpenVINOEngine(converted, *how)
        except Exception as error:  # noqa: BLE001 - a converter may fail in any way
            why = f"OpenVINO cannot run {source.name} ({first_line(error)})"
            if settings.engine == "openvino":
                raise StartupError(f"{why}: try --engine keras.") from None
            log.warning("%s: Keras itself runs it, more slowly.", why)
        else:
            cache.write(converted, asdict(found))
            return engine, found
    if settings.precision == "bfloat16":
        raise StartupError("--precision bfloat16 needs the engine openvino.")
    keras_engine = KerasEngine(keras_model, settings.max_batch)
    found.engine = keras_engine.name
    return keras_engine, found


def import_keras() -> Any:
    """Import Keras, without the greetings of TensorFlow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    return keras


def is_keras_file(path: Path) -> bool:
    """Return whether a file can be a Keras model: a zip archive or HDF5."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(4) == b"\x89HDF"


def architecture(name: str) -> Any:
    """Return the function that builds a classifier of keras.applications. Raises StartupError."""
    classifiers = {n.lower(): c for n, c in vars(import_keras().applications).items() if n[0].isupper()}
    if name in classifiers:
        return classifiers[name]
    near = difflib.get_close_matches(name, [*classifiers], 1, cutoff=0)[0]
    raise StartupError(f"{name} is neither a file nor a classifier of keras.applications, such as {near}.")


def preprocess_of(name: str) -> str:
    """Return the key of PREPROCESS of an architecture, found by trying its own preprocess_input."""
    preprocess_input = sys.modules[architecture(name).__module__].preprocess_input
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 2, 2, 3)).astype(np.float32)
    expected = preprocess_input(pixels.copy(), data_format="channels_last")
    for mode, (order, mean, deviation) in PREPROCESS.items():
        ordered = pixels[..., ::-1] if order == "BGR" else pixels
        if np.allclose((ordered - np.array(mean)) / np.array(deviation), expected, atol=1e-3):
            return mode
    raise StartupError(f"This release of Keras preprocesses for {name} in a way that the server does not know.")


def load_saved_model(path: Path) -> Any:
    """Return a Keras model around a SavedModel's signature `serving_default`, with its names of inputs and outputs."""
    keras = import_keras()
    import tensorflow as tf

    saved = tf.saved_model.load(path)
    signature = saved.signatures["serving_default"]

    class Signature(keras.layers.Layer):  # type: ignore[name-defined]
        def call(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return signature(**inputs)

    layer = Signature()
    layer.saved = saved  # which holds the variables that the signature only points to
    specs = signature.structured_input_signature[1]
    inputs = {name: keras.Input(tuple(s.shape[1:]), dtype=s.dtype.name, name=name) for name, s in specs.items()}
    return keras.Model(inputs, layer(inputs))


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
