"""Serve a Keras image classifier as a REST API: load it once, POST an image, read the most probable labels as JSON.

    python run_keras_server.py
    curl -X POST -F image=@dog.jpg http://localhost:5000/predict

The rooms of this file, and what passes through them:

    server    greenlets read whole requests from any number of clients, however slow     (gevent)
    web       a native thread runs the Flask view                                        (Flask)
    images    which decodes the upload into one float32 array                            (Pillow)
    batching  threads of its own compute the model on whatever has queued while they were busy
    model     OpenVINO on a CPU, Keras' own compiled function elsewhere
    settings  one table for the command line, the environment and the README, in keras_server/settings.py
"""

from __future__ import annotations

import contextlib
import hmac
import io
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flask
import gevent
import gevent.socket
import numpy as np
import prometheus_client as prometheus
from PIL import Image, ImageOps, PngImagePlugin
from werkzeug.exceptions import HTTPException

from keras_server import ticket as account
from keras_server.api import docs as openapi
from keras_server.api import explanations as explain
from keras_server.api import protocols
from keras_server.front.server import OVERLOADED, TOO_LARGE, TOO_LATE, Front, Limits, error_body, give_memory_back
from keras_server.models.engines import processors
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.labels import check_labels, read_labels
from keras_server.models.source import (
    MODES,
    PREPROCESS,
    Source,
    Spec,
    open_engine,
    preprocess_of,
)
from keras_server.settings import Settings, read_settings, unknown_variables
from keras_server.ticket import TICKET, JsonFormatter, LineFormatter, Ticket

log = logging.getLogger("keras_server")


settings = Settings()  # the defaults, until configure() reads the command line and the environment


# ----------------------------------------------------------------------------------------------------------
# Model: loaded once, before the port opens
# ----------------------------------------------------------------------------------------------------------

model: Any = None  # anything with .predict(batch) -> array of shape (n, classes); load_model() puts it here
spec = Spec()
source: Source | None = None  # where it came from, for those who need the Keras model itself


def load_model() -> None:
    """Load the model that the settings name, warm it up, and put it into `model`, `spec` and `source`.

    Raises StartupError.
    """
    global model, spec, source
    source = Source(settings.model or "resnet50", settings.weights, settings.unsafe_model)
    try:
        run, spec = open_engine(source, settings)
    except DownloadError as error:
        if settings.model:
            raise
        log.warning(
            "ResNet50's weights are not in Keras' cache and cannot be downloaded (%s), so the bundled "
            "EfficientNet-Lite0 is served. For ResNet50 start once with internet access, or give --weights FILE.",
            error.reason,
        )
        source = Source("bundled")
        run, spec = open_engine(source, settings)
    # A lone row warms up, of ones, which are valid tokens, too; noise shows whether the outputs are probabilities.
    ones = [np.ones((1, *(d or 8 for d in t.shape)), t.dtype) for t in spec.inputs]
    run(ones)
    if spec.image:
        values = np.random.default_rng(0).uniform(0, 255, (4, *(d or 224 for d in spec.inputs[0].shape)))
        settle(run([values.astype(spec.inputs[0].dtype)])[0])
    model = Batcher(run, settings.max_batch, settings.queue_size, run.lanes)
    account.MODEL.info({"name": spec.name, "engine": spec.engine, "precision": settings.precision})
    account.WAITING.set_function(lambda: getattr(model, "waiting", 0))


def settle(outputs: np.ndarray) -> None:
    """Decide how pixels go in and probabilities come out, given outputs for noise, shape (n, classes)."""
    mode = settings.preprocess
    if mode != "auto":
        spec.preprocess = mode if mode in PREPROCESS else preprocess_of(mode.lower())
    if spec.image and spec.image[2] != 3 and spec.preprocess not in ("none", "tf"):
        raise StartupError(f"--preprocess {mode} is for RGB, and {spec.name} takes {spec.image[2]} channels.")
    spec.activation = settings.activation
    if spec.activation == "auto":
        logits = outputs.min() < -0.01 or outputs.max() > 1.01
        spec.activation = "none" if not logits else "softmax" if outputs.shape[-1] > 1 else "sigmoid"
        if logits:
            log.info("The outputs are logits: the server applies %s (--activation none would not).", spec.activation)
    if settings.labels:
        spec.labels = [*read_labels(Path(settings.labels))]
        check_labels(spec.labels, spec.classes, spec.name)


# ----------------------------------------------------------------------------------------------------------
# Images: from an upload's bytes to one float32 array
# ----------------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
Image.MAX_IMAGE_PIXELS = None  # open_image has the limit, and Pillow's own would only warn
PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes of all comments in a PNG, unpacked; Pillow's own limit is 64 MiB


class ImageError(ValueError):
    """An upload that is no acceptable image; the message is a sentence for the client."""


def open_image(data: bytes) -> Image.Image:
    """Open an encoded image of at most max_megapixels; only its header is read yet. Raises ImageError."""
    if not data:
        raise ImageError("The file is empty.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # noqa: BLE001 - Pillow's readers raise whatever a mutilated header trips over
        raise ImageError(f"This is not an image that the server reads ({', '.join(FORMATS)}).") from None
    if image.width * image.height > settings.max_megapixels * 1e6:
        raise ImageError(
            f"The image has {image.width} x {image.height} pixels, more than the {settings.max_megapixels:g} "
            "million allowed: shrink it."
        )
    # A JPEG has a bit at least for each 8 x 8 pixels; what is missing of them Pillow would paint grey.
    if image.format in ("JPEG", "MPO") and image.width * image.height > 64 * 8 * len(data):
        raise ImageError("The image is damaged or cut off: it cannot be decoded.")
    return image


def prepare_image(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """Return the image as the model takes it: float32, shape (1, height, width, 3), preprocessed as in training.

    `target` is (width, height). The photo is turned upright by its EXIF orientation, and has as many channels as the
    model's input. Raises ImageError where the pixels cannot be decoded.
    """
    order, mean, deviation = PREPROCESS[spec.preprocess]
    channels = spec.image[2] if spec.image else 3
    # A JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the cost; twice the target keeps the answer the same.
    upright = decode_pixels(image, 2 * max(target), MODES[channels])
    small = upright.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    # As rows of width x channels, in which numpy computes several times faster than in triples.
    pixels = np.frombuffer(small.tobytes("raw", order if channels == 3 else small.mode), np.uint8)
    rows = pixels.reshape(target[1], -1).astype(np.float32)
    if spec.preprocess != "none":
        rows -= np.tile(np.array(mean[:channels], np.float32), target[0])
        rows /= np.tile(np.array(deviation[:channels], np.float32), target[0])
    return rows.reshape(1, target[1], target[0], channels)


def decode_pixels(image: Image.Image, side: int, mode: str) -> Image.Image:
    """Return the opened image in `mode`, upright, of its full size or, from a JPEG, at least `side` pixels a side.

    Raises ImageError.
    """
    try:
        image.draft("RGB", (side, side))
        image.load()
        with contextlib.suppress(Exception):  # EXIF data that cannot be read says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)
        return convert_mode(image, mode)
    except Exception:  # noqa: BLE001 - as in open_image
        raise ImageError("The image is damaged or cut off: it cannot be decoded.") from None


def convert_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return the image in `mode` (L, RGB or RGBA), whatever its own. Alpha is dropped as Keras' load_img drops it."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, which Pillow would clip at 255
        pixels = np.nan_to_num(np.asarray(image, np.float32))
        highest = pixels.max(initial=0)
        if image.mode == "F":
            pixels *= 255 if highest <= 1 else 1
        elif image.mode != "I" or highest > 255:
            pixels /= 257
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # by way of RGBA, or Pillow warns of transparent palettes
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


# ----------------------------------------------------------------------------------------------------------
# Batching: the model's own threads take whatever has queued while they were busy
# ----------------------------------------------------------------------------------------------------------


class Overdue(Exception):
    """The answer was not ready in time."""


class QueueFull(Exception):
    """More images wait than queue_size allows."""


class ModelDied(Exception):
    """A thread that owns the model has ended."""


class Job:
    """The rows of one request, which may be computed in several batches."""

    def __init__(self, inputs: list[np.ndarray]):
        self.inputs = inputs
        self.rows = len(inputs[0])
        self.kind = [(a.shape[1:], a.dtype) for a in inputs]  # only equal kinds share a batch
        self.taken = self.done = 0
        self.outputs: list[np.ndarray] = []
        self.error: Exception | None = None
        self.finished = threading.Event()
        self.ticket = TICKET.get()
        self.since = time.monotonic()
        self.filling = threading.Lock()

    def fill(self, rows: slice, outputs: list[np.ndarray]) -> None:
        """Take the outputs for some of the rows, and finish with the last."""
        with self.filling:
            self.done += rows.stop - rows.start
            if self.done == self.rows and not self.outputs:  # all at once
                self.outputs = outputs
            else:
                self.outputs = self.outputs or [np.empty((self.rows, *o.shape[1:]), o.dtype) for o in outputs]
                for whole, part in zip(self.outputs, outputs, strict=True):
                    whole[rows] = part
        if self.done == self.rows:
            self.finish()

    def finish(self, error: Exception | None = None) -> None:
        """Wake the waiting request, with the first thing that went wrong if anything did."""
        if not self.finished.is_set():
            self.error = error
            self.finished.set()


class Batcher:
    """Stands where the tutorial's model stood: predict() from any thread, computed in batches by the model's own.

    They are as many as the model computes batches side by side, its lanes: on a GPU one. An idle one computes a lone
    row at once; while all are busy rows queue up and form the next batches.
    """

    def __init__(
        self, run: Callable[[list[np.ndarray]], list[np.ndarray]], max_batch: int, queue_size: int, lanes: int = 1
    ):
        self.run, self.queue_size, self.lanes = run, queue_size, lanes
        self.max_batch = max(1, max_batch // lanes)  # of one lane
        self.jobs: deque[Job] = deque()
        self.waiting = 0  # rows
        self.busy: dict[int, float] = {}  # lanes that compute, since when
        self.dead = False
        self.on_death: Callable[[], None] = lambda: None
        self.changed = threading.Condition()
        self.threads = [threading.Thread(target=self.loop, args=[n], name="model", daemon=True) for n in range(lanes)]
        for thread in self.threads:
            thread.start()

    def predict(self, batch: np.ndarray) -> np.ndarray:
        """Return the model's first output for a batch of its only input, both with the batch as first axis."""
        return self.compute([batch])[0]

    def compute(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Return the model's outputs for its inputs, all with the same first axis.

        Raises QueueFull at once, Overdue at the request's deadline, ModelDied, or what the model raised.
        """
        job = Job(inputs)
        with self.changed:
            if self.dead:
                raise ModelDied
            if self.waiting + job.rows > self.queue_size:
                raise QueueFull
            self.jobs.append(job)
            self.waiting += job.rows
            self.changed.notify()
        if not job.finished.wait(job.ticket.left if job.ticket else None):
            raise Overdue
        if job.error:
            raise job.error
        return job.outputs

    def loop(self, lane: int) -> None:
        """Compute batch after batch, for as long as the process lives."""
        batch: list[tuple[Job, slice]] = []
        try:
            while True:
                with self.changed:
                    self.busy.pop(lane, None)
                    while not self.jobs:
                        self.changed.wait()
                    batch = self.take()
                    self.busy[lane] = time.monotonic()
                    if self.jobs:  # for the next idle lane
                        self.changed.notify()
                if batch:
                    self.work(batch)
        finally:  # no exception is expected here: the process is to end, but nobody is left waiting
            with self.changed:
                self.dead = True
                for job in {job for job, _ in batch} | {*self.jobs}:
                    job.finish(ModelDied())
            self.on_death()

    def take(self) -> list[tuple[Job, slice]]:
        """Take the next batch off the queue, at most max_batch rows of one kind, and no more than this lane's part.

        Each waiting job gives an equal share in turn and goes to the back, so that a long one starves nobody.
        """
        batch: list[tuple[Job, slice]] = []
        others: list[Job] = []
        room = min(self.max_batch, -(-self.waiting // (self.lanes - len(self.busy))))  # idle lanes share, rounded up
        share = max(1, room // len(self.jobs))
        while self.jobs and room:
            job = self.jobs.popleft()
            if job.finished.is_set() or (job.ticket and job.ticket.over):
                self.waiting -= job.rows - job.taken
                job.finish(Overdue())
                continue
            if batch and job.kind != batch[0][0].kind:
                others.append(job)
                continue
            rows = min(share, room, job.rows - job.taken)
            batch.append((job, slice(job.taken, job.taken + rows)))
            job.taken += rows
            room -= rows
            self.waiting -= rows
            if job.taken < job.rows:
                self.jobs.append(job)
        self.jobs.extendleft(reversed(others))
        return batch

    def work(self, batch: list[tuple[Job, slice]]) -> None:
        """Compute a batch and hand out its rows. Where the model fails on it, each part is tried alone."""
        inputs = [
            parts[0] if len(parts) == 1 else np.concatenate(parts)
            for parts in zip(*([array[rows] for array in job.inputs] for job, rows in batch), strict=True)
        ]
        started = time.monotonic()
        try:
            outputs = self.run(inputs)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything
            if len(batch) == 1:
                batch[0][0].finish(error)
            else:
                for job_and_rows in batch:
                    self.work([job_and_rows])
            return
        finished = time.monotonic()
        account.INFERENCE.observe(finished - started)
        account.BATCH.observe(len(inputs[0]))
        first = 0
        for job, rows in batch:
            account.QUEUED.observe(started - job.since)
            job.fill(rows, [output[first : first + rows.stop - rows.start] for output in outputs])
            first += rows.stop - rows.start


# ----------------------------------------------------------------------------------------------------------
# Web: the Flask app, which the test client and any WSGI server can call
# ----------------------------------------------------------------------------------------------------------

NEED_NO_KEY = {"healthz", "readyz", "index", "static"}  # probes, and the page that asks for the key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
draining = threading.Event()
decoding = threading.BoundedSemaphore(processors())


class Request(flask.Request):
    """A request that keeps its files in memory: they are bounded, and decoded at once."""

    def _get_file_stream(self, *_: Any, **__: Any) -> Any:
        return io.BytesIO()


class App(flask.Flask):
    """Flask, with that request."""

    request_class = Request


API = Path(__file__).resolve().parent / "keras_server" / "api"
app = App(__name__, static_folder=API / "static", template_folder=API / "templates")
app.json.sort_keys = False  # type: ignore[attr-defined]  # label before probability


@app.post("/predict")
def predict() -> Any:
    """Answer with the most probable labels of the image or images in the request."""
    top = read_top()
    answers: list[dict[str, Any]] = []
    batch: list[np.ndarray] = []
    for name, data in read_uploads():
        answers.append({"filename": name, "success": True})
        try:
            batch.append(decode(data))
        except ImageError as error:
            answers[-1] |= {"success": False, "error": str(error)}
    if batch:
        preds = model.predict(batch[0] if len(batch) == 1 else np.concatenate(batch))
        rows = iter(decode_predictions(preds, top))
        for answer in answers:
            if answer["success"]:
                answer["predictions"] = next(rows)
    account.IMAGES.inc(len(batch))
    if len(answers) == 1:
        if not batch:
            flask.abort(400, answers[0]["error"])
        return {"success": True, "model": spec.name, "predictions": answers[0]["predictions"]}
    if not batch:
        return {"success": False, "error": "None of these files can be read as an image.", "results": answers}, 400
    return {"success": True, "model": spec.name, "results": answers}


@contextlib.contextmanager
def decoder() -> Iterator[None]:
    """Wait for one of the few turns to decode. Raises Overdue where nobody waits for the answer any more."""
    with decoding:
        if (ticket := TICKET.get()) and ticket.over:
            raise Overdue
        yield


def decode(data: bytes) -> np.ndarray:
    """Decode and prepare one upload. Raises ImageError, or Overdue."""
    with decoder(), account.DECODING.time():
        prepared = prepare_image(open_image(data), spec.target)
    if spec.image and spec.image[3]:
        prepared = np.ascontiguousarray(np.moveaxis(prepared, -1, 1))
    return prepared.astype(spec.inputs[0].dtype, copy=False)


def decode_predictions(preds: np.ndarray, top: int) -> list[list[dict[str, Any]]]:
    """Return for each row of the model's output, shape (n, classes), its `top` most probable labels, best first."""
    preds = probabilities(preds)
    labels = class_names(preds.shape[-1])
    return [
        [{"label": labels[i], "probability": float(row[i])} for i in np.argsort(-row, kind="stable")[:top]]
        for row in preds
    ]


def probabilities(preds: np.ndarray) -> np.ndarray:
    """Return the probabilities, float32, shape (n, classes), in the model's output, shape (n, classes or 1)."""
    preds = np.asarray(preds, np.float32)
    if not np.isfinite(preds).all():
        raise ValueError(f"{spec.name} answered with numbers that are not finite")
    if spec.activation == "softmax":
        with np.errstate(over="ignore"):  # the least probable of huge logits
            exponentials = np.exp(preds - preds.max(-1, keepdims=True))
        preds = exponentials / exponentials.sum(-1, keepdims=True)
    elif spec.activation == "sigmoid":
        preds = 1 / (1 + np.exp(-preds.clip(-60, 60)))
    return np.concatenate([1 - preds, preds], -1) if preds.shape[-1] == 1 else preds  # the second of two classes


def class_names(count: int) -> list[str]:
    """Return the labels of the model's classes, which are their numbers where it has none."""
    return spec.labels if len(spec.labels) == count else [str(i) for i in range(count)]


def read_top() -> int:
    """Return the number of rows that the request asks for with ?top=N."""
    classes = spec.classes
    text = flask.request.args.get("top")
    if text is None:
        return min(settings.top, classes)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not 1 <= int(text) <= classes:
        flask.abort(400, f"top must be a whole number from 1 to {classes}, the number of classes.")
    return int(text)


def read_uploads() -> list[tuple[str, bytes]]:
    """Return the names and contents of the request's images, from a form or as the whole body."""
    if model is None:
        flask.abort(503, "The model is not loaded yet: try again in a moment.")
    if not spec.image:
        flask.abort(400, f"{spec.name} takes no images: send its inputs as JSON to /v2/models/{spec.name}/infer or to "
                    f"/v1/models/{spec.name}:predict.")  # fmt: skip
    request, kind = flask.request, flask.request.mimetype
    if kind == "multipart/form-data":
        files = request.files.getlist("image")
        if "image" in request.form:
            flask.abort(400, "The field 'image' holds text instead of a file: with curl, write -F image=@dog.jpg.")
        uploads = [(file.filename or "", file.read()) for file in files]
    elif kind.startswith("image/") or kind == "application/octet-stream":
        uploads = [("", request.get_data(cache=False))]
    elif kind or request.content_length:
        flask.abort(415, "Send the image as the form field 'image' (multipart/form-data), or as the whole body with "
                    "Content-Type: image/jpeg.")  # fmt: skip
    else:
        uploads = []
    if not uploads:
        flask.abort(400, "There is no image: send one as the form field 'image', as in curl -F image=@dog.jpg.")
    if len(uploads) > settings.queue_size:
        flask.abort(400, f"There are {len(uploads)} images: send at most {settings.queue_size} at once.")
    if ticket := TICKET.get():
        ticket.images = len(uploads)
    return uploads


@app.get("/")
def index() -> Any:
    """A page for a person with a browser."""
    return flask.render_template("index.html", spec=spec, limit=settings.max_upload_mb)


@app.get("/healthz")
def healthz() -> Any:
    """Liveness: the process answers."""
    return {"status": "alive"}


@app.get("/readyz")
def readyz() -> Any:
    """Readiness: a prediction would be taken."""
    since = min(getattr(model, "busy", {}).copy().values(), default=time.monotonic())
    reasons = {
        "The server is shutting down.": draining.is_set(),
        "The model is not loaded yet.": model is None,
        "The model's thread has ended.": getattr(model, "dead", False),
        "The model has been busy with one batch for too long.": time.monotonic() - since > settings.timeout,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        flask.abort(503, reason)
    return {"status": "ready", "model": spec.name}


@app.get("/metrics")
def metrics() -> Any:
    """Figures for Prometheus."""
    return flask.Response(prometheus.generate_latest(account.METRICS), content_type=prometheus.CONTENT_TYPE_LATEST)


@app.before_request
def admit() -> Any:
    """Give the request its ticket and limits, and ask for its key."""
    request = flask.request
    ticket = request.environ.get("ticket") or Ticket(settings.timeout)
    flask.g.ticket = ticket
    ticket.describe(request.environ)
    TICKET.set(ticket)
    flask.g.since = time.monotonic()
    request.max_content_length = body_limit()
    request.max_form_parts = settings.queue_size + 16
    if request.method == "OPTIONS" or request.endpoint in NEED_NO_KEY or not settings.api_key:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Every key is compared, each in constant time, so that the time taken tells nothing.
    equal = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in settings.api_key]
    if scheme.lower() != "bearer" or not any(equal):
        flask.abort(401, "This server asks for a key: send the header 'Authorization: Bearer KEY'.")


@app.after_request
def finish(response: flask.Response) -> flask.Response:
    """Add the headers that every answer has, and record it."""
    ticket: Ticket = flask.g.ticket
    headers = response.headers
    headers["X-Request-ID"] = ticket.id
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Server-Timing"] = f"app;dur={1000 * (time.monotonic() - flask.g.since):.1f}"
    headers["Content-Security-Policy"] = POLICY
    if response.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if response.status_code == 503:
        headers["Retry-After"] = "1"
    if draining.is_set():
        headers["Connection"] = "close"
    if settings.cors_origin:
        headers["Access-Control-Allow-Origin"] = settings.cors_origin
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, X-Request-ID"
        headers["Access-Control-Expose-Headers"] = "X-Request-ID, Retry-After"
        headers["Vary"] = "Origin"
    rule = flask.request.url_rule
    ticket.close(response.status_code, rule.rule if rule else "other")
    return response


@app.teardown_request
def leave(_: BaseException | None) -> None:
    """Take the ticket off the thread, which serves others next."""
    TICKET.set(None)


@app.errorhandler(Exception)
def failure(error: Exception) -> flask.Response:
    """Turn every exception into a status and a sentence in JSON; no traceback leaves the server."""
    request, headers = flask.request, []
    if isinstance(error, HTTPException):
        status, sentence = error.code or 500, error.description or ""
        headers = [(key, value) for key, value in error.get_headers() if key in ("Allow", "Location")]
        if status == 404:
            sentence = f"There is nothing at {request.path}: POST images to /predict."
        elif status == 405:
            sentence = f"{request.path} does not take {request.method}: it takes {dict(headers)['Allow']}."
        elif status == 413 and (request.content_length or 0) <= body_limit():
            sentence = "The form has too many fields, or too long ones: send the images as 'image' and nothing else."
            status = 400
        elif status == 413:
            sentence = TOO_LARGE.format(settings.max_upload_mb)
    elif isinstance(error, QueueFull):
        status, sentence = 503, OVERLOADED
    elif isinstance(error, Overdue):
        status, sentence = 504, TOO_LATE
    else:
        log.error("Request %s failed", flask.g.ticket.id, exc_info=error)
        status, sentence = 500, f"The server failed on this request; its log says why, under {flask.g.ticket.id}."
    return flask.Response(error_body(request.path, sentence), status, headers, content_type="application/json")


for part in (explain, protocols, openapi):
    app.register_blueprint(part.blueprint(sys.modules[__name__]))


# ----------------------------------------------------------------------------------------------------------
# Server: from the command line to the open port
# ----------------------------------------------------------------------------------------------------------


def bind(host: str, port: int) -> Any:
    """Take the port without listening yet, so that a mistake shows at once and nobody is answered too early."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = gevent.socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        raise StartupError(f"Cannot listen on {host} port {port} ({error.strerror}): choose another --port.") from None


def serve(listener: Any) -> int:
    """Serve on the bound socket until a signal or the model's end. Returns the exit status."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # each connection is an open file
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    listener.listen(1024)
    limits = Limits(
        body=body_limit(),
        seconds=settings.timeout,
        requests=settings.queue_size + settings.max_batch,
        # One batch that is computed and one that is decoded. The rest waits as it came, which takes less memory.
        threads=2 * settings.max_batch + decode_threads(),
        grace=settings.drain_seconds,
    )
    front = Front(listener, app, limits, draining)
    front.start()
    model.on_death = front.die
    for which in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(which, front.stop_softly)
    host, port = listener.getsockname()[:2]
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    print(f" * Serving {spec.name} with {spec.engine} in {settings.precision} on http://{host}:{port}")
    print(f" * Try: curl -X POST -F image=@dog.jpg http://{host}:{port}/predict", flush=True)
    front.serve_forever()
    return front.status


def decode_threads() -> int:
    """Return how many images are decoded at once."""
    return settings.decode_threads or processors()


def body_limit() -> int:
    """Return the largest request body, in bytes."""
    return int(settings.max_upload_mb * 2**20)


def configure(arguments: Sequence[str] = ()) -> None:
    """Read the settings and set up what hangs on them."""
    global settings, decoding
    settings = read_settings(arguments)
    decoding = threading.BoundedSemaphore(decode_threads())
    handler = logging.StreamHandler()
    plain = LineFormatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else plain)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)
    for sentence in unknown_variables():
        log.warning(sentence)


def create_app() -> App:
    """Return the app with its model loaded, for another WSGI server; the environment holds the settings.

    Raises StartupError.
    """
    configure()
    load_model()
    return app


def main(arguments: Sequence[str]) -> int:
    """Load the model and serve it. Returns the exit status."""
    give_memory_back()
    configure(arguments)
    # Ctrl-C while it loads: a KeyboardInterrupt is lost where Python runs a callback of a library.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        listener = bind(settings.host, settings.port)
        print(" * Loading the Keras model: please wait until the server has fully started", flush=True)
        load_model()
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not settings.api_key and not listener.getsockname()[0].startswith(("127.", "::1")):
        log.warning("Whoever reaches %s can use the model: --api-key asks them for a key.", settings.host)
    return serve(listener)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
