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

    gradients = {
        "Relu": elementwise(lambda x, y, op: step(y > 0, y)),
        "Relu6": elementwise(lambda x, y, op: step((y > 0) & (y < 6), y)),
        "LeakyRelu": elementwise(lambda x, y, op: tf.where(x > 0, tf.ones_like(x), op.get_attr("alpha"))),
        "Elu": elementwise(lambda x, y, op: tf.where(x > 0, tf.ones_like(x), y + 1)),
        # Klambauer et al. 2017, arXiv:1706.02515: scale and alpha
        "Selu": elementwise(
            lambda x, y, op: tf.where(y < 0, y + 1.7580993408473766, 1.0507009873554805 * tf.ones_like(y))
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
        "AvgPool": average_pool,
        "Conv2D": convolution,
        "Conv2DBackpropInput": transposed_convolution,
        "DepthwiseConv2dNative": depthwise,
        "ConcatV2": concat,
        "StridedSlice": strided_slice,
    }
    for operation, gradient in gradients.items():
        tf.RegisterGradient(f"Plain{operation}")(gradient)
    return {operation: f"Plain{operation}" for operation in gradients}


def batch_norm(op: Any, dy: Any, *_: Any) -> Any:
    """Return the gradient of a batch norm by what it normalises; those by its other inputs are not asked for.

    Where the moments are those of the input (LayerNormalization of tf_keras), it is that of Ioffe and Szegedy 2015,
    arXiv:1502.03167, section 3.
    """
    import tensorflow as tf

    (x, scale, _, _, variance), epsilon = op.inputs, op.get_attr("epsilon")
    if not op.get_attr("is_training"):
        return dy * tf.cast(scale * tf.math.rsqrt(variance + epsilon), dy.dtype), *[None] * 4
    is_last = op.get_attr("data_format") == b"NHWC"
    axes = (0, 1, 2) if is_last else (0, 2, 3)
    scale = tf.reshape(scale, (-1,) if is_last else (-1, 1, 1))
    centred = tf.cast(x, scale.dtype)
    centred -= tf.reduce_mean(centred, axes, keepdims=True)
    factor = tf.math.rsqrt(tf.reduce_mean(centred * centred, axes, keepdims=True) + epsilon)
    normal, gradient = centred * factor, tf.cast(dy, scale.dtype) * scale
    gradient -= tf.reduce_mean(gradient, axes, keepdims=True)
    gradient -= normal * tf.reduce_mean(gradient * normal, axes, keepdims=True)
    return tf.cast(gradient * factor, dy.dtype), *[None] * 4


def convolution(op: Any, dy: Any) -> Any:
    """Return the gradient of a convolution by what it convolves; that by its kernel is not asked for."""
    import tensorflow as tf

    x, kernel = op.inputs
    groups = x.shape[3] // kernel.shape[2]
    pairs = zip(tf.split(dy, groups, 3), tf.split(kernel, groups, 3), strict=True)
    if kernel.shape[:2] == (1, 1) and op.get_attr("strides") == [1, 1, 1, 1]:  # as heads have it, on a single pixel
        return tf.concat([tf.tensordot(part, weights[0, 0], ((3,), (1,))) for part, weights in pairs], 3), None
    shape = (*x.shape[:3], kernel.shape[2])
    return tf.concat([tf.nn.conv2d_transpose(*pair, shape, **sliding(op)) for pair in pairs], 3), None


def transposed_convolution(op: Any, dy: Any) -> Any:
    """Return the gradient of a transposed convolution by what it convolves."""
    import tensorflow as tf

    return None, None, tf.nn.conv2d(dy, op.inputs[1], **sliding(op))


def sliding(op: Any) -> dict[str, Any]:
    """Return how a convolution goes over its picture."""
    return {"strides": op.get_attr("strides"), "dilations": op.get_attr("dilations"),
            "padding": op.get_attr("padding").decode()}  # fmt: skip


def concat(op: Any, dy: Any) -> Any:
    """Return the gradient of a concatenation: each input's part."""
    import tensorflow as tf

    *parts, axis = op.inputs
    axis = int(tf.get_static_value(axis))
    return *tf.split(dy, [part.shape[axis] for part in parts], axis), None


def strided_slice(op: Any, dy: Any) -> Any:
    """Return the gradient of a slice: zero but for where the slice was taken from."""
    import tensorflow as tf

    x, *bounds = op.inputs
    masks = {name: op.get_attr(name) for name in ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask",
                                                  "shrink_axis_mask")}  # fmt: skip
    begin, end, strides = map(tf.get_static_value, bounds)
    size = x.shape.num_elements()
    with tf.init_scope():  # now, and not in the graph
        places = tf.reshape(tf.range(size), x.shape)
        taken = tf.raw_ops.StridedSlice(input=places, begin=begin, end=end, strides=strides, **masks).numpy()
    scattered = tf.scatter_nd(taken.reshape(-1, 1), tf.reshape(dy, [-1]), [size])
    return tf.reshape(scattered, x.shape), None, None, None


class Windows:
    """The windows that an operation slides over pictures of shape (n, h, w, c), by the places in them."""

    def __init__(self, op: Any, size: tuple[int, int]):
        """Take the operation, and the rows and columns of its windows."""
        self.pictures, self.rows, self.columns, _ = op.outputs[0].shape
        _, self.down, self.right, _ = op.get_attr("strides")
        _, self.height, self.width, _ = op.inputs[0].shape
        high, wide = (self.rows - 1) * self.down + size[0], (self.columns - 1) * self.right + size[1]
        is_same = op.get_attr("padding") == b"SAME"
        self.top, self.left = (max(n - m, 0) // 2 * is_same for n, m in ((high, self.height), (wide, self.width)))
        self.bottom, self.after = max(high - self.top - self.height, 0), max(wide - self.left - self.width, 0)
        self.places = [(i, j) for i in range(size[0]) for j in range(size[1])]

    def cut(self, picture: Any, place: tuple[int, int], rim: float) -> Any:
        """Return what stands at a place of each window, shape (n, rows, columns, c); `rim` lies round the picture."""
        import tensorflow as tf

        edges = ((0, 0), (self.top, self.bottom), (self.left, self.after), (0, 0))
        padded, (i, j) = tf.pad(picture, edges, constant_values=rim), place
        last = i + (self.rows - 1) * self.down + 1, j + (self.columns - 1) * self.right + 1
        return padded[:, i : last[0] : self.down, j : last[1] : self.right]

    def gather(self, parts: dict[tuple[int, int], Any]) -> Any:
        """Return the sum of values that are put back to where cut() took them from: shape of the picture."""
        import tensorflow as tf

        whole = tf.add_n([self.put(values, *place) for place, values in parts.items()])
        return whole[:, self.top : self.top + self.height, self.left : self.left + self.width]

    def put(self, values: Any, i: int, j: int) -> Any:
        """Return values where cut() took them from, among zeros: shape of the picture with its rim."""
        import tensorflow as tf

        gaps = ((0, 0), (0, 0), (0, self.down - 1), (0, 0), (0, self.right - 1), (0, 0))
        spaced = tf.pad(values[:, :, None, :, None], gaps)  # zeros behind each row and column
        spaced = tf.reshape(spaced, (self.pictures, self.rows * self.down, self.columns * self.right, values.shape[-1]))
        high, wide = (self.rows - 1) * self.down + 1, (self.columns - 1) * self.right + 1
        below = self.top + self.height + self.bottom - i - high
        behind = self.left + self.width + self.after - j - wide
        return tf.pad(spaced[:, :high, :wide], ((0, 0), (i, below), (j, behind), (0, 0)))


def max_pool(op: Any, dy: Any) -> Any:
    """Return the gradient of a max pooling: each window's goes to its largest number, or in parts to several equals."""
    import tensorflow as tf

    (x,), (y,), windows = op.inputs, op.outputs, Windows(op, op.get_attr("ksize")[1:3])
    largest = {place: tf.cast(windows.cut(x, place, x.dtype.min) == y, dy.dtype) for place in windows.places}
    part = dy / tf.add_n([*largest.values()])
    return windows.gather({place: part * is_largest for place, is_largest in largest.items()})


def average_pool(op: Any, dy: Any) -> Any:
    """Return the gradient of an average pooling: each window's goes in equal parts to its numbers, none to the rim."""
    import tensorflow as tf

    windows = Windows(op, op.get_attr("ksize")[1:3])
    ones = tf.ones((1, windows.height, windows.width, 1), dy.dtype)
    part = dy / tf.add_n([windows.cut(ones, place, 0) for place in windows.places])
    return windows.gather(dict.fromkeys(windows.places, part))


def depthwise(op: Any, dy: Any) -> Any:
    """Return the gradient of a depthwise convolution by what it convolves."""
    import tensorflow as tf

    kernel = op.inputs[1]  # (rows, columns, channels, multiplier)
    windows = Windows(op, kernel.shape[:2])
    by_channel = tf.reshape(dy, (*dy.shape[:3], *kernel.shape[2:]))
    parts = {(i, j): tf.reduce_sum(by_channel * kernel[i, j], axis=-1) for i, j in windows.places}
    return windows.gather(parts), None
