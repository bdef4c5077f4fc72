"""Finds the model that the settings name, and loads it with Keras."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_server.models.architectures import PREPROCESS_OF, cached_weights, check_architecture
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.files import load_file, training_loss
from keras_server.models.kinds import check_program, check_weights, find_model, foreign_format, is_export
from keras_server.models.tracing import import_keras, reason_of
from keras_server.settings import Settings

BUNDLED = Path(__file__).resolve().parents[1] / "bundled" / "efficientnet_lite0.keras"


class Source:
    """A model as the settings name it: an architecture with weights, a file, a SavedModel folder, or an export."""

    in_memory = False  # whether Keras has loaded it already, in this process

    def __init__(self, model: str, weights: str = "", unsafe: bool = False, imports: Sequence[str] = ()):
        """Look whether it can be there at all. `imports` are files of Python to run first. Raises StartupError."""
        named = BUNDLED if model == "bundled" else named_path(model)
        self.path = find_model(named) if named else None
        self.name = reachable(named) if named else check_architecture(model.lower())
        self.model, self.weights, self.unsafe = model, weights, unsafe
        self.imports = [Path(file) for file in imports]
        self.is_architecture = not self.path
        self.is_export = bool(self.path and is_export(self.path))
        self.is_foreign = bool(self.path and foreign_format(self.path))  # and OpenVINO alone reads it
        if self.path and weights:
            raise StartupError("--weights is for an architecture that --model names; a model file brings its own.")
        for file in self.imports:
            check_program(file)
        if weights:
            check_weights(Path(weights))

    @classmethod
    def of(cls, settings: Settings, model: str | None = None) -> Source:
        """Look for the model that the settings name, or for another one with what they say. Raises StartupError."""
        model = settings.model if model is None else model
        return cls(model, settings.weights, settings.unsafe_model, settings.import_)

    @property
    def has_labels(self) -> bool:
        """Whether it is known to tell ImageNet's classes apart."""
        return self.is_architecture or self.path == BUNDLED

    @property
    def loss(self) -> tuple[str, bool]:
        """The name of the loss that the model was trained with, as far as its file says so, and whether on logits."""
        return training_loss(self.path)

    @property
    def files(self) -> list[Path]:
        """The files that make the model what it is, as far as they are here already; none: nobody can tell."""
        if self.path or self.weights:
            path = self.path or Path(self.weights)
            return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return cached_weights(self.name)

    def load(self) -> Any:
        """Return the Keras model. Raises StartupError."""
        for file in self.imports:
            run_file(file)
        if self.path and self.is_foreign:
            raise StartupError(f"{self.path} is no model of Keras, but OpenVINO serves it as it is.")
        if self.path:
            return load_file(self.path, self.unsafe)
        applications = vars(import_keras().applications)
        build = next(build for name, build in applications.items() if name[0].isupper() and name.lower() == self.name)
        try:
            return build(weights=self.weights or "imagenet")
        except Exception as error:  # noqa: BLE001 - Keras raises anything, and a failed download is a bare Exception
            if self.weights:
                raise StartupError(f"{self.weights} does not fit {self.name}: {reason_of(error)}") from None
            raise DownloadError(self.name, reason_of(error).rpartition(" -- ")[2]) from None


def named_path(model: str) -> Path | None:
    """Return the file or folder that --model names, which need not be there; None where it names an architecture."""
    return Path(model) if re.search(r"[./\\]", model) or os.path.exists(model) else None


def reachable(path: Path) -> str:
    """Return a file's or folder's name as it can stand in an address: without colons, blanks and their like."""
    path = Path(os.path.abspath(path))  # which follows no link: its own name is meant
    return re.sub(r"[\x00-\x20:?#%\\\x7f]+", "_", path.name if path.is_dir() else path.stem) or "model"


def run_file(file: Path) -> None:
    """Run a user's file of Python, and let Keras find the layers and functions in it. Raises StartupError."""
    description = importlib.util.spec_from_file_location(file.stem, file)
    if not description or not description.loader:
        raise StartupError(f"--import {file}: this is no file of Python.")
    module = importlib.util.module_from_spec(description)
    sys.modules[file.stem] = module  # where Keras, too, looks for its classes
    try:
        with contextlib.chdir("."):  # wherever it goes, the model's path still counts from here
            description.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is somebody's program
        raise StartupError(f"--import {file} fails: {type(error).__name__}: {reason_of(error)}") from None
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    import_keras().saving.get_custom_objects().update(own)  # also those that are not registered


class KerasModel(Source):
    """A model that Keras has loaded already."""

    in_memory = True

    def __init__(self, keras_model: Any):
        self.path, self.name, self.keras_model = None, keras_model.name, keras_model
        self.is_export = self.is_foreign = False
        self.is_architecture = keras_model.name in PREPROCESS_OF  # Keras calls its ResNet50 resnet50

    def load(self) -> Any:
        """Return it."""
        return self.keras_model
