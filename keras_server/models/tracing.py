"""A Keras model as one function from flat inputs to flat outputs."""

from __future__ import annotations

import contextlib
import os
import re
from importlib.util import find_spec
from typing import Any

from keras_server.models.errors import StartupError

SMALL = 4096  # numbers of a weight that is copied into a function: nearly all but the kernels


def check_keras() -> None:
    """Raise StartupError where Keras and TensorFlow are not installed; neither is imported."""
    missing = [package for package in ("keras", "tensorflow") if not find_spec(package)]
    if missing:
        raise StartupError(
            f"{' and '.join(missing)} must be installed to convert a model (pip install -r requirements.txt); without, "
            "only what `keras-server export MODEL FOLDER` has written can be served, with --model FOLDER."
        )


def import_keras() -> Any:
    """Import Keras, without the greetings of TensorFlow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    return keras


def trace(keras_model: Any, constants: bool = False) -> Any:
    """Return one TensorFlow function from flat inputs to flat outputs that holds for every batch size.

    A model with a fixed batch size keeps it. `constants`: its weights are constants, see as_constants().
    """
    keras = import_keras()
    import tensorflow as tf

    structure, _ = structures(keras_model)

    signature = [tf.TensorSpec(t.shape, t.dtype) for t in keras_model.inputs]

    @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
    def forward(*inputs: Any) -> list[Any]:
        packed = keras.tree.pack_sequence_as(structure, inputs)
        with as_constants(keras_model) if constants else contextlib.nullcontext():
            flat: list[Any] = keras.tree.flatten(keras_model(packed, training=False))
        return flat

    return forward.get_concrete_function()


def as_constants(keras_model: Any) -> Any:
    """Return the scope, within a TensorFlow function, in which a model's weights are constants and not variables.

    OpenVINO's converter looks for each variable among all of them, several times: with a thousand it takes most of the
    time. Large ones are handed to it as tensors, since they would be copied into the function, which holds 2 GiB.
    """
    keras = import_keras()
    import tensorflow as tf

    variables = [variable for variable in keras_model.variables if isinstance(variable, keras.Variable)]
    with tf.init_scope():
        values = [tf.convert_to_tensor(variable.value) for variable in variables]
        values = [value.numpy() if value.shape.num_elements() <= SMALL else value for value in values]
    return keras.StatelessScope(zip(variables, values, strict=True))


def structures(keras_model: Any) -> tuple[Any, Any]:
    """Return how a model takes its inputs and gives its outputs: a tensor, or a list or dict of them."""
    keras = import_keras()
    if isinstance(keras_model, keras.Sequential):  # which knows them only as lists
        return keras_model.inputs[0], keras_model.outputs[0]
    return keras_model.input, keras_model.output


# How lines begin that say that something failed, and not why.
NOISE = (
    "Check '", "FrontEnd API", "Model wasn't", "Summary", "To facilitate", "Exception from", "Exception encountered",
)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """Return the innermost reason that an exception gives, in one line.

    OpenVINO puts it on a later line, among advice; Keras behind "Exception encountered", in colour.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    text = text.rpartition("Exception encountered: ")[2].partition("\nArguments received by")[0]
    if text.startswith("in user code:"):  # TensorFlow's traceback
        text = re.split(r"\n\s*[\w.]*(?:Error|Exception): ", text)[-1]
    lines = [line.strip().removeprefix("-- ") for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(NOISE)] or lines or [type(error).__name__]
    reason = " ".join(reasons[:2]) if reasons[0].endswith(":") else reasons[0]  # an example follows
    return reason[:300]
