"""From a source to an engine: an export opened with OpenVINO, which a process of its own has made, or Keras itself."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.explain.cam import Cam, Unexplainable, engine_cam, keras_cam
from keras_server.machine import processors
from keras_server.models.architectures import check_download
from keras_server.models.child import Crashed, convert_in_child
from keras_server.models.convert import Converted, Job, Loaded, convert_source, load_described
from keras_server.models.engines import (
    Engine,
    KerasEngine,
    OpenVINOEngine,
    accelerated,
    batched,
    has_bfloat16,
    read_copied,
)
from keras_server.models.errors import StartupError
from keras_server.models.export import Cache, Export, ExportError, keep, write_export
from keras_server.models.foreign import open_foreign
from keras_server.models.meaning import check_options, final_spec
from keras_server.models.precision import QUANTIZED, check_rows, choose, with_precision
from keras_server.models.reference import random_inputs
from keras_server.models.source import Source
from keras_server.models.spec import Spec
from keras_server.models.tracing import check_keras, reason_of
from keras_server.settings import Precision, Settings

log = logging.getLogger("keras_server")


@dataclass(frozen=True)
class Opened:
    """A model that can compute."""

    engine: Engine
    spec: Spec
    explain: Callable[[], Cam]  # makes what computes heat maps, or raises Unexplainable
    explained: int = -1  # the output that they are of


@dataclass(frozen=True)
class Lanes:
    """How OpenVINO is to compute."""

    precision: Precision
    threads: int
    max_batch: int

    def open(self, model: Any, spec: Spec) -> Engine:
        """Return the engine of an OpenVINO model, or of the .xml file of one."""
        rows = rows_of(spec, spec.batch or 1)
        return batched(OpenVINOEngine(model, self.precision, self.threads, self.max_batch, rows), spec.batch)

    def explain(self, model: Any, spec: Spec, output: int) -> Cam:
        """Return what computes heat maps with an OpenVINO model, for an output of a number."""
        return engine_cam(OpenVINOEngine(model, "float32", self.threads, 1), spec.outputs[output])


def open_model(source: Source, settings: Settings, name: str = "") -> Opened:
    """Return a model that has computed a row, and its final spec, under a name of its own or another.

    Raises StartupError.
    """
    if settings.precision == "bfloat16" and not has_bfloat16():
        raise StartupError("This processor has no bfloat16 arithmetic: leave --precision at float32.")
    if settings.calibrate and settings.precision not in QUANTIZED:
        log.warning("--calibrate changes nothing without --precision int8 or auto.")
    check_rows(source, settings)
    check_options(settings)
    try:
        opened = open_engine(source, settings)
        warm_up(opened.engine, opened.spec)
    except StartupError:
        raise
    except Exception as error:
        log.debug("The model cannot be served", exc_info=True)
        raise StartupError(f"{source.name} cannot be served: {reason_of(error)}") from None
    spec = final_spec(replace(opened.spec, name=name or opened.spec.name), settings)
    if spec.tested:
        log.info("%s", spec.tested)
    if opened.explained not in (-1, spec.output):
        had, asked = (spec.outputs[number].name for number in (opened.explained, spec.output))
        flaw = f"This export of {spec.name} has heat maps of its output {had}, and {asked} is served."
        return replace(opened, spec=spec, explain=refuse(flaw))
    return replace(opened, spec=spec)


def open_engine(source: Source, settings: Settings) -> Opened:
    """Return a model as the settings say, with the spec as the model itself has it. Raises StartupError."""
    if source.is_export and settings.engine == "keras":
        raise StartupError(f"--engine keras: {source.path} is an export for OpenVINO, without the Keras model.")
    if source.is_foreign and settings.engine == "keras":
        raise StartupError(f"--engine keras: {source.path} is no model of Keras, and OpenVINO alone reads it.")
    on_openvino = is_for_openvino(source, settings)
    plain: Precision = "bfloat16" if settings.precision == "bfloat16" else "float32"  # of what was not quantized
    lanes = Lanes(plain, settings.engine_threads or processors(), settings.max_batch)
    loaded: Loaded | None = None
    check_source(source)
    if on_openvino:
        if source.in_memory:
            converted = convert_source(source, settings.output)
            loaded, why = converted.loaded, converted.why
            if not why and settings.precision in QUANTIZED:
                return open_written(converted.models, converted.about, settings, lanes)
            if not why:
                heat = converted.heat  # what else was converted goes
                return opened_with(lanes, converted.model, lambda: heat, converted)
        else:
            opened, why = open_export(source, settings, lanes)
            if opened:
                return opened
        words = f"OpenVINO cannot run {source.name} ({why})"
        if settings.engine == "openvino":
            raise StartupError(f"{words}: try --engine keras.")
        log.warning("%s: Keras itself runs it, more slowly.", words)
    if settings.precision in ("bfloat16", "int8"):
        raise StartupError(f"--precision {settings.precision} needs the engine openvino.")
    return open_with_keras(loaded or load_described(source), settings)


def is_for_openvino(source: Source, settings: Settings) -> bool:
    """Return whether OpenVINO is to compute a model, if it can."""
    is_alien = source.is_export or source.is_foreign  # and Keras knows nothing of it
    return is_alien or settings.engine == "openvino" or (settings.engine == "auto" and not accelerated())


def check_source(source: Source) -> None:
    """Raise DownloadError, before Keras is imported, where a model's weights are not here and cannot be had."""
    if source.is_architecture and not source.in_memory and not source.files:
        check_download(source.name)


def open_export(source: Source, settings: Settings, lanes: Lanes) -> tuple[Opened | None, str]:
    """Return a model from its export, which may have to be made; or why OpenVINO cannot run it. Raises StartupError."""
    if source.is_foreign:
        model, spec = open_foreign(source.path or Path(), source.name)
        flaw = f"{source.name} is no model of Keras, so it cannot be explained."
        if settings.precision in QUANTIZED:
            about = {"spec": asdict(spec), "flaw": flaw, "explained": -1}
            return open_written({"model": model}, about, settings, lanes), ""
        spec = replace(spec, precision=lanes.precision)
        return Opened(lanes.open(model, spec), spec, refuse(flaw)), ""
    export = given_export(source) if source.is_export else kept_export(source, settings)
    if export and export.why:
        return None, export.why
    with contextlib.ExitStack() as cleaning:
        if export:
            export = with_precision(export, settings, cleaning)
            try:
                return opened_while(export, settings, lanes, cleaning, given=source.is_export), ""
            except Exception as error:
                if source.is_export or isinstance(error, StartupError):
                    raise
        # Whatever is wrong with the copy, the original is still there.
        export = make_export(source, settings, cleaning, useless=bool(export))
        if export.why:
            return None, export.why
        return opened_while(with_precision(export, settings, cleaning), settings, lanes, cleaning), ""


def open_written(models: dict[str, Any], about: dict[str, Any], settings: Settings, lanes: Lanes) -> Opened:
    """Return a model that is in memory only, quantized. Raises StartupError."""
    with contextlib.ExitStack() as cleaning:
        folder = Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="keras-server-")))
        write_export(folder, models, about)
        return opened_while(with_precision(Export.read(folder), settings, cleaning), settings, lanes, cleaning)


def opened_while(
    export: Export, settings: Settings, lanes: Lanes, cleaning: contextlib.ExitStack, given: bool = False
) -> Opened:
    """Open an export that goes with `cleaning`, once nobody can read heat maps from it. Raises as opened_from()."""
    opened = opened_from(export, settings, lanes, given)
    weakref.finalize(opened.explain, cleaning.pop_all().close)
    return opened


def export_of(source: Source, settings: Settings, cleaning: contextlib.ExitStack) -> Export:
    """Return the export that a source is, that the cache has, or that another process makes. Raises StartupError."""
    check_rows(source, settings)
    check_source(source)
    export = given_export(source) if source.is_export else kept_export(source, settings)
    return with_precision(export or make_export(source, settings, cleaning), settings, cleaning)


def given_export(source: Source) -> Export:
    """Return the export that a source is. Raises StartupError."""
    assert source.path
    try:
        return Export.read(source.path)
    except ExportError as error:
        raise StartupError(f"{error} Export the model anew: keras-server export MODEL {source.path}") from None


def kept_export(source: Source, settings: Settings) -> Export | None:
    """Return the export of a model that the cache has, if any."""
    kept = Cache.of(source, settings.cache_dir, settings.output).read()
    with contextlib.suppress(ExportError):
        return Export.of(*kept) if kept else None
    return None


def make_export(source: Source, settings: Settings, cleaning: contextlib.ExitStack, useless: bool = False) -> Export:
    """Have another process convert a model, and return its export, which may say why OpenVINO cannot run it.

    It goes with `cleaning` where the cache does not keep it; `useless` says that what the cache has cannot be opened.
    Raises StartupError.
    """
    check_keras()
    elsewhere = tempfile.mkdtemp(prefix="keras-server-")
    cleaning.callback(shutil.rmtree, elsewhere, ignore_errors=True)
    job = Job(
        source.model,
        source.weights,
        source.unsafe,
        [str(file) for file in source.imports],
        settings.output,
        settings.cache_dir,
        useless,
        elsewhere,
    )
    try:
        export = Export.read(convert_in_child(source.name, job))
    except (Crashed, ExportError) as error:
        return Export(Path(elsewhere), Spec(), why=str(error))
    if export.folder != Path(elsewhere):  # the cache keeps it
        cleaning.close()
    return export


def opened_from(export: Export, settings: Settings, lanes: Lanes, given: bool) -> Opened:
    """Open an export; one that was `given` may change meanwhile. Raises StartupError, or whatever OpenVINO does."""
    precision, tested = choose(export, settings)
    model, heat = export.folder / ("int8.xml" if precision == "int8" else "model.xml"), export.folder / "heat.xml"
    lanes = replace(lanes, precision=precision)
    if given:
        opened = opened_with(lanes, read_copied(model), lambda: read_copied(heat), export)
    else:
        kept = keep(export.folder)
        opened = opened_with(lanes, model, lambda: heat, export)
        if kept:
            weakref.finalize(opened.explain, kept.close)
    return replace(opened, spec=replace(opened.spec, tested=tested))


def opened_with(lanes: Lanes, model: Any, heat: Callable[[], Any], about: Export | Converted) -> Opened:
    """Open what was converted: OpenVINO models, or their .xml files. Raises whatever OpenVINO does."""
    spec, output = about.spec, about.explained
    explain = refuse(about.flaw) if about.flaw else lambda: lanes.explain(heat(), spec, output)
    return Opened(lanes.open(model, spec), replace(spec, precision=lanes.precision), explain, output)


def refuse(flaw: str) -> Callable[[], Cam]:
    """Return what says that there are no heat maps, and why."""

    def explain() -> Cam:
        raise Unexplainable(flaw)

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
    """Compute a row. Raises what the engine raises."""
    if rows := rows_of(spec, 1):
        engine(rows)


def rows_of(spec: Spec, rows: int) -> list[np.ndarray]:
    """Return so many random rows, of a size that the model is known to take; none where none is known."""
    # Tokens of the least vocabulary are tokens of any.
    return random_inputs(spec.inputs, spec.sizes, rows, 2) if spec.sizes else []
