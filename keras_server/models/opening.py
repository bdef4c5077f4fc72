"""From a source to an engine: from the cache, or loaded, described, converted, and held against Keras' own answers."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.images import PREPROCESS
from keras_server.machine import processors
from keras_server.models.convert import Reference, all_layers, convert, differs, random_input
from keras_server.models.engines import (
    Engine,
    FixedBatch,
    KerasEngine,
    OpenVINOEngine,
    accelerated,
    has_bfloat16,
)
from keras_server.models.errors import StartupError
from keras_server.models.export import Cache
from keras_server.models.labels import check_labels, read_labels
from keras_server.models.meaning import ask_noise, decide, last_activation, meaning_of
from keras_server.models.source import BUNDLED, Source, preprocess_of
from keras_server.models.spec import Spec, Tensor
from keras_server.models.tracing import import_keras, reason_of, structures
from keras_server.settings import Settings

log = logging.getLogger("keras_server")


def open_model(source: Source, settings: Settings) -> tuple[Engine, Spec]:
    """Return the engine of a model, warmed up, and its final spec. Raises StartupError."""
    try:
        engine, spec = open_engine(source, settings)
        engine = batched(engine, spec)
        warm_up(engine, spec)
    except StartupError:
        raise
    except Exception as error:
        log.debug("The model cannot be served", exc_info=True)
        raise StartupError(f"{source.name} cannot be served: {reason_of(error)}") from None
    spec = replace(spec, precision=settings.precision)
    if settings.labels:
        spec = replace(spec, labels=read_labels(Path(settings.labels)))
    spec = decide(spec, settings)
    if settings.labels:
        check_labels(spec.labels, classes_of(spec), spec.name)
    mode = settings.preprocess
    if mode != "auto":
        spec = replace(spec, preprocess=mode if mode in PREPROCESS else preprocess_of(mode.lower()))
    if spec.image and spec.image[2] != 3 and spec.preprocess not in ("none", "tf"):
        raise StartupError(f"--preprocess {mode} is for RGB, and {spec.name} takes {spec.image[2]} channels.")
    return engine, spec


def classes_of(spec: Spec) -> int | None:
    """Return how many classes there are to name, in the output that /predict answers from; None where it is no list."""
    return spec.classes if len(spec.outputs[spec.output].shape) == 1 else None


def open_engine(source: Source, settings: Settings) -> tuple[Engine, Spec]:
    """Return the engine that runs a model as the settings say, and the spec as the model itself has it.

    Raises StartupError.
    """
    if settings.precision == "bfloat16" and not has_bfloat16():
        raise StartupError("This processor has no bfloat16 arithmetic: leave --precision at float32.")
    on_openvino = settings.engine == "openvino" or (settings.engine == "auto" and not accelerated())
    how = (settings.precision, settings.engine_threads or processors(), settings.max_batch)
    cache = Cache(settings.cache_dir, source.name, source.files, {"unsafe": str(source.unsafe)})
    if on_openvino and (kept := cache.read()):
        with contextlib.suppress(Exception):  # whatever is wrong with the copy, the original is still there
            return OpenVINOEngine(kept[0], *how), Spec.from_json(kept[1])
    keras_model = source.load()
    spec = describe(source, keras_model)
    reference = None
    with contextlib.suppress(Exception):  # a model that computes nothing that we can think of is served unseen
        reference = Reference(keras_model, spec)
    if reference:
        spec = ask_noise(replace(spec, sizes=tuple(reference.sizes)), reference.noise)
        check_count(spec, reference.noise, len(reference.rows[0]))
        if not spec.batch:
            check_row_alone(reference)
    if on_openvino:
        try:
            engine = convert_and_check(keras_model, spec, reference, cache, how)
            return engine, replace(spec, engine=OpenVINOEngine.name)
        except Exception as error:  # noqa: BLE001 - a converter may fail in any way
            why = f"OpenVINO cannot run {source.name} ({reason_of(error)})"
            if settings.engine == "openvino":
                raise StartupError(f"{why}: try --engine keras.") from None
            log.warning("%s: Keras itself runs it, more slowly.", why)
    if settings.precision == "bfloat16":
        raise StartupError("--precision bfloat16 needs the engine openvino.")
    try:
        keras_engine = KerasEngine(keras_model, settings.max_batch)
    except Exception as error:  # noqa: BLE001 - names with blanks, say, which TensorFlow takes in no graph
        log.warning("%s cannot be traced (%s): Keras calls it layer by layer.", spec.name, reason_of(error))
        keras_engine = KerasEngine(keras_model, settings.max_batch, traced=False)
    if keras_engine.function and reference and (words := reference.difference(batched(keras_engine, spec))):
        log.warning("Traced, %s answers otherwise (%s): Keras calls it layer by layer.", spec.name, words)
        keras_engine = KerasEngine(keras_model, settings.max_batch, traced=False)
    return keras_engine, replace(spec, engine=keras_engine.name)


def check_count(spec: Spec, outputs: list[np.ndarray], rows: int) -> None:
    """Raise StartupError where an output has another number of rows than went in."""
    for tensor, output in zip(spec.outputs, outputs, strict=True):
        if output.ndim == 0 or len(output) != rows:
            raise StartupError(
                f"{spec.name} cannot be served: its output {tensor.name} has no row for each that goes in."
            )


def check_row_alone(reference: Reference) -> None:
    """Raise StartupError where a row alone has not one row of answers, or others than among others."""
    spec, rows = reference.spec, reference.rows
    alone = reference.predict([array[:1] for array in rows])
    check_count(spec, alone, 1)  # as many features as rows looked like rows
    suspects = [
        number
        for number, (output, together) in enumerate(zip(alone, reference.noise, strict=True))
        if together.dtype.kind == "f" and differs(np.concatenate([output, together[1:]]), together, np.zeros(()))
    ]
    moved = reference.movement(rows, reference.noise) if suspects else []
    for number in suspects:
        if moved[number].max() > np.abs(reference.noise[number]).max() / 1000:
            continue  # an answer that wavers by itself says nothing
        raise StartupError(
            f"{spec.name} cannot be served: its output {spec.outputs[number].name} mixes the rows of a batch, so that "
            "the answer to one client would depend on what others send meanwhile."
        )


def convert_and_check(
    keras_model: Any, spec: Spec, reference: Reference | None, cache: Cache, how: tuple[str, int, int]
) -> Engine:
    """Return the engine of a converted model that answers as Keras does, and keep it. Raises what is in the way."""
    if any(tensor.dtype == "string" for tensor in (*spec.inputs, *spec.outputs)):
        raise ValueError("it takes or gives text")
    if any(tensor.dtype == "float64" for tensor in (*spec.inputs, *spec.outputs)):
        raise ValueError("it takes or gives float64, and OpenVINO computes in float32")
    if not reference:
        raise ValueError("there is no size at which it could be compared with Keras")
    converted = convert(keras_model)
    _, threads, max_batch = how
    exact = OpenVINOEngine(converted, "float32", threads, max_batch)
    if words := reference.difference(batched(exact, spec)):
        raise ValueError(f"converted, {words}")
    cache.write(converted, asdict(replace(spec, engine=OpenVINOEngine.name)))
    return exact if how[0] == "float32" else OpenVINOEngine(converted, *how)


def batched(engine: Engine, spec: Spec) -> Engine:
    """Return an engine that takes any number of rows."""
    return FixedBatch(engine, spec.batch) if spec.batch else engine


def warm_up(engine: Engine, spec: Spec) -> None:
    """Compute a row, of a size that the model is known to take. Raises what the engine raises."""
    if spec.sizes:
        random = np.random.default_rng(0)
        pairs = zip(spec.inputs, spec.sizes, strict=True)
        # Tokens of the least vocabulary are tokens of any.
        engine([random_input(tensor, (1, *size), random, 2) for tensor, size in pairs])


def describe(source: Source, keras_model: Any) -> Spec:
    """Return the spec of the loaded model. Raises StartupError where it does not know its inputs."""
    stateful = next((layer for layer in all_layers(keras_model) if getattr(layer, "stateful", False) is True), None)
    if stateful:
        raise StartupError(
            f"{source.name} is stateful (its layer {stateful.name} remembers rows from call to call), which would "
            "mix the requests of several clients: save it with stateful=False."
        )
    for tensor in (*(getattr(keras_model, "inputs", None) or ()), *(getattr(keras_model, "outputs", None) or ())):
        if 0 in tensor.shape:  # OpenVINO ends the process
            raise StartupError(
                f"{source.name} cannot be served: a tensor of shape {tuple(tensor.shape)} goes in or comes out, which "
                "holds no numbers."
            )
    try:
        inputs, outputs = structures(keras_model)
        names = tensor_names(keras_model, inputs, outputs)
        tensors = [
            tuple(Tensor(n, tuple(t.shape[1:]), t.dtype) for n, t in zip(n_list, t_list, strict=True))
            for n_list, t_list in zip(names, (keras_model.inputs, keras_model.outputs), strict=True)
        ]
        batches = {t.shape[0] for t in keras_model.inputs}
    except (AttributeError, TypeError, ValueError, IndexError):
        raise StartupError(
            f"{source.name} does not know the shape of its input: call it on a batch before you save it or, if its "
            "class is your own, export it with model.export(FOLDER)."
        ) from None
    loss = source.loss
    meanings = tuple(
        replace(tensor, meaning=meaning_of(last_activation(keras_model, i), loss, tensor.shape, tensor.dtype))
        for i, tensor in enumerate(tensors[1])
    )
    preprocess = preprocess_of(source.name) if source.is_architecture else "none"
    spec = Spec(source.name, tensors[0], meanings, preprocess, batch=batches.pop() if len(batches) == 1 else None)
    return spec if source.is_architecture or source.path == BUNDLED else replace(spec, labels=())


def tensor_names(keras_model: Any, inputs: Any, outputs: Any) -> tuple[list[str], list[str]]:
    """Return the names of the inputs and outputs: those that the model's maker gave, and never a counter of Keras'."""
    keras = import_keras()
    # Of lists in a dict, a key may stand for several tensors.
    flat = isinstance(inputs, dict) and len(inputs) == len(keras_model.inputs)
    first = sorted(inputs) if flat else [t.name for t in keras_model.inputs]
    if isinstance(outputs, dict) and len(outputs) == len(keras_model.outputs):
        last = sorted(outputs)
    elif isinstance(keras_model, keras.Sequential):
        last = [keras_model.layers[-1].name]
    else:
        last = list(getattr(keras_model, "output_names", ())) or ["output"] * len(keras_model.outputs)
    return unique(first), unique(last)


def unique(names: list[str]) -> list[str]:
    """Return names that are all different: the second "dense" becomes dense_1."""
    seen: list[str] = []
    for name in names:
        number, candidate = 0, name
        while candidate in seen:
            number += 1
            candidate = f"{name}_{number}"
        seen.append(candidate)
    return seen
