"""Models by name: /models/NAME/predict, and Triton's model repository extension, which loads and unloads them.

    curl -X POST -H "Authorization: Bearer $KEY" http://localhost:5000/v2/repository/models/cats/load

Taken from docs/protocol/extension_model_repository.md of github.com/triton-inference-server/server.
"""

from __future__ import annotations

from typing import Any

import flask
import msgspec
from flask.typing import ResponseReturnValue

from keras_server.api.bodies import read_body
from keras_server.api.context import current_app, current_settings
from keras_server.api.explanations import explain
from keras_server.api.parsing import read_object
from keras_server.api.tensors import TensorError, typed
from keras_server.models.errors import StartupError
from keras_server.models.repository import Repository

routes = flask.Blueprint("repository", __name__)


@routes.post("/models/<segment:name>/predict")
def predict(**_: str) -> ResponseReturnValue:
    """Do what /predict does, whoever has written that, for the model of this name."""
    app = current_app()
    return app.ensure_sync(app.view_functions["predict"])()  # type: ignore[no-any-return]


@routes.post("/models/<segment:name>/explain")
def explain_named(**_: str) -> ResponseReturnValue:
    """Do what /explain does for the model of this name."""
    return explain()


class Request(msgspec.Struct):
    """What is read of a request."""

    ready: Any = False
    parameters: Any = None


def read_request() -> Request:
    """Return what a request asks for, which may have no body. Raises TensorError."""
    body = read_body()
    request = read_object(body, Request) if body.strip() else Request()
    if request.parameters is not None:
        typed(request.parameters, dict, "'parameters'")
    return request


def repository() -> Repository:
    """Return what loads models. Aborts where that was not allowed when the server was started."""
    models = current_app().registry
    if not isinstance(models, Repository) or not models.folder:
        flask.abort(403, "Models are loaded and unloaded only in a folder: start the server with --model-dir.")
    if not current_settings().api_key:
        flask.abort(403, "Who loads and unloads models needs a key: start the server with --api-key.")
    return models


@routes.post("/v2/repository/index")
def index() -> ResponseReturnValue:
    """Name all models and versions, or those that are ready."""
    ready = typed(read_request().ready, bool, "'ready'")
    rows = current_app().registry.index()
    return flask.jsonify([row for row in rows if row["state"] == "READY" or not ready])


@routes.post("/v2/repository/models/<segment:name>/load")
def load(name: str) -> ResponseReturnValue:
    """Serve a model of the folder as it is now."""
    models, parameters = repository(), read_request().parameters or {}
    if parameters:
        raise TensorError("A model is loaded as it is in the folder: send no parameters.")
    try:
        models.load(name)
    except StartupError as error:
        flask.abort(400, str(error))
    return {}


@routes.post("/v2/repository/models/<segment:name>/unload")
def unload(name: str) -> ResponseReturnValue:
    """Serve a model of the folder no more, until it is loaded again."""
    models = repository()
    read_request()
    try:
        models.unload(name)
    except StartupError as error:
        flask.abort(400, str(error))
    return {}
