"""Serve a Keras image classifier as a REST API: load it once, POST an image, read the most probable labels as JSON.

    python run_keras_server.py
    curl -X POST -F image=@dog.jpg http://localhost:5000/predict

This file is the service as the tutorial tells it, and the one to edit: what you change in load_model() or
prepare_image() holds on every route. What a library would do for you stands in keras_server/:

    front     greenlets read whole requests from any number of clients, however slow     (gevent)
    api       a native thread runs the Flask view, which decodes the upload              (Flask, Pillow)
    models    threads of its own compute the model on whatever has queued meanwhile      (OpenVINO, or Keras itself)
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Sequence

import flask
import numpy as np
from flask.typing import ResponseReturnValue
from PIL import Image

from keras_server import api, images, resampling, spans, telemetry
from keras_server.api.uploads import decode, read_top, read_uploads
from keras_server.commands import COMMANDS
from keras_server.front.limits import Limits
from keras_server.front.listener import bind, is_local, raise_file_limit, url_of
from keras_server.front.logs import Log, say, stop
from keras_server.front.server import Front, give_memory_back
from keras_server.front.signals import end_at_once, on_hang_up, on_signals
from keras_server.front.systemd import Systemd, taken_over
from keras_server.hosts import LOOPBACK
from keras_server.models import repository
from keras_server.models.beside import locate
from keras_server.models.errors import StartupError
from keras_server.models.registry import Registry
from keras_server.models.served import Served
from keras_server.settings import Settings, read_settings, unknown_variables

log = logging.getLogger("keras_server")

settings = Settings()  # main() reads them from the command line and the environment
model: object = None  # load_model() puts it here: a Registry, a Served, a keras.Model, or whatever has .predict(batch)
app = api.create_app(  # which asks for them at each request, so that what you put in their place holds everywhere
    settings=lambda: settings,
    model=lambda: model,
    prepare=lambda image, target: prepare_image(image, target),  # noqa: PLW0108
)


def load_model() -> None:
    """Load the model that the settings name, and warm it up.

    `model = ResNet50(weights="imagenet")` would do as well: what Keras loaded is converted and batched like a file.
    Raises StartupError.
    """
    global model
    model = repository.load(settings)


def prepare_image(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """Return the image as the model takes it: float32, shape (1, height, width, channels), preprocessed as in training.

    `target` is (width, height). The photo is turned upright by its EXIF orientation, and has as many channels as the
    model's input. Raises ImageError where the pixels cannot be decoded.
    """
    spec, settings = app.current_model().spec, app.model_settings()
    # A JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the cost; twice the target keeps the answer the same.
    side = images.least_side(target, settings.interpolation)
    image = images.decode(image, side, spec.mode, settings.background)
    image = images.resize(image, target, settings.crop, settings.interpolation)
    return images.to_array(image, spec.preprocess)[np.newaxis]


@app.post("/predict")
def predict() -> ResponseReturnValue:
    """Answer with the most probable labels of the image or images in the request."""
    served, top = app.current_model(), read_top()
    results: list[dict[str, object]] = []
    batch: list[np.ndarray] = []

    # decode and prepare each image; one that is none does not fail the others
    for name, data in read_uploads():
        results.append({"filename": name, "success": True})
        try:
            batch.append(decode(data))
        except images.ImageError as error:
            results[-1] |= {"success": False, "error": str(error)}

    # classify all of them at once
    if batch:
        preds = served.predict(np.concatenate(batch))
        good = [result for result in results if result["success"]]
        for result, answer in zip(good, served.answers(preds, top), strict=True):
            result.update(answer)
        served.metrics.images.inc(len(batch))

    # one image is answered by itself, several as a list
    if len(results) > 1:
        if batch:
            return {"success": True, **served.title, "results": results}
        return {"success": False, "error": "None of these files can be read as an image.", "results": results}, 400
    (result,) = results
    if not batch:
        flask.abort(400, str(result["error"]))
    del result["filename"]
    return {"success": True, **served.title, **result}


def configure(arguments: Sequence[str] = (), to: Callable[[], logging.Handler] = logging.StreamHandler) -> None:
    """Read the settings, and log as they say."""
    global settings
    settings = read_settings(arguments, locate)
    handler = to()
    handler.setFormatter(telemetry.JsonFormatter() if settings.log_format == "json" else telemetry.TextFormatter())
    log.handlers, log.propagate = [handler], False
    log.setLevel(settings.log_level.upper())
    for sentence in unknown_variables():
        log.warning(sentence)


def start_model() -> Served:
    """Load the model, and let what load_model() put into `model` be converted and batched. Raises StartupError."""
    global model
    load_model()
    if not isinstance(model, Registry):
        model = app.current_model()
    return app.current_model()


def create_app() -> api.App:
    """Return the app with its model loaded, for another WSGI server; the environment holds the settings.

    Raises StartupError.
    """
    configure()
    spans.begin()
    start_model()
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the model and serve it, or do what the command that comes first says. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        sys.modules.setdefault("run_keras_server", sys.modules[__name__])  # the commands import it under this name
        return COMMANDS[arguments[0]](arguments[1:])
    give_memory_back()
    configure(arguments, Log)
    end_at_once()  # on Ctrl-C while it loads: a KeyboardInterrupt is lost where Python runs a callback of a library
    try:
        return serve(taken_over())
    except StartupError as error:
        return stop(str(error))


def serve(systemd: Systemd) -> int:
    """Load the model and serve it until a signal comes. Returns the exit status. Raises StartupError."""
    listeners = systemd.listeners or bind(settings.host, settings.port)
    say(" * Loading the Keras model: please wait until the server has fully started")
    hung_up = threading.Event()
    if repository.has_several(settings):  # for a look at the folder, which may have been looked at by now
        on_hang_up(hung_up.set)
    spec = start_model().spec  # and no more of it, or its first version would stay in memory for ever
    reached = [listener for listener in listeners if not is_local(listener)]
    if not settings.api_key and reached:
        host = reached[0].getsockname()[0]
        log.warning("Whoever reaches %s can use the model: --api-key asks them for a key.", host)
    spans.begin()
    raise_file_limit()
    if not systemd.listeners:
        for listener in listeners:
            listener.listen(1024)
    shared = bool(systemd.listeners)
    front_limits = limits(settings, not reached)
    group = functools.partial(api.group_of, app)
    front = Front(listeners, app, front_limits, app.draining, api.probes(app), api.cors_of(settings), shared, group)
    app.registry.on_death(front.die)
    look = model.look_soon if isinstance(model, repository.Repository) else front.stop_softly
    on_signals(stop=front.stop_softly, hang_up=look)
    if hung_up.is_set():
        look()
    front.start()
    url = url_of(listeners[0])
    say(
        f" * Serving {', '.join(app.registry.names())} with {spec.engine} in {spec.precision} on {url}",
        *([f" * Pictures are resized by {resampling.RESIZER}"] if spec.image else []),
        f" * Try: curl -X POST -F image=@dog.jpg {url}/predict",
    )
    systemd.ready()
    front.serve_forever()
    if isinstance(model, repository.Repository):
        model.end()
    spans.end()
    return front.status


def limits(settings: Settings, local: bool) -> Limits:
    """Return what the front needs to know of the settings, and of whether only this machine reaches it."""
    return Limits(
        body=api.body_limit(settings),
        mebibytes=settings.max_upload_mb,
        held=api.bodies_limit(settings),
        seconds=settings.timeout,
        per_address=settings.connections_per_address,
        keep_alive=settings.keep_alive,
        requests=settings.queue_size + settings.max_batch,
        threads=api.threads(settings),
        grace=settings.drain_seconds,
        proxies=settings.trusted_proxies,
        hosts=settings.allowed_hosts or ((*LOOPBACK, settings.host) if local else ("*",)),
    )


if __name__ == "__main__":
    sys.exit(main())
