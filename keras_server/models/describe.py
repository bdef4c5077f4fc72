"""What a loaded Keras model takes and gives, and whether its rows can be served to several clients at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from keras_server.models.architectures import PREPROCESS_OF
from keras_server.models.errors import StartupError
from keras_server.models.meaning import last_activation, meaning_of
from keras_server.models.reference import Reference, all_layers, differs
from keras_server.models.source import Source
from keras_server.models.spec import Spec, Tensor
from keras_server.models.tracing import import_keras, structures


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
    preprocess = PREPROCESS_OF[source.name] if source.is_architecture else "none"
    spec = Spec(source.name, tensors[0], meanings, preprocess, batch=batches.pop() if len(batches) == 1 else None)
    return spec if source.has_labels else replace(spec, labels=())


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
