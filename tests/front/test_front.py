"""The front over real sockets: what is HTTP and what is not. test_slow_clients.py has who takes long."""

import contextlib
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from fakes import PIXEL, PREDICT, FakeServer, post, request, wait_until

import run_keras_server as server

CHUNKED = PREDICT + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(PIXEL), PIXEL)


def table(cases: dict[str, tuple[int, bytes]]) -> list[Any]:
    """Return named cases as pytest takes them."""
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeServer]:
    """A server that most tests share."""
    with FakeServer("--queue-size", "4", "--max-batch", "1", "--log-level", "debug") as server:
        yield server


@pytest.fixture
def fake(shared: FakeServer) -> Iterator[FakeServer]:
    """That server, which rests after the test."""
    yield shared
    shared.rest()


# What HTTP allows, and what it does not


@pytest.mark.parametrize(
    ("status", "data"),
    table(
        {
            "HTTP/1.1": (200, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"),
            "HTTP/1.0": (200, b"GET /healthz HTTP/1.0\r\n\r\n"),
            "an empty line first": (200, b"\r\nGET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"),
            "absolute address": (200, b"GET http://elsewhere/healthz?a=b HTTP/1.1\r\nHost: a\r\n\r\n"),
            "absolute address of the root": (200, b"GET HTTP://elsewhere HTTP/1.1\r\nHost: a\r\n\r\n"),
            "empty field": (200, b"GET /healthz HTTP/1.1\r\nHost:\r\nX-Empty:\r\n\r\n"),
            "bytes beyond ASCII in a field": (200, b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Name: \xc3\xa4\xff\r\n\r\n"),
            "websocket": (
                400,
                b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
            ),
            "GET with a body": (200, b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"),
            "no body": (400, b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"),
            "no length": (400, b"POST /predict HTTP/1.1\r\nHost: a\r\n\r\n"),
            "body": (200, PREDICT + b"Content-Length: %d\r\n\r\n%b" % (len(PIXEL), PIXEL)),
            "zeros before the length": (200, PREDICT + b"Content-Length: 000%d\r\n\r\n%b" % (len(PIXEL), PIXEL)),
            "chunks": (200, CHUNKED + CHUNKS),
            "many chunks": (200, CHUNKED + b"".join(b"01\r\n%c\r\n" % byte for byte in PIXEL) + b"0\r\n\r\n"),
            "chunks with extensions and trailers": (
                200,
                CHUNKED + b"%X;a=b\r\n%b\r\n000;c\r\nX-Sum: 1\r\n\r\n" % (len(PIXEL), PIXEL),
            ),
            "Chunked": (200, PREDICT + b"Transfer-Encoding: Chunked\r\n\r\n" + CHUNKS),
            "OPTIONS": (200, b"OPTIONS /predict HTTP/1.1\r\nHost: a\r\n\r\n"),
            "a method in small letters": (200, b"post" + PREDICT[4:] + b"Content-Length: 67\r\n\r\n" + PIXEL),
            "OPTIONS *": (404, b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
            "CONNECT": (404, b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n"),
            "TRACE": (405, b"TRACE /predict HTTP/1.1\r\nHost: a\r\nX-Secret: s\r\n\r\n"),
            "unknown method": (405, b"BREW /predict HTTP/1.1\r\nHost: a\r\n\r\n"),
            "%00": (404, b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n"),
            "%0d%0a": (404, b"GET /%0d%0aX-Injected:%201 HTTP/1.1\r\nHost: a\r\n\r\n"),
            "dots": (404, b"GET /static/../run_keras_server.py HTTP/1.1\r\nHost: a\r\n\r\n"),
            "encoded dots": (404, b"GET /static/%2e%2e/run_keras_server.py HTTP/1.1\r\nHost: a\r\n\r\n"),
            "invalid UTF-8": (404, b"GET /%ff%c0%80\xfe HTTP/1.1\r\nHost: a\r\n\r\n"),
            "lone %": (404, b"GET /%zz% HTTP/1.1\r\nHost: a\r\n\r\n"),
            "long query": (200, b"GET /healthz?" + b"a" * 8000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
            "odd Host": (200, b"GET /healthz HTTP/1.1\r\nHost: a b/c?d@:e\r\n\r\n"),
            "100 fields": (200, b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 99 + b"\r\n"),
        }
    ),
)
def test_what_http_allows_is_answered(fake: FakeServer, status: int, data: bytes) -> None:
    answer = fake.ask(data)
    assert answer.status == status, answer.body


BODY = b"\r\nContent-Length: %d\r\n\r\n%b" % (len(PIXEL), PIXEL)


@pytest.mark.parametrize(
    ("status", "data"),
    table(
        {
            "101 fields": (431, b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 100 + b"\r\n"),
            "two lengths": (400, PREDICT + b"Content-Length: 1\r\nContent-Length: 5\r\n\r\n"),
            "one length twice": (400, PREDICT + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n"),
            "two lengths in a field": (400, PREDICT + b"Content-Length: 5, 5\r\n\r\n"),
            "negative length": (400, PREDICT + b"Content-Length: -1\r\n\r\n"),
            "length with a sign": (400, PREDICT + b"Content-Length: +5\r\n\r\n"),
            "length with an underscore": (400, PREDICT + b"Content-Length: 1_0\r\n\r\n"),
            "length with a point": (400, PREDICT + b"Content-Length: 5.0\r\n\r\n"),
            "hexadecimal length": (400, PREDICT + b"Content-Length: 0x5\r\n\r\n"),
            "superscript length": (400, PREDICT + b"Content-Length: \xb2\r\n\r\n"),
            "empty length": (400, PREDICT + b"Content-Length:\r\n\r\n"),
            "endless length": (400, PREDICT + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
            "length and coding": (400, PREDICT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            "coding and length": (400, PREDICT + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
            "coding in HTTP/1.0": (400, CHUNKED.replace(b"1.1", b"1.0") + CHUNKS),
            "gzip": (400, PREDICT + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
            "two codings": (400, PREDICT + b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
            "identity": (400, PREDICT + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n"),
            "vertical tab in the coding": (400, PREDICT + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
            "blank before the colon": (400, PREDICT + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
            "folded field": (400, PREDICT + b"X-Long: a\r\n b\r\nContent-Length: 5\r\n\r\n"),
            "folded first field": (400, b"GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n"),
            "no colon": (400, PREDICT + b"what is this\r\n\r\n"),
            "no name": (400, PREDICT + b": value\r\n\r\n"),
            "NUL in a field": (400, PREDICT + b"X-A: a\0b\r\n\r\n"),
            "NUL in a name": (400, PREDICT + b"X\0A: a\r\n\r\n"),
            "carriage return in a field": (400, PREDICT + b"X-A: a\rContent-Length: 5\r\n\r\n"),
            "bare line feeds": (400, b"GET /healthz HTTP/1.1\nHost: a\n\n"),
            "bare line feed in the head": (400, b"GET /healthz HTTP/1.1\r\nHost: a\nX-A: b\r\n\r\n"),
            "bare line feed ends the head": (400, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\n"),
            "carriage returns only": (400, b"GET /healthz HTTP/1.1\rHost: a\r\r\n"),
            "no host": (400, b"GET /healthz HTTP/1.1\r\n\r\n"),
            "two hosts": (400, b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
            "HTTP/0.9": (400, b"GET /healthz\r\n"),
            "HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
            "HTTP/1.10": (400, b"GET /healthz HTTP/1.10\r\nHost: a\r\n\r\n"),
            "http": (400, b"GET /healthz http/1.1\r\nHost: a\r\n\r\n"),
            "two blanks": (400, b"GET  /healthz HTTP/1.1\r\nHost: a\r\n\r\n"),
            "tab": (400, b"GET\t/healthz HTTP/1.1\r\nHost: a\r\n\r\n"),
            "blank in the address": (400, b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
            "no-break space": (400, b"GET\xa0/healthz\xa0HTTP/1.1\r\nHost: a\r\n\r\n"),
            "blank at the end": (400, b"GET /healthz HTTP/1.1 \r\nHost: a\r\n\r\n"),
            "NUL in the address": (400, b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n"),
            "no method": (400, b" /healthz HTTP/1.1\r\nHost: a\r\n\r\n"),
            "TLS, of which no line ends": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64)),
            "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n"),
            "chunk size that is none": (400, CHUNKED + b"zz\r\n"),
            "empty chunk size": (400, CHUNKED + b"\r\n"),
            "negative chunk size": (400, CHUNKED + b"-1\r\n"),
            "chunk size with 0x": (400, CHUNKED + b"0x1\r\na\r\n"),
            "chunk size with a blank": (400, CHUNKED + b" 1\r\na\r\n"),
            "endless chunk size": (400, CHUNKED + b"0" * 5000),
            "bare line feed after the size": (400, CHUNKED + b"1\na\r\n"),
            "longer chunk than it says": (400, CHUNKED + b"1\r\nab\r\n0\r\n\r\n"),
            "bare line feed after a chunk": (400, CHUNKED + b"1\r\na\n0\r\n\r\n"),
            "endless extension": (400, CHUNKED + b"1;" + b"a" * 20_000),
            "bad trailer": (400, CHUNKED + b"1\r\na\r\n0\r\nX A: b\r\n\r\n"),
            "endless trailer": (431, CHUNKED + b"1\r\na\r\n0\r\nX-A: " + b"b" * 20_000),
            "long address": (414, b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
            "endless address": (414, b"GET /" + b"a" * 9000),
            "long field": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 40_000 + b"\r\n\r\n"),
            "endless field": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 40_000),
            "many fields": (431, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 5000),
        }
    ),
)
def test_what_http_does_not_allow_is_refused_and_ends_the_connection(
    fake: FakeServer, status: int, data: bytes
) -> None:
    with fake.raw() as raw:
        answer = raw.send(data + request("/smuggled")).answer()
        assert answer
        assert answer.status == status, answer.body
        assert answer.headers["Connection"] == "close"
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.ended()
    assert "smuggled" not in fake.log


def test_a_client_that_is_still_sending_its_head_can_read_that_it_is_too_large(fake: FakeServer) -> None:
    with fake.raw() as raw:
        raw.send(b"GET / HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 20_000_000).expect(431)


@pytest.mark.parametrize(
    ("refused", "sizes"),
    [
        (False, [8] * 1000),
        (True, [8] * 1100),
        (False, [256] * 20_000),
        (True, [240] * 20_000),
        (True, [100_000, *[1] * 1500]),
        (False, [200_000, *[1] * 1500]),
    ],
)
def test_small_chunks_are_refused_before_they_cost_much(fake: FakeServer, refused: bool, sizes: list[int]) -> None:
    with fake.raw() as raw:
        with contextlib.suppress(OSError):
            raw.send(CHUNKED + b"".join(b"%x\r\n%b\r\n" % (size, bytes(size)) for size in sizes) + b"0\r\n\r\n")
        answer = raw.answer()
    assert answer
    assert answer.status == 400  # those that were read whole are no pictures
    assert ("too small" in answer.json["error"]) is refused


def test_a_head_or_body_that_breaks_off_is_not_taken_for_a_request(fake: FakeServer) -> None:
    for cut in (b"GET /broken-off HTTP/1.1", b"GET /broken-off HTTP/1.1\r\nHost: a\r\n"):
        with fake.raw() as raw:
            raw.send(cut).socket.shutdown(socket.SHUT_WR)
            assert raw.ended()
    assert "broken-off" not in fake.log
    for cut in (PREDICT + b"Content-Length: 100\r\n\r\nabc", CHUNKED + b"64\r\nabc", CHUNKED + b"3\r\nabc\r\n"):
        with fake.raw() as raw:
            raw.send(cut).socket.shutdown(socket.SHUT_WR)
            raw.expect(400)


def test_requests_sent_at_once_are_answered_in_order(fake: FakeServer) -> None:
    with fake.raw() as raw:
        raw.send(post(X_Request_ID="1") + request(X_Request_ID="2") + post(b"no image", X_Request_ID="3") + post())
        answers = [raw.answer() for _ in range(4)]
    assert [answer.status for answer in answers if answer] == [200, 200, 400, 200]
    assert [answer.headers["X-Request-ID"] for answer in answers[:3] if answer] == ["1", "2", "3"]


def test_a_connection_is_kept_unless_the_client_wants_it_closed(fake: FakeServer) -> None:
    with fake.raw() as raw:
        for _ in range(3):
            answer = raw.send(request()).answer()
            assert answer
            assert (answer.headers["Connection"], answer.headers["Keep-Alive"]) == ("keep-alive", "timeout=75")
        answer = raw.send(request(Connection="close")).answer()
        assert answer
        assert answer.headers["Connection"] == "close"
        assert "Keep-Alive" not in answer.headers
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.ended()
    with fake.raw() as raw:
        old = b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
        for _ in range(2):
            answer = raw.send(old).answer()
            assert answer
            assert answer.headers["Connection"] == "keep-alive"
        answer = raw.send(old.replace(b"keep-alive", b"x")).answer()
        assert answer
        assert answer.headers["Connection"] == "close"
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.ended()


def test_head_has_the_headers_of_get_and_no_body(fake: FakeServer) -> None:
    with fake.raw() as raw:
        for target in ("/healthz", "/nothing", "/predict"):
            answer = raw.send(request(target, "HEAD")).answer(head=True)
            assert answer
            assert int(answer.headers["Content-Length"]) > 0
        assert raw.send(request()).answer()  # no body stands in between


def test_a_client_that_asks_first_is_told_to_continue(fake: FakeServer) -> None:
    with fake.raw() as raw:
        head, body = post(Expect="100-continue").split(b"\r\n\r\n", 1)
        raw.send(head + b"\r\n\r\n").expect(100)
        raw.send(body).expect(200)


def test_many_requests_at_once_do_not_keep_others_waiting(fake: FakeServer) -> None:
    with fake.raw() as greedy, fake.raw() as other:
        sender = threading.Thread(target=greedy.send, args=(request() * 3000,))
        sender.start()
        assert greedy.answer()
        assert other.send(request(X_Request_ID="other")).answer()
        for _ in range(2999):
            assert greedy.answer()
        sender.join()
    ids = re.findall(r"id=(\S+)", fake.log)
    assert len(ids) - ids.index("other") > 1000, "it had to wait for the greedy client's last answers"


def test_a_waiting_request_whose_client_leaves_is_not_computed(fake: FakeServer) -> None:
    first, second, third = fake.occupy(3)
    rows = fake.tell()["rows"]
    second.close()
    wait_until(lambda: "status=499" in fake.log)
    fake.tell("go")
    assert first.answer()
    assert third.answer()
    assert fake.wait(running=0)["rows"] == rows + 2
    for raw in (first, third):
        raw.close()
    assert "Traceback" not in fake.log


def test_nothing_is_left_of_connections_and_threads(fake: FakeServer) -> None:
    fake.wait(connections=0)
    before = fake.tell()
    for _ in range(50):
        fake.ask(post())
        fake.raw().close()
        with fake.raw() as raw:
            raw.send(b"GET / HTTP/1.1\r\nHost")
        assert requests.get(f"{fake.url}/healthz", timeout=20).ok
    after = fake.wait(connections=0, held=0)
    assert after["files"] == before["files"]
    assert after["threads"] == before["threads"]


def test_pages_neither_wait_behind_predictions_nor_take_all_that_come() -> None:
    with FakeServer("--max-batch", "1", "--decode-threads", "1", PAGES=2, PAGE_THREADS=1) as fake:
        raws = fake.occupy(5)  # every thread of the predictions is taken
        assert fake.ask(request("/docs")).status == 200
        with fake.raw() as many:
            answers = []
            others = [fake.raw() for _ in range(8)]
            fake.signal(signal.SIGSTOP)  # so that it finds all of them at once
            for raw in others:
                raw.send(request("/docs") * 10)
            fake.signal(signal.SIGCONT)
            assert many.send(request()).answer()
            for raw in others:
                answers += [raw.answer() for _ in range(10)]
                raw.close()
        assert {answer.status for answer in answers if answer} == {200, 503}
        fake.tell("go")
        for raw in raws:
            raw.expect(200)
            raw.close()


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/healthz", {"status": "alive"}),
        ("/readyz", {"status": "ready", "model": "resnet50"}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
    ],
)
def test_a_probe_has_the_headers_of_the_app(fake: FakeServer, target: str, body: dict[str, object]) -> None:
    probe = fake.ask(request(target, X_Request_ID="probe"))
    app = server.app.test_client().get(target, headers={"X-Request-ID": "probe"})
    assert (probe.status, probe.json) == (200, body)
    ours = {"Date", "Connection", "Keep-Alive"}
    assert {*probe.headers} - ours == {*app.headers.keys()} - {"Server-Timing", "Retry-After"}
    with fake.raw() as raw:
        answer = raw.send(request(target, "HEAD")).answer(head=True)
    assert answer
    assert answer.headers["Content-Length"] == probe.headers["Content-Length"]
    assert fake.ask(request(target, "POST", b"")).status == 405


def test_while_predictions_wait_a_client_of_pages_gets_a_pause_after_each(fake: FakeServer) -> None:
    def seconds() -> float:
        with fake.raw() as raw:
            started = time.monotonic()
            raw.send(request() * 6)
            assert all(raw.answer() for _ in range(6))
            return time.monotonic() - started

    (waiting,) = fake.occupy(1)
    assert seconds() > 0.5
    fake.tell("go")
    assert waiting.answer()
    waiting.close()
    fake.wait(running=0)
    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("value", ["100-continue", "100-Continue", "100-CONTINUE"])
def test_the_case_of_a_field_s_value_does_not_matter(fake: FakeServer, value: str) -> None:
    with fake.raw() as raw:
        head, body = post(Expect=value, Connection="Keep-Alive, Close").split(b"\r\n\r\n", 1)
        first = raw.send(head + b"\r\n\r\n").answer()
        second = raw.send(body).answer()
    assert first
    assert second
    assert (first.status, second.status, second.headers["Connection"]) == (100, 200, "close")


@pytest.mark.parametrize(
    ("status", "trailers"),
    [
        (200, b"X-A: b\r\n" * 100),
        (431, b"X-A: b\r\n" * 101),
        (200, b"X-A: " + b"b" * 8183 + b"\r\n"),
        (431, b"X-A: " + b"b" * 8184 + b"\r\n"),
        (400, b"X-A: b\n"),
        (400, b"X-A: b\rX-B: c\r\n"),
        (400, b"X-A b\r\n"),
    ],
)
def test_trailers_are_bounded(fake: FakeServer, status: int, trailers: bytes) -> None:
    with fake.raw() as raw:
        answer = raw.send(CHUNKED + CHUNKS[:-2] + trailers + b"\r\n").answer()
    assert answer
    assert answer.status == status


def test_no_header_comes_twice(fake: FakeServer) -> None:
    for data in (request(), request("/docs"), request("/nothing"), post(), post(b""), b"nonsense\r\n\r\n"):
        names = [name.lower() for name in fake.ask(data).headers]
        assert len(names) == len({*names}), names


def test_pages_of_each_origin_on_the_list_can_read_answers_and_no_others() -> None:
    origins, longer = ("https://there", "http://localhost:3000"), "https://there.example"
    with FakeServer("--max-upload-mb", "0.1", environment={"KERAS_SERVER_CORS_ORIGIN": ", ".join(origins)}) as fake:
        for origin in (*origins, longer, "http://localhost:300", "https://THERE", "null", ", ".join(origins)):
            asks = [request(Origin=origin), request("/docs", Origin=origin), post(Origin=origin)]
            asks.append(request("/predict", "OPTIONS", Origin=origin, Access_Control_Request_Method="POST"))
            asks += [post(bytes(200_000), Origin=origin), post(b"none", Origin=origin)]
            for answer in map(fake.ask, asks):
                allowed = origin if origin in origins else None
                assert answer.headers["Access-Control-Allow-Origin"] == allowed
                assert ("Access-Control-Allow-Headers" in answer.headers) is (origin in origins)
                assert answer.headers["Vary"] == "Origin"
        for data in (request(), post(), b"nonsense\r\n\r\n"):
            assert "Access-Control-Allow-Origin" not in fake.ask(data).headers


def test_pages_of_other_origins_can_read_the_front_s_errors() -> None:
    origin = "https://there"
    with FakeServer("--cors-origin", origin, "--max-upload-mb", "0.1", "--queue-size", "1", "--timeout", "1") as fake:
        answers = {413: fake.ask(post(bytes(200_000), Origin=origin)), 400: fake.ask(b"nonsense\r\n\r\n")}
        assert "larger than the 0.1 MiB" in answers[413].json["error"]
        answers[200] = fake.ask(request(Origin=origin))
        fake.tell("hold")
        answers[504] = fake.ask(post(Origin=origin))
        for status, answer in answers.items():
            assert answer.status == status
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert "Retry-After" in answer.headers["Access-Control-Expose-Headers"]
            assert answer.headers["Vary"] == "Origin"
        fake.tell("go")


def test_a_client_may_end_its_half_of_the_connection_after_a_get(fake: FakeServer) -> None:
    raws = fake.occupy(1)
    with fake.raw() as raw:
        raw.send(request("/metrics")).socket.shutdown(socket.SHUT_WR)
        answer = raw.answer()
    assert answer
    assert answer.status == 200
    fake.tell("go")
    assert raws[0].answer()
    raws[0].close()
