"""Errors as clients see them, and the headers of every answer: one place for the front and the app."""

from __future__ import annotations

import json
from dataclasses import dataclass

from keras_server.ticket import Ticket

OVERLOADED = "The server has more to do than it can: try again in a moment."
CLIENT_LEFT = "The connection was closed, or its sending half, before the answer was ready: keep it open."
TOO_LATE = "The answer was not ready in time: try again, or with fewer images."
TOO_LARGE = "The request is larger than the {:g} MiB that this server takes: send a smaller picture."
FAILED = "The server failed on this request; its log says why, under {}."
NOT_LOADED = "The model is not loaded yet: try again in a moment."
OTHER_HOST = "This server answers for other names than the request's Host: --allowed-hosts adds one."
STOPPING = "The server is shutting down."

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
ALLOWED = (
    "Authorization, Cache-Control, Content-Encoding, Content-Type, Inference-Header-Content-Length, X-Request-ID, "
    "X-Requested-With"
)
EXPOSED = "X-Request-ID, Retry-After, Inference-Header-Content-Length"
PREFLIGHT_SECONDS = 7200  # for which a browser remembers what it may send: Chromium's most

Headers = list[tuple[str, str]]


@dataclass(frozen=True)
class Cors:
    """Pages of which other origins may read the answers."""

    origins: tuple[str, ...] = ()

    def headers(self, origin: str) -> Headers:
        """Return what tells the browser so, for a request from a page of `origin`."""
        if not self.origins:
            return []
        anybody = "*" in self.origins
        vary = [] if anybody else [("Vary", "Origin")]
        if not origin and len(self.origins) == 1:  # a head that is refused may break off before its Origin
            (origin,) = self.origins
        if not anybody and origin not in self.origins:
            return vary
        return [
            ("Access-Control-Allow-Origin", "*" if anybody else origin),
            ("Access-Control-Allow-Headers", ALLOWED),
            ("Access-Control-Expose-Headers", EXPOSED),
            ("Access-Control-Max-Age", str(PREFLIGHT_SECONDS)),
            *vary,
        ]


def error_body(path: str, sentence: str) -> bytes:
    """Return the JSON of an error; on the paths of other protocols in the shape that their clients read."""
    foreign = path.startswith(("/v1", "/v2"))
    return json.dumps({"error": sentence} if foreign else {"success": False, "error": sentence}).encode() + b"\n"


def common_headers(ticket: Ticket, status: int, cors: Cors) -> Headers:
    """Return the headers that every answer of this status has, whoever made it."""
    headers = [("X-Request-ID", ticket.id), ("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", POLICY)]
    if status == 401:
        headers.append(("WWW-Authenticate", "Bearer"))
    if status == 503:
        headers.append(("Retry-After", "1"))
    return headers + cors.headers(ticket.origin)


def json_headers(ticket: Ticket, status: int, cors: Cors) -> Headers:
    """Return the headers of an answer in JSON that the app has not made."""
    return [("Content-Type", "application/json"), *common_headers(ticket, status, cors)]
