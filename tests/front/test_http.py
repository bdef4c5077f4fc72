"""HTTP by the byte where no server is needed: both sides of each limit, what fields become, and what an answer says."""

import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.socket
import pytest

from keras_server.front import lanes, limits
from keras_server.front.http import Head, Refusal, read_body, read_head, render
from keras_server.front.lanes import run
from keras_server.front.reader import Reader

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"


def head_of(data: bytes) -> Head:
    """Return a request's head."""
    head = Head()
    read_head(io.BufferedReader(io.BytesIO(data)), head)
    return head


def body_of(data: bytes) -> bytes:
    """Return a body that comes in chunks."""
    return b"".join(read_body(io.BufferedReader(io.BytesIO(data)), Head(chunked=True)))


def address(size: int) -> bytes:
    """Return a head whose first line has so many bytes, with its end."""
    return b"GET /" + b"a" * (size - 16) + b" HTTP/1.1\r\nHost: a\r\n\r\n"


def fields(size: int) -> bytes:
    """Return a head with so many bytes of fields, in several lines."""
    line = b"X-A: " + b"a" * 1000 + b"\r\n"
    count, rest = divmod(size - len(b"Host: a\r\n") - len(b"X-B: \r\n"), len(line))
    return GET + line * count + b"X-B: " + b"b" * rest + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("status", "make", "size"),
    [(414, address, 8 * 1024), (431, fields, 32 * 1024)],
)
def test_a_head_may_have_fewer_bytes_than_the_limit(status: int, make: Callable[[int], bytes], size: int) -> None:
    assert head_of(make(size - 1)).host == "a"
    with pytest.raises(Refusal) as caught:
        head_of(make(size))
    assert caught.value.status == status


def chunk_line(size: int) -> bytes:
    """Return a chunk, and the last, whose first line has so many bytes, with its end."""
    return b"3;" + b"a" * (size - 4) + b"\r\nabc\r\n0\r\n\r\n"


def digits(count: int) -> bytes:
    """Return a chunk, and the last, whose size has so many digits."""
    return b"3".rjust(count, b"0") + b"\r\nabc\r\n0\r\n\r\n"


@pytest.mark.parametrize(("make", "most"), [(chunk_line, 1024), (digits, 16)])
def test_the_line_before_a_chunk_is_bounded(make: Callable[[int], bytes], most: int) -> None:
    assert body_of(make(most)) == b"abc"
    with pytest.raises(Refusal):
        body_of(make(most + 1))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\x0b", b"\0\0", b"ab", b"\r\n"])
def test_a_chunk_ends_with_carriage_return_and_line_feed(end: bytes) -> None:
    """Who takes anything else for its end sees other chunks than a proxy that does not."""
    data = b"3\r\nabc" + end + b"0\r\n\r\n"
    if end == b"\r\n":
        assert body_of(data) == b"abc"
    else:
        with pytest.raises(Refusal):
            body_of(data)


def test_fields_of_one_name_are_joined_in_their_order() -> None:
    """RFC 9110, 5.3: what a proxy adds to X-Forwarded-For as a field of its own stands behind what the client sent."""
    head = head_of(GET + b"X-A: 1\r\nCookie: a=b\r\nx-a:\t2 \r\ncookie: c=d\r\nX-A: 3\r\n\r\n")
    assert head.fields == {"host": "a", "x-a": "1,2,3", "cookie": "a=b; c=d"}
    assert head.environ()["HTTP_X_A"] == "1,2,3"


def test_a_name_with_an_underscore_passes_for_no_other() -> None:
    head = head_of(GET + b"X_Forwarded_For: 1\r\nContent_Length: 5\r\n\r\n")
    environ = head.environ()
    assert (environ["CONTENT_LENGTH"], "HTTP_X_FORWARDED_FOR" in environ) == ("0", False)


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (Head(fields={"expect": "100-continue"}, length=1), True),
        (Head(fields={"expect": "100-continue"}, chunked=True), True),
        (Head(fields={"expect": "100-continue"}), False),  # no body
        (Head(fields={"expect": "100-continue"}, length=1, version="1.0"), False),
        (Head(fields={"expect": "nothing"}, length=1), False),
    ],
)
def test_who_waits_for_it_is_told_to_continue(head: Head, told: bool) -> None:
    """RFC 9110, 10.1.1."""
    assert head.expects is told


@pytest.mark.parametrize(
    ("status", "method", "said"),
    [("200 OK", "GET", 1), ("200 OK", "HEAD", 1), ("204 No Content", "GET", 0), ("304 Not Modified", "GET", 0)],
)
def test_an_answer_says_its_length_once_and_without_a_body_not(status: str, method: str, said: int) -> None:
    for headers in ([], [("Content-Length", "4")], [("content-length", "4")]):
        answer = render((status, headers if said else [], b"body"), Head(method), 75)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.lower().count(b"content-length: 4") == said
        assert body == (b"body" if said and method == "GET" else b"")


def test_a_client_that_sends_faster_than_it_is_read_lets_others_have_their_turn() -> None:
    turns, reads = 0, 10 * limits.STEPS

    def wait_for_turns() -> None:
        nonlocal turns
        while True:
            gevent.sleep(0)
            turns += 1

    ours, theirs = gevent.socket.socketpair()
    with ours, theirs:
        theirs.sendall(bytes(reads))
        reader = Reader(ours)
        reader.until = time.monotonic() + 60
        other = gevent.spawn(wait_for_turns)
        assert sum(reader.readinto(bytearray(1)) for _ in range(reads)) == reads
        other.kill()
    assert turns >= 8


class Body:
    """What an app returns: a part of a body, which is followed by a failure where that is wanted."""

    def __init__(self, fails: bool):
        self.fails, self.closed = fails, False

    def __iter__(self) -> Iterator[bytes]:
        yield b" whole"
        if self.fails:
            raise ArithmeticError

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("fails", [False, True])
def test_an_app_is_called_as_wsgi_has_it(fails: bool) -> None:
    """PEP 3333: what write() was given comes first, of two heads the second counts, close() is called in any case."""
    body = Body(fails)

    def app(environ: dict[str, Any], start_response: Any) -> Body:
        start_response("200 OK", [("A", "b")])(b"the")
        try:
            raise ArithmeticError
        except ArithmeticError:
            start_response("500 No", [("C", "d")], (None, None, None))
        return body

    assert run(app, {}) == (None if fails else ("500 No", [("C", "d")], b"the whole"))
    assert body.closed


def test_an_app_that_would_end_its_thread_is_answered_for_and_the_thread_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(_environ: object, _start: object) -> list[bytes]:
        sys.exit("as somebody's own code may")

    monkeypatch.setattr(lanes.log, "propagate", True)
    assert run(app, {}) is None  # for which the front answers 500
    assert "SystemExit: as somebody's own code may" in caplog.text
