"""Finds the model that the settings name, and loads it with Keras."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.images import PREPROCESS
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.files import is_model_file, is_saved_model, kind_of, load_file, newest_version, training_loss
from keras_server.models.tracing import import_keras, reason_of

BUNDLED = Path(__file__).resolve().parents[1] / "bundled" / "efficientnet_lite0.keras"


class Source:
    """A model as the settings name it: an architecture with weights, a file, or a SavedModel folder."""

    def __init__(self, model: str, weights: str = "", unsafe: bool = False):
        """Look whether it can be there at all. Raises StartupError."""
        is_path = re.search(r"[./\\]", model) or Path(model).exists()
        self.path = BUNDLED if model == "bundled" else Path(model) if is_path else None
        self.name = reachable(self.path) if self.path else model.lower()
        self.weights, self.unsafe = weights, unsafe
        self.is_architecture = not self.path
        if self.path and weights:
            raise StartupError("--weights is for an architecture that --model names; a model file brings its own.")
        file = self.path or (Path(weights) if weights else None)
        if file and not file.exists():
            raise StartupError(f"There is no file {file}.")
        if self.path and self.path.is_dir() and not is_saved_model(self.path):
            self.path = newest_version(self.path) or self.path
        if self.path and not (is_saved_model(self.path) or is_model_file(self.path)):
            raise StartupError(
                f"{self.path} is not a Keras model, but {kind_of(self.path)}: save one with model.save('name.keras')."
            )

    @property
    def loss(self) -> tuple[str, bool]:
        """The name of the loss that the model was trained with, as far as its file says so, and whether on logits."""
        return training_loss(self.path)

    @property
    def files(self) -> list[Path]:
        """The files that make the model what it is, as far as they are here already."""
        if self.path or self.weights:
            path = self.path or Path(self.weights)
            return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        folder = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "models"
        # Keras keeps MobileNetV2 in mobilenet_v2_weights_....h5.
        return sorted(file for file in folder.glob("*.h5") if self.name in re.sub("[-_]", "", file.name.lower()))

    def load(self) -> Any:
        """Return the Keras model. Raises StartupError."""
        if self.path:
            return load_file(self.path, self.unsafe)
        build = architecture(self.name)
        try:
            return build(weights=self.weights or "imagenet")
        except Exception as error:  # noqa: BLE001 - Keras raises anything, and a failed download is a bare Exception
            if self.weights:
                raise StartupError(f"{self.weights} does not fit {self.name}: {reason_of(error)}") from None
            raise DownloadError(self.name, reason_of(error).rpartition(" -- ")[2]) from None


def reachable(path: Path) -> str:
    """Return a file's or folder's name as it can stand in an address: without colons, blanks and their like."""
    path = path.resolve()
    return re.sub(r"[\x00-\x20:?#%\\\x7f]+", "_", path.name if path.is_dir() else path.stem) or "model"


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
