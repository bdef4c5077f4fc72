"""The bytes of a request's body, unpacked where it is compressed."""

from __future__ import annotations

import zlib

import flask

from keras_server.api.context import body_limit, charge, current_settings, turn
from keras_server.api.tensors import TensorError, short

COPIES = 4  # how often a body is in memory while pictures are taken out of it
SWELLING = 1032  # most bytes that one of deflate stands for
UNPACKED = 4  # nanoseconds for each byte of them

GZIP = 0x1F8B
MOST_CODINGS = 2  # of a body, one over the other
MOST_MEMBERS = 64  # of gzip: each costs a copy of what follows it


def read_body() -> bytes:
    """Return the request's body, unpacked where it is compressed, and never larger than the server takes.

    The request is charged for it.
    """
    request = flask.request
    if (size := request.content_length) is None or size > body_limit(current_settings()):
        data = request.get_data(cache=False)
    else:  # in one piece, where werkzeug would copy it piece by piece
        data = request.environ["wsgi.input"].read(size)
    said = request.headers.get("Content-Encoding", "").lower()
    codings = [coding for coding in map(str.strip, said.split(",")) if coding not in ("", "identity")]
    if len(codings) > MOST_CODINGS or not {*codings} <= {"gzip", "x-gzip", "deflate"}:
        raise TensorError(f"The server cannot unpack {short(said)}: take gzip, deflate or none.", 415)
    most = min(len(data) * (SWELLING if codings else 1), body_limit(current_settings()))
    charge(COPIES * most)
    for coding in reversed(codings):  # in the order in which they were applied (RFC 9110, 8.4)
        with turn(UNPACKED * most):
            data = unpacked(data, coding)
    return data


def unpacked(data: bytes, coding: str) -> bytes:
    """Return what gzip, in any members (RFC 1952, 2.2), or deflate has packed. Raises TensorError."""
    limit, whole = body_limit(current_settings()), b""
    for member in range(MOST_MEMBERS):
        # 47 tells gzip and deflate apart itself; some clients send deflate without the head that it should have.
        head = int.from_bytes(data[:2])
        bare = coding == "deflate" and head != GZIP and (data[:1] != b"\x78" or head % 31 != 0)
        unpacker = zlib.decompressobj(wbits=-15 if bare else 47)
        try:
            whole += unpacker.decompress(data, limit + 1 - len(whole))
        except zlib.error:
            if member:
                break
            raise TensorError(f"The body is not {coding}, although its Content-Encoding says so.") from None
        if len(whole) > limit:
            raise TensorError(f"Unpacked, the body is larger than {current_settings().max_upload_mb:g} MiB.", 413)
        if not unpacker.eof:
            raise TensorError(f"The body breaks off within what {coding} has packed: send it once more.")
        data = unpacker.unused_data
        if not data:
            return whole
        if coding == "deflate":
            break
    raise TensorError(f"Something follows in the body what {coding} has packed.")
