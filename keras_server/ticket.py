"""A request's ticket: when its answer is due, whether anybody still waits for it, and its line in log and metrics."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import time
import urllib.parse
from contextvars import ContextVar
from typing import Any

import prometheus_client as prometheus

log = logging.getLogger("keras_server")

METRICS = prometheus.CollectorRegistry()
prometheus.ProcessCollector(registry=METRICS)
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def metric(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
    """Register a metric of this server."""
    return kind(f"keras_server_{name}", text, labels, registry=METRICS, **options)


def histogram(name: str, text: str, *labels: str) -> Any:
    """Register a histogram of seconds."""
    return metric(prometheus.Histogram, name, text, *labels, buckets=BUCKETS)


REQUESTS = metric(prometheus.Counter, "requests", "Requests answered", "route", "method", "status")
REJECTED = metric(prometheus.Counter, "rejected", "Requests turned away", "reason")
IMAGES = metric(prometheus.Counter, "images", "Images answered with predictions")
BATCH = metric(prometheus.Histogram, "batch_size", "Rows computed at once", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
WAITING = metric(prometheus.Gauge, "queue_length", "Rows that wait for the model")
MODEL = metric(prometheus.Info, "model", "What is served")
LATENCY = histogram("request_seconds", "From a request's first line to its answer", "route")
DECODING = histogram("decode_seconds", "Decoding and preparing one image")
QUEUED = histogram("queue_seconds", "From joining the queue to the start of the batch")
INFERENCE = histogram("inference_seconds", "Computing one batch")
ID = re.compile("[A-Za-z0-9._-]{1,64}")  # that a client may choose
LENGTH = re.compile("[0-9]{1,18}")  # of a body
LINE = "method=%(method)s path=%(path)s status=%(status)s ms=%(ms)s images=%(images)s bytes=%(bytes)s id=%(id)s"
RECORD = vars(logging.LogRecord(log.name, logging.INFO, __file__, 0, LINE, None, None))
METHODS = {"GET", "HEAD", "POST", "OPTIONS"}
REASONS = {
    400: "bad request", 401: "no key", 404: "not found", 405: "bad method", 408: "too slow", 413: "too large",
    414: "too large", 415: "media type", 422: "bad request", 431: "too large", 499: "client left", 501: "bad request",
    503: "overload", 504: "too late",
}  # fmt: skip


class Ticket:
    """One request, from its first line to its answer."""

    def __init__(self, seconds: float):
        self.arrived = time.monotonic()
        self.due = self.arrived + seconds
        self.gone = False  # nobody waits any more: the client left, or was told 504
        self.closed = False
        self.images = 0
        self.method = self.path = self.id = ""
        self.size = 0

    @property
    def left(self) -> float:
        """Seconds until the answer is due."""
        return self.due - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether an answer would be work for nobody."""
        return self.gone or self.left <= 0

    def describe(self, environ: dict[str, Any]) -> None:
        """Note what the log will say. An id that the client chose is kept where it is well-formed."""
        self.method, self.path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        size = environ.get("CONTENT_LENGTH") or "0"
        self.size = int(size) if LENGTH.fullmatch(size) else 0
        given = environ.get("HTTP_X_REQUEST_ID", "")
        self.id = self.id or (given if ID.fullmatch(given) else os.urandom(16).hex())

    def close(self, status: int, route: str = "other") -> None:
        """Count and log the answer, once: the front may have answered before the app did."""
        if not self.closed:
            self.closed = True
            self.record(status, route, time.monotonic() - self.arrived)

    def record(self, status: int, route: str, seconds: float) -> None:
        """Count and log an answer that took so long."""
        method = self.method if self.method in METHODS else "other"
        child(REQUESTS, route, method, status).inc()
        child(LATENCY, route).observe(seconds)
        if status in REASONS:
            child(REJECTED, REASONS[status]).inc()
        fields = {"method": method, "path": quoted(self.path[:200]), "status": status, "ms": round(1000 * seconds, 1)}
        fields |= {"images": self.images, "bytes": self.size, "id": self.id}
        write_line(fields)


@functools.lru_cache(1024)
def child(parent: Any, *labels: Any) -> Any:
    """Return a metric for these labels, which prometheus_client takes longer to find than to count with."""
    return parent.labels(*labels)


@functools.lru_cache(1024)
def quoted(path: str) -> str:
    """Return a path as the log shows it: one with a line break in it would write a line of its own."""
    return urllib.parse.quote(path, safe="/:", encoding="latin-1", errors="replace")


def write_line(fields: dict[str, Any]) -> None:
    """Log a request's line, without looking for thread and caller as log.info() does at half of its cost."""
    if log.isEnabledFor(logging.INFO):
        record, now = logging.LogRecord.__new__(logging.LogRecord), time.time()
        vars(record).update(RECORD, args=fields, created=now, msecs=now % 1 * 1000)
        log.handle(record)


TICKET: ContextVar[Ticket | None] = ContextVar("ticket", default=None)  # of the request that this thread serves


@functools.lru_cache(1)
def local_time(seconds: int) -> str:
    """Return a time as the log writes it, but for the milliseconds."""
    return time.strftime(logging.Formatter.default_time_format, time.localtime(seconds))


class LineFormatter(logging.Formatter):
    """Formats a log line as text."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the record's time, which is worked out once a second."""
        return f"{local_time(int(record.created))},{int(record.msecs):03d}"


class JsonFormatter(LineFormatter):
    """Formats a log line as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; what a request's line says stands in fields of its own."""
        line = {"time": self.formatTime(record), "level": record.levelname}
        line |= record.args if isinstance(record.args, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
