"""The program that converts a model and ends: python -m keras_server.models.convert, see task.py.

It loads a model with Keras, converts it for OpenVINO with its heat map, holds both against Keras' own answers, and
writes an export. The server has neither TensorFlow nor Keras in its process; see child.py for its side of this.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.explain.cam import Unexplainable, direction_of, heat_function
from keras_server.models.describe import check_count, check_row_alone, describe
from keras_server.models.engines import OpenVINOEngine, batched, openvino
from keras_server.models.errors import StartupError
from keras_server.models.export import Cache, write_export
from keras_server.models.meaning import ask_noise, choose_output
from keras_server.models.reference import Reference, differs, nudged
from keras_server.models.source import Source
from keras_server.models.spec import Spec
from keras_server.models.task import Stage, perform
from keras_server.models.tracing import import_keras, reason_of, trace

log = logging.getLogger("keras_server")


class ConversionError(Exception):
    """The model cannot be had in OpenVINO's form with the same answers; the message says why."""


@dataclass(frozen=True)
class Job:
    """What is to be converted, and where the export may lie."""

    model: str  # as --model names it, and likewise the next four
    weights: str
    unsafe: bool
    imports: Sequence[str]
    output: str
    cache_dir: str
    useless: bool  # what the cache holds
    elsewhere: str  # an empty folder, for what the cache cannot keep


@dataclass(frozen=True)
class Loaded:
    """A model in Keras, what it takes and gives, and what it answers; None where nothing is known that it computes."""

    model: Any
    spec: Spec
    reference: Reference | None


@dataclass(frozen=True)
class Converted:
    """A model in OpenVINO's form, with what cannot be had of it."""

    loaded: Loaded
    model: Any  # None, where `why` says why OpenVINO cannot run it
    heat: Any = None  # None, where `flaw` says why it has no heat maps
    why: str = ""
    flaw: str = ""
    explained: int = 0  # the output that the heat maps are of

    @property
    def spec(self) -> Spec:
        """What it takes and gives, as the model itself has it."""
        return self.loaded.spec

    @property
    def about(self) -> dict[str, Any]:
        """What its export says, as JSON."""
        return {"spec": asdict(self.spec), "why": self.why, "flaw": self.flaw, "explained": self.explained}

    @property
    def models(self) -> dict[str, Any]:
        """OpenVINO's models, by the names of their files."""
        return {name: model for name, model in (("model", self.model), ("heat", self.heat)) if model}


def load_described(source: Source) -> Loaded:
    """Load a model and find out what it is. Raises StartupError where it cannot be served at all."""
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
    return Loaded(keras_model, spec, reference)


def convert_source(source: Source, output: str, stage: Stage = lambda words: None) -> Converted:
    """Load a model and convert it, with a heat map of the output of this name. Raises StartupError."""
    stage("loading it with Keras")
    loaded = load_described(source)
    try:
        model = checked(loaded, stage)
    except Exception as error:  # noqa: BLE001 - a converter may fail in any way
        return Converted(loaded, None, why=reason_of(error))
    loaded = replace(loaded, spec=replace(loaded.spec, engine=OpenVINOEngine.name))
    stage("converting its heat maps")
    explained = choose_output(loaded.spec, output)
    try:
        return Converted(loaded, model, convert_heat(loaded, explained), explained=explained)
    except Unexplainable as error:
        return Converted(loaded, model, flaw=str(error), explained=explained)


def checked(loaded: Loaded, stage: Stage) -> Any:
    """Return the OpenVINO model, which answers as Keras does. Raises what is in the way."""
    tensors = (*loaded.spec.inputs, *loaded.spec.outputs)
    if any(tensor.dtype == "string" for tensor in tensors):
        raise ConversionError("it takes or gives text")
    if any(tensor.dtype == "float64" for tensor in tensors):
        raise ConversionError("it takes or gives float64, and OpenVINO computes in float32")
    if not loaded.reference:
        raise ConversionError("there is no size at which it could be compared with Keras")
    stage("converting it for OpenVINO")
    converted = convert(loaded.model)
    stage("comparing the answers with Keras' own")
    if words := loaded.reference.difference(batched(OpenVINOEngine(converted, "float32", 1, 1), loaded.spec.batch)):
        raise ConversionError(f"converted, {words}")
    return converted


def convert(keras_model: Any) -> Any:
    """Return the OpenVINO model with the Keras model's inputs and outputs, in its order.

    Raises ConversionError, or whatever the converter does.
    """
    keras = import_keras()
    if keras.backend.backend() != "tensorflow":
        raise ConversionError(f"Keras runs on {keras.backend.backend()}, and OpenVINO converts from TensorFlow")
    return convert_function(trace(keras_model, constants=True), len(keras_model.inputs))


def convert_function(function: Any, inputs: int) -> Any:
    """Return the OpenVINO model of a TensorFlow function with so many inputs. Raises as convert() does."""
    # Not shared: TensorFlow frees the weights once the Keras model is gone, and the answers would turn to noise.
    converted = openvino().convert_model(function, share_weights=False)
    # Operations whose result nobody uses become results, too: only those that the function returns are wanted.
    results = by_tensor_name(converted.get_results(), [tensor.name for tensor in function.outputs])
    parameters = by_tensor_name(converted.get_parameters(), [tensor.name for tensor in function.inputs[:inputs]])
    return openvino().Model(results, converted.get_sinks(), parameters, "model")


def by_tensor_name(nodes: list[Any], names: list[str]) -> list[Any]:
    """Return OpenVINO's nodes for TensorFlow's tensors, in their order. Raises ConversionError where one is missing."""
    known = {name: node for node in nodes for name in node.output(0).get_names()}
    known |= {node.get_friendly_name(): node for node in nodes}  # of an output that is an input as it came
    try:
        return [known[name if name in known else name.removesuffix(":0")] for name in names]
    except KeyError as error:
        raise ConversionError(f"its tensor {error} has no counterpart in the converted model") from None


def convert_heat(loaded: Loaded, output: int) -> Any:
    """Return the OpenVINO model of heat_function(), for the output of a number, which gives the same maps.

    Raises Unexplainable.
    """
    spec, reference = loaded.spec, loaded.reference
    function = heat_function(loaded.model, spec, output)
    try:
        converted = convert_function(function, 2)
        assert reference is not None  # or it would not have been converted
        picture = reference.rows[0][:1]
        direction = direction_of(0, spec.outputs[output])
        expected, moved = (np.asarray(function(array, direction)) for array in (picture, nudged(picture)))
        (actual,) = OpenVINOEngine(converted, "float32", 1, 1)([picture, direction])
        if words := differs(actual, expected, np.abs(moved - expected)):
            raise ConversionError(f"converted, its heat map {words}")
    except Exception as error:  # noqa: BLE001 - as above
        raise Unexplainable(f"The heat maps of {spec.name} cannot be had in OpenVINO ({reason_of(error)}).") from None
    return converted


def do(job: Job, stage: Stage) -> Path:
    """Convert a model, and return the folder of its export. Raises StartupError."""
    source = Source(job.model, job.weights, job.unsafe, job.imports)
    converted = convert_source(source, job.output, stage)
    stage("writing it")
    cache = Cache.of(source, job.cache_dir, job.output)
    cache.was_read = job.useless
    if cache.write(converted.models, converted.about):
        return cache.entry
    folder = Path(job.elsewhere)
    try:
        write_export(folder, converted.models, converted.about)
    except (OSError, RuntimeError) as error:
        raise StartupError(
            f"The converted model can be written neither to --cache-dir nor to {folder} ({reason_of(error)}): make "
            "room for it."
        ) from None
    return folder


if __name__ == "__main__":
    sys.exit(perform(Job, do))
