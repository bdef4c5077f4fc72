"""What answers for a photo: a server somewhere, or the model in this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import requests

from keras_server.api.context import decode_threads
from keras_server.api.uploads import decode
from keras_server.images import ImageError
from keras_server.models.errors import StartupError
from simple_request import Answer, PredictionError, ask, foreign_answer, post

T = TypeVar("T")
EXPLAIN_SECONDS = 120.0  # for a heat map; before the first one the server loads what it needs
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

    @property
    def session(self) -> requests.Session:
        """The connections of this thread."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
        session: requests.Session = self.local.session
        return session

    def answer(self, photo: bytes) -> Answer:
        """Ask, and ask again. Raises PredictionError."""
        return self.patiently(lambda: ask(photo, self.url, session=self.session, **self.options))

    def explain(self, photo: bytes) -> bytes:
        """Return a PNG of a photo under the heat map of its first label. Raises PredictionError."""
        return self.patiently(lambda: explanation(self.session, self.url, self.options["api_key"], photo))

    def patiently(self, do: Callable[[], T]) -> T:
        """Do what asks the server, again while it is away. Raises PredictionError."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                answer = do()
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


def explanation(session: requests.Session, url: str, api_key: str, photo: bytes) -> bytes:
    """Return what a server's /explain answers for a photo: a PNG. Raises PredictionError."""
    parts = urlsplit(url)
    url = parts._replace(path=parts.path.removesuffix("predict") + "explain").geturl()
    response = post(session, url, api_key, timeout=EXPLAIN_SECONDS, files={"image": photo})
    if response.ok and response.content.startswith(b"\x89PNG"):
        return response.content
    status = response.status_code
    flaw = f"{url} answered 200 with something that is no heat map. Is it the Keras server?"
    sentence = flaw if response.ok else foreign_answer(url, status, is_json=False)
    with contextlib.suppress(ValueError, RecursionError, LookupError, TypeError):
        sentence = str(response.json()["error"])
    # 422: the model cannot be explained, whatever the photo
    raise PredictionError(sentence, status, for_all=status == 422, passing=status in (502, 503, 504))


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
