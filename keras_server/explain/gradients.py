"""Gradients in operations that OpenVINO knows, for those whose own it does not: ReluGrad, MaxPoolGrad and their like.

Each follows from the derivative of its function; `y` is what the operation gave, `dy` the gradient of that.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def plain_gradients() -> dict[str, str]:
    """Tell TensorFlow of each gradient, once a process, and return their names by operation, for an override map."""
    import tensorflow as tf

    def elementwise(derivative: Any) -> Any:
        """Return the gradient of an operation on each number, from its derivative by x and y."""
        return lambda op, dy: dy * derivative(op.inputs[0], op.outputs[0], op)

    def step(condition: Any, like: Any) -> Any:
        return tf.cast(condition, like.dtype)

    def batch_norm(op: Any, dy: Any, *_: Any) -> Any:
        """Return the gradient of a batch norm with fixed moments, by what it normalises; others are not asked for."""
        scale, variance = op.inputs[1], op.inputs[4]
        return dy * tf.cast(scale * tf.math.rsqrt(variance + op.get_attr("epsilon")), dy.dtype), *[None] * 4

    gradients = {
        "Relu": elementwise(lambda x, y, op: step(y > 0, y)),
        "Relu6": elementwise(lambda x, y, op: step((y > 0) & (y < 6), y)),
        "LeakyRelu": elementwise(lambda x, y, op: tf.where(x > 0, tf.ones_like(x), op.get_attr("alpha"))),
        "Elu": elementwise(lambda x, y, op: tf.where(x > 0, tf.ones_like(x), y + 1)),
        # Klambauer et al. 2017, arXiv:1706.02515: scale and alpha
        "Selu": elementwise(
            lambda x, y, op: tf.where(x > 0, 1.0507009873554805 * tf.ones_like(x), y + 1.7580993408473766)
        ),
        "Softplus": elementwise(lambda x, y, op: tf.sigmoid(x)),
        "Softsign": elementwise(lambda x, y, op: 1 / tf.square(1 + tf.abs(x))),
        "Sigmoid": elementwise(lambda x, y, op: y * (1 - y)),
        "Tanh": elementwise(lambda x, y, op: 1 - y * y),
        "Sqrt": elementwise(lambda x, y, op: 0.5 / y),
        "Rsqrt": elementwise(lambda x, y, op: -0.5 * y * y * y),
        "Reciprocal": elementwise(lambda x, y, op: -y * y),
        "BiasAdd": lambda op, dy: (dy, None),
        "FusedBatchNormV3": batch_norm,
        "MaxPool": max_pool,
        "Conv2D": convolution,
    }
    for operation, gradient in gradients.items():
        tf.RegisterGradient(f"Plain{operation}")(gradient)
    return {operation: f"Plain{operation}" for operation in gradients}


def convolution(op: Any, dy: Any) -> Any:
    """Return the gradient of a convolution by what it convolves; that by its kernel is not asked for."""
    import tensorflow as tf

    x, kernel = op.inputs
    if kernel.shape[:2] == (1, 1) and op.get_attr("strides") == [1, 1, 1, 1]:  # as heads have it, on a single pixel
        return tf.tensordot(dy, kernel[0, 0], ((3,), (1,))), None
    options = {"strides": op.get_attr("strides"), "dilations": op.get_attr("dilations"),
               "padding": op.get_attr("padding").decode()}  # fmt: skip
    return tf.nn.conv2d_transpose(dy, kernel, x.shape, **options), None


def max_pool(op: Any, dy: Any) -> Any:
    """Return the gradient of a max pooling: each window's goes to its largest number, or in parts to several equals."""
    import tensorflow as tf

    x, y = op.inputs[0], op.outputs[0]
    (_, height, width, _), (_, down, right, _) = op.get_attr("ksize"), op.get_attr("strides")
    rows, columns = y.shape[1:3]
    # the picture with its windows' rim, which holds no largest number
    high, wide = (rows - 1) * down + height, (columns - 1) * right + width
    top, left = ((max(n - m, 0) // 2 if op.get_attr("padding") == b"SAME" else 0)
                 for n, m in ((high, x.shape[1]), (wide, x.shape[2])))  # fmt: skip
    bottom, after = max(high - top - x.shape[1], 0), max(wide - left - x.shape[2], 0)
    padded = tf.pad(x, ((0, 0), (top, bottom), (left, after), (0, 0)), constant_values=x.dtype.min)

    def window(i: int, j: int) -> Any:
        """Return of each window the number in row i and column j: shape of y."""
        return padded[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]

    def spread(values: Any, i: int, j: int) -> Any:
        """Return values of the shape of y where window(i, j) took them from, among zeros: shape of padded."""
        values = zeros_between(values, down, right)[:, : (rows - 1) * down + 1, : (columns - 1) * right + 1]
        rest = (padded.shape[1] - i - values.shape[1], padded.shape[2] - j - values.shape[2])
        return tf.pad(values, ((0, 0), (i, rest[0]), (j, rest[1]), (0, 0)))

    places = [(i, j) for i in range(height) for j in range(width)]
    largest = {place: tf.cast(window(*place) == y, dy.dtype) for place in places}
    part = dy / tf.add_n([*largest.values()])
    whole = tf.add_n([spread(part * largest[place], *place) for place in places])
    return whole[:, top : top + x.shape[1], left : left + x.shape[2]]


def zeros_between(values: Any, down: int, right: int) -> Any:
    """Return a tensor with zeros behind each of its rows and columns: (1, h, w, c) to (1, h * down, w * right, c)."""
    import tensorflow as tf

    _, rows, columns, channels = values.shape
    spaced = tf.pad(values[:, :, None, :, None], ((0, 0), (0, 0), (0, down - 1), (0, 0), (0, right - 1), (0, 0)))
    return tf.reshape(spaced, (1, rows * down, columns * right, channels))
