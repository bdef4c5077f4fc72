"""From a source to an engine: an export opened with OpenVINO, which a process of its own has made, or Keras itself."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.explain.cam import Cam, Unexplainable, engine_cam, keras_cam
from keras_server.images import PREPROCESS
from keras_server.machine import processors
from keras_server.models.architectures import PREPROCESS_OF, check_download
from keras_server.models.child import Crashed, convert_in_child
from keras_server.models.convert import Job, Loaded, convert_source, load_described
from keras_server.models.engines import Engine, KerasEngine, OpenVINOEngine, accelerated, batched, has_bfloat16
from keras_server.models.errors import StartupError
from keras_server.models.export import Cache, Export, ExportError
from keras_server.models.labels import check_labels, read_labels
from keras_server.models.meaning import decide
from keras_server.models.reference import random_input
from keras_server.models.source import Source
from keras_server.models.spec import Spec
from keras_server.models.tracing import reason_of
from keras_server.settings import Settings

log = logging.getLogger("keras_server")


@dataclass(frozen=True)
class Opened:
    """A model that can compute."""

    engine: Engine
    spec: Spec
    explain: Callable[[], Cam]  # makes what computes heat maps, or raises Unexplainable


@dataclass(frozen=True)
class Lanes:
    """How OpenVINO is to compute."""

    precision: str
    threads: int
    max_batch: int

    def open(self, model: Any, batch: int | None) -> Engine:
        """Return the engine of an OpenVINO model, or of the .xml file of one."""
        return batched(OpenVINOEngine(model, self.precision, self.threads, self.max_batch), batch)

    def explain(self, model: Any, spec: Spec, output: int) -> Cam:
        """Return what computes heat maps with an OpenVINO model, for an output of a number."""
        return engine_cam(OpenVINOEngine(model, "float32", self.threads, 1), spec.outputs[output])


def open_model(source: Source, settings: Settings) -> Opened:
    """Return a model that has computed a row, and its final spec. Raises StartupError."""
    if settings.precision == "bfloat16" and not has_bfloat16():
        raise StartupError("This processor has no bfloat16 arithmetic: leave --precision at float32.")
    labels = read_labels(Path(settings.labels)) if settings.labels else ()
    mode = preprocessing(settings.preprocess)
    try:
        opened = open_engine(source, settings)
        warm_up(opened.engine, opened.spec)
    except StartupError:
        raise
    except Exception as error:
        log.debug("The model cannot be served", exc_info=True)
        raise StartupError(f"{source.name} cannot be served: {reason_of(error)}") from None
    spec = replace(opened.spec, precision=settings.precision)
    spec = decide(replace(spec, labels=labels or spec.labels, preprocess=mode or spec.preprocess), settings)
    if labels:
        check_labels(spec.labels, classes_of(spec), spec.name)
    if spec.image and spec.image[2] != 3 and spec.preprocess not in ("none", "unit", "tf"):
        raise StartupError(
            f"--preprocess {settings.preprocess} is for RGB, and {spec.name} takes {spec.image[2]} channels."
        )
    return replace(opened, spec=spec)


def preprocessing(name: str) -> str:
    """Return the key of PREPROCESS that a mode or an architecture stands for; "" for auto. Raises StartupError."""
    if name == "auto" or name in PREPROCESS:
        return "" if name == "auto" else name
    if name.lower() in PREPROCESS_OF:
        return PREPROCESS_OF[name.lower()]
    raise StartupError(
        f"--preprocess {name} is no mode: take one of auto, {', '.join(PREPROCESS)}, or a classifier of "
        "keras.applications, such as resnet50."
    )


def classes_of(spec: Spec) -> int | None:
    """Return how many classes there are to name, in the output that /predict answers from; None where it is no list."""
    return spec.classes if len(spec.outputs[spec.output].shape) == 1 else None


def open_engine(source: Source, settings: Settings) -> Opened:
    """Return a model as the settings say, with the spec as the model itself has it. Raises StartupError."""
    on_openvino = settings.engine == "openvino" or (settings.engine == "auto" and not accelerated())
    lanes = Lanes(settings.precision, settings.engine_threads or processors(), settings.max_batch)
    loaded: Loaded | None = None
    if source.is_architecture and not source.in_memory and not source.files:
        check_download(source.name)
    if on_openvino:
        if source.in_memory:
            converted = convert_source(source, settings.output)
            loaded, why = converted.loaded, converted.why
            if not why:
                spec = loaded.spec
                explain = explaining(lanes, converted.heat, spec, converted.explained, converted.flaw)
                return Opened(lanes.open(converted.model, spec.batch), spec, explain)
        else:
            opened, why = open_export(source, settings, lanes)
            if opened:
                return opened
        words = f"OpenVINO cannot run {source.name} ({why})"
        if settings.engine == "openvino":
            raise StartupError(f"{words}: try --engine keras.")
        log.warning("%s: Keras itself runs it, more slowly.", words)
    if settings.precision == "bfloat16":
        raise StartupError("--precision bfloat16 needs the engine openvino.")
    return open_with_keras(loaded or load_described(source), settings)


def open_export(source: Source, settings: Settings, lanes: Lanes) -> tuple[Opened | None, str]:
    """Return a model from the cache, or else converted by another process; or why OpenVINO cannot run it.

    Raises StartupError.
    """
    cache = Cache.of(source, settings.cache_dir, settings.output)
    if kept := cache.read():
        with contextlib.suppress(Exception):  # whatever is wrong with the copy, the original is still there
            export = Export.of(*kept)
            return (None, export.why) if export.why else (opened_from(export, lanes), "")
    with contextlib.ExitStack() as cleaning:
        elsewhere = Path(tempfile.mkdtemp(prefix="keras-server-"))
        cleaning.callback(shutil.rmtree, elsewhere, ignore_errors=True)
        job = Job(
            source.model,
            source.weights,
            source.unsafe,
            [str(file) for file in source.imports],
            settings.output,
            settings.cache_dir,
            useless=cache.was_read,
            elsewhere=str(elsewhere),
        )
        try:
            export = Export.read(convert_in_child(source.name, job))
        except (Crashed, ExportError) as error:
            return None, str(error)
        if export.why:
            return None, export.why
        opened = opened_from(export, lanes)
        if export.folder == elsewhere:  # which heat maps are read from later
            weakref.finalize(opened.explain, cleaning.pop_all().close)
        return opened, ""


def opened_from(export: Export, lanes: Lanes) -> Opened:
    """Open an export. Raises whatever OpenVINO does."""
    spec = export.spec
    explain = explaining(lanes, export.folder / "heat.xml", spec, export.explained, export.flaw)
    return Opened(lanes.open(export.folder / "model.xml", spec.batch), spec, explain)


def explaining(lanes: Lanes, heat: Any, spec: Spec, output: int, flaw: str) -> Callable[[], Cam]:
    """Return what makes heat maps with an OpenVINO model once they are asked for, or says the flaw that forbids it."""

    def explain() -> Cam:
        if flaw:
            raise Unexplainable(flaw)
        return lanes.explain(heat, spec, output)

    return explain


def open_with_keras(loaded: Loaded, settings: Settings) -> Opened:
    """Let Keras compute a model in this process: traced, if it then answers as it does layer by layer."""
    keras_model, spec, reference = loaded.model, loaded.spec, loaded.reference
    try:
        engine = KerasEngine(keras_model, settings.max_batch)
    except Exception as error:  # noqa: BLE001 - names with blanks, say, which TensorFlow takes in no graph
        log.warning("%s cannot be traced (%s): Keras calls it layer by layer.", spec.name, reason_of(error))
        engine = KerasEngine(keras_model, settings.max_batch, traced=False)
    if engine.function and reference and (words := reference.difference(batched(engine, spec.batch))):
        log.warning("Traced, %s answers otherwise (%s): Keras calls it layer by layer.", spec.name, words)
        engine = KerasEngine(keras_model, settings.max_batch, traced=False)
    spec = replace(spec, engine=engine.name)
    return Opened(batched(engine, spec.batch), spec, lambda: keras_cam(keras_model, spec, settings.output))


def warm_up(engine: Engine, spec: Spec) -> None:
    """Compute a row, of a size that the model is known to take. Raises what the engine raises."""
    if spec.sizes:
        random = np.random.default_rng(0)
        pairs = zip(spec.inputs, spec.sizes, strict=True)
        # Tokens of the least vocabulary are tokens of any.
        engine([random_input(tensor, (1, *size), random, 2) for tensor, size in pairs])
