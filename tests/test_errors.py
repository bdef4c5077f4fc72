"""The shape and the headers that all errors have."""

import json

import pytest

from keras_server.errors import Cors, common_headers, error_body
from keras_server.ticket import Ticket


@pytest.mark.parametrize(
    ("path", "foreign"),
    [("/predict", False), ("/", False), ("/v1/models/a:predict", True), ("/v2", True), ("/docs/v1", False)],
)
def test_an_error_has_the_shape_of_its_protocol(path: str, foreign: bool) -> None:
    body = json.loads(error_body(path, "why"))
    assert body == ({"error": "why"} if foreign else {"success": False, "error": "why"})


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), "https://a", None),
        (("*",), "https://a", "*"),
        (("https://a",), "https://a", "https://a"),
        (("https://a",), "https://b", None),
        (("https://a",), "", "https://a"),
        (("https://a", "https://b"), "https://a", "https://a"),
        (("https://a", "https://b"), "https://b", "https://b"),
        (("https://a", "https://b"), "https://c", None),
        (("https://a", "https://b"), "", None),
        (("https://a", "*"), "https://c", "*"),
    ],
)
def test_which_origins_may_read_an_answer(origins: tuple[str, ...], origin: str, allowed: str | None) -> None:
    headers = dict(Cors(origins).headers(origin))
    assert headers.get("Access-Control-Allow-Origin") == allowed
    assert headers.get("Vary") == ("Origin" if origins and "*" not in origins else None)
    assert len(headers) == (4 if allowed else 0) + ("Vary" in headers)


@pytest.mark.parametrize("status", [200, 400, 401, 413, 503, 504])
def test_which_headers_a_status_has(status: int) -> None:
    ticket = Ticket(1)
    ticket.describe({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_X_REQUEST_ID": "mine"})
    headers = dict(common_headers(ticket, status, Cors()))
    assert headers["X-Request-ID"] == "mine"
    assert ("Retry-After" in headers) == (status == 503)
    assert ("WWW-Authenticate" in headers) == (status == 401)
