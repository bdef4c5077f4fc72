"""The pictures in a request, however its client has packed them, and their way to the array that the model takes."""

from __future__ import annotations

import itertools
import math
import quopri
import re
from typing import Any, NamedTuple, NoReturn

import flask
import msgspec
import numpy as np
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from keras_server.api.bodies import read_body
from keras_server.api.context import charge, current_app, current_model, current_settings, model_settings, turn
from keras_server.api.parsing import ABSENT, is_list, kind_of, read_large, read_object, read_text, reading
from keras_server.api.tensors import TensorError, from_base64
from keras_server.images import Picture, begins_as_picture, least_side
from keras_server.ticket import TICKET, stage

HOW = "send it as the form field 'image', as in curl -F image=@dog.jpg"
ITSELF = "let the HTTP client set that header itself, as curl -F image=@dog.jpg does"
URLENCODED = "application/x-www-form-urlencoded"
# What clients write, or leave out, where nobody told them which type the body has.
VAGUE = ("", "*/*", URLENCODED, "text/plain")
JSON = re.compile(r"(application|text)/([^/]+\+)?json")
FORM = re.compile(rb"(?i)--[^\r\n]{1,200}\r?\ncontent-disposition: *form-data")
# Also as some clients misspell it: without the semicolon, or with spaces beside the equals sign.
BOUNDARY = re.compile(r'(?i)\bboundary *= *"?([^";,]+)')
BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")  # between the head of a part and its content
PIXEL = 32  # bytes of a row for each, at most: four channels of float32, alone and in the batch of all
OTHER_PARTS = 32  # that a form may have beside as many images as there may be
HEAD_BYTES = 4096  # of a part of a form
PREPARED = 12  # nanoseconds for each pixel of a picture that is decoded and made a row for the model
LOOKED = 15  # nanoseconds for each byte of a picture that is looked at
DIVIDED = 15  # nanoseconds for each byte of a form that is divided into its parts,
HEADED = 1500  # and for each byte of their heads
UNCODED = 15  # nanoseconds for each byte of base64


class Part(NamedTuple):
    """A part of a form."""

    field: str
    filename: str
    content: bytes


def read_uploads() -> list[tuple[str, bytes]]:
    """Return the names and contents of the request's images: of a form, of JSON, or the whole body.

    Raises QueueFull where their rows would find no place.
    """
    spec, settings = current_model().spec, current_settings()
    if spec.kind == "none":
        flask.abort(400, spec.reason)
    kind, data = flask.request.mimetype, read_body()
    if "/" not in kind:  # as in "undefined", which pages send of a file whose type they do not know
        kind = ""
    if kind.startswith("multipart/form-data"):  # even where a space stands in for the semicolon
        uploads = from_form(data)
    elif FORM.match(data):
        flask.abort(400, f"The body is a form, and its Content-Type does not say so: {ITSELF}.")
    elif JSON.fullmatch(kind) or (kind in VAGUE and data[:64].lstrip()[:1] == b"{"):
        uploads = from_json(data)
    elif kind == URLENCODED and without_line_ends(data):
        flask.abort(400, "The file has lost its line ends, which curl's -d takes out: use -F image=@dog.jpg.")
    elif (
        kind.startswith("image/")
        or kind.endswith("/octet-stream")
        or (data and not kind)
        or (kind in ("*/*", URLENCODED) and begins_as_picture(data))
    ):
        uploads = [("", data)]
    elif not kind:
        flask.abort(400, f"There is no image: {HOW}.")
    else:
        flask.abort(415, "Send the image as the form field 'image' (multipart/form-data), as in curl -F "
                    "image=@dog.jpg, or as the whole body with Content-Type: image/jpeg.")  # fmt: skip
    if len(uploads) > settings.queue_size:
        flask.abort(400, f"There are {len(uploads)} images: send at most {settings.queue_size} at once.")
    current_model().batcher.check_room(len(uploads))
    if ticket := TICKET.get():
        ticket.images = len(uploads)
    charge(len(uploads) * PIXEL * math.prod(spec.target))
    return uploads


def without_line_ends(data: bytes) -> bool:
    """Return whether a JPEG of some size has no byte of a line end, which does not happen by chance."""
    return data.startswith(b"\xff\xd8") and len(data) > 4096 and not re.search(rb"[\r\n]", data)


def from_form(data: bytes) -> list[tuple[str, bytes]]:
    """Return the images of a form: those called 'image', or the only ones under another name."""
    parts = [part for part in read_parts(data) if part.content or part.filename]
    images = [part for part in parts if part.field == "image"]
    if not images:
        likely = [part for part in parts if part.filename or begins_as_picture(part.content)]
        fields = {part.field for part in likely}
        alike = {field for field in fields if re.fullmatch(r"(?i)images?(\[\d*\])?", field)}
        chosen = alike or fields
        if not alike and len(fields) != 1:
            refuse_form(parts, likely)
        images = [part for part in likely if part.field in chosen]
    return [(part.filename, unwrapped(part)) for part in images]


def refuse_form(parts: list[Part], likely: list[Part]) -> NoReturn:
    """Abort for a form without a field that could be meant."""
    names = ", ".join(sorted({repr(part.field[:40]) for part in likely or parts})[:8])
    if likely:
        flask.abort(400, f"The form has pictures as {names}, and none as 'image': {HOW}.")
    if parts:
        flask.abort(400, f"There is no image among the form's fields, which are {names}: {HOW}.")
    flask.abort(400, f"There is no image: {HOW}.")


def unwrapped(part: Part) -> bytes:
    """Return the bytes of an image that a form holds; a text may stand for them."""
    if not part.filename and (part.content[:5].lower() == b"data:" or is_base64(part.content)):
        return from_text(part.content.decode("latin-1"))
    if not part.filename and len(part.content) < 1024 and not begins_as_picture(part.content):
        flask.abort(400, "The field 'image' holds text instead of a file: with curl, write -F image=@dog.jpg.")
    return part.content


def is_base64(content: bytes) -> bool:
    """Return whether a text is a picture in base64, by its beginning."""
    try:
        return begins_as_picture(from_base64(content[:64].decode("latin-1")))
    except TensorError:
        return False


def read_parts(data: bytes) -> list[Part]:
    """Return the parts of a form. Aborts where it is not whole."""
    spelled = BOUNDARY.search(flask.request.content_type or "")
    named = flask.request.mimetype_params.get("boundary") or (spelled[1].strip() if spelled else "")
    boundary = named.encode("latin-1", "replace")
    mark = b"--" + boundary
    if boundary:
        check_parts(data, mark)
    delimiter = re.compile(re.escape(mark) + rb"(--)?+[^\S\r\n]*+(?:\r\n|\r|\n|\Z)")
    divided = boundary and delimiter.search(data)
    if not divided and begins_as_picture(data):
        flask.abort(400, "The body is a picture, and its Content-Type says that it is a form: say image/jpeg there.")
    if not boundary:
        flask.abort(400, f"The form's Content-Type names no boundary: {ITSELF}.")
    if not divided:
        if not data.strip():
            flask.abort(400, f"There is no image: {HOW}.")
        flask.abort(400, f"The form is not divided by the boundary that its Content-Type names: {ITSELF}.")
    if mark + b"--" not in data:
        flask.abort(400, "The form breaks off: its closing boundary is missing. Send it once more.")
    nanoseconds = DIVIDED * len(data) + HEADED * bytes_of_heads(data, delimiter)
    with turn(nanoseconds):  # or the event loop waits for many threads
        return divide(data, boundary)


def check_parts(data: bytes, mark: bytes) -> None:
    """Abort for a form of more parts than any client sends, wherever its boundary stands."""
    images = current_settings().queue_size
    most = images + OTHER_PARTS
    marks = re.finditer(re.escape(mark), data)
    if sum(1 for _ in itertools.islice(marks, most + 2)) > most + 1:  # the last part has one before and one behind it
        flask.abort(400, f"The form has too many fields, over {most}: send at most {images} images at once.")


def bytes_of_heads(data: bytes, delimiter: re.Pattern[bytes]) -> int:
    """Return how many bytes of a form are heads of its parts, from above. Aborts where one is too long.

    What looks like a delimiter counts as one wherever it stands, so that the decoder finds no other.
    """
    size = 0
    for each in delimiter.finditer(data):
        if each[1]:  # the last
            continue
        end = min(each.end() + HEAD_BYTES, len(data))
        blank = BLANK_LINE.search(data, each.end(), end)
        if not blank and end < len(data):
            flask.abort(400, f"A part of the form has a head of more than {HEAD_BYTES:,} bytes: {ITSELF}.")
        size += (blank.end() if blank else end) - each.end()
    return size


def divide(data: bytes, boundary: bytes) -> list[Part]:
    """Return the parts of a form that has its boundaries."""
    decoder, parts = MultipartDecoder(boundary), list[Part]()
    decoder.receive_data(data)
    decoder.receive_data(None)
    pieces: list[bytes] = []
    head: Field | File | None = None
    try:
        while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
            if isinstance(event, Field | File):
                head, pieces = event, []
            elif isinstance(event, Data) and head:
                pieces.append(event.data)
                if not event.more_data:
                    parts.append(part_of(head, b"".join(pieces)))
    except TensorError:
        raise
    except ValueError:
        flask.abort(400, f"The form cannot be read: {HOW}.")
    return parts


def part_of(head: Field | File, content: bytes) -> Part:
    """Return a part of a form, whose content may be in base64."""
    coding, _ = parse_options_header(head.headers.get("Content-Transfer-Encoding", ""))
    if coding.lower() == "base64":
        content = from_base64(content.decode("latin-1"))
    elif coding.lower() == "quoted-printable":
        content = quopri.decodestring(content)
    return Part(head.name or "", getattr(head, "filename", "") or "", content)


class Request(msgspec.Struct):
    """What is read of a body of JSON."""

    image: msgspec.Raw = ABSENT
    images: msgspec.Raw = ABSENT


def from_json(data: bytes) -> list[tuple[str, bytes]]:
    """Return the images of a JSON object, in base64 or as data URIs: "image", or a list of "images"."""
    asked = 'send {"image": BASE64}, or {"images": [BASE64, ...]}'
    try:
        content = read_object(data, Request)
    except TensorError as error:
        remedy = "it is a picture, so say image/jpeg there" if begins_as_picture(data) else asked
        flask.abort(400, f"{error} {remedy[0].upper()}{remedy[1:]}.")
    if content.image != ABSENT and content.images != ABSENT:
        flask.abort(400, f"The JSON has both 'image' and 'images': {asked}.")
    if content.image == content.images == ABSENT:
        flask.abort(400, f"The JSON has no image: {asked}.")
    if content.images == ABSENT:
        return [("", from_text(read_text(content.image, "An encoded image")))]
    if not is_list(content.images):
        flask.abort(400, f"'images' has to be a list, and {kind_of(content.images)} came: {asked}.")
    most = current_settings().queue_size  # a data URI has a comma
    texts = read_large(content.images, lambda counts: counts.values <= 2 * most and counts.lists == 1, "'images'")
    if not texts:
        flask.abort(400, f"'images' has to be a list of one image or more: {asked}.")
    return [("", from_text(text)) for text in texts]


def from_text(text: Any) -> bytes:
    """Return the bytes of an image in base64, in its turn where it is not small. Raises as from_base64()."""
    with reading(text if isinstance(text, str) else "", UNCODED):
        return from_base64(text)


def look(data: bytes) -> Picture:
    """Return an upload with its head read, in its turn, for its bytes are gone through. Raises as decode()."""
    with turn(LOOKED * len(data)):
        return Picture(data, current_settings().max_megapixels)


def decode(data: bytes) -> np.ndarray:
    """Decode and prepare one upload, in its turn: the row of a batch, as the model takes it.

    Raises ImageError, QueueFull or Overdue.
    """
    app, served, spec = current_app(), current_model(), current_model().spec
    picture = look(data)
    side = least_side(spec.target, model_settings().interpolation)
    work = picture.work(side)
    work = work._replace(seconds=work.seconds + PREPARED * math.prod(spec.target) / 1e9)
    with app.budget.turn(work), served.metrics.decoding.time(), stage("decode"):
        prepared = app.prepare(picture.image(), spec.target)
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
