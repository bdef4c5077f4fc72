"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): the map of one label over one picture, as a TensorFlow function.

Each channel of the last convolutional features is weighted with how much the label's score grows with it; where the
weighted sum is positive, the picture speaks for the label. All of it is found in the graph of TensorFlow's operations,
so that it does not matter which Keras, or what nesting of models, they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_server.explain.gradients import plain_gradients
from keras_server.models.engines import Engine
from keras_server.models.meaning import choose_output
from keras_server.models.spec import Spec, Tensor
from keras_server.models.tracing import as_constants, import_keras, reason_of, structures

Operation = Any  # tf.Operation
Symbol = Any  # tf.Tensor of a graph

CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput")
POOLINGS = ("MaxPool", "AvgPool")
GRIDS = (*CONVOLUTIONS, *POOLINGS, "BatchToSpaceND")  # the last ends a dilated convolution
RESHAPING = ("Identity", "Reshape", "Squeeze", "Cast", "StopGradient", "PreventGradient", "IdentityN")
ABOUT_SHAPES = ("Shape", "ShapeN", "Size", "Rank")  # what they say of a tensor hangs on no pixel


Cam = Callable[
    [np.ndarray, int], np.ndarray
]  # a picture, (1, h, w, channels), and a class to their map, (rows, columns)


class Unexplainable(Exception):
    """The model that is served cannot be explained; the message is a sentence for the client."""


def direction_of(label: int, output: Tensor) -> np.ndarray:
    """Return how much of each score speaks for a label: float32, shape (1, numbers of the output), -1 to 1.

    One score alone speaks for the second of two classes, or against it for the first.
    """
    (numbers,) = output.shape
    if numbers == 1:
        return np.array([[1 if label else -1]], np.float32)
    return np.eye(1, numbers, label, np.float32)


def engine_cam(engine: Engine, output: Tensor) -> Cam:
    """Return what computes the heat maps of an output with the engine of a converted heat_function()."""
    return lambda picture, label: engine([picture, direction_of(label, output)])[0]


def keras_cam(keras_model: Any, spec: Spec, requested: str) -> Cam:
    """Return what computes the heat maps of the requested output with TensorFlow. Raises Unexplainable."""
    number = choose_output(spec, requested)
    function = heat_function(keras_model, spec, number)
    return lambda picture, label: np.asarray(function(picture, direction_of(label, spec.outputs[number])))


def heat_function(keras_model: Any, spec: Spec, output: int) -> Any:
    """Return the TensorFlow function of a picture and a direction to the picture's map, by the output of a number.

    The picture is prepared, shape (1, height, width, channels); the direction comes from direction_of(). The map has
    the shape (rows, columns), and no value below 0. Raises Unexplainable where the model has no features to show.
    """
    name = spec.name
    keras = import_keras()
    if keras.backend.backend() != "tensorflow":
        raise Unexplainable(
            f"Explanations need Keras on TensorFlow, and this server runs it on {keras.backend.backend()}."
        )
    import tensorflow as tf

    if not spec.image or spec.image[3]:
        raise Unexplainable(f"{name} takes no pictures with their channels last, so it cannot be explained.")
    if output < 0 or len(spec.outputs[output].shape) != 1:
        raise Unexplainable(f"{name} has no output that is a list of classes, so it cannot be explained.")
    source, answer = keras_model.inputs[0], keras_model.outputs[output]
    structure, _ = structures(keras_model)
    overrides = plain_gradients()
    nothing = f"{name} has no convolutional features before its labels, so it cannot be explained."
    signature = [
        tf.TensorSpec((1, *source.shape[1:]), source.dtype, "picture"),
        tf.TensorSpec((1, answer.shape[-1]), tf.float32, "direction"),
    ]

    @tf.autograph.experimental.do_not_convert  # type: ignore[untyped-decorator]
    def heat(picture: Symbol, outputs: list[Symbol], direction: Symbol) -> Symbol:
        scores = logits(outputs[output])
        features = last_features(picture, scores)
        if features is None:
            raise Unexplainable(nothing)
        scores = tf.reshape(tf.cast(scores, tf.float32), (1, -1))
        (gradient,) = tf.gradients(tf.reduce_sum(scores * direction), features)
        weights = tf.reduce_mean(tf.cast(gradient, tf.float32), axis=(0, 1, 2))  # (channels,)
        return tf.nn.relu(tf.linalg.matvec(tf.cast(features[0], tf.float32), weights))

    @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
    def explain(picture: Symbol, direction: Symbol) -> Symbol:
        # Functions in it, as Keras has them for grouped convolutions, become operations of this graph.
        tf.config.run_functions_eagerly(True)
        try:
            graph = tf.compat.v1.get_default_graph()
            with graph.gradient_override_map(overrides), as_constants(keras_model):
                outputs = keras_model(keras.tree.pack_sequence_as(structure, [picture]), training=False)
        finally:
            tf.config.run_functions_eagerly(False)
        return heat(picture, keras.tree.flatten(outputs), direction)

    try:
        return explain.get_concrete_function()
    except Unexplainable:  # in whose sentence TensorFlow has put where in the code it was raised
        raise Unexplainable(nothing) from None
    except Exception as error:  # noqa: BLE001 - a layer that takes no batch of one, an operation without a gradient
        raise Unexplainable(f"The heat maps of {name} cannot be computed ({reason_of(error)}).") from None


def logits(output: Symbol) -> Symbol:
    """Return the scores before the softmax or sigmoid that ends in `output`; `output` itself where there is none.

    The gradient of a probability says what separates a label from the others, and fades where the model is sure; the
    paper takes the score.
    """
    tensor = output
    while tensor.op.type in RESHAPING:
        tensor = tensor.op.inputs[0]
    return tensor.op.inputs[0] if tensor.op.type in ("Softmax", "Sigmoid") else output


def last_features(picture: Symbol, scores: Symbol) -> Symbol | None:
    """Return the last map that all scores hang on, before it is merely pooled; None where there is none.

    It has a batch, height, width and channels; it is not one pixel; and it lies on the grid of a convolution before it,
    as four axes may also be the heads of an attention.
    """
    for tensor, before in bottlenecks(picture, scores):
        operations = [earlier.op for earlier in (*before, tensor)]
        grids = {grid(op.outputs[0]) for op in operations if op.type in GRIDS}
        convolved = any(op.type in CONVOLUTIONS for op in operations)
        if convolved and grid(tensor) in grids - {None, (1, 1)} and tensor.op.type not in POOLINGS:
            return tensor
    return None


def grid(tensor: Symbol) -> tuple[int, int] | None:
    """Return the rows and columns of a tensor with four axes, of one picture and not of its parts."""
    return tuple(tensor.shape[1:3]) if tensor.shape.rank == 4 and tensor.shape[0] == 1 else None


def bottlenecks(picture: Symbol, scores: Symbol) -> Iterator[tuple[Symbol, list[Symbol]]]:
    """Yield from the last to the first each tensor that everything after it depends on, with all that lies before it.

    Between two of them the graph may branch as it likes.
    """
    ordered = between(picture, scores)
    known = {tensor.ref() for tensor in ordered}
    needed = {scores.ref()}
    while ordered:
        tensor = ordered.pop()
        if tensor.ref() not in needed:
            continue
        if len(needed) == 1:
            yield tensor, ordered
        needed.remove(tensor.ref())
        needed |= {source.ref() for source in sources(tensor)} & known


def between(picture: Symbol, scores: Symbol) -> list[Symbol]:
    """Return the tensors that hang on the picture and that the scores hang on, each after those it is computed from."""
    ordered: dict[Any, bool] = {picture.ref(): True}  # whether it hangs on the picture
    stack = [(scores, False)]
    while stack:
        tensor, done = stack.pop()
        if done:
            ordered.setdefault(tensor.ref(), any(ordered.get(source.ref(), False) for source in sources(tensor)))
        elif tensor.ref() not in ordered:
            stack += [(tensor, True), *((source, False) for source in sources(tensor))]
    return [reference.deref() for reference, hangs in ordered.items() if hangs]


def sources(tensor: Symbol) -> list[Symbol]:
    """Return the tensors that a tensor's numbers are computed from."""
    return [] if tensor.op.type in ABOUT_SHAPES else list(tensor.op.inputs)
