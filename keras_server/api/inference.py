"""What the protocols for tensors have in common: bodies, names, rows, and the way to the model.

Each protocol has a function that decodes a request into one array for each input of the model, and one that encodes
the outputs. In between, whatever the protocol, the rows join the queue in which images wait.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

import flask
import msgspec
import numpy as np
from werkzeug.routing import BaseConverter

from keras_server.api.bodies import read_body
from keras_server.api.context import current_model, current_settings
from keras_server.api.parsing import read_object
from keras_server.api.tensors import TensorError, short
from keras_server.api.uploads import decode
from keras_server.images import ImageError
from keras_server.ticket import TICKET

T = TypeVar("T", bound=msgspec.Struct)
Arrays = dict[str, np.ndarray]  # by the name of the input

JSON_LENGTH = "Inference-Header-Content-Length"  # the header that says where JSON ends and binary tensors begin


class Segment(BaseConverter):
    """A part of a path without a colon, so that ":predict" is part of no name."""

    regex = "[^/:]+"


def protocol(name: str) -> flask.Blueprint:
    """Return a blueprint whose routes may hold <segment:name> and <segment:version>, and whose errors are JSON."""
    routes = flask.Blueprint(name, __name__)
    routes.record_once(lambda state: state.app.url_map.converters.update(segment=Segment))
    routes.before_request(admit)
    return routes


def admit() -> None:
    """Take the model that a request names, before anything is read of it."""
    if flask.request.view_args:
        current_model()


def read_request(schema: type[T]) -> tuple[T, memoryview]:
    """Return the fields of the JSON object in the request's body that a schema names, and the bytes that follow it."""
    current_model()  # or there is none yet
    body = read_body()
    length = flask.request.headers.get(JSON_LENGTH, str(len(body)))
    if not re.fullmatch("[0-9]{1,12}", length) or int(length) > len(body):
        raise TensorError(f"{JSON_LENGTH} is the size of the JSON, of {len(body)} bytes in all: {short(length)} came.")
    end = int(length)
    return read_object(body[:end], schema), memoryview(body)[end:]


def check_names(requested: Iterable[str]) -> None:
    """Raise TensorError unless the names are those of the model's inputs."""
    names, requested = [tensor.name for tensor in current_model().spec.inputs], [*requested]
    takes = f"the model {current_model().spec.name} takes {', '.join(names)}"
    for name in requested:
        if name not in names:
            raise TensorError(f"There is no input {short(name)}: {takes}.")
    for name in names:
        if name not in requested:
            raise TensorError(f"The input {name} is missing: {takes}.")


def check_rows(count: int) -> None:
    """Raise TensorError for more rows than may wait, and QueueFull for more than find a place now."""
    if count > current_settings().queue_size:
        raise TensorError(f"There are {count} rows: send 1 to {current_settings().queue_size} at once.")
    current_model().batcher.check_room(count)


def from_image(file: bytes, number: int) -> np.ndarray:
    """Return the row of one encoded image, the request's `number`th, prepared as /predict prepares it."""
    try:
        return decode(file)
    except ImageError as error:
        raise TensorError(f"Image {number}: {error}") from None


def compute(arrays: Arrays) -> list[np.ndarray]:
    """Return the model's outputs for an array for each of its inputs."""
    rows = {len(array) for array in arrays.values()}
    if len(rows) > 1:
        raise TensorError(f"The inputs have to have equally many rows: {', '.join(map(str, sorted(rows)))} came.")
    check_rows(*rows)
    if ticket := TICKET.get():
        (ticket.images,) = rows
    served = current_model()
    outputs = served.compute([arrays[tensor.name] for tensor in served.spec.inputs])
    served.metrics.images.inc(sum(rows))
    return outputs
