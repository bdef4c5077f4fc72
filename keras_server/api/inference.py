"""What the protocols for tensors have in common: bodies, names, rows, and the way to the model.

Each protocol has a function that decodes a request into one array for each input of the model, and one that encodes
the outputs. In between, whatever the protocol, the rows join the queue in which images wait.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable
from typing import Any, NoReturn

import flask
import numpy as np
from werkzeug.routing import BaseConverter

from keras_server import telemetry
from keras_server.api.context import body_limit, current_app, current_model, current_settings
from keras_server.api.tensors import TensorError, short, typed
from keras_server.api.uploads import decode
from keras_server.images import ImageError
from keras_server.ticket import TICKET

Arrays = dict[str, np.ndarray]  # by the name of the input

JSON_LENGTH = "Inference-Header-Content-Length"  # the header that says where JSON ends and binary tensors begin


class Segment(BaseConverter):
    """A part of a path without a colon, so that ":predict" is part of no name."""

    regex = "[^/:]+"


def protocol(name: str) -> flask.Blueprint:
    """Return a blueprint whose routes may hold <segment:name> and <segment:version>, and whose errors are JSON."""
    routes = flask.Blueprint(name, __name__)
    routes.record_once(lambda state: state.app.url_map.converters.update(segment=Segment))
    routes.before_request(check_version)
    routes.register_error_handler(TensorError, refuse)
    return routes


def check_version() -> Any:
    """Answer 404 for a version that is not served."""
    version = (flask.request.view_args or {}).get("version", "1")
    name = current_model().spec.name
    if version != "1":
        return {"error": f"There is no version {short(version)} of {name}: it has version 1."}, 404
    return None


def refuse(error: TensorError) -> Any:
    """Answer what the model cannot take."""
    return {"error": str(error)}, error.status


def read_request() -> tuple[dict[str, Any], memoryview]:
    """Return the JSON object in the request's body, and the bytes that follow it."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"it has no {name}")

    current_model()  # or there is none yet
    body = read_body()
    length = flask.request.headers.get(JSON_LENGTH, str(len(body)))
    if not re.fullmatch("[0-9]{1,12}", length) or int(length) > len(body):
        raise TensorError(f"{JSON_LENGTH} is the size of the JSON, of {len(body)} bytes in all: {short(length)} came.")
    end = int(length)
    try:
        with current_app().decoder():  # few at a time, for lists take many times the memory of their text
            found = json.loads(body[:end], parse_constant=refuse_constant)
    except RecursionError:
        raise TensorError("The JSON is nested too deeply.") from None
    except ValueError as error:
        raise TensorError(f"The body is not JSON: {error}.") from None
    return typed(found, dict, "The body"), memoryview(body)[end:]


def read_body() -> bytes:
    """Return the request's body, unpacked where it is compressed, and never larger than the server takes."""
    request = flask.request
    if (size := request.content_length) is None or size > body_limit(current_settings()):
        data = request.get_data(cache=False)
    else:  # in one piece, where werkzeug would copy it piece by piece
        data = request.environ["wsgi.input"].read(size)
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding == "identity":
        return data
    if coding not in ("gzip", "deflate"):
        raise TensorError(f"The server cannot unpack {short(coding)}: take gzip, deflate or none.", 415)
    unpacker = zlib.decompressobj(wbits=47)  # tells gzip and deflate apart itself
    try:
        data = unpacker.decompress(data, body_limit(current_settings()) + 1)
    except zlib.error:
        raise TensorError(f"The body is not {coding}, although its Content-Encoding says so.") from None
    if len(data) > body_limit(current_settings()):
        raise TensorError(f"Unpacked, the body is larger than {current_settings().max_upload_mb:g} MiB.", 413)
    if not unpacker.eof or unpacker.unused_data:
        raise TensorError(f"The body is not one whole stream of {coding}.")
    return data


def check_names(given: Iterable[str]) -> None:
    """Raise TensorError unless the names are those of the model's inputs."""
    names, given = [tensor.name for tensor in current_model().spec.inputs], [*given]
    for name in names:
        if name not in given:
            raise TensorError(f"The input {name} is missing: {current_model().spec.name} takes {', '.join(names)}.")
    for name in given:
        if name not in names:
            raise TensorError(f"There is no input {short(name)}: {current_model().spec.name} takes {', '.join(names)}.")


def check_rows(count: int) -> None:
    """Raise TensorError for more rows than may wait."""
    if count > current_settings().queue_size:
        raise TensorError(f"There are {count} rows: send 1 to {current_settings().queue_size} at once.")


def from_image(file: bytes, number: int) -> np.ndarray:
    """Return the row of one encoded image, the request's `number`th, prepared as /predict prepares it."""
    try:
        return decode(file)
    except ImageError as error:
        raise TensorError(f"Image {number}: {error}") from None


def from_base64(text: Any) -> bytes:
    """Return the bytes that a text of JSON stands for."""
    try:
        return base64.b64decode("".join(typed(text, str, "An encoded image").split()), validate=True)
    except ValueError as error:
        raise error if isinstance(error, TensorError) else TensorError("An encoded image is not in base64.") from None


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
    telemetry.IMAGES.inc(sum(rows))
    return outputs
