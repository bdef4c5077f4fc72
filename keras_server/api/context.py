"""What a request finds around it: the app that serves it, its settings, and its model."""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import IO, cast
from urllib.parse import parse_qsl, unquote

import flask
import numpy as np
from PIL import Image

from keras_server.api.budget import LEAST, Budget
from keras_server.errors import Cors
from keras_server.machine import memory, processors, resident
from keras_server.models.registry import Hook, NotLoaded, Registry
from keras_server.models.served import Served
from keras_server.pictures.work import Work
from keras_server.settings import Settings
from keras_server.telemetry import PROBES

Prepare = Callable[[Image.Image, tuple[int, int]], np.ndarray]  # a picture, (width, height) -> (1, h, w, channels)

# Probes, the page that asks for the key, and the documents, which tell strangers the models' names and the limits only.
NEED_NO_KEY = {*PROBES, "/", "/docs", "/openapi.json", "/static/<path:filename>"}
METRICS = "/metrics"  # which may have a key of its own
NAMED = re.compile("/(?:v[12]/)?models/([^/:]+)")  # the paths that name a model
REPOSITORY = "/v2/repository/"  # of what loads models, which takes its time


class Request(flask.Request):
    """A request that keeps its files in memory: they are bounded, and decoded at once."""

    def _get_file_stream(self, *_: object, **__: object) -> IO[bytes]:  # werkzeug's documented way to choose
        return io.BytesIO()


class App(flask.Flask):
    """Flask, with the hooks of run_keras_server.py, which are asked anew at each request."""

    request_class = Request

    def __init__(self, settings: Callable[[], Settings], model: Callable[[], object], prepare: Prepare):
        """Take what returns the settings, what returns the model (see Hook), and prepare_image."""
        super().__init__("keras_server.api")
        self.settings, self.prepare = settings, prepare
        self.hook = Hook(model, settings)
        self.draining = threading.Event()  # set once the server begins to stop
        self.sharing = threading.Lock()
        self.shared: tuple[Settings, Budget] | None = None  # made once, by the settings
        # Made once, by what makes them and the model: what they were made from, and they.
        self.documents: dict[tuple[object, str], tuple[object, Settings, bytes]] = {}

    @property
    def registry(self) -> Registry:
        """All models. Raises NotLoaded."""
        return self.hook.registry()

    def current_model(self) -> Served:
        """Return the model that the request took, and lets go once it is answered; outside of requests the default one.

        Raises NotLoaded, UnknownModel or NotServed.
        """
        if not flask.has_request_context():
            return self.registry.find()
        served: Served | None = flask.g.get("served")
        if served is None:
            parts, request = flask.request.view_args or {}, flask.request
            name = parts.get("name", request.args.get("model"))
            served = flask.g.served = self.registry.take(name, parts.get("version"), parts.get("label"))
        return served

    def model_settings(self) -> Settings:
        """Return the settings as they are for that model. Raises likewise."""
        return self.current_model().settings or self.settings()

    @property
    def budget(self) -> Budget:
        """What the requests share, by the settings."""
        settings = self.settings()
        with self.sharing:
            if not self.shared or self.shared[0] is not settings:
                budget = Budget(
                    request_memory(settings),
                    decode_threads(settings),
                    waiting(settings),
                    settings.timeout,
                    settings.max_megapixels,
                )
                self.shared = settings, budget
            return self.shared[1]


def group_of(app: App, target: str) -> str:
    """Return the model that a request's target names, where it is served and not the default; else nothing.

    What loads models is a group of its own.
    """
    path, _, query = target.encode("latin-1").decode(errors="replace").partition("?")
    if path.startswith(REPOSITORY):
        return REPOSITORY
    if found := NAMED.match(path):
        name = unquote(found[1])
    else:  # of several the first one counts, as where the model is taken
        name = dict(reversed(parse_qsl(query, keep_blank_values=True))).get("model", "")
    try:
        return name if name in app.registry.names()[1:] else ""
    except NotLoaded:
        return ""


def current_app() -> App:
    """Return the app that serves the request."""
    return cast(App, flask.current_app)


def current_settings() -> Settings:
    """Return the settings of the app that serves the request."""
    return current_app().settings()


def current_model() -> Served:
    """Return the model that the request took when it was admitted. Raises as App.current_model()."""
    return current_app().current_model()


def model_settings() -> Settings:
    """Return the settings as they are for that model. Raises likewise."""
    return current_app().model_settings()


def cors_of(settings: Settings) -> Cors:
    """Return which other origins' pages may read the answers."""
    return Cors(settings.cors_origin)


def keys_for(rule: str, settings: Settings) -> tuple[str, ...]:
    """Return the keys of which a route takes each; none where it asks for none."""
    if rule in NEED_NO_KEY:
        return ()
    return (*settings.api_key, settings.metrics_key) if rule == METRICS and settings.metrics_key else settings.api_key


def decode_threads(settings: Settings) -> int:
    """Return how many images are decoded at once."""
    return settings.decode_threads or processors()


def threads(settings: Settings) -> int:
    """Return how many requests are worked on at once.

    One batch that is computed and one that is decoded, and the large ones that wait for their turn or for memory. The
    rest waits as it came, which takes less memory.
    """
    return 2 * settings.max_batch + decode_threads(settings) + 2 * waiting(settings)


def waiting(settings: Settings) -> int:
    """Return how many large requests wait for a turn to decode, and how many for memory, before others are refused."""
    return min(settings.max_batch, 8)


def bodies_limit(settings: Settings) -> int:
    """Return how many bytes of bodies there may be that are not answered: a quarter of the memory for requests."""
    return max(request_memory(settings) // 4, body_limit(settings), 2**20)


def request_memory(settings: Settings) -> int:
    """Return how many bytes of memory the requests have: what the model has left, by now, of all."""
    return max(memory_limit(settings) - resident(), LEAST)


def body_limit(settings: Settings) -> int:
    """Return the largest request body, in bytes."""
    return int(settings.max_upload_mb * 2**20)


def memory_limit(settings: Settings) -> int:
    """Return how many bytes of memory the server takes at most."""
    return settings.memory * 2**20 or memory() // 2


def turn(nanoseconds: float) -> AbstractContextManager[None]:
    """Return the turn for work of the request that takes so long and no memory of its own. Raises as Turns.turn()."""
    return current_app().budget.turn(Work(0, nanoseconds / 1e9, 0))


def no_turn() -> AbstractContextManager[None]:
    """Return what stands for a turn where the work is too small for one."""
    current_app().budget.light.pass_by()
    return contextlib.nullcontext()


def charge(size: int) -> None:
    """Have the request charged so many bytes more, until it is answered. Raises as Budget.charge()."""
    held, flask.g.charged = flask.g.get("charged", 0), 0
    flask.g.charged = current_app().budget.charge(held, size)
