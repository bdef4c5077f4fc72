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

import logging
import os
import signal
import sys
from collections.abc import Sequence

import flask
import gevent
import numpy as np
from flask.typing import ResponseReturnValue
from PIL import Image

from keras_server import api, images, telemetry
from keras_server.api.uploads import decode, read_top, read_uploads
from keras_server.commands import COMMANDS
from keras_server.front.limits import Limits
from keras_server.front.listener import bind, is_local, raise_file_limit, url_of
from keras_server.front.server import Front, give_memory_back
from keras_server.models import registry
from keras_server.models.beside import locate
from keras_server.models.errors import StartupError
from keras_server.models.served import Served
from keras_server.settings import Settings, read_settings, unknown_variables

log = logging.getLogger("keras_server")

settings = Settings()  # main() reads them from the command line and the environment
model: object = None  # load_model() puts it here: a Served, a keras.Model, or anything with .predict(batch)
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
    model = registry.load(settings)


def prepare_image(image: Image.Image, target: tuple[int, int]) -> np.ndarray:
    """Return the image as the model takes it: float32, shape (1, height, width, channels), preprocessed as in training.

    `target` is (width, height). The photo is turned upright by its EXIF orientation, and has as many channels as the
    model's input. Raises ImageError where the pixels cannot be decoded.
    """
    spec = app.current_model().spec
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
        telemetry.IMAGES.inc(len(batch))

    # one image is answered by itself, several as a list
    if len(results) > 1:
        if batch:
            return {"success": True, "model": served.spec.name, "results": results}
        return {"success": False, "error": "None of these files can be read as an image.", "results": results}, 400
    (result,) = results
    if not batch:
        flask.abort(400, str(result["error"]))
    del result["filename"]
    return {"success": True, "model": served.spec.name} | result


def configure(arguments: Sequence[str] = ()) -> None:
    """Read the settings, and log as they say."""
    global settings
    settings = read_settings(arguments, locate)
    handler = logging.StreamHandler()
    handler.setFormatter(telemetry.JsonFormatter() if settings.log_format == "json" else telemetry.TextFormatter())
    log.handlers, log.propagate = [handler], False
    log.setLevel(settings.log_level.upper())
    for sentence in unknown_variables():
        log.warning(sentence)


def start_model() -> Served:
    """Load the model, and let what load_model() put into `model` be converted and batched. Raises StartupError."""
    global model
    load_model()
    model = served = app.current_model()
    return served


def create_app() -> api.App:
    """Return the app with its model loaded, for another WSGI server; the environment holds the settings.

    Raises StartupError.
    """
    configure()
    start_model()
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the model and serve it, or do what the command that comes first says. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        sys.modules.setdefault("run_keras_server", sys.modules[__name__])  # the commands import it under this name
        return COMMANDS[arguments[0]](arguments[1:])
    give_memory_back()
    configure(arguments)
    # Ctrl-C while it loads: a KeyboardInterrupt is lost where Python runs a callback of a library.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        listeners = bind(settings.host, settings.port)
        print(" * Loading the Keras model: please wait until the server has fully started", flush=True)
        served = start_model()
    except StartupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not settings.api_key and not all(map(is_local, listeners)):
        log.warning("Whoever reaches %s can use the model: --api-key asks them for a key.", settings.host)
    raise_file_limit()
    for listener in listeners:
        listener.listen(1024)
    front = Front(listeners, app, limits(settings), app.draining, api.probes(app), api.cors_of(settings))
    served.batcher.on_death = front.die
    for which in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(which, front.stop_softly)
    front.start()
    url = url_of(listeners[0])
    print(f" * Serving {served.spec.name} with {served.spec.engine} in {served.spec.precision} on {url}")
    print(f" * Try: curl -X POST -F image=@dog.jpg {url}/predict", flush=True)
    front.serve_forever()
    return front.status


def limits(settings: Settings) -> Limits:
    """Return what the front needs to know of the settings."""
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
    )


if __name__ == "__main__":
    sys.exit(main())
