"""Models that are none of Keras': ONNX, TensorFlow Lite and OpenVINO's own, as far as OpenVINO reads them itself.

Nothing of them but the file says what they are, so what it does not say is asked of the model: whether it takes any
number of rows, and what its numbers mean.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.models.engines import OpenVINOEngine, batched, read_copied
from keras_server.models.errors import StartupError
from keras_server.models.kinds import foreign_format
from keras_server.models.meaning import ask_noise, meaning_of
from keras_server.models.reference import ROWS, differs, random_inputs, sizes_to_try
from keras_server.models.spec import Spec, Tensor
from keras_server.models.tracing import reason_of

# What an output may pass through after the operation that says what it is.
PASSING = ("Reshape", "Squeeze", "Unsqueeze", "Convert", "FakeQuantize", "Transpose")
ACTIVATIONS = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
# Numpy's names for OpenVINO's types, which has others read as some of these: bits of bfloat16 as those of float16.
TYPES = {"boolean": "bool", "f16": "float16", "f32": "float32", "f64": "float64"} | {
    f"{letter}{bits}": f"{word}{bits}" for letter, word in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}
LARGEST_TOKEN = 2  # of the least vocabulary


def open_foreign(path: Path, name: str) -> tuple[Any, Spec]:
    """Return the OpenVINO model in a file and its spec, with no labels. Raises StartupError."""
    model = read(path)
    spec = describe(model, name, path)
    if spec.batch == 1:
        with contextlib.suppress(Exception):  # a model that takes one row and no other number
            freed = read(path)
            freed.reshape({port: [-1, *list(port.partial_shape)[1:]] for port in freed.inputs})
            loose = describe(freed, name, path)
            if not loose.batch and loose.outputs == spec.outputs:
                return freed, tried(freed, loose)
    try:
        return model, tried(model, spec)
    except StartupError:
        raise
    except Exception as error:  # noqa: BLE001 - OpenVINO raises anything
        raise StartupError(f"{path} cannot be served: {reason_of(error)}") from None


def read(path: Path) -> Any:
    """Return the OpenVINO model in a file, which OpenVINO tells by its ending. Raises StartupError."""
    ending = foreign_format(path)
    try:
        if ending == ".xml":
            return read_copied(path, path.with_suffix(".bin"))
        if path.suffix == ending:
            return read_copied(path)
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, f"model{ending}")
            link.symlink_to(path.resolve())
            return read_copied(link)
    except Exception as error:  # noqa: BLE001 - as above
        if missing := re.search(r"external data.*data_full_path: ([^,]+)", str(error), re.DOTALL):
            raise StartupError(f"{path} keeps its weights in {missing[1]}, which cannot be read.") from None
        # A link that was made for it stands for the path that begins the sentence.
        reason = re.sub(r" in file: .*", "", reason_of(error))
        raise StartupError(f"{path} cannot be read by OpenVINO: {reason}.") from None


def describe(model: Any, name: str, path: Path) -> Spec:
    """Return the spec of a model that OpenVINO has read. Raises StartupError where it has no axis for its rows."""
    inputs = tuple(tensor_of(port, path) for port in model.inputs)
    outputs = tuple(
        replace(tensor, meaning=meaning_of(activation_of(port), ("", False), tensor.shape, tensor.dtype))
        for port in model.outputs
        for tensor in (tensor_of(port, path),)
    )
    firsts = [port.partial_shape[0] for port in model.inputs]
    batches = {None if first.is_dynamic else first.get_length() for first in firsts}
    if len(batches) != 1:
        raise StartupError(f"{path} cannot be served: its inputs do not take the same number of rows.")
    return Spec(name, inputs, outputs, preprocess="none", labels=(), engine=OpenVINOEngine.name, batch=batches.pop())


def tensor_of(port: Any, path: Path) -> Tensor:
    """Return what goes into or comes out of a port. Raises StartupError for what no array can be."""
    name = port.any_name if port.names else port.node.friendly_name
    shape = port.partial_shape
    if shape.rank.is_dynamic or len(shape) == 0:
        raise StartupError(f"{path} cannot be served: its tensor {name} has no first axis for rows.")
    kind = port.element_type.get_type_name()
    if not (dtype := TYPES.get(kind)):
        raise StartupError(f"{path} cannot be served: its tensor {name} is of type {kind}, which numpy lacks.")
    return Tensor(name, tuple(None if size.is_dynamic else size.get_length() for size in list(shape)[1:]), dtype)


def activation_of(port: Any) -> str:
    """Return the name of the activation that an output comes out of, or "" where nobody can tell."""
    node = port.node.input_value(0).get_node()
    while node.get_type_name() in PASSING:
        node = node.input_value(0).get_node()
    return ACTIVATIONS.get(node.get_type_name(), "")


def tried(model: Any, spec: Spec) -> Spec:
    """Return the spec with a size that the model computes, and the meaning of what it answers to noise.

    Raises StartupError where a row has no answer of its own, or another among others; else what OpenVINO raises.
    """
    engine = batched(OpenVINOEngine(model, "float32", 1, 1), spec.batch)
    error: Exception = ValueError("there is no size to try it with")
    for sizes in sizes_to_try(spec):
        rows = random_inputs(spec.inputs, sizes, ROWS, LARGEST_TOKEN)
        try:
            together = engine(rows)
        except Exception as reason:  # noqa: BLE001 - not every length suits every model
            error = reason
            continue
        alone = [engine([array[row : row + 1] for array in rows]) for row in range(ROWS)]
        for number, tensor in enumerate(spec.outputs):
            answers = [answer[number] for answer in alone]
            if any(answer.shape != (1, *together[number].shape[1:]) for answer in answers) or differs(
                np.concatenate(answers), together[number], np.zeros(())
            ):
                raise StartupError(
                    f"{spec.name} cannot be served: in its output {tensor.name} a row alone has another answer than "
                    "among others."
                )
        return ask_noise(replace(spec, sizes=tuple(sizes)), together)
    raise error
