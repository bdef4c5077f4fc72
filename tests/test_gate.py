"""The Gate alone: before a pretended proxy, without a cluster."""

import asyncio
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from keras_server import gate
from keras_server.gate import Gate, with_ticket
from keras_server.settings import Settings
from keras_server.ticket import Ticket

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
BODY = {"type": "http.response.body", "body": b"{}"}
RAY_OWN = {"headers": [(b"content-type", b"text/plain"), (b"retry-after", b"1")]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "PAUSE", 0.001)


def ask(
    app: Callable[..., Any], *parts: bytes, headers: Any = (), then: str = "wait", held: int = 0, **settings: Any
) -> tuple[int, dict[str, str], Any]:
    """Send a request through a gate; returns the answer's status, headers and JSON."""
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": p, "more_body": i < len(parts) - 1} for i, p in enumerate(parts)]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop(0)
        if then == "wait":
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [*headers]}
    asked = Gate(app, Settings(**settings))
    asked.held = held
    asyncio.run(asked(scope, receive, send))
    assert asked.held == held
    if not sent:
        return 0, {}, None
    found = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], found, json.loads(b"".join(m["body"] for m in sent[1:]))


def answering(*answers: Any) -> Any:
    """An app that gives these answers in turn and notes the bodies that it was sent."""
    left = list(answers)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        app.bodies.append((await receive())["body"])  # type: ignore[attr-defined]
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, BaseException):
            raise answer
        for message in answer:
            await send(message)

    app.bodies = []  # type: ignore[attr-defined]
    return app


def test_the_app_gets_the_whole_body_at_once() -> None:
    app = answering([START, BODY])
    assert ask(app, b"a", b"b", b"c")[0] == 200
    assert app.bodies == [b"abc"]


def test_a_chunked_body_has_a_length_then() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers.append(dict(scope["headers"]))
        await send(START)
        await send(BODY)

    headers: list[dict[bytes, bytes]] = []
    assert ask(app, b"abc", b"d", headers=[(b"transfer-encoding", b"chunked")])[0] == 200
    assert headers == [{b"content-length": b"4"}]


@pytest.mark.parametrize("lost", [[], [START], [START, BODY | {"more_body": True}], RuntimeError("died")])
def test_a_lost_answer_is_asked_for_again(lost: Any) -> None:
    app = answering(lost, lost, [START, BODY])
    assert ask(app, b"photo")[0] == 200
    assert app.bodies == [b"photo"] * 3


def test_where_every_replica_is_lost() -> None:
    app = answering([])
    status, headers, answer = ask(app, b"photo")
    assert (status, headers["retry-after"], answer["success"]) == (503, "1", False)
    assert len(app.bodies) == gate.TRIES


@pytest.mark.parametrize(("code", "expected"), [(503, 503), (408, 504), (404, 503), (500, 503)])
def test_rays_own_errors_are_put_in_the_contracts_shape(code: int, expected: int) -> None:
    status, headers, answer = ask(answering([START | RAY_OWN | {"status": code}, BODY]), b"x")
    assert status == expected
    assert ("retry-after" in headers) == (expected == 503)
    assert answer.keys() == {"success", "error"}
    assert headers["x-request-id"]


def test_text_that_is_no_error_stays_as_it_is() -> None:
    """As the app's figures for Prometheus."""
    assert ask(answering([START | RAY_OWN, BODY]), b"x")[::2] == (200, {})


def test_an_error_can_be_read_by_the_pages_that_may() -> None:
    headers = [(b"origin", b"https://a.example")]
    allowed = ask(answering([]), b"x", headers=headers, cors_origin=("https://a.example",))[1]
    assert allowed["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in ask(answering([]), b"x", headers=headers)[1]


def test_what_the_app_never_sees_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "keras_server"):
        headers = ask(answering([START, BODY]), b"x", headers=[(b"content-length", b"99999999")])[1]
    assert "status=413 " in caplog.text
    assert headers["x-request-id"] in caplog.text


def test_the_apps_own_errors_stay_as_they_are() -> None:
    own = [START | {"status": 503}, BODY | {"body": b'{"error": "own"}'}]
    app = answering(own)
    assert ask(app, b"x")[2] == {"error": "own"}
    assert len(app.bodies) == 1


def test_headers_come_once() -> None:
    twice = START | {"headers": [(b"x-request-id", b"app"), (b"x-request-id", b"ray"), (b"content-type", b"a/b")]}
    assert ask(answering([twice, BODY]), b"x")[1]["x-request-id"] == "app"


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(("size", "expected"), [(1048, 200), (1049, 413)])
def test_a_body_over_the_limit_is_not_passed_on(announced: bool, size: int, expected: int) -> None:
    app = answering([START, BODY])
    headers = [(b"content-length", b"%d" % size)] if announced else []
    status, _, answer = ask(app, b"x" * size, headers=headers, max_upload_mb=0.001)
    assert status == expected
    assert len(app.bodies) == (expected == 200)
    assert answer.get("success") == (None if expected == 200 else False)


@pytest.mark.parametrize("length", [b"9" * 5000, b"-1", b"x", b"", b"\xff"])
def test_a_length_that_is_none_is_not_believed(length: bytes) -> None:
    app = answering([START, BODY])
    assert ask(app, b"body", headers=[(b"content-length", length)])[0] == 200
    assert app.bodies == [b"body"]


@pytest.mark.parametrize(("held", "expected"), [(2**21 - 1, 200), (2**21, 503)])
def test_memory_is_bounded(held: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODIES", 2)
    app = answering([START, BODY])
    status, headers, _ = ask(app, b"x", held=held, max_upload_mb=1)
    assert status == expected
    assert len(app.bodies) == (expected == 200)
    assert headers.get("retry-after") == (None if expected == 200 else "1")


def test_a_body_that_breaks_off() -> None:
    assert ask(answering([START, BODY]), then="leave")[0] == 400


def test_nobody_waits_for_an_answer_after_the_deadline() -> None:
    """Ray keeps the cancellation to itself, as this app does."""

    async def slow(*_: Any) -> None:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return

    status, _, answer = ask(slow, b"x", timeout=0.05)
    assert (status, answer["success"]) == (504, False)


def test_who_left_is_not_asked_for_again() -> None:
    async def leaves(_: Any, receive: Any, send: Any) -> None:
        calls.append(await receive())
        calls.append(await receive())

    calls: list[Any] = []
    assert ask(leaves, b"x", then="leave") == (0, {}, None)
    assert [message["type"] for message in calls] == ["http.request", "http.disconnect"]


def test_a_gate_behind_a_gate() -> None:
    """As with HAProxy, where both stand in the replica."""
    assert ask(Gate(answering([START, BODY]), Settings(), tries=1), b"x")[0] == 200


def test_rays_own_paths_pass() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    asyncio.run(Gate(app, Settings())({"type": "http", "path": "/-/healthz"}, None, None))  # type: ignore[arg-type]
    assert seen == ["/-/healthz"]


def test_a_request_can_be_sent_to_another_process() -> None:
    """As Ray's Python proxy does, which pickles the scope."""
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(pickle.loads(pickle.dumps(scope)))
        await send(START)
        await send(BODY)

    assert ask(app, b"x")[0] == 200
    assert scopes[0]["path"] == "/predict"


def test_the_wsgi_app_has_the_ticket_of_the_gate_before_it() -> None:
    tickets: list[Ticket] = []

    def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        tickets.append(environ["ticket"])
        return []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.to_thread(with_ticket(wsgi), {}, None)
        assert not tickets[0].gone
        await send(START)
        await send(BODY)

    assert ask(app, b"x", headers=[(b"x-request-id", b"mine")], timeout=50)[0] == 200
    assert tickets[0].id == "mine"
    assert 40 < tickets[0].left <= 50
    assert tickets[0].gone


def test_an_answer_in_pieces_is_whole_once_its_last_has_come() -> None:
    app = answering([START, BODY | {"body": b"[1,", "more_body": True}, BODY | {"body": b"2]"}])
    assert ask(app, b"x")[2] == [1, 2]
    assert app.bodies == [b"x"]


def test_the_pauses_between_tries_double_and_each_loss_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(gate.asyncio, "sleep", sleep)
    assert ask(answering(RuntimeError("died")), b"x")[0] == 503
    assert pauses == [gate.PAUSE * 2**attempt for attempt in range(gate.TRIES)]
    lost = [record for record in caplog.records if record.getMessage() == "A request was lost"]
    assert [record.exc_info is not None and str(record.exc_info[1]) for record in lost] == ["died"] * gate.TRIES
