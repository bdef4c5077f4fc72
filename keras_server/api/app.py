"""The Flask app: made by a factory, so that two apps in one process do not touch each other."""

from __future__ import annotations

import hmac
import logging
import re
import time
import urllib.parse
from collections.abc import Callable

import flask
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RequestRedirect

from keras_server.api import explanations, oip, pages, repository, tfserving
from keras_server.api.context import (
    App,
    Prepare,
    body_limit,
    cors_of,
    current_app,
    current_settings,
    keys_for,
)
from keras_server.api.tensors import TensorError
from keras_server.errors import (
    CLIENT_LEFT,
    FAILED,
    NOT_LOADED,
    OTHER_HOST,
    OVERLOADED,
    TOO_LARGE,
    TOO_LATE,
    common_headers,
    error_body,
)
from keras_server.hosts import allows
from keras_server.models.batcher import Overdue, QueueFull
from keras_server.models.registry import NotLoaded, NotServed, UnknownModel
from keras_server.settings import Settings
from keras_server.telemetry import PROBES
from keras_server.ticket import TICKET, Ticket

UNTIDY = re.compile(r"//|/\.\.?(/|$)")  # parts of a path that are nothing or dots

log = logging.getLogger("keras_server")


class OtherHost(HTTPException):
    """A request for a host that this server does not answer for: misdirected, by RFC 9110, 7.4 and 15.5.20."""

    code, description = 421, OTHER_HOST


def create_app(settings: Callable[[], Settings], model: Callable[[], object], prepare: Prepare) -> App:
    """Return the app, whose /predict its caller adds.

    `settings` and `model` are asked at each request; a model is whatever Hook takes, None until there is one.
    """
    app = App(settings, model, prepare)
    app.json.sort_keys = False  # type: ignore[attr-defined]  # label before probability
    app.before_request(admit)
    app.after_request(finish)
    app.teardown_request(leave)
    app.register_error_handler(Exception, answer_error)
    for part in (pages, explanations, tfserving, oip, repository):
        app.register_blueprint(part.routes)
    return app


def admit() -> ResponseReturnValue | None:
    """Give the request its ticket, limits and model, and ask for its key."""
    request, settings = flask.request, current_settings()
    ticket = request.environ.get("ticket") or Ticket(settings.timeout)
    flask.g.ticket = ticket
    ticket.describe(request.environ, settings.trusted_proxies)
    TICKET.set(ticket)
    flask.g.since = time.monotonic()
    request.max_content_length = body_limit(settings)
    allowed = settings.allowed_hosts  # what the front refuses beyond that never comes here
    if allowed and not allows(allowed, request.headers.get("Host", ""), request.path in PROBES):
        raise OtherHost
    # Werkzeug would serve //metrics as /metrics, or send the client there: past a proxy's rule for /metrics.
    if UNTIDY.search(request.environ["PATH_INFO"]):
        flask.abort(404)
    try:
        request.query_string.decode()  # as werkzeug decodes it, where it is asked for an argument
    except UnicodeDecodeError:
        flask.abort(400, "What follows the ? of the address is not UTF-8: percent-encode it.")
    keys = keys_for(request.url_rule.rule if request.url_rule else "", settings)
    if request.method != "OPTIONS" and keys:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        # Every key is compared, each in constant time, so that the time taken tells nothing.
        equal = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in keys]
        if scheme.lower() != "bearer" or not any(equal):
            flask.abort(401, "This server asks for a key: send the header 'Authorization: Bearer KEY'.")
    if isinstance(elsewhere := request.routing_exception, RequestRedirect):  # which names the host as the client does
        path = urllib.parse.urlsplit(elsewhere.new_url)._replace(scheme="", netloc="").geturl()
        return flask.redirect(path, elsewhere.code)
    return None


def finish(response: flask.Response) -> flask.Response:
    """Add the headers that every answer has, and record it."""
    ticket: Ticket = flask.g.ticket
    headers = response.headers
    for name, value in common_headers(ticket, response.status_code, cors_of(current_settings())):
        if name == "Vary":
            response.vary.add(value)  # to what the view has said
        else:
            headers[name] = value
    headers["Server-Timing"] = f"app;dur={1000 * (time.monotonic() - flask.g.since):.1f}"
    if current_app().draining.is_set():
        headers["Connection"] = "close"
    rule = flask.request.url_rule
    ticket.close(response.status_code, rule.rule if rule else "other")
    return response


def leave(_: BaseException | None) -> None:
    """Take the ticket off the thread, which serves others next, and give back what the request had."""
    TICKET.set(None)
    if served := flask.g.pop("served", None):
        served.let_go()
    if charged := flask.g.pop("charged", 0):
        current_app().budget.requests.change(charged, 0)


def answer_error(error: Exception) -> flask.Response:
    """Turn every exception into a status and a sentence in JSON; no traceback leaves the server."""
    headers = []
    if isinstance(error, HTTPException):
        status, sentence = describe(error)
        headers = [(key, value) for key, value in error.get_headers() if key == "Allow"]
    elif isinstance(error, QueueFull):
        status, sentence = 503, OVERLOADED
    elif isinstance(error, NotLoaded):
        status, sentence = 503, NOT_LOADED
    elif isinstance(error, NotServed):
        status, sentence = 503, str(error)
    elif isinstance(error, UnknownModel):
        status, sentence = 404, str(error)
    elif isinstance(error, TensorError):
        status, sentence = error.status, str(error)
    elif isinstance(error, Overdue):
        status, sentence = (499, CLIENT_LEFT) if flask.g.ticket.gone else (504, TOO_LATE)
    else:
        log.error("Request %s failed", flask.g.ticket.id, exc_info=error)
        status, sentence = 500, FAILED.format(flask.g.ticket.id)
    body = error_body(flask.request.path, sentence)
    return flask.Response(body, status, headers, content_type="application/json")


def describe(error: HTTPException) -> tuple[int, str]:
    """Return the status and the sentence of an error that Flask, Werkzeug or a view has raised."""
    request, settings, status = flask.request, current_settings(), error.code or 500
    if status == 404:
        return 404, f"There is nothing at {request.path}: POST images to /predict."
    if status == 405:
        return 405, f"{request.path} does not take {request.method}: it takes {dict(error.get_headers())['Allow']}."
    if status == 413 and (request.content_length or 0) <= body_limit(settings):
        return 400, "The form has too many fields, or too long ones: send the images as 'image' and nothing else."
    if status == 413:
        return 413, TOO_LARGE.format(settings.max_upload_mb)
    return status, error.description or ""
