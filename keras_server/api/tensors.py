"""Arrays out of what a request holds, and back: lists of JSON, and memory as it is.

Everything is held against the input of the model that it is meant for. What does not fit raises TensorError, whose
message names what was expected and what came.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_server.models.spec import Tensor, numpy_type

# What the Open Inference Protocol and TensorFlow call the types of numbers.
DATATYPES = {
    "bool": ("BOOL", "DT_BOOL"),
    "uint8": ("UINT8", "DT_UINT8"),
    "uint16": ("UINT16", "DT_UINT16"),
    "uint32": ("UINT32", "DT_UINT32"),
    "uint64": ("UINT64", "DT_UINT64"),
    "int8": ("INT8", "DT_INT8"),
    "int16": ("INT16", "DT_INT16"),
    "int32": ("INT32", "DT_INT32"),
    "int64": ("INT64", "DT_INT64"),
    "float16": ("FP16", "DT_HALF"),
    "float32": ("FP32", "DT_FLOAT"),
    "float64": ("FP64", "DT_DOUBLE"),
    "bfloat16": ("FP32", "DT_FLOAT"),  # which neither JSON nor numpy has: taken and answered as float32
    "string": ("BYTES", "DT_STRING"),
}
JSON_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false"}


class TensorError(ValueError):
    """A request that the model cannot take; the message is a sentence for the client."""

    def __init__(self, sentence: str, status: int = 400):
        super().__init__(sentence)
        self.status = status


def short(value: Any) -> str:
    """Return a value as JSON, cut to what fits into a sentence."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def in_words(value: Any) -> str:
    """Return what a JSON value is: a number itself, else its type."""
    return short(value) if value is None or type(value) in (int, float) else JSON_TYPES[type(value)]


def typed(value: Any, kind: type, what: str) -> Any:
    """Return a value of JSON that has to be of this type."""
    if type(value) is not kind:
        raise TensorError(f"{what} has to be {JSON_TYPES[kind]}, and {in_words(value)} came.")
    return value


def whole(value: Any, what: str) -> int:
    """Return a value of JSON that has to be a natural number; 2.0 is one."""
    if type(value) not in (int, float) or value < 0 or value % 1:
        raise TensorError(f"{what} has to be a natural number, and {in_words(value)} came.")
    if value >= 2**63:
        raise TensorError(f"{what} has to be less than 2^63, and {in_words(value)} came.")
    return int(value)


def shape_of(tensor: Tensor) -> list[int]:
    """Return the shape of an input or output with its batch, -1 where any length will do."""
    return [-1, *(-1 if length is None else length for length in tensor.shape)]


def lists_in(shape: Sequence[int | None]) -> int:
    """Return how many lists nest into the shape of one row, all of whose lengths are known."""
    return sum(math.prod(length or 0 for length in shape[:depth]) for depth in range(len(shape)))


def mismatch(tensor: Tensor, came: str) -> TensorError:
    """Return the error that says what an input takes and what came."""
    return TensorError(
        f"The input {tensor.name} takes {DATATYPES[tensor.dtype][0]} of shape {shape_of(tensor)}, and {came}."
    )


def check_header(shape: list[int], datatype: Any, tensor: Tensor) -> None:
    """Raise TensorError unless an input takes this shape, batch included, and datatype."""
    expected = shape_of(tensor)
    fits = len(shape) == len(expected) and all(e in (-1, s) for s, e in zip(shape, expected, strict=True))
    if not fits or 0 in shape or datatype != DATATYPES[tensor.dtype][0]:
        raise mismatch(tensor, f"{short(datatype)} of shape {short(shape)} came")


def from_lists(data: Any, shape: list[int], tensor: Tensor) -> np.ndarray:
    """Return the array in lists that are nested as the shape says; -1 stands for any length but none."""
    flat, actual = [data], list[int]()
    for length in shape:
        lengths = {len(part) if type(part) is list else 0 for part in flat}
        if len(lengths) > 1:
            raise mismatch(tensor, "lists of different lengths came")
        actual += lengths
        if not actual[-1] or length not in (-1, actual[-1]):
            raise mismatch(tensor, nesting(data))
        flat = [*itertools.chain.from_iterable(flat)]
    if any(type(value) is list for value in flat):
        raise mismatch(tensor, nesting(data))
    return from_values(flat, tensor).reshape(actual)


def nesting(data: Any) -> str:
    """Return what came in place of a tensor: the shape of the lists, judged by the first of each."""
    shape: list[int] = []
    first = data
    while type(first) is list and len(shape) < 9:
        shape.append(len(first))
        first = first[0] if first else None
    return f"lists of shape {shape} came" if shape else f"{in_words(data)} came"


def from_values(values: list[Any], tensor: Tensor) -> np.ndarray:
    """Return the flat array of JSON's numbers, or of true and false, in the type that the input takes."""
    if tensor.dtype == "string":
        return texts(values, tensor)
    dtype = np.dtype(numpy_type(tensor.dtype))
    kinds = set(map(type, values))
    for strange in kinds - ({bool} if dtype.kind == "b" else {int, float}):
        raise mismatch(tensor, f"{in_words(next(value for value in values if type(value) is strange))} came")
    if dtype.kind in "iu" and float in kinds:
        if fractions := [value for value in values if value % 1]:  # among them infinity, which JSON spells 1e999
            raise mismatch(tensor, f"{fractions[0]} came")
        values = [int(value) for value in values]
    try:
        array = np.array(values, np.float64 if dtype.kind == "f" else dtype)
        if dtype.kind == "f" and np.abs(array).max() > np.finfo(dtype).max:
            raise OverflowError
    except OverflowError:
        raise mismatch(tensor, "a number came that is too large for it") from None
    return array.astype(dtype, copy=False)


def texts(values: list[Any], tensor: Tensor) -> np.ndarray:
    """Return the flat array of JSON's texts, or of TensorFlow Serving's objects for binary data, as bytes."""
    for value in values:
        if type(value) is not str and not is_encoded(value):
            raise mismatch(tensor, f"{in_words(value)} came")
    return np.array([from_base64(v["b64"]) if type(v) is dict else v.encode() for v in values] + [None], object)[:-1]


def is_encoded(value: Any) -> bool:
    """Return whether a value of JSON is TensorFlow Serving's object for binary data."""
    return type(value) is dict and value.keys() == {"b64"}


def from_base64(text: Any) -> bytes:
    """Return the bytes that a text of JSON stands for: base64 in either alphabet, padded or not, or a data URI."""
    text = "".join(typed(text, str, "An encoded image").split())
    if text[:5].lower() == "data:":
        head, _, text = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise TensorError("An encoded image is a data URI that is not in base64.")
    text = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise TensorError("An encoded image is not in base64.") from None


def from_memory(data: memoryview, shape: list[int], tensor: Tensor) -> np.ndarray:
    """Return the array of this shape whose memory these bytes are, without copying them."""
    if tensor.dtype == "string":
        elements = [*split_elements(data)]
        if len(elements) != math.prod(shape):
            raise mismatch(tensor, f"shape {shape} has {math.prod(shape)} texts, of which {len(elements)} came")
        return np.array([*elements, None], object)[:-1].reshape(shape)
    dtype = np.dtype(numpy_type(tensor.dtype)).newbyteorder("<")
    size = math.prod(shape) * dtype.itemsize
    if len(data) != size:
        raise mismatch(tensor, f"shape {shape} has {size} bytes, of which {len(data)} came")
    if dtype.kind == "b" and np.frombuffer(data, np.uint8).max() > 1:
        raise mismatch(tensor, "bytes other than 0 and 1 came")
    return np.frombuffer(data, dtype).reshape(shape)


def split_elements(data: memoryview) -> Iterator[bytes]:
    """Yield the elements of a BYTES tensor in memory, each of which has its length before it."""
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        if len(data) < end:
            raise TensorError(f"A BYTES tensor breaks off: {len(data)} bytes are left where {end} belong.")
        yield bytes(data[4:end])
        data = data[end:]


def join_elements(array: np.ndarray) -> bytes:
    """Return the memory of a BYTES tensor of text."""
    elements = [element if isinstance(element, bytes) else str(element).encode() for element in array.flat]
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def to_lists(array: np.ndarray) -> Any:
    """Return nested lists for JSON, which has no word for NaN and infinities: they become null."""
    if array.dtype.kind == "O":
        decode = np.frompyfunc(
            lambda value: value.decode("utf-8", "replace") if isinstance(value, bytes) else value, 1, 1
        )
        return decode(array).tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        finite, array = np.isfinite(array), array.astype(object)
        array[~finite] = None
    return array.tolist()
