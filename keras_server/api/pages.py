"""What is not about a single picture: the page, the documents, the probes, the metrics."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import flask
import prometheus_client as prometheus

from keras_server import telemetry
from keras_server.api import docs
from keras_server.api.context import METRICS, App, current_app, current_model, current_settings
from keras_server.errors import NOT_LOADED, STOPPING, error_body
from keras_server.models.registry import NotLoaded

routes = flask.Blueprint("pages", __name__)


def document(render: docs.Render, content_type: str) -> flask.Response:
    """Answer with a document that depends only on what is served: made once, and kept as bytes with an ETag."""
    app, served, settings = current_app(), current_model(), current_settings()
    shown = docs.Shown(served.spec, served.version_name, app.registry.names())
    key = render, served.spec.name
    made = app.documents.get(key)
    if made and made[0] == shown and made[1] is settings:
        body = made[2]
    else:
        body = render(shown, settings).encode()
        for gone in [other for other in [*app.documents] if other[1] not in shown.names]:
            app.documents.pop(gone, None)
        app.documents[key] = shown, settings, body
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


def probes(app: App) -> dict[str, Callable[[], tuple[int, bytes]]]:
    """Return what answers the probes, by path, with Flask or without: a status and JSON."""

    def alive() -> str:
        return ""

    def ready() -> str:
        try:
            return problem_of(app)
        except NotLoaded:
            return NOT_LOADED

    def answer(path: str, problem: Callable[[], str], good: Callable[[], dict[str, object]]) -> tuple[int, bytes]:
        if sentence := problem():
            return 503, error_body(path, sentence)
        return 200, json.dumps(good()).encode() + b"\n"

    rows: dict[str, tuple[Callable[[], str], Callable[[], dict[str, object]]]] = {
        "/healthz": (alive, lambda: {"status": "alive"}),
        "/readyz": (ready, lambda: {"status": "ready", "model": app.current_model().spec.name}),
        "/v2/health/live": (alive, lambda: {"live": True}),
        "/v2/health/ready": (ready, lambda: {"ready": True}),
    }
    return {path: functools.partial(answer, path, *row) for path, row in rows.items()}


@routes.get("/healthz")
@routes.get("/readyz")
@routes.get("/v2/health/live")
@routes.get("/v2/health/ready")
def probe() -> flask.Response:
    """Liveness: the process answers; readiness: a prediction would be taken."""
    status, body = probes(current_app())[flask.request.path]()
    return flask.Response(body, status, content_type="application/json")


def check_ready() -> None:
    """Abort with 503 where no prediction of the request's model would be taken."""
    app = current_app()
    if problem := STOPPING if app.draining.is_set() else app.current_model().problem(app.settings().timeout):
        flask.abort(503, problem)


def problem_of(app: App) -> str:
    """Return why not all models would take predictions, or nothing. Raises NotLoaded."""
    return STOPPING if app.draining.is_set() else app.registry.problem(app.settings().timeout)


@routes.get(METRICS)
def metrics() -> Any:
    """Figures for Prometheus."""
    return flask.Response(telemetry.METRICS_PAGE.render(), content_type=prometheus.CONTENT_TYPE_LATEST)
