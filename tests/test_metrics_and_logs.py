"""What the operator sees: metrics with bounded labels, one line a request, request ids, and the headers' defaults."""

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest
import requests
from fakes import PIXEL, FakeServer, post, request, wait_until
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from keras_server import telemetry
from keras_server.telemetry import JsonFormatter
from keras_server.ticket import Ticket


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeServer]:
    """A server that logs in JSON."""
    with FakeServer(
        "--log-format",
        "json",
        "--log-level",
        "debug",
        "--max-upload-mb",
        "0.1",
        "--queue-size",
        "3",
        "--max-batch",
        "1",
    ) as server:
        yield server


@pytest.fixture
def fake(shared: FakeServer) -> Iterator[FakeServer]:
    """That server, which rests after the test."""
    yield shared
    shared.rest()


def samples(fake: FakeServer) -> dict[tuple[str, ...], float]:
    """Return the metrics' values by their names and labels' values."""
    families = text_string_to_metric_families(fake.ask(request("/metrics")).body.decode())
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def lines(fake: FakeServer) -> list[dict[str, object]]:
    """Return the log's lines, each of which must be JSON."""
    return [json.loads(line) for line in fake.log.splitlines()]


def line(fake: FakeServer, name: str) -> dict[str, object]:
    """Return the one line of a request's id; it is written after the answer."""
    wait_until(lambda: name in fake.log)
    (found,) = [line for line in lines(fake) if line.get("id") == name]
    return found


def test_metrics_count_what_happens(fake: FakeServer) -> None:
    before = samples(fake)
    form = [("image", ("a.png", PIXEL)), ("image", ("b.png", PIXEL)), ("image", ("c.png", b"no image"))]
    assert requests.post(f"{fake.url}/predict", files=form, timeout=20).ok
    assert fake.ask(post(b"no image")).status == 400
    assert fake.ask(post(bytes(200_000))).status == 413
    assert fake.ask(request("/nothing")).status == 404
    raws = fake.occupy(4)
    fake.wait(waiting=3)
    assert samples(fake)["keras_server_queue_length", "resnet50", "1"] == 3
    assert fake.ask(post()).status == 503
    fake.tell("go")
    for raw in raws:
        assert raw.answer()
        raw.close()
    after = samples(fake)
    changes = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key)}
    wanted = {
        ("keras_server_requests_total", "POST", "/predict", "200"): 5,
        ("keras_server_requests_total", "POST", "/predict", "400"): 1,
        ("keras_server_rejected_total", "bad request"): 1,
        ("keras_server_rejected_total", "too large"): 1,
        ("keras_server_rejected_total", "not found"): 1,
        ("keras_server_rejected_total", "overload"): 1,
        ("keras_server_images_total", "resnet50", "1"): 6,
        ("keras_server_decode_seconds_count", "resnet50", "1"): 6,  # what is no image is not decoded
        ("keras_server_queue_seconds_count", "resnet50", "1"): 6,
        ("keras_server_inference_seconds_count", "resnet50", "1"): 6,
        ("keras_server_batch_size_count", "resnet50", "1"): 6,
        ("keras_server_batch_size_sum", "resnet50", "1"): 6,
        ("keras_server_request_seconds_count", "/predict"): 6,
    }
    assert {key: changes.get(key) for key in wanted} == wanted
    for status, count in (("413", 1), ("503", 1)):  # which the front answers
        assert (
            sum(value for key, value in changes.items() if key[0].endswith("requests_total") and status in key) == count
        )
    assert after["keras_server_queue_length", "resnet50", "1"] == 0
    assert after["process_resident_memory_bytes",] > 1e7
    assert after["process_open_fds",] > 3


def test_the_model_is_an_info_metric(client: FlaskClient) -> None:
    text = client.get("/metrics")
    assert text.content_type.startswith("text/plain; version=")
    assert "# TYPE keras_server_model_info gauge" in text.text


def test_labels_are_bounded_whatever_a_client_sends(fake: FakeServer) -> None:
    def labelled() -> set[tuple[str, ...]]:
        return {key for key in samples(fake) if key[0].endswith(("requests_total", "rejected_total", "seconds_count"))}

    def storm(first: int) -> None:
        for n in range(first, first + 50):
            for target in (f"/{n}", f"/static/{n}", f"/predict/{n}", f"/v2/models/{n}", f"/v1/models/{n}:predict"):
                fake.ask(request(target, X_Request_ID=f"{n}", User_Agent=f"{n}"))
            fake.ask(request("/predict", f"M{n}"))
            fake.ask(request(f"/{n}", f"M{n}"))
            fake.ask(post(b"", f"/predict?top={n}", Origin=f"http://{n}"))
            fake.ask(b"GET /%d HTTP/1.1\r\n\r\n" % n)

    storm(0)
    before = labelled()
    storm(1000)
    assert labelled() == before
    assert len(before) < 100


def test_every_request_has_one_line(fake: FakeServer) -> None:
    assert fake.ask(post(X_Request_ID="taken-over.1")).headers["X-Request-ID"] == "taken-over.1"
    found = line(fake, "taken-over.1")
    milliseconds = found.pop("ms")
    assert isinstance(milliseconds, float)
    assert 0 < milliseconds < 30_000
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", str(found.pop("time")))
    assert found == {
        "level": "INFO", "method": "POST", "path": "/predict", "status": 200, "images": 1, "bytes": len(PIXEL),
        "client": "127.0.0.1", "id": "taken-over.1",
    }  # fmt: skip
    for data, status in (
        (post(bytes(200_000), X_Request_ID="large"), 413),
        (b"POST /predict HTTP/1.1\r\nHost: a\r\nX-Request-ID: length\r\nContent-Length: x\r\n\r\n", 400),
        (request("/nothing?secret=1", X_Request_ID="missing"), 404),
        (b"nonsense\r\n\r\n", 400),
    ):
        answer = fake.ask(data)
        assert answer.status == status
        assert line(fake, answer.headers["X-Request-ID"])["status"] == status
    fake.ask(request(body=b"abc", X_Request_ID="probe"))  # which the front answers itself
    assert line(fake, "probe")["bytes"] == 3
    assert "secret" not in fake.log


@pytest.mark.parametrize("name", ["a" * 65, "a b", "a/b", "ä", "\xff", "", "a\tb", '"}', "%0a", "a=b"])
def test_an_id_that_is_not_well_formed_is_replaced(fake: FakeServer, name: str) -> None:
    given = fake.ask(request(X_Request_ID=name)).headers["X-Request-ID"]
    assert re.fullmatch("[0-9a-f]{32}", given)
    found = line(fake, given)
    assert (found["path"], found["level"]) == ("/healthz", "DEBUG")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_client_writes_a_line_of_its_own(log_format: str) -> None:
    with FakeServer("--log-format", log_format) as fake:
        evil = 'x\r\nforged method=GET\x1b[31m\x00" \x85\u2028'
        encoded = "".join(f"%{byte:02x}" for byte in evil.encode())
        fake.ask(request(f"/{encoded}?{encoded}"))
        fake.ask(request("/" + evil.encode().decode("latin-1").translate(dict.fromkeys(range(33))) + "forged"))
        form = {
            "image": (evil, b"no image", evil.replace("\r\n", "").replace("\0", "").encode("ascii", "ignore").decode())
        }
        requests.post(f"{fake.url}/predict", files=form, headers={"User-Agent": "forged"}, timeout=20)
        requests.post(f"{fake.url}/predict", files=[*form.items()] * 2, timeout=20)
        fake.ask(request(method="FORGED"))
        count = 5
        wait_until(lambda: fake.log.count("\n") >= count)
        assert fake.log.count("\n") == len(fake.log.splitlines()) == count
        assert fake.log.isascii()
        assert not re.search(r"^forged|\x1b| forged|FORGED", fake.log, re.MULTILINE)


def test_a_failure_is_logged_with_its_traceback_and_answered_without(fake: FakeServer) -> None:
    fake.tell("fail")
    answer = fake.ask(post(X_Request_ID="failing"))
    assert answer.status == 500
    assert "failing" in answer.json["error"]
    assert not re.search("Arithmetic|Traceback|wished", answer.body.decode())
    wait_until(lambda: '"status": 500' in fake.log)
    (found,) = [line for line in lines(fake) if "traceback" in line]
    assert "ArithmeticError: as the test wished" in str(found["traceback"])
    assert "failing" in str(found["message"])


def test_json_lines_hold_any_message() -> None:
    record = logging.LogRecord("a", logging.ERROR, "", 1, "line\nbreak %s", ("\u2028\x00",), None)
    found = json.loads(JsonFormatter().format(record))
    assert found["message"] == "line\nbreak \u2028\x00"
    assert found["level"] == "ERROR"


def test_a_ticket_is_closed_once(caplog: pytest.LogCaptureFixture) -> None:
    ticket = Ticket(1)
    ticket.describe({"REQUEST_METHOD": "GET", "PATH_INFO": "/", "CONTENT_LENGTH": "what"})
    with caplog.at_level(logging.INFO, "keras_server"):
        ticket.close(504)
        ticket.close(200)
    (message,) = caplog.messages
    assert message.startswith("method=GET path=/ status=504 ms=")
    assert message.endswith(f" images=0 bytes=0 client= id={ticket.id}")


def test_answers_have_careful_headers(client: FlaskClient, setting: Callable[..., None]) -> None:
    for answer in (client.get("/"), client.get("/healthz"), client.get("/nothing"), client.post("/predict")):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert "Server" not in answer.headers


@pytest.mark.parametrize(
    ("status", "reason"),
    [(200, None), (304, None), (500, None), (400, "bad request"), (401, "no key"), (404, "not found"),
     (405, "bad method"), (408, "too slow"), (413, "too large"), (414, "too large"), (415, "media type"),
     (429, "too many"), (431, "too large"), (499, "client left"), (503, "overload"), (504, "too late")],
)  # fmt: skip
def test_what_is_turned_away_is_counted_by_its_reason(status: int, reason: str | None) -> None:
    def counted() -> dict[str, float]:
        (family,) = telemetry.REJECTED.collect()
        return {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}

    before = counted()
    Ticket(1).close(status)
    changed = {name: value - before.get(name, 0) for name, value in counted().items() if value != before.get(name, 0)}
    assert changed == ({reason: 1} if reason else {})


def test_the_bounds_of_histograms_are_those_that_dashboards_ask_for(fake: FakeServer) -> None:
    fake.ask(post())
    page = fake.ask(request("/metrics")).body.decode()
    seconds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
    for name, more in {
        "decode": "model=",
        "queue": "model=",
        "inference": "model=",
        "request": 'route="/predict"',
    }.items():
        found = re.findall(rf'(?m)^keras_server_{name}_seconds_bucket{{le="([\d.]+)",{more}', page)
        assert [*map(float, found)] == seconds, name
    rows = re.findall(r'(?m)^keras_server_batch_size_bucket{le="([\d.]+)",model=', page)
    assert [*map(float, rows)] == [1, 2, 4, 8, 16, 32, 64, 128]


def test_metrics_are_made_at_most_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now)
    page = telemetry.MetricsPage()
    first = page.render()
    telemetry.IMAGES.labels("a", "1").inc()
    now = 100.99
    assert page.render() == first
    now = 101.0
    assert page.render() != first
