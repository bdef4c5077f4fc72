"""What Keras itself answers to random rows, which any other way of computing the model is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from keras_server.models.engines import plain
from keras_server.models.spec import Spec, Tensor, numpy_type
from keras_server.models.tracing import import_keras, reason_of, structures

TOLERANCE = 1e-4  # of an output's size
ROWS = 3
# Whole numbers up to here are tried: OpenVINO computes with 32 bits, some of it in float32, and 8 bits without carry.
LARGEST = {1: 2**7, 2: 2**15, 4: 2**26, 8: 2**40}  # by bytes

Compute = Callable[[list[np.ndarray]], list[np.ndarray]]


# ----------------------------------------------------------------------------------------------------------
# Rows to try a model with
# ----------------------------------------------------------------------------------------------------------


def all_layers(keras_model: Any) -> Iterator[Any]:
    """Yield every layer of a model, those of nested models and wrappers included."""
    for layer in getattr(keras_model, "layers", ()):
        yield layer
        yield from all_layers(layer)
        for name in ("layer", "forward_layer", "backward_layer", "cell", "original"):
            if inner := getattr(layer, name, None):
                yield inner
                yield from all_layers(inner)


def vocabulary(keras_model: Any) -> int | None:
    """Return how many numbers a token may take, from 0, in all layers that take tokens; None without such a layer."""
    sizes = [
        size
        for layer in all_layers(keras_model)
        for size in (getattr(layer, "input_dim", None), getattr(layer, "num_tokens", None))
        if isinstance(size, int) and type(layer).__name__ in ("Embedding", "ReversibleEmbedding", "CategoryEncoding")
    ]
    return min(sizes, default=None)


def random_rows(keras_model: Any, spec: Spec, sizes: list[tuple[int, ...]], rows: int = ROWS) -> list[np.ndarray]:
    """Return an array for each input, with so many rows of these shapes, of values that the model may be made for.

    The end of the second row is padding, as of a shorter sequence.
    """
    return random_inputs(spec.inputs, sizes, rows, vocabulary(keras_model))


def random_inputs(
    tensors: Sequence[Tensor], sizes: Sequence[tuple[int, ...]], rows: int, tokens: int | None
) -> list[np.ndarray]:
    """Return an array for each input, with so many rows of these shapes, the same at each call."""
    random = np.random.default_rng(0)
    return [random_input(tensor, (rows, *size), random, tokens) for tensor, size in zip(tensors, sizes, strict=True)]


def random_input(tensor: Tensor, shape: tuple[int, ...], random: np.random.Generator, tokens: int | None) -> np.ndarray:
    """Return random values of an input, whose shape has the batch first."""
    if tensor.dtype == "string":
        words = np.array([b"the cat sat", b"", b"on a mat of 7 words, perhaps"], object)
        texts: np.ndarray = words[random.integers(0, len(words), shape)]
        return texts
    dtype = np.dtype(numpy_type(tensor.dtype))
    is_image = len(shape) == 4
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    if is_image:
        return random.uniform(0, 255, shape).astype(dtype)
    values: np.ndarray
    if tokens and len(shape) <= 3:
        values = random.integers(0, tokens, shape)
    elif dtype.kind in "iu":
        values = random.integers(0, 10, shape)
    else:
        values = random.normal(size=shape)
    if len(shape) > 1 and len(values) > 1 and shape[1] > 2:
        values[1, -(shape[1] // 3) :] = 0
    return values.astype(dtype)


def large_numbers(array: np.ndarray) -> np.ndarray:
    """Return an array of the same shape and type with large whole numbers in it; others come back as they are."""
    if array.dtype.kind not in "iu":
        return array
    limits, largest = np.iinfo(array.dtype), LARGEST[array.dtype.itemsize]
    low, high = max(limits.min, -largest), min(limits.max, 2 * largest)
    return np.random.default_rng(2).integers(low, high, array.shape, array.dtype, endpoint=True)


def sizes_to_try(spec: Spec) -> Iterator[list[tuple[int, ...]]]:
    """Yield shapes of a row for each input, with one length after the other for the axes of any length."""
    lengths = (224, 256, 128, 64, 32, 512) if spec.image else (128, 64, 32, 16, 8, 256, 512, *range(1, 65))
    for length in lengths:
        yield [tuple(size or length for size in tensor.shape) for tensor in spec.inputs]
        if all(None not in tensor.shape for tensor in spec.inputs):
            return


# ----------------------------------------------------------------------------------------------------------
# The comparison
# ----------------------------------------------------------------------------------------------------------


class Reference:
    """What Keras itself answers to random rows: all together, and each alone.

    The model is called as it stands, without a function traced of it: with axes of any length even predict() answers
    with other shapes once it has been asked for several sizes (TimeDistributed after a masked LSTM, Keras 3.15).
    """

    def __init__(self, keras_model: Any, spec: Spec):
        """Find a size that the model computes at all. Raises what it raised last where there is none."""
        self.model, self.spec = keras_model, spec
        self.keras = import_keras()
        self.structure, _ = structures(keras_model)
        error: Exception = ValueError("there is no size to try it with")
        self.sizes: list[tuple[int, ...]] = []
        for sizes in sizes_to_try(spec):
            rows = random_rows(keras_model, spec, sizes, spec.batch or ROWS)
            try:
                outputs = self.predict(rows)
            except Exception as reason:  # noqa: BLE001 - a layer raises whatever it finds too short
                error = reason
                continue
            tells = any(len(output) > 1 and (output[0] != output[1]).any() for output in outputs if output.ndim)
            tells = tells and all(map(np.array_equal, self.predict(rows), outputs))
            if tells or not self.sizes:  # of too short a sequence some layers make nothing, or what memory holds
                self.noise, self.sizes, self.rows = outputs, sizes, rows
            if tells or None not in (length for tensor in spec.inputs for length in tensor.shape) or len(rows[0]) == 1:
                break
        if not self.sizes:
            raise error

    def predict(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return what Keras answers, for flat inputs as flat outputs."""
        packed = self.keras.tree.pack_sequence_as(self.structure, inputs)
        return [plain(np.asarray(output)) for output in self.keras.tree.flatten(self.model(packed, training=False))]

    def samples(self) -> Iterator[list[np.ndarray]]:
        """Yield batches to compare: rows together, each alone, and of another length where any length will do."""
        yield self.rows
        if not self.spec.batch:
            for row in range(ROWS):
                yield [array[row : row + 1] for array in self.rows]
        if any(array.dtype.kind in "iu" for array in self.rows) and not vocabulary(self.model):
            yield [large_numbers(array) for array in self.rows]
        if any(None in tensor.shape for tensor in self.spec.inputs):
            longer = [
                tuple(size if known else size * 2 for known, size in zip(tensor.shape, sizes, strict=True))
                for tensor, sizes in zip(self.spec.inputs, self.sizes, strict=True)
            ]
            yield random_rows(self.model, self.spec, longer, self.spec.batch or ROWS)

    def difference(self, compute: Compute) -> str:
        """Return in what another way of computing the model differs from Keras' own, in words; or nothing."""
        for inputs in self.samples():
            try:
                expected = self.predict(inputs)
            except Exception:  # noqa: BLE001 - not every length suits every model
                continue
            try:
                actual = compute(inputs)
            except Exception as error:  # noqa: BLE001 - an engine raises anything
                return f"it fails on {len(inputs[0])} rows of {self.words(inputs)}: {reason_of(error)}"
            if len(actual) != len(expected):
                return f"it has {len(actual)} outputs instead of {len(expected)}"
            exact = [np.zeros(())] * len(expected)
            if not self.compared(actual, expected, exact):
                continue
            if words := self.compared(actual, expected, self.movement(inputs, expected)):
                return f"{words}, on {len(inputs[0])} rows of {self.words(inputs)}"
        return ""

    def compared(self, actual: list[np.ndarray], expected: list[np.ndarray], moved: list[np.ndarray]) -> str:
        """Return in which output two answers differ by more than rounding, and how, in words; or nothing."""
        for tensor, a, b, slack in zip(self.spec.outputs, actual, expected, moved, strict=True):
            if words := differs(np.asarray(a), b, slack):
                return f"{tensor.name} {words}"
        return ""

    def movement(self, inputs: list[np.ndarray], expected: list[np.ndarray]) -> list[np.ndarray]:
        """Return by how much Keras' own answers move where the inputs are rounded otherwise, in their last digit.

        A model of random weights or great depth may well be so sensitive; no two ways of computing it agree better.
        """
        others = [nudged(array) for array in inputs]
        if all(a is b for a, b in zip(others, inputs, strict=True)):
            return [np.zeros(())] * len(expected)
        outputs = self.predict(others)
        return [
            np.abs(a.astype(np.float64) - b) if a.dtype.kind in "fiu" else np.zeros(())
            for a, b in zip(outputs, expected, strict=True)
        ]

    def words(self, inputs: list[np.ndarray]) -> str:
        """Return the shapes of a row, for a sentence."""
        return ", ".join("x".join(map(str, array.shape[1:])) or "one number" for array in inputs)


def nudged(array: np.ndarray) -> np.ndarray:
    """Return an array with its numbers changed by a millionth; whole numbers come back as they are."""
    if array.dtype.kind != "f":
        return array
    factors = 1 + np.random.default_rng(1).choice([-1e-6, 1e-6], array.shape)
    return np.asarray(array * factors, array.dtype)


def differs(actual: np.ndarray, expected: np.ndarray, moved: np.ndarray) -> str:
    """Return in what an output differs from the expected one, in words, or nothing where they agree."""
    if actual.shape != expected.shape:
        return f"has shape {actual.shape} instead of {expected.shape}"
    if expected.dtype.kind not in "fiu":
        return "" if (actual.astype(expected.dtype) == expected).all() else "has other values"
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not (np.isfinite(a) == finite).all():
        return "is finite in other places"
    if not finite.any():
        return ""
    a, b = np.where(finite, a, 0), np.where(finite, b, 0)
    size = np.abs(b).max()
    allowed = np.minimum(10 * moved, size / 100) + TOLERANCE * size
    if expected.dtype.kind in "iu":
        allowed = np.where(moved > 0, np.inf, 0)  # a whole number that rounding turns says nothing
    apart = np.abs(a - b)
    if (apart <= allowed).all():
        return ""
    return f"differs by {apart.max():.2g} where its largest value is {size:.2g}"
