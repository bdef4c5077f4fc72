"""What answers for a photo: a server somewhere, or the model in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import requests

from keras_server.api.context import decode_threads
from keras_server.api.uploads import decode
from keras_server.images import ImageError
from keras_server.models.errors import StartupError
from simple_request import Answer, PredictionError, ask

PATIENCE = 120.0  # seconds in which a server that has answered before may be away: a restart


class Answering(Protocol):
    """What answers for a photo, from as many threads at a time as it has workers."""

    workers: int

    def answer(self, photo: bytes) -> Answer:
        """Return the model's name, and its labels or values. Raises PredictionError."""

    def give_up(self) -> None:
        """Wait for nothing any more: what cannot be answered now is not."""


class ServerAnswering:
    """Asks a server, and waits for one that is being restarted."""

    def __init__(self, url: str, workers: int, news: Callable[[str], None], **options: Any):
        """Take the options of simple_request.ask(), and what tells the person that the server is away."""
        self.url, self.workers, self.news, self.options = url, workers, news, options
        self.local = threading.local()  # a session a thread, each with a connection that is kept
        self.met = self.away = False
        self.given_up = threading.Event()

    def answer(self, photo: bytes) -> Answer:
        """Ask, and ask again. Raises PredictionError."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
        end = time.monotonic() + PATIENCE
        while True:
            try:
                answer = ask(photo, self.url, session=self.local.session, **self.options)
            except PredictionError as error:
                if not error.passing or not self.met or time.monotonic() > end or self.given_up.wait(1):
                    raise
                if not self.away:
                    self.away = True
                    self.news(f"Waiting up to {PATIENCE:.0f} s for the server: {error}")
            else:
                self.met, self.away = True, False
                return answer

    def give_up(self) -> None:
        """Ask no photo's labels a second time."""
        self.given_up.set()


class ModelAnswering:
    """Computes with the model of run_keras_server.py: its load_model() and prepare_image(), as on every route."""

    def __init__(self, values: Mapping[str, Any]):
        """Take settings by name. Raises StartupError."""
        import run_keras_server as service  # the file to edit, which imports this package

        service.configure()
        service.settings = settings = replace(service.settings, **values)
        self.app, self.served, self.top = service.app, service.start_model(), settings.top
        if self.served.spec.kind == "none":
            raise StartupError(self.served.spec.reason)
        self.workers = 2 * settings.max_batch + decode_threads(settings)  # a batch computed, one ready, the next ones

    def answer(self, photo: bytes) -> Answer:
        """Prepare a photo and let it join the next batch. Raises PredictionError."""
        try:
            with self.app.app_context():
                row = decode(photo)
            (answer,) = self.served.answers(self.served.predict(row), self.top)
        except ImageError as error:
            raise PredictionError(str(error)) from None
        except Exception as error:  # as the server does, where it answers 500
            raise PredictionError(f"The model failed on this photo: {error}") from error
        return {"model": self.served.spec.name} | answer

    def give_up(self) -> None:
        """Compute what is under way: it takes no longer than a batch."""
