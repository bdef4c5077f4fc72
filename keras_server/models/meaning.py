"""What the numbers of a model mean: asked of its last layers and its loss, then of the settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from keras_server.images import PREPROCESS
from keras_server.models.architectures import PREPROCESS_OF
from keras_server.models.calibration import look
from keras_server.models.errors import StartupError
from keras_server.models.labels import check_labels, read_labels
from keras_server.models.spec import Meaning, Spec
from keras_server.settings import Settings

log = logging.getLogger("keras_server")

PASSING = ("Flatten", "Reshape", "Dropout", "Identity", "ActivityRegularization", "Activation", "GaussianNoise")
SQUASHING = ("softmax", "sigmoid", "hard_sigmoid")


def last_activation(keras_model: Any, output: int) -> str:
    """Return the name of the activation that an output comes out of, "linear" for none, "" where nobody can tell."""
    layers = list(getattr(keras_model, "layers", ()))
    if original := getattr(layers[-1], "original", None) if layers else None:  # in the shell of files.py
        return last_activation(original, output) if hasattr(original, "layers") else ""
    names = getattr(keras_model, "output_names", None)
    if names and len(names) > output and len(set(names)) == len(names):
        layers = [layer for layer in layers if layer.name == names[output]]
    elif len(getattr(keras_model, "outputs", ())) != 1:
        return ""
    layer = layers[-1] if layers else None
    while layer is not None:
        name = type(layer).__name__
        if hasattr(layer, "layers"):  # a nested model
            return last_activation(layer, 0)
        if name in ("Softmax", "Sigmoid", "ReLU", "LeakyReLU", "PReLU", "ELU"):
            return name.lower()
        activation = getattr(layer, "activation", None)
        function = getattr(activation, "__name__", "") if activation is not None else ""
        if function and function != "linear":
            return str(function)
        if function == "linear" and name not in PASSING:
            return "linear"
        if name not in PASSING:
            return ""
        layer = before(keras_model, layer)
    return ""


def before(keras_model: Any, layer: Any) -> Any:
    """Return the layer that another one gets its only input from, or None."""
    try:
        source = layer.input
        return next(other for other in keras_model.layers if other is not layer and other.output is source)
    except (AttributeError, ValueError, StopIteration):
        return None


def meaning_of(activation: str, loss: tuple[str, bool], shape: tuple[int | None, ...], dtype: str) -> Meaning:
    """Return what an output is, by its activation, and by the loss it was trained with and whether on logits."""
    name, on_logits = loss
    if not dtype.startswith(("float", "bfloat")) or len(shape) != 1:
        return "values"
    if activation in SQUASHING:
        return "values" if activation == "softmax" and shape[-1] == 1 else "probabilities"
    if activation == "":
        return "unknown"
    if activation != "linear":
        return "values"
    if on_logits or "crossentropy" in name:
        return "binary logits" if "binary" in name or shape[-1] == 1 else "logits"
    if name:  # a mean squared error, or its kind
        return "values"
    return "values" if shape[-1] == 1 else "logits"


def ask_noise(spec: Spec, outputs: list[np.ndarray]) -> Spec:
    """Return the spec with a meaning for each output that nobody knows: what it answers to noise tells the most."""
    tensors = list(spec.outputs)
    for number, (tensor, values) in enumerate(zip(tensors, outputs, strict=True)):
        if tensor.meaning != "unknown":
            continue
        meaning: Meaning = "values"
        if values.dtype.kind == "f" and values.ndim == 2:
            within = np.isfinite(values).all() and values.min() >= -1e-3 and values.max() <= 1 + 1e-3
            meaning = "probabilities" if within else "values" if values.shape[1] == 1 else "logits"
        tensors[number] = replace(tensor, meaning=meaning)
    return replace(spec, outputs=tuple(tensors))


def decide(spec: Spec, settings: Settings) -> Spec:
    """Return the spec with what /predict answers, from which output and how. Raises StartupError."""
    name = spec.name
    output = choose_output(spec, settings.output)
    elsewhere = f"/v2/models/{name}/infer or to /v1/models/{name}:predict"
    if not spec.image:
        reason = f"{name} takes no images: send its inputs as JSON to {elsewhere}."
        return replace(spec, kind="none", output=max(output, 0), reason=reason)
    if spec.inputs[0].dtype == "int8":
        reason = f"{name} takes pictures as int8, which only its maker knows how to write: send them to {elsewhere}."
        return replace(spec, kind="none", output=max(output, 0), reason=reason)
    if output < 0:
        names = ", ".join(tensor.name for tensor in spec.outputs)
        reason = (
            f"{name} has several outputs: start the server with --output and one of {names}, or send images to "
            f"{elsewhere}."
        )
        return replace(spec, kind="none", output=0, reason=reason)
    tensor = spec.outputs[output]
    spec = replace(spec, output=output)
    if len(tensor.shape) != 1 or not tensor.dtype.startswith(("float", "bfloat")):
        shape = [-1, *(-1 if length is None else length for length in tensor.shape)]
        reason = (
            f"{name} takes images, but its output {tensor.name} is no list of classes: it is {tensor.dtype} of shape "
            f"{shape}. Send images to {elsewhere}."
        )
        return replace(spec, kind="none", reason=reason)
    return with_activation(spec, settings)


def choose_output(spec: Spec, requested: str) -> int:
    """Return the output that /predict answers from, or -1 where several may be meant. Raises StartupError."""
    names = [tensor.name for tensor in spec.outputs]
    if requested:
        if requested not in names:
            raise StartupError(f"--output: {spec.name} has no output {requested}: it has {', '.join(names)}.")
        return names.index(requested)
    if len(names) == 1:
        return 0
    lists = [i for i, t in enumerate(spec.outputs) if t.meaning in ("probabilities", "logits", "binary logits")]
    return lists[0] if len(lists) == 1 else -1


def with_activation(spec: Spec, settings: Settings) -> Spec:
    """Return the spec of a list of numbers with what makes probabilities of it, or as values."""
    tensor, activation = spec.outputs[spec.output], settings.activation
    meaning = tensor.meaning
    if meaning == "values" and tensor.shape[-1] == 1 and len(spec.labels) == 2:
        meaning = "binary logits"
    if activation in ("softmax", "sigmoid"):
        return replace(spec, kind="classes", activation=activation)
    if meaning == "values" or (activation == "none" and "logits" in meaning):
        log.info(
            "The output %s is no list of probabilities: /predict answers with its values "
            "(--activation softmax or sigmoid makes classes of them).",
            tensor.name,
        )
        return replace(spec, kind="values")
    activation = {"logits": "softmax", "binary logits": "sigmoid"}.get(meaning, "none")
    if activation != "none":
        log.info("The outputs are logits: the server applies %s (--activation none would not).", activation)
    return replace(spec, kind="classes", activation=activation)


def check_options(settings: Settings) -> None:
    """Raise StartupError for options that no model could take, before one is loaded."""
    preprocessing(settings.preprocess)
    if settings.labels:
        read_labels(Path(settings.labels))
    if settings.calibrate and settings.precision in ("int8", "auto"):
        look(Path(settings.calibrate))


def final_spec(spec: Spec, settings: Settings) -> Spec:
    """Return the spec of a model with what the settings say of it. Raises StartupError."""
    labels = read_labels(Path(settings.labels)) if settings.labels else spec.labels
    spec = replace(spec, labels=labels, preprocess=preprocessing(settings.preprocess) or spec.preprocess)
    spec = decide(spec, settings)
    if settings.labels:
        check_labels(spec.labels, settings.labels, classes_of(spec), spec.name)
    if spec.image and spec.image[2] != 3 and spec.preprocess not in ("none", "unit", "tf"):
        raise StartupError(
            f"--preprocess {settings.preprocess} is for RGB, and {spec.name} takes {spec.image[2]} channels."
        )
    if spec.image and spec.inputs[0].dtype.startswith(("int", "uint")) and spec.preprocess != "none":
        raise StartupError(
            f"--preprocess {settings.preprocess} gives fractions, and {spec.name} takes whole numbers: leave it out."
        )
    return spec


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
