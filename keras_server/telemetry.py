"""What the operator sees: metrics, the formats of the log, and the line that each request leaves in it."""

from __future__ import annotations

import datetime
import functools
import json
import logging
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Mapping
from typing import ClassVar

import prometheus_client as prometheus

log = logging.getLogger("keras_server")

METRICS = prometheus.CollectorRegistry()
METRICS_SECONDS = 1.0  # for which a page of metrics is kept
prometheus.ProcessCollector(registry=METRICS)
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
    """Register a counter."""
    return prometheus.Counter(f"keras_server_{name}", text, labels, registry=METRICS)


def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = BUCKETS) -> prometheus.Histogram:
    """Register a histogram, of seconds unless `buckets` say otherwise."""
    return prometheus.Histogram(f"keras_server_{name}", text, labels, registry=METRICS, buckets=buckets)


REQUESTS = counter("requests", "Requests answered", "route", "method", "status")
REJECTED = counter("rejected", "Requests turned away", "reason")
UNSENT = counter("unsent", "Answers that were not sent whole")
LATENCY = histogram("request_seconds", "From a request's first line to its answer", "route")
LOADS = counter("model_loads", "Loads of models and versions, by outcome: loaded or refused", "model", "outcome")

OF_MODEL = ("model", "version")
IMAGES = counter("images", "Images answered with predictions", *OF_MODEL)
BATCH = histogram("batch_size", "Rows computed at once", *OF_MODEL, buckets=(1, 2, 4, 8, 16, 32, 64, 128))
WAITING = prometheus.Gauge("keras_server_queue_length", "Rows that wait for the model", OF_MODEL, registry=METRICS)
MODEL = prometheus.Info("keras_server_model", "What is served", OF_MODEL, registry=METRICS)
DECODING = histogram("decode_seconds", "Decoding and preparing one image", *OF_MODEL)
QUEUED = histogram("queue_seconds", "From joining the queue to the start of the batch", *OF_MODEL)
INFERENCE = histogram("inference_seconds", "Computing one batch", *OF_MODEL)

PROBES = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
METHODS = {"GET", "HEAD", "POST", "OPTIONS"}
REASONS = {
    400: "bad request", 401: "no key", 404: "not found", 405: "bad method", 408: "too slow", 413: "too large",
    414: "too large", 415: "media type", 421: "other host", 422: "bad request", 429: "too many", 431: "too large",
    499: "client left", 503: "overload", 504: "too late",
}  # fmt: skip


class MetricsPage:
    """The metrics as Prometheus reads them, made at most once in METRICS_SECONDS, however many ask."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made = float("-inf")
        self.page = b""

    def render(self) -> bytes:
        """Return the page, from any thread."""
        with self.lock:
            if time.monotonic() - self.made >= METRICS_SECONDS:
                self.page = prometheus.generate_latest(METRICS)
                self.made = time.monotonic()
            return self.page


METRICS_PAGE = MetricsPage()


class ModelMetrics:
    """The series of a model's version, which go with the last that counts in them."""

    counting: ClassVar[Counter[tuple[str, str]]] = Counter()
    lock = threading.Lock()

    def __init__(self, model: str, version: str):
        self.labels = model, version
        with self.lock:
            self.counting[self.labels] += 1
        self.images, self.batch = IMAGES.labels(*self.labels), BATCH.labels(*self.labels)
        self.decoding, self.queued = DECODING.labels(*self.labels), QUEUED.labels(*self.labels)
        self.inference = INFERENCE.labels(*self.labels)

    def begin(self, engine: str, precision: str, waiting: Callable[[], float]) -> None:
        """Say what computes it, and from now on how many rows are `waiting`."""
        MODEL.labels(*self.labels).info({"engine": engine, "precision": precision})
        WAITING.labels(*self.labels).set_function(waiting)

    def end(self) -> None:
        """Count no more."""
        with self.lock:
            self.counting[self.labels] -= 1
            if not self.counting[self.labels]:
                del self.counting[self.labels]
                for metric in (IMAGES, BATCH, WAITING, MODEL, DECODING, QUEUED, INFERENCE):
                    metric.remove(*self.labels)


def forget_loads(model: str) -> None:
    """Remove the counts of a model that is there no more."""
    for outcome in ("loaded", "refused"):
        LOADS.remove(model, outcome)


def record(status: int, route: str, method: str, path: str, seconds: float, more: Mapping[str, object]) -> None:
    """Count and log an answer, with what `more` the log is to say.

    Labels are bounded: `route` is one of the app's, an unknown method is `other`.
    """
    method = method if method in METHODS else "other"
    requests_of(route, method, status).inc()
    latency_of(route).observe(seconds)
    if status in REASONS:
        REJECTED.labels(REASONS[status]).inc()
    fields = {"method": method, "path": quoted(path[:200]), "status": status, "ms": round(1000 * seconds, 1), **more}
    level = logging.DEBUG if route in PROBES else logging.INFO
    log.log(level, " ".join(f"{name}=%({name})s" for name in fields), fields)


@functools.lru_cache(1024)
def requests_of(route: str, method: str, status: int) -> prometheus.Counter:
    """Return the counter with these labels, which prometheus_client takes longer to find than to count with."""
    return REQUESTS.labels(route, method, status)


@functools.lru_cache(1024)
def latency_of(route: str) -> prometheus.Histogram:
    """Return the histogram with this label."""
    return LATENCY.labels(route)


def quoted(path: str) -> str:
    """Return a path as the log shows it: one with a line break in it would write a line of its own."""
    return urllib.parse.quote(path, safe="/:", encoding="latin-1", errors="replace")


class TextFormatter(logging.Formatter):
    """Formats a log line as text, with its time by ISO 8601."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the time of a record on this machine's clock, with its zone: 2026-11-25T11:28:34.123+01:00."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        return time.astimezone().isoformat(timespec="milliseconds")


class JsonFormatter(TextFormatter):
    """Formats a log line as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; what a request's line says stands in fields of its own."""
        line: dict[str, object] = {"time": self.formatTime(record), "level": record.levelname}
        line |= record.args if isinstance(record.args, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
