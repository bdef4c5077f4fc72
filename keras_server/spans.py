"""Spans of OpenTelemetry: each request, with its decoding, its wait and its computing, sent where the environment says.

Nothing is imported, and nothing noted, unless OTEL_EXPORTER_OTLP_ENDPOINT asks for them. Names and attributes of a
request are those of OpenTelemetry's semantic conventions for servers of HTTP.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from keras_server import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("keras_server")

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
LAST_SECONDS = 2.0  # in which the last spans are sent when the server ends


class Stage(NamedTuple):
    """A part of a request's time, by time.monotonic()."""

    name: str  # decode, queue or compute
    started: float
    ended: float


class Exporter:
    """Sends spans from a thread of its own, which keeps nobody waiting: what it cannot send in time is dropped."""

    def __init__(self, provider: TracerProvider):
        from opentelemetry import trace
        from opentelemetry.trace.propagation import tracecontext

        self.provider, self.trace = provider, trace
        self.tracer = provider.get_tracer("keras_server", __version__)
        self.propagator = tracecontext.TraceContextTextMapPropagator()

    def record(
        self,
        name: str,
        whole: tuple[float, float],
        stages: Sequence[Stage],
        parent: str,
        status: int,
        attributes: Mapping[str, str | int],
    ) -> None:
        """Send a request's span and its stages', whose times are time.monotonic()'s; `parent` is a traceparent."""
        shift = time.time_ns() - time.monotonic_ns()

        def nanoseconds(seconds: float) -> int:
            return int(seconds * 1e9) + shift

        span = self.tracer.start_span(
            name,
            self.propagator.extract({"traceparent": parent} if parent else {}),
            self.trace.SpanKind.SERVER,
            attributes,
            start_time=nanoseconds(whole[0]),
        )
        within = self.trace.set_span_in_context(span)
        for stage in stages:
            child = self.tracer.start_span(stage.name, within, start_time=nanoseconds(stage.started))
            child.end(nanoseconds(stage.ended))
        if status >= 500:  # what a client did wrong is no fault of a server
            span.set_status(self.trace.Status(self.trace.StatusCode.ERROR))
            span.set_attribute("error.type", str(status))
        span.end(nanoseconds(whole[1]))


current: Exporter | None = None  # begin() puts it here


def begin() -> None:
    """Send spans from now on, where the environment asks for them."""
    global current
    current = exporter()


def end() -> None:
    """Send what is left, for LAST_SECONDS at most."""
    if current:
        closing = threading.Thread(target=current.provider.shutdown, daemon=True)
        closing.start()
        closing.join(LAST_SECONDS)


def exporter() -> Exporter | None:
    """Return what sends spans, where the environment asks for it and OpenTelemetry is installed; else None."""
    wanted = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if not wanted:
        return None
    protocol = next((value for name in PROTOCOLS if (value := os.environ.get(name))), "http/protobuf")
    if protocol != "http/protobuf":
        log.warning("No spans are sent: %s asks for them by %s, and there is http/protobuf only.", wanted, protocol)
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("No spans are sent to %s: pip install 'keras-rest-server[otel]' adds what does.", wanted)
        return None
    theirs = logging.getLogger("opentelemetry")
    theirs.handlers, theirs.propagate = log.handlers, False
    named = Resource.create({"service.name": "keras-server", "service.version": __version__})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Exporter(provider)
