"""Spans of OpenTelemetry, as a collector on this machine gets them over OTLP."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import ROOT
from fakes import FakeServer, post, request, wait_until

import run_keras_server as server
from keras_server import spans

collector = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
KIND_SERVER, UNSET, ERROR = 2, 0, 2


class Collector(ThreadingHTTPServer):
    """Takes spans by HTTP, as protobuf."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.resources: list[Any] = []
        self.spans: list[Any] = []

    @property
    def environment(self) -> dict[str, str]:
        """What has a server send its spans here, soon."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def wait(self, number: int) -> list[Any]:
        """Return the spans once there are so many, the oldest first."""
        wait_until(lambda: len(self.spans) >= number)
        assert len(self.spans) == number, [span.name for span in self.spans]
        return sorted(self.spans, key=lambda span: span.start_time_unix_nano)


class Handler(BaseHTTPRequestHandler):
    """Answers a request of OTLP."""

    server: Collector

    def do_POST(self) -> None:
        """Take spans."""
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for part in collector.ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append(part.resource)
            self.server.spans += [span for scope in part.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Collector]:
    """A collector."""
    with Collector() as found:
        threading.Thread(target=found.serve_forever, args=[0.05], daemon=True).start()
        yield found
        found.shutdown()


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource."""
    return {row.key: getattr(row.value, row.value.WhichOneof("value")) for row in holder.attributes}


def by_name(found: list[Any]) -> dict[str, Any]:
    """Return spans by their names, which all differ."""
    named = {span.name: span for span in found}
    assert len(named) == len(found)
    return named


def test_a_request_is_a_span_with_its_stages_as_children_and_its_caller_as_parent(receiver: Collector) -> None:
    with FakeServer(environment=receiver.environment) as fake:
        before = time.time_ns()
        assert fake.ask(post(traceparent=PARENT, X_Request_ID="mine")).status == 200
        found = by_name(receiver.wait(4))
        after = time.time_ns()
    assert {*found} == {"POST /predict", "decode", "queue", "compute"}
    whole, stages = found["POST /predict"], [found[name] for name in ("decode", "queue", "compute")]
    assert {span.trace_id.hex() for span in found.values()} == {PARENT.split("-")[1]}
    assert whole.parent_span_id.hex() == PARENT.split("-")[2]
    assert {span.parent_span_id for span in stages} == {whole.span_id}
    times = [before, whole.start_time_unix_nano]
    for span in stages:
        times += [span.start_time_unix_nano, span.end_time_unix_nano]
    times += [whole.end_time_unix_nano, after]
    assert times == sorted(times)
    assert found["queue"].end_time_unix_nano - found["compute"].start_time_unix_nano == pytest.approx(0, abs=1e4)
    assert (whole.kind, whole.status.code) == (KIND_SERVER, UNSET)
    told = attributes(whole)
    assert told.pop("http.request.body.size") > 60
    assert told == {
        "http.request.method": "POST",
        "http.route": "/predict",
        "http.response.status_code": 200,
        "url.path": "/predict",
        "client.address": "127.0.0.1",
        "keras_server.request_id": "mine",
        "keras_server.images": 1,
    }
    assert attributes(receiver.resources[0])["service.name"] == "keras-server"


def test_the_time_in_the_queue_is_the_queue_s(receiver: Collector) -> None:
    """What waits while another batch is computed has waited until that one ended."""
    with FakeServer(environment=receiver.environment) as fake:
        raws = fake.occupy(2)
        fake.wait(waiting=1)
        fake.tell("go")
        for raw in raws:
            assert (answer := raw.answer())
            assert answer.status == 200
            raw.close()
        found = receiver.wait(8)
    first, second = (span for span in found if span.name == "compute")
    waited = [span for span in found if span.name == "queue" and span.end_time_unix_nano >= first.end_time_unix_nano]
    assert [span.parent_span_id for span in waited] == [second.parent_span_id]
    assert first.parent_span_id != second.parent_span_id
    assert waited[0].start_time_unix_nano < first.end_time_unix_nano


def test_what_failed_is_an_error_where_the_server_did(receiver: Collector) -> None:
    """With the time that it took, which is the model's, and without a client's own mistakes."""
    with FakeServer(environment=receiver.environment) as fake:
        fake.tell("fail")
        assert fake.ask(post()).status == 500
        broken = by_name(receiver.wait(4))["POST /predict"]
        assert (broken.status.code, attributes(broken)["error.type"]) == (ERROR, "500")
        assert broken.parent_span_id == b""
        receiver.spans.clear()
        assert fake.ask(request("/none/such", "PURGE")).status == 404
        (lost,) = receiver.wait(1)
    assert (lost.name, lost.status.code) == ("HTTP", UNSET)
    assert attributes(lost)["http.request.method"] == "_OTHER"
    assert "http.route" not in attributes(lost)


def test_probes_and_what_the_caller_leaves_out_are_not_sent(receiver: Collector) -> None:
    with FakeServer(environment=receiver.environment | {"OTEL_SERVICE_NAME": "cats"}) as fake:
        assert fake.ask(request("/readyz")).status == 200
        assert fake.ask(post(traceparent=PARENT[:-1] + "0")).status == 200
        assert fake.ask(request("/docs")).status == 200
        assert [span.name for span in receiver.wait(1)] == ["GET /docs"]
    assert attributes(receiver.resources[0])["service.name"] == "cats"


def test_the_last_spans_are_sent_before_the_end(receiver: Collector) -> None:
    with FakeServer(environment=receiver.environment | {"OTEL_BSP_SCHEDULE_DELAY": "3600000"}) as fake:
        assert fake.ask(post()).status == 200
        fake.signal()
        assert fake.end() == 0
    assert len(receiver.spans) == 4


def test_a_collector_that_never_answers_holds_up_neither_answers_nor_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",
            "OTEL_BSP_SCHEDULE_DELAY": "1",
            "OTEL_BSP_MAX_QUEUE_SIZE": "16",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8",
        }
        with FakeServer("--log-format", "json", environment=environment) as fake:
            with silent.accept()[0] if fake.ask(post()).status == 200 else socket.socket():
                for _ in range(10):
                    assert fake.ask(post()).status == 200
                fake.signal()
                assert fake.popen.wait(20) == 0, "OpenTelemetry by itself would wait for half a minute"
            lines = fake.log.splitlines()
    assert any("Queue full" in line for line in lines)
    assert all(line.startswith("{") for line in lines), "what OpenTelemetry says is in the log's own format"


# Without


def test_without_an_endpoint_nothing_is_imported_or_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in spans.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    code = "import sys, run_keras_server as s; s.configure(); s.spans.begin(); s.spans.end(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not re.search(r"\bopentelemetry\b", done.stdout)
    ticket = server.api.app.Ticket(1)
    ticket.note("decode", 0, 1)
    assert ticket.stages == []


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    assert spans.exporter() is None
    assert "No spans are sent to OTEL_EXPORTER_OTLP_ENDPOINT: pip install 'keras-rest-server[otel]'" in caplog.text


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert spans.exporter() is None
    assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT asks for them by grpc, and there is http/protobuf only" in caplog.text
