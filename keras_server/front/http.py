"""HTTP/1.1 as this server reads and writes it, as strict as RFC 9112 allows.

Where two readers of a request disagree about its end, somebody smuggles another: nothing here is guessed or repaired.
llhttp was weighed against these few rules: it knows no unknown method, does not say where a request ends among those
that follow it, and leaves lengths, hosts, sizes and the statuses of refusals to its user all the same.
"""

from __future__ import annotations

import io
import re
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TypeAlias

from keras_server.errors import Headers
from keras_server.front import limits
from keras_server.ticket import LENGTH

PIECE_BYTES = 64 * 1024  # of a body that are read at once

TLS = b"\x16"  # the first byte of its handshake (RFC 8446, 5.1)

SMALL_CHUNKS = "The request's body comes in chunks that are too small."
MANY_FIELDS = (
    f"The request has more than {limits.FIELDS} header fields, or trailers larger than {limits.TRAILER_BYTES} bytes."
)
BROKEN_OFF = "The request's body broke off, or is not in the chunks that HTTP asks for."

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~\x80-\xff]+) HTTP/(1\.[01])\r\n")
FIELD = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)\r\n")
CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t -~\x80-\xff]*)?\r\n")
# Of letters, digits, hyphens, dots and slashes. No client writes them so, and /%6detrics would pass a proxy's /metrics.
NEEDLESS = re.compile("%(?=2[DEF]|3[0-9]|[46][1-9A-F]|[57][0-9A])", re.IGNORECASE)
PROXY_FORM = re.compile("https?://([^/?#]+)/?", re.IGNORECASE)  # http://host/path, as to a proxy

Stream: TypeAlias = io.BufferedReader
Answer = tuple[str, Headers, bytes]  # status line, headers, body


class Refusal(Exception):
    """A request that the app never sees, with the status and the sentence of its answer."""

    def __init__(self, status: int = 400, sentence: str = "This is no well-formed request of HTTP/1.1."):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass
class Head:
    """What stands before a request's body; one of "" and {} is a request of which nothing could be read."""

    method: str = ""
    target: str = ""
    version: str = "1.1"
    fields: dict[str, str] = field(default_factory=dict)  # by lower-case names; of several with one name, joined
    host: str = ""
    length: int = 0  # of the body, where it is not chunked
    chunked: bool = False

    @property
    def path(self) -> str:
        """The target's path, decoded as WSGI wants it."""
        path = NEEDLESS.sub("%25", self.target.partition("?")[0])
        return urllib.parse.unquote_to_bytes(path.encode("latin-1")).decode("latin-1")

    @property
    def keep_alive(self) -> bool:
        """Whether another request may follow on the connection."""
        options = {option.strip().lower() for option in self.fields.get("connection", "").split(",")}
        return "close" not in options if self.version == "1.1" else "keep-alive" in options

    @property
    def expects(self) -> bool:
        """Whether the client asks before it sends the body."""
        has_body = self.chunked or self.length > 0
        return has_body and self.version == "1.1" and self.fields.get("expect", "").lower() == "100-continue"

    def environ(self) -> dict[str, object]:
        """Return what WSGI wants to know of the request."""
        environ: dict[str, object] = {
            "REQUEST_METHOD": self.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": self.path,
            "QUERY_STRING": self.target.partition("?")[2],
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
        }
        for name, value in self.fields.items():
            if "_" not in name:  # or it could pass for another's name
                environ["HTTP_" + name.upper().replace("-", "_")] = value
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        if self.host:
            environ["HTTP_HOST"] = self.host
        environ["CONTENT_LENGTH"] = environ.pop("HTTP_CONTENT_LENGTH", "0")
        if (kind := environ.pop("HTTP_CONTENT_TYPE", None)) is not None:
            environ["CONTENT_TYPE"] = kind
        return environ


def read_head(stream: Stream, head: Head) -> None:
    """Fill in a request's head as far as it can be read.

    Raises Refusal where it is malformed, too large or unclear about the body, ConnectionAbortedError where it breaks
    off.
    """
    if stream.peek(1)[:1] == TLS:  # whose client waits for an answer, and sends no end of a line
        raise Refusal(400, "This is TLS, and the server speaks plain HTTP: say http://, or put a proxy before it.")
    line = stream.readline(limits.LINE_BYTES)
    if line == b"\r\n":  # some clients end a body with one too many
        line = stream.readline(limits.LINE_BYTES)
    if len(line) == limits.LINE_BYTES:
        raise Refusal(414, "The address is too long.")
    if not line.endswith(b"\n"):
        raise ConnectionAbortedError
    if not (match := REQUEST_LINE.fullmatch(line.decode("latin-1"))):
        raise Refusal
    head.method, head.target, head.version = match[1].upper(), match[2], match[3]  # as the app reads the method
    proxy_form = PROXY_FORM.match(head.target)
    if proxy_form:
        head.target = "/" + head.target[proxy_form.end() :]
    elif not head.target.startswith("/"):
        if head.method not in ("OPTIONS", "CONNECT"):  # whose targets are a star, or a host and its port
            raise Refusal
        head.target = "/" + head.target
    if head.target.count("&") >= limits.FIELDS:  # whose parameters would be taken apart on the loop
        raise Refusal(414, f"The address has more than {limits.FIELDS} parameters.")
    names = read_fields(stream, head.fields)
    head.host = proxy_form[1] if proxy_form else head.fields.get("host", "")  # RFC 9112, 3.2.2
    check_framing(head, names)


def read_fields(stream: Stream, fields: dict[str, str]) -> list[str]:
    """Read the fields up to the empty line; returns their names, in lower case. Raises as read_head()."""
    names, size = list[str](), 0
    while (line := stream.readline(limits.HEAD_BYTES)) != b"\r\n":
        size += len(line)
        if not line:
            raise ConnectionAbortedError
        if size >= limits.HEAD_BYTES:
            raise Refusal(431, f"The request's head is larger than {limits.HEAD_BYTES} bytes.")
        if len(names) == limits.FIELDS:
            raise Refusal(431, MANY_FIELDS)
        if not (match := FIELD.fullmatch(line.decode("latin-1"))):
            raise Refusal
        name, value = match[1].lower(), match[2].strip("\t ")
        names.append(name)
        if name in fields:
            value = fields[name] + ("; " if name == "cookie" else ",") + value
        fields[name] = value
    return names


def check_framing(head: Head, names: list[str]) -> None:
    """Find out how the body ends. Raises Refusal where others might see it end elsewhere."""
    modern, length = head.version == "1.1", head.fields.get("content-length")
    coding = head.fields.get("transfer-encoding")
    hosts = names.count("host")
    if hosts > 1 or (modern and not hosts):
        raise Refusal(400, "HTTP/1.1 asks for exactly one Host field.")
    if length is not None and not LENGTH.fullmatch(length):  # several are joined by a comma
        raise Refusal
    if coding is not None and (length is not None or not modern):
        raise Refusal
    if coding is not None and coding.lower() != "chunked":
        raise Refusal(400, "The only transfer encoding that this server understands is chunked.")
    head.length, head.chunked = int(length or 0), coding is not None


def read_body(stream: Stream, head: Head) -> Iterator[bytes]:
    """Yield the body in pieces. Raises Refusal where it breaks off or its chunks are malformed."""
    if not head.chunked:
        yield from read_exactly(stream, head.length)
        return
    chunks = total = 0
    while True:
        if not (match := CHUNK.fullmatch(stream.readline(limits.CHUNK_LINE_BYTES))):
            raise Refusal(400, BROKEN_OFF)
        if not (size := int(match[1], 16)):
            break
        chunks, total = chunks + 1, total + size
        if chunks > limits.CHUNKS + total // limits.CHUNK_BYTES:  # each costs as much as hundreds of bytes
            raise Refusal(400, SMALL_CHUNKS)
        yield from read_exactly(stream, size)
        if stream.read(2) != b"\r\n":
            raise Refusal(400, BROKEN_OFF)
    left = limits.TRAILER_BYTES
    for _ in range(limits.FIELDS + 1):
        line = stream.readline(left)
        left -= len(line)
        if line == b"\r\n":
            return
        if left and not FIELD.fullmatch(line.decode("latin-1")):
            raise Refusal(400, BROKEN_OFF)
    raise Refusal(431, MANY_FIELDS)


def read_exactly(stream: Stream, size: int) -> Iterator[bytes]:
    """Yield so many bytes, as they come. Raises Refusal where the client ends before."""
    while size:
        piece = stream.read1(min(size, PIECE_BYTES))
        if not piece:
            raise Refusal(400, BROKEN_OFF)
        size -= len(piece)
        yield piece


def render(answer: Answer, head: Head, keep_alive: float) -> bytes:
    """Return an answer as it is sent; the connection is kept for so many seconds, or closed where there are none."""
    status, headers, body = answer
    lines = [f"HTTP/1.1 {status}", f"Date: {formatdate(time.time(), usegmt=True)}"]
    # Clients that know when the connection ends do not send on it as it is being closed (RFC 2068, 19.7.1.1).
    lines += (
        ["Connection: keep-alive", f"Keep-Alive: timeout={int(keep_alive)}"] if keep_alive else ["Connection: close"]
    )
    ours = {"connection", "date"} if head.method == "HEAD" else {"connection", "date", "content-length"}
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in ours]
    bodiless = status.startswith(("204", "304"))
    if not bodiless and not any(line.lower().startswith("content-length:") for line in lines):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if bodiless or head.method == "HEAD" else body)
