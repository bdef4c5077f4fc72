"""The bytes of a request's body, unpacked where it is compressed."""

from __future__ import annotations

import zlib

import flask

from keras_server.api.context import body_limit, charge, current_app, current_settings
from keras_server.api.tensors import TensorError, short
from keras_server.pictures.work import Work

COPIES = 4  # how often a body is in memory while pictures are taken out of it
SWELLING = 1032  # most bytes that one of deflate stands for
UNPACKED = 4  # nanoseconds for each byte of them


def read_body() -> bytes:
    """Return the request's body, unpacked where it is compressed, and never larger than the server takes.

    The request is charged for it.
    """
    request = flask.request
    if (size := request.content_length) is None or size > body_limit(current_settings()):
        data = request.get_data(cache=False)
    else:  # in one piece, where werkzeug would copy it piece by piece
        data = request.environ["wsgi.input"].read(size)
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    most = min(len(data) * (1 if coding == "identity" else SWELLING), body_limit(current_settings()))
    charge(COPIES * most)
    if coding == "identity":
        return data
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise TensorError(f"The server cannot unpack {short(coding)}: take gzip, deflate or none.", 415)
    # 47 tells gzip and deflate apart itself; some clients send deflate without the head that it should have.
    bare = (
        coding == "deflate" and data[:2] != b"\x1f\x8b" and (data[:1] != b"\x78" or int.from_bytes(data[:2]) % 31 != 0)
    )
    unpacker = zlib.decompressobj(wbits=-15 if bare else 47)
    try:
        with current_app().budget.turn(Work(0, UNPACKED * most / 1e9, 0)):
            data = unpacker.decompress(data, body_limit(current_settings()) + 1)
    except zlib.error:
        raise TensorError(f"The body is not {coding}, although its Content-Encoding says so.") from None
    if len(data) > body_limit(current_settings()):
        raise TensorError(f"Unpacked, the body is larger than {current_settings().max_upload_mb:g} MiB.", 413)
    if not unpacker.eof or unpacker.unused_data:
        raise TensorError(f"The body is not one whole stream of {coding}.")
    return data
