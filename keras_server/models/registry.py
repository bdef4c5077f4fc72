"""Finds the model that a request is for."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from keras_server.models.errors import DownloadError
from keras_server.models.opening import open_model
from keras_server.models.served import Served
from keras_server.models.source import KerasModel, Source
from keras_server.models.spec import Spec
from keras_server.models.suspicion import suspicion
from keras_server.settings import Settings

log = logging.getLogger("keras_server")
T = TypeVar("T")


class NotLoaded(Exception):
    """There is no model yet."""


class UnknownModel(Exception):
    """No model has this name; the message is a sentence for the client."""


@runtime_checkable
class Predictor(Protocol):
    """Anything that predicts, such as a fake of a few lines in a test."""

    def predict(self, batch: np.ndarray, /) -> np.ndarray:
        """Return an output for a batch, both with the batch as first axis."""


class PredictorEngine:
    """Computes batches with a predictor, one at a time."""

    lanes = 1

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def __call__(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Compute one batch."""
        return [np.asarray(self.predictor.predict(*inputs))]


class Registry:
    """Makes a Served of whatever stands in the place of the model: a Served, a keras.Model or a Predictor."""

    def __init__(self, model: Callable[[], object], settings: Callable[[], Settings]):
        self.model, self.settings = model, settings
        self.lock = threading.Lock()
        self.adapted: tuple[object, Served] | None = None  # the last that was no Served, and what it became

    def find(self, name: str | None = None) -> Served:
        """Return the model of this name, or the default one. Raises NotLoaded, UnknownModel or StartupError."""
        served = self.default()
        if name is not None and name != served.spec.name:
            requested, there = json.dumps(name[:80]), json.dumps(served.spec.name)
            raise UnknownModel(f"There is no model {requested}: this server has {there}.")
        return served

    def default(self) -> Served:
        """Return what requests that name no model go to."""
        model = self.model()
        if isinstance(model, Served):
            return model
        if model is None:
            raise NotLoaded
        with self.lock:
            if not self.adapted or self.adapted[0] is not model:
                if self.adapted:
                    self.adapted[1].close()
                self.adapted = model, adapt(model, self.settings())
            return self.adapted[1]


def adapt(model: object, settings: Settings) -> Served:
    """Return a Served of a keras.Model, converted and checked like one from a file, or of a Predictor."""
    keras = sys.modules.get("keras")
    if keras and isinstance(model, keras.Model):
        return serve_source(KerasModel(model), settings)
    if not isinstance(model, Predictor):
        raise TypeError(f"{type(model).__name__} is no model: it has no method predict")
    return Served(Spec(), PredictorEngine(model), settings.max_batch, settings.queue_size)


def serve_source(source: Source, settings: Settings) -> Served:
    """Load, convert and warm up a model. Raises StartupError."""
    opened = open_model(source, settings)
    return Served(opened.spec, opened.engine, settings.max_batch, settings.queue_size, opened.explain)


def load(settings: Settings) -> Served:
    """Return the model that the settings name; without one resnet50, or else the bundled one. Raises StartupError."""
    source = Source(settings.model or "resnet50", settings.weights, settings.unsafe_model, settings.import_)
    if settings.model:
        served = serve_source(source, settings)
        with contextlib.suppress(Exception):  # what is wrong with a model shows in its answers
            if not source.has_labels and (words := suspicion(served, settings)):
                log.warning(words)
        return served
    return or_bundled(source, lambda source: serve_source(source, settings))


def or_bundled(source: Source, use: Callable[[Source], T]) -> T:
    """Return what is made of a model, or of the bundled one where its weights cannot be had. Raises StartupError."""
    try:
        return use(source)
    except DownloadError as error:
        log.warning(
            "ResNet50's weights are not in Keras' cache and cannot be downloaded (%s), so the bundled "
            "EfficientNet-Lite0 is served. For ResNet50 start once with internet access, or give --weights FILE.",
            error.reason,
        )
        return use(Source("bundled"))
