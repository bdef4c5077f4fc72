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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.images import PREPROCESS
from keras_server.machine import processors
from keras_server.models.engines import (
    Engine,
    KerasEngine,
    OpenVINOEngine,
    accelerated,
    convert,
    has_bfloat16,
    structures,
)
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.export import Cache
from keras_server.models.labels import check_labels, read_labels
from keras_server.models.spec import Spec, Tensor

log = logging.getLogger("keras_server")

MODELS = Path(__file__).resolve().parents[1] / "bundled"
BUNDLED = MODELS / "efficientnet_lite0.keras"
IMAGENET = MODELS / "imagenet_classes.json"  # {"0": ["n01440764", "tench"], ...}: Keras' class index


class Source:
    """A model as the settings name it: an architecture with weights, a file, or a SavedModel folder."""

    def __init__(self, wanted: str, weights: str = "", unsafe: bool = False):
        """Look whether it can be there at all. Raises StartupError."""
        is_path = re.search(r"[./\\]", wanted) or Path(wanted).exists()
        self.path = BUNDLED if wanted == "bundled" else Path(wanted) if is_path else None
        self.name = self.path.stem if self.path else wanted.lower()
        self.weights, self.unsafe = weights, unsafe
        self.is_architecture = not self.path
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
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        try:
            for tensors, structure, found in zip(
                (keras_model.inputs, keras_model.outputs),
                structures(keras_model),
                (inputs, outputs),
                strict=True,
            ):
                names = sorted(structure) if isinstance(structure, dict) else [t.name for t in tensors]
                found += [Tensor(n, tuple(t.shape[1:]), t.dtype) for n, t in zip(names, tensors, strict=True)]
        except (AttributeError, TypeError, ValueError):
            raise StartupError(
                f"{self.name} does not know the shape of its input: call it on a batch, then save it again."
            ) from None
        preprocess = preprocess_of(self.name) if self.is_architecture else "none"
        spec = Spec(self.name, tuple(inputs), tuple(outputs), preprocess)
        return spec if self.is_architecture or self.path == BUNDLED else replace(spec, labels=())


class KerasModel(Source):
    """A model that Keras has loaded already."""

    def __init__(self, keras_model: Any):
        self.path, self.name, self.weights, self.unsafe, self.model = None, keras_model.name, "", False, keras_model
        self.is_architecture = keras_model.name in classifiers()  # Keras calls its ResNet50 resnet50

    @property
    def files(self) -> list[Path]:
        """None: it is converted anew each time."""
        return []

    def load(self) -> Any:
        """Return it."""
        return self.model


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
            found = replace(found, engine=OpenVINOEngine.name)
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
    return keras_engine, replace(found, engine=keras_engine.name)


def open_model(source: Source, settings: Any) -> tuple[Engine, Spec]:
    """Return the engine of a model, warmed up, and its final spec. Raises StartupError."""
    run, spec = open_engine(source, settings)
    spec = replace(spec, precision=settings.precision)
    # A lone row warms up, of ones, which are valid tokens, too; noise shows whether the outputs are probabilities.
    run([np.ones((1, *(d or 8 for d in t.shape)), t.dtype) for t in spec.inputs])
    if not spec.image:
        reason = (
            f"{spec.name} takes no images: send its inputs as JSON to /v2/models/{spec.name}/infer "
            f"or to /v1/models/{spec.name}:predict."
        )
        return run, replace(spec, kind="none", reason=reason)
    values = np.random.default_rng(0).uniform(0, 255, (4, *(d or 224 for d in spec.inputs[0].shape)))
    outputs = run([values.astype(spec.inputs[0].dtype)])[0]
    mode = settings.preprocess
    if mode != "auto":
        spec = replace(spec, preprocess=mode if mode in PREPROCESS else preprocess_of(mode.lower()))
    if spec.image and spec.image[2] != 3 and spec.preprocess not in ("none", "tf"):
        raise StartupError(f"--preprocess {mode} is for RGB, and {spec.name} takes {spec.image[2]} channels.")
    activation = settings.activation
    if activation == "auto":
        logits = outputs.min() < -0.01 or outputs.max() > 1.01
        activation = "none" if not logits else "softmax" if outputs.shape[-1] > 1 else "sigmoid"
        if logits:
            log.info("The outputs are logits: the server applies %s (--activation none would not).", activation)
    spec = replace(spec, activation=activation)
    if settings.labels:
        spec = replace(spec, labels=read_labels(Path(settings.labels)))
        check_labels(spec.labels, spec.classes, spec.name)
    return run, spec


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


def classifiers() -> dict[str, Any]:
    """Return the functions that build the classifiers of keras.applications, by their names in lower case."""
    return {n.lower(): c for n, c in vars(import_keras().applications).items() if n[0].isupper()}


def architecture(name: str) -> Any:
    """Return the function that builds a classifier of keras.applications. Raises StartupError."""
    known = classifiers()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, [*known], 1, cutoff=0)[0]
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
