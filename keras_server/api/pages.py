"""What is not about a single picture: the page, the documents, the probes, the metrics."""

from __future__ import annotations

from typing import Any

import flask
import prometheus_client as prometheus

from keras_server import ticket as account
from keras_server.api import docs
from keras_server.api.context import current_app, current_model, current_settings

routes = flask.Blueprint("pages", __name__)


def document(render: docs.Render, content_type: str) -> flask.Response:
    """Answer with a document that depends only on what is served: made once, and kept as bytes with an ETag."""
    spec, settings, kept = current_model().spec, current_settings(), current_app().documents
    if (made := kept.get(render)) and made[0] is spec and made[1] is settings:
        body = made[2]
    else:
        body = render(spec, settings).encode()
        kept[render] = spec, settings, body
    response = flask.Response(body, content_type=content_type)
    response.add_etag()
    response.make_conditional(flask.request)
    return response


@routes.get("/")
def index() -> flask.Response:
    """A page for a person with a browser."""
    return document(docs.page, "text/html; charset=utf-8")


@routes.get("/docs")
def documentation() -> flask.Response:
    """Describe every route to a person."""
    return document(docs.documentation, "text/html; charset=utf-8")


@routes.get("/openapi.json")
def openapi() -> flask.Response:
    """Describe every route to a program."""
    return document(docs.openapi, "application/json")


@routes.get("/healthz")
def healthz() -> dict[str, str]:
    """Liveness: the process answers."""
    return {"status": "alive"}


@routes.get("/readyz")
def readyz() -> dict[str, str]:
    """Readiness: a prediction would be taken."""
    check_ready()
    return {"status": "ready", "model": current_model().spec.name}


def check_ready() -> None:
    """Abort with 503 where no prediction would be taken."""
    if current_app().draining.is_set():
        flask.abort(503, "The server is shutting down.")
    if reason := current_model().problem(current_settings().timeout):
        flask.abort(503, reason)


@routes.get("/metrics")
def metrics() -> Any:
    """Figures for Prometheus."""
    return flask.Response(prometheus.generate_latest(account.METRICS), content_type=prometheus.CONTENT_TYPE_LATEST)
