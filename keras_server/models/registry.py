"""Finds the model that a request is for, among the names and versions that are served."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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

SHOWN = 20  # names in a sentence


class NotLoaded(Exception):
    """There is no model yet."""


class UnknownModel(Exception):
    """No model or version has this name; the message is a sentence for the client."""


class NotServed(Exception):
    """A model is there, and not served just now; the message is a sentence for the client."""


@dataclass
class Model:
    """One name, and what is served under it."""

    versions: dict[int, Served] = field(default_factory=dict)  # the newest last; 1 where it has none
    labels: Mapping[str, int] = field(default_factory=dict)
    missing: str = ""  # why nothing is served, as a sentence

    @property
    def newest(self) -> Served | None:
        """What requests that name no version go to."""
        return next(reversed(self.versions.values()), None)


class Registry:
    """The models that are served, by name and version. A request that takes one keeps it to its end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.models: dict[str, Model] = {}
        self.default = ""  # the first that was served; no other takes its place while it is being loaded again

    def names(self) -> tuple[str, ...]:
        """Return the names of what is served, the default first."""
        with self.lock:
            names = [name for name, model in self.models.items() if model.versions]
            return tuple(sorted(names, key=lambda name: name != self.default))

    def versions(self, name: str) -> tuple[Served, ...]:
        """Return the versions of a model, the newest first."""
        with self.lock:
            return tuple(reversed(self.models[name].versions.values())) if name in self.models else ()

    def find(self, name: str | None = None, version: str | None = None, label: str | None = None) -> Served:
        """Return a model's newest version, or another one, without taking it; the default where no name is given.

        Raises NotLoaded, UnknownModel or NotServed.
        """
        with self.lock:
            return self.found(name, version, label)

    def take(self, name: str | None = None, version: str | None = None, label: str | None = None) -> Served:
        """Return a model likewise for a request, which has to let it go. Raises as find()."""
        with self.lock:
            served = self.found(name, version, label)
            served.hold()
            return served

    def found(self, name: str | None, version: str | None, label: str | None) -> Served:
        """Do what find() does, with the lock held."""
        if name is None:
            default = self.models.get(self.default)
            is_there = default and (default.versions or default.missing)
            others = (name for name, model in self.models.items() if model.versions)
            name = self.default if is_there else next(others, None)
        if name is None:
            raise NotLoaded
        model = self.models.get(name)
        if not model or not (newest := model.newest):
            if model and model.missing:
                raise NotServed(f"{name} is not served: {model.missing}")
            raise UnknownModel(self.unknown(name))
        if label is not None:
            if label not in model.labels:
                there = f"labels {in_words(model.labels)}" if model.labels else "no labels"
                raise UnknownModel(f"There is no label {short(label)} of {name}: it has {there}.")
            version = str(model.labels[label])
        if version is None:
            return newest
        for served in model.versions.values():
            if served.version_name == version:
                return served
        known = [served.version_name for served in model.versions.values()]
        has = f"version{'s' * (len(known) > 1)} {in_words(known)}"
        raise UnknownModel(f"There is no version {short(version)} of {name}: it has {has}.")

    def unknown(self, name: str) -> str:
        """Return the sentence on a name that no model has."""
        there = [json.dumps(name) for name, model in self.models.items() if model.versions]
        return f"There is no model {short(name)}: this server has {in_words(there) or 'none'}."

    def put(self, name: str, number: int, served: Served) -> Served | None:
        """Serve a version from now on; returns what had its place, to be retired."""
        served.metrics.begin(served.spec.engine, served.spec.precision, lambda: served.batcher.waiting)
        with self.lock:
            self.default = self.default or name
            model = self.models.setdefault(name, Model())
            old = model.versions.pop(number, None)
            model.versions = dict(sorted([*model.versions.items(), (number, served)], key=lambda item: item[0]))
            model.missing = ""
            return old

    def drop(self, name: str, number: int) -> Served | None:
        """Serve a version no more; returns it, to be retired."""
        with self.lock:
            return self.models[name].versions.pop(number, None) if name in self.models else None

    def index(self) -> list[dict[str, str]]:
        """Return what there is, version by version, in the words of Triton's repository extension."""
        return [
            {"name": served.spec.name, "version": served.version_name, "state": "READY", "reason": ""}
            for served in self.all()
        ]

    def problem(self, patience: float) -> str:
        """Return which model would take no prediction and why, as a sentence, or nothing. Raises NotLoaded."""
        with self.lock:
            if not self.models:
                raise NotLoaded
            alone = len(self.models) == 1
            for name, model in self.models.items():
                problems = [served.problem(patience) for served in model.versions.values()]
                if sentence := next(filter(None, [*problems, model.missing]), ""):
                    return sentence if alone else f"{name}: {sentence}"
        return ""

    def on_death(self, do: Callable[[], None]) -> None:
        """Have it done where a model's thread ends, which is past all help."""
        for served in self.all():
            served.batcher.on_death = do

    def all(self) -> Iterator[Served]:
        """Return everything that is served."""
        with self.lock:
            return iter([served for model in self.models.values() for served in model.versions.values()])

    def close(self) -> None:
        """Serve nothing any more."""
        with self.lock:
            models, self.models = self.models, {}
        for model in models.values():
            for served in model.versions.values():
                served.retire()


def short(name: str) -> str:
    """Return a name as a sentence shows it."""
    return json.dumps(name[:80])


def in_words(names: Mapping[str, int] | list[str]) -> str:
    """Return names for a sentence: all, or the first of many."""
    shown = [*names][:SHOWN]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


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


class Hook:
    """Makes a Registry of whatever stands in `model`: a Registry, a Served, a keras.Model or a Predictor."""

    def __init__(self, model: Callable[[], object], settings: Callable[[], Settings]):
        self.model, self.settings = model, settings
        self.lock = threading.Lock()
        self.adapted: tuple[object, Registry] | None = None  # the last that was no Registry, and what it became

    def registry(self) -> Registry:
        """Return it. Raises NotLoaded or StartupError."""
        model = self.model()
        if isinstance(model, Registry):
            return model
        if model is None:
            raise NotLoaded
        with self.lock:
            known = self.adapted
            if known and (known[0] is model or any(each is model for each in known[1].all())):
                return known[1]
            served = model if isinstance(model, Served) else adapt(model, self.settings())
            if known and not isinstance(known[0], Served):
                known[1].close()
            registry = Registry()
            registry.put(served.spec.name, 1, served)
            self.adapted = model, registry
            return registry


def adapt(model: object, settings: Settings) -> Served:
    """Return a Served of a keras.Model, converted and checked like one from a file, or of a Predictor."""
    keras = sys.modules.get("keras")
    if keras and isinstance(model, keras.Model):
        return serve_source(KerasModel(model), settings)
    if not isinstance(model, Predictor):
        raise TypeError(f"{type(model).__name__} is no model: it has no method predict")
    return Served(Spec(), PredictorEngine(model), settings.max_batch, settings.queue_size)


def serve_source(
    source: Source, settings: Settings, name: str = "", version: int | None = None, own: Settings | None = None
) -> Served:
    """Load, convert and warm up a model, which may have another name, a version and settings of its own.

    Raises StartupError.
    """
    opened = open_model(source, own or settings, name)
    return Served(
        opened.spec,
        opened.engine,
        settings.max_batch,
        settings.queue_size,
        opened.explain,
        version=version,
        settings=own,
    )


def load(settings: Settings) -> Served:
    """Return the model that the settings name; without one resnet50, or else the bundled one. Raises StartupError."""
    source = Source.of(settings, settings.model or "resnet50")
    if settings.model:
        served = serve_source(source, settings)
        warn(source, served, settings)
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


def warn(source: Source, served: Served, settings: Settings) -> None:
    """Say in the log where a model's preprocessing looks wrong."""
    with contextlib.suppress(Exception):  # what is wrong with a model shows in its answers
        if not source.has_labels and (words := suspicion(served, settings)):
            log.warning(words)
