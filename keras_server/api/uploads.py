"""The pictures in a request, and their way to the array that the model takes."""

from __future__ import annotations

import flask
import numpy as np

from keras_server import telemetry
from keras_server.api.context import current_app, current_model, current_settings
from keras_server.images import open_image
from keras_server.ticket import TICKET


def read_uploads() -> list[tuple[str, bytes]]:
    """Return the names and contents of the request's images, from a form or as the whole body."""
    spec, settings = current_model().spec, current_settings()
    if spec.kind == "none":
        flask.abort(400, spec.reason)
    request, kind = flask.request, flask.request.mimetype
    if kind == "multipart/form-data":
        files = request.files.getlist("image")
        if "image" in request.form:
            flask.abort(400, "The field 'image' holds text instead of a file: with curl, write -F image=@dog.jpg.")
        uploads = [(file.filename or "", file.read()) for file in files]
    elif kind.startswith("image/") or kind == "application/octet-stream":
        uploads = [("", request.get_data(cache=False))]
    elif kind or request.content_length:
        flask.abort(415, "Send the image as the form field 'image' (multipart/form-data), or as the whole body with "
                    "Content-Type: image/jpeg.")  # fmt: skip
    else:
        uploads = []
    if not uploads:
        flask.abort(400, "There is no image: send one as the form field 'image', as in curl -F image=@dog.jpg.")
    if len(uploads) > settings.queue_size:
        flask.abort(400, f"There are {len(uploads)} images: send at most {settings.queue_size} at once.")
    if ticket := TICKET.get():
        ticket.images = len(uploads)
    return uploads


def decode(data: bytes) -> np.ndarray:
    """Decode and prepare one upload, in its turn: the row of a batch, as the model takes it.

    Raises ImageError, or Overdue.
    """
    app, spec = current_app(), current_model().spec
    with app.decoder(), telemetry.DECODING.time():
        prepared = app.prepare(open_image(data, app.settings().max_megapixels), spec.target)
    if spec.image and spec.image[3]:
        prepared = np.ascontiguousarray(np.moveaxis(prepared, -1, 1))
    return prepared.astype(spec.inputs[0].dtype, copy=False)


def read_top() -> int:
    """Return the number of rows that the request asks for with ?top=N."""
    classes = current_model().spec.classes
    text = flask.request.args.get("top")
    if text is None:
        return min(current_settings().top, classes)
    if not (text.isascii() and text.isdigit() and len(text) < 10) or not 1 <= int(text) <= classes:
        flask.abort(400, f"top must be a whole number from 1 to {classes}, the number of classes.")
    return int(text)
