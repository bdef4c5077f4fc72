"""JSON as requests bring it: what nobody reads becomes no object, and what becomes objects is counted before.

msgspec checks the whole text, and makes objects only of the fields that a schema names; those of type Raw stay text
until their turn comes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from keras_server.api.context import charge, current_settings, no_turn, turn
from keras_server.api.tensors import JSON_TYPES, TensorError

T = TypeVar("T", bound=msgspec.Struct)
ABSENT = msgspec.Raw(b"")
SMALL = 4096  # bytes of text that are checked, and become objects uncounted, without a turn; of a field that is short
# Nanoseconds for each byte of a text that is checked, whose marks are counted, and that is made objects of.
CHECKED, COUNTED, MADE = 10, 1, 40
STARTS = {b"{": dict, b"[": list, b'"': str, b"t": bool, b"f": bool}
CONSTANT = re.compile(rb"Infinity|NaN")
PLACE = re.compile(r"\(byte (\d+)\)")  # in what msgspec says of malformed JSON


def read_object(text: bytes, schema: type[T], what: str = "The body") -> T:
    """Return the fields of a JSON object that a schema names. Raises TensorError where it is none."""
    text = text.removeprefix(b"\xef\xbb\xbf")
    try:
        with reading(text):
            return msgspec.json.decode(text, type=schema)
    except msgspec.ValidationError:
        raise TensorError(f"{what} has to be an object, and {kind_of(msgspec.Raw(text.strip()))} came.") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise malformed(error, text) from None


def reading(text: str | bytes | memoryview, each: float = CHECKED) -> contextlib.AbstractContextManager[None]:
    """Return the turn in which a text is gone through, in so many nanoseconds a byte; a small one needs none."""
    return turn(each * len(text)) if len(text) > SMALL else no_turn()


def malformed(error: Exception, text: bytes) -> TensorError:
    """Return what is wrong with a text that is no JSON, or that no number can be taken from."""
    if isinstance(error, RecursionError):
        return TensorError("The JSON is nested too deeply.")
    if isinstance(error, msgspec.ValidationError):
        return TensorError("A number in the JSON is too large, or has too many digits.")
    place = PLACE.search(str(error))
    if place and (constant := CONSTANT.match(text, at := int(place[1]))):
        sign = "-" if text[at - 1 : at] == b"-" else ""
        return TensorError(f"The body is not JSON: it has no {sign}{constant[0].decode()}.")
    return TensorError(f"The body is not JSON: {str(error).removeprefix('JSON is malformed: ')}.")


def kind_of(raw: msgspec.Raw) -> str:
    """Return in words what a text of JSON is: a number itself, else its type."""
    if kind := STARTS.get(start(raw, 1)):
        return JSON_TYPES[kind]
    return start(raw, 80).decode("ascii", "replace")


def start(raw: msgspec.Raw, length: int) -> bytes:
    """Return the first bytes of a text of JSON."""
    return bytes(memoryview(raw)[:length])


def read_text(raw: msgspec.Raw, what: str) -> str:
    """Return a text of any length. Raises TensorError where it is none."""
    if start(raw, 1) != b'"':
        raise TensorError(f"{what} has to be text, and {kind_of(raw)} came.")
    text = memoryview(raw)
    with reading(text):
        return str(read(text))


def is_list(raw: msgspec.Raw) -> bool:
    """Return whether a text of JSON is a list."""
    return start(raw, 1) == b"["


def read_small(raw: msgspec.Raw, default: Any, what: str) -> Any:
    """Return the value of a field that no client makes long. Raises TensorError for one that is."""
    if raw == ABSENT:
        return default
    if len(text := memoryview(raw)) > SMALL:
        raise TensorError(f"{what} is longer than {SMALL:,} bytes.")
    return read(text)


class Counts(NamedTuple):
    """What a text of JSON has at most; texts that hold such marks are counted as what they look like."""

    values: int
    lists: int
    objects: int
    quotes: int

    @classmethod
    def of(cls, text: memoryview) -> Counts:
        """Count, without making anything of it, and without Python's lock, which bytes.count() holds."""
        marks = np.frombuffer(text, np.uint8)
        commas, lists, objects, quotes = (int(np.count_nonzero(marks == mark)) for mark in b',[{"')
        return cls(commas + 1, lists, objects, quotes)

    @property
    def memory(self) -> int:
        """Bytes that the objects take, from above: numbers with their places in a list, and texts by two quotes."""
        return 40 * self.values + 88 * self.lists + 240 * self.objects + 32 * self.quotes


def count(text: memoryview) -> Counts:
    """Count what a text has, in its turn."""
    with turn(COUNTED * len(text)):
        return Counts.of(text)


def read_large(raw: msgspec.Raw, fits: Callable[[Counts], bool], what: str) -> Any:
    """Return the value of a field, for whose objects the request is charged.

    Raises TensorError where what it has does not fit, before anything is made of it, else as fits() or charge().
    """
    text = memoryview(raw)
    if len(text) <= SMALL:
        return read(text)
    counts = count(text)
    if not fits(counts):
        raise TensorError(
            f"{what} has {counts.values:,} values in {counts.lists:,} lists and {counts.objects:,} objects, which does "
            f"not fit the shapes that the model takes in at most {current_settings().queue_size} rows."
        )
    charge(counts.memory)
    with turn(MADE * len(text)):
        return read(text)


def read(text: memoryview) -> Any:
    """Return the value of a text of JSON. Raises TensorError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise malformed(error, bytes(text)) from None
