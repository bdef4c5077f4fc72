"""What a request finds around it: the app that serves it, its settings, and its model."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import IO, cast

import flask
import numpy as np
from PIL import Image

from keras_server.errors import Cors
from keras_server.machine import processors
from keras_server.models.batcher import Overdue
from keras_server.models.registry import Registry
from keras_server.models.served import Served
from keras_server.models.spec import Spec
from keras_server.settings import Settings
from keras_server.ticket import TICKET

Prepare = Callable[[Image.Image, tuple[int, int]], np.ndarray]  # a picture, (width, height) -> (1, h, w, channels)

# Probes, the page that asks for the key, and the documents, which tell strangers the model's name and the limits only.
NEED_NO_KEY = {"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"}
NEED_NO_KEY |= {"/", "/docs", "/openapi.json", "/static/<path:filename>"}


class Request(flask.Request):
    """A request that keeps its files in memory: they are bounded, and decoded at once."""

    def _get_file_stream(self, *_: object, **__: object) -> IO[bytes]:  # werkzeug's documented way to choose
        return io.BytesIO()


class App(flask.Flask):
    """Flask, with the hooks of run_keras_server.py, which are asked anew at each request."""

    request_class = Request

    def __init__(self, settings: Callable[[], Settings], model: Callable[[], object], prepare: Prepare):
        """Take what returns the settings, what returns the model (see Registry), and prepare_image."""
        super().__init__("keras_server.api")
        self.settings, self.prepare = settings, prepare
        self.registry = Registry(model, settings)
        self.draining = threading.Event()  # set once the server begins to stop
        self.decoders: dict[int, threading.BoundedSemaphore] = {}
        self.documents: dict[object, tuple[Spec, Settings, bytes]] = {}  # made once, by what they were made from

    def current_model(self) -> Served:
        """Return the model that the request took when it was admitted; outside of requests the default one.

        Raises NotLoaded or UnknownModel.
        """
        if not flask.has_request_context():
            return self.registry.find()
        if "served" not in flask.g:
            request = flask.request
            name = (request.view_args or {}).get("name", request.args.get("model"))
            flask.g.served = self.registry.find(name)
        return cast(Served, flask.g.served)

    @contextlib.contextmanager
    def decoder(self) -> Iterator[None]:
        """Wait for one of the few turns to decode. Raises Overdue where nobody waits for the answer any more."""
        count = decode_threads(self.settings())
        with self.decoders.setdefault(count, threading.BoundedSemaphore(count)):
            if (ticket := TICKET.get()) and ticket.over:
                raise Overdue
            yield


def current_app() -> App:
    """Return the app that serves the request."""
    return cast(App, flask.current_app)


def current_settings() -> Settings:
    """Return the settings of the app that serves the request."""
    return current_app().settings()


def current_model() -> Served:
    """Return the model that the request took when it was admitted. Raises NotLoaded or UnknownModel."""
    return current_app().current_model()


def cors_of(settings: Settings) -> Cors:
    """Return which other origins' pages may read the answers."""
    return Cors(settings.cors_origin)


def decode_threads(settings: Settings) -> int:
    """Return how many images are decoded at once."""
    return settings.decode_threads or processors()


def body_limit(settings: Settings) -> int:
    """Return the largest request body, in bytes."""
    return int(settings.max_upload_mb * 2**20)
