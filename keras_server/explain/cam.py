"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): the map of one label over one picture, from a Keras model.

Each channel of the last convolutional features is weighted with how much the label's score grows with it; where the
weighted sum is positive, the picture speaks for the label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Cam = Callable[[np.ndarray, int], np.ndarray]  # a picture, (1, h, w, 3), and a class to their map, (rows, columns)


class Unexplainable(Exception):
    """The model that is served cannot be explained; the message is a sentence for the client."""


# ----------------------------------------------------------------------------------------------------------
# The model, cut in two at its last convolutional features
# ----------------------------------------------------------------------------------------------------------


def producer(tensor: Any) -> Any:
    """Return the layer, nested model or other operation that a symbolic tensor comes out of."""
    return tensor._keras_history.operation


def parents(tensor: Any) -> list[Any]:
    """Return the symbolic tensors that a symbolic tensor is computed from."""
    node = producer(tensor)._inbound_nodes[tensor._keras_history.node_index]
    return list(node.input_tensors)


def is_graph(operation: Any) -> bool:
    """Return whether this is a model with layers to look into, from one input to one output."""
    import keras

    return isinstance(operation, keras.Model) and all(
        len(getattr(operation, ends, None) or ()) == 1 for ends in ("inputs", "outputs")
    )


def bottlenecks(output: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Yield from the last to the first each tensor that everything after it depends on, with all that lies before it.

    Between two of them the model may branch as it likes; at one of them it can be cut in two.
    """
    ordered: dict[int, Any] = {}  # each tensor after those that it is computed from
    stack = [(output, False)]
    while stack:
        tensor, done = stack.pop()
        if done:
            ordered.setdefault(id(tensor), tensor)
        elif id(tensor) not in ordered:
            stack += [(tensor, True), *((parent, False) for parent in parents(tensor))]
    rest = [*ordered.values()]
    needed = {id(output)}
    while rest:
        if len(needed) == 1:
            yield rest[-1], rest[:-1]
        tensor = rest.pop()
        needed = needed - {id(tensor)} | {id(parent) for parent in parents(tensor)}


def is_map(tensor: Any) -> bool:
    """Return whether a symbolic tensor is a picture of features: batch, height, width, channels, and not one pixel."""
    return len(tensor.shape) == 4 and tensor.shape[1:3] != (1, 1)


def has_kernel(tensor: Any) -> bool:
    """Return whether the operation behind a symbolic tensor convolves: its kernel has four axes."""
    return any(len(weight.shape) == 4 for weight in getattr(producer(tensor), "weights", ()))


def only_pools(tensor: Any) -> bool:
    """Return whether a map is merely a coarser copy of the one before it."""
    before = parents(tensor)
    return (
        len(before) == 1
        and is_map(before[0])
        and not getattr(producer(tensor), "weights", ())
        and tensor.shape[1:3] != before[0].shape[1:3]
    )


def logits(output: Any) -> Any:
    """Return the scores before the softmax or sigmoid that ends in `output`; `output` itself where there is none.

    The gradient of a probability says what separates a label from the others, and fades where the model is sure; the
    paper takes the score.
    """
    import keras

    last = producer(output)
    squashes = (keras.activations.softmax, keras.activations.sigmoid)
    if is_graph(last):
        scores = logits(last.outputs[0])
        return output if scores is last.outputs[0] else keras.Model(last.inputs[0], scores)(parents(output)[0])
    if getattr(last, "activation", None) in squashes and last.weights:  # a twin of the layer that stops before it
        twin = type(last).from_config(last.get_config() | {"activation": "linear"})
        scores = twin(parents(output)[0])
        twin.set_weights(last.get_weights())
        return scores
    if getattr(last, "activation", None) in squashes or type(last).__name__ in ("Softmax", "Sigmoid"):
        return parents(output)[0]
    return output


def cut(source: Any, output: Any) -> tuple[list[Any], list[Any]] | None:
    """Return the models that lead to the last convolutional features and those that follow, each to be run in turn.

    The features are the last map that everything after depends on, before it is merely pooled. None: there are none.
    """
    import keras

    for tensor, before in bottlenecks(output):
        after = [] if tensor is output else [keras.Model(tensor, output)]
        inner = producer(tensor)
        if is_graph(inner) and (inside := cut(inner.inputs[0], inner.outputs[0])):
            (start,) = parents(tensor)
            return [keras.Model(source, start), *inside[0]], [*inside[1], *after]
        if is_map(tensor) and not only_pools(tensor) and any(has_kernel(t) for t in (tensor, *before)):
            return [keras.Model(source, tensor)], after
    return None


def grad_cam(keras_model: Any, name: str) -> Cam:
    """Return the function that explains an image classifier. Raises Unexplainable."""
    import keras

    if keras.backend.backend() != "tensorflow":
        raise Unexplainable(
            f"Explanations need Keras on TensorFlow, and this server runs it on {keras.backend.backend()}."
        )
    import tensorflow as tf

    if hasattr(keras_model.layers[-1], "original"):  # the shell of models/files.py
        raise Unexplainable(f"{name} comes from Keras 2 or a SavedModel, and only layers of Keras 3 can be explained.")
    (source,), output = keras_model.inputs, keras_model.outputs[0]
    parts = cut(source, logits(output))
    if not parts or not parts[1]:
        raise Unexplainable(f"{name} has no convolutional features before its labels, so it cannot be explained.")

    def run(models: list[Any], tensor: Any) -> Any:
        for part in models:
            tensor = part(tensor, training=False)
        return tensor

    signature = [tf.TensorSpec((1, *source.shape[1:]), source.dtype), tf.TensorSpec((), tf.int32)]

    @tf.function(input_signature=signature)  # type: ignore[untyped-decorator]
    def explain(picture: Any, label: Any) -> Any:
        features = run(parts[0], picture)  # (1, rows, columns, channels)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(features)
            scores = run(parts[1], features)  # (1, classes)
            if output.shape[-1] == 1:  # which speaks for the second of two classes, or against it for the first
                scores = tf.concat([-scores, scores], axis=-1)
            score = scores[0, label]
        gradients = tape.gradient(score, features)
        weights = tf.reduce_mean(tf.cast(gradients, tf.float32), axis=(0, 1, 2))  # (channels,)
        return tf.nn.relu(tf.linalg.matvec(tf.cast(features[0], tf.float32), weights))  # (rows, columns)

    return lambda picture, label: explain(tf.constant(picture), tf.constant(label, tf.int32)).numpy()
