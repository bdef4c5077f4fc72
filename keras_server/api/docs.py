"""What the server answers, route by route, as an OpenAPI 3.1 document; and the page that shows it.

The document stands in templates/openapi.json, generic in the tensors: the metadata of a model say which it takes. Added
to it are the limits of the settings, and the errors that many routes share. Pictures in JSON are told in words only:
openapi-generator's clients, which take forms apart into parameters, would say of every form that it is JSON.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flask

from keras_server import __version__
from keras_server.api.context import NEED_NO_KEY, keys_for
from keras_server.api.examples import curl, requests_of
from keras_server.api.tensors import DATATYPES
from keras_server.explain.heatmap import ramp
from keras_server.images import NAMES
from keras_server.models.spec import Spec
from keras_server.settings import Settings

Schema = dict[str, Any]

ERRORS = {
    400: "The request is malformed, or the model cannot take what it holds; the sentence says why.",
    401: "The server asks for a key, and the request has none or another one.",
    403: "The server was started without what this needs, such as --model-dir and an --api-key.",
    404: "There is nothing by this name.",
    408: "The request did not arrive in time.",
    413: "The body is larger than the server takes.",
    414: "The address is too long.",
    415: "The content type, or the content encoding, is none that is read here.",
    421: "The request is for a host that this server does not answer for.",
    422: "This model cannot be explained; the sentence says why.",
    429: "The client's address has as many connections, or requests under way, as it may have.",
    431: "The head of the request is too large.",
    500: "The server failed; its log says why, under the X-Request-ID.",
    503: "The server has more to do than it can, loads its model, or shuts down: try again later.",
    504: "The answer was not ready in time.",
}
ALWAYS = {400, 408, 413, 414, 421, 429, 431, 500, 503}  # before it is known which route a request is for
COMPUTED = {415, 504}  # where there is a body, too
REQUEST_ID = {"X-Request-ID": {"required": True, "schema": {"type": "string"}}}
HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}},
    503: {"Retry-After": {"required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}},
}


@dataclass(frozen=True)
class Shown:
    """What the documents tell of the models."""

    spec: Spec
    version: str
    names: tuple[str, ...]  # of all models


Render = Callable[[Shown, Settings], str]  # makes a document that depends on nothing else


def page(shown: Shown, settings: Settings) -> str:
    """Return the page for a person with a browser."""
    spec = shown.spec
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in ramp(9)]
    nameless = spec.kind == "classes" and len(spec.labels) != spec.classes  # its labels are numbers
    html = flask.render_template(
        "index.html",
        spec=spec,
        names=shown.names,
        limit=settings.max_upload_mb,
        ramp=" ".join(colours),
        formats=NAMES,
        nameless=nameless,
    )
    return re.sub(r"\n\s+", "\n", html)  # indentation is for who edits the template


def openapi(shown: Shown, settings: Settings) -> str:
    """Return the description of every route for a program."""
    return flask.json.dumps(document(shown, settings))


def documentation(shown: Shown, settings: Settings) -> str:
    """Return the description of every route for a person."""
    found = document(shown, settings)
    also = {path: others_of(path) for path in found["paths"]}
    others = {other for paths in also.values() for other in paths}
    return flask.render_template("docs.html", document=found, spec=shown.spec, also=also, others=others)


def others_of(path: str) -> list[str]:
    """Return the other paths of a route: with the name of a model in it, with a version, or a label of one."""
    if path in ("/predict", "/explain"):
        return [f"/models/{{name}}{path}"]
    if not re.match("/v[12]/models/{name}", path) or "{name}/versions" in path or "{name}/labels" in path:
        return []
    kinds = ("versions/{version}", "labels/{label}") if path.startswith("/v1") else ("versions/{version}",)
    return [path.replace("{name}", f"{{name}}/{kind}") for kind in kinds]


def document(shown: Shown, settings: Settings) -> dict[str, Any]:
    """Return the document. It depends on the model by a sentence, the examples, and whether /predict answers.

    However many models there are, it is as long.
    """
    spec = shown.spec
    datatypes = sorted({datatype for datatype, _ in DATATYPES.values()})
    text = flask.render_template(
        "openapi.json",
        version=__version__,
        spec=spec,
        settings=settings,
        datatypes=datatypes,
        formats=NAMES,
        requests=requests_of(spec, settings),
    )
    content: dict[str, Any] = json.loads(text)
    content["info"]["description"] = f"Serves {spec.name}. {content['info']['description']}"
    paths = content["paths"]
    for path in [*paths]:
        if path in ("/predict", "/explain") and spec.kind == "none" and len(shown.names) < 2:
            reason = "the answer says why." if settings.api_key else spec.reason  # which may tell of tensors
            paths[path] = {"description": f"Each request is answered 400 here: {reason}"}
        for other in others_of(path):
            paths[other] = copy.deepcopy(paths[path])
            if other.startswith("/models/") and "post" in paths[other]:
                named = [each for each in paths[other]["post"]["parameters"] if each["name"] != "model"]
                paths[other]["post"]["parameters"] = named
    free = {path_of(rule) for rule in NEED_NO_KEY}
    for path, item in paths.items():
        for method in item.keys() & {"get", "post"}:
            complete(item[method], method, path, shown, path not in free, bool(keys_for(path, settings)))
            line = curl(path, item[method], settings)
            item[method]["x-codeSamples"] = [{"lang": "Shell", "label": "curl", "source": line}]  # as Redoc reads them
    content["components"]["responses"] = {
        f"{kind}{status}": error(kind, status) for kind in ("Error", "ProtocolError") for status in ERRORS
    }
    if settings.api_key or settings.metrics_key:
        content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return content


def path_of(rule: str) -> str:
    """Return a route's path as OpenAPI writes it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def complete(operation: Schema, method: str, path: str, shown: Shown, needs_key: bool, has_key: bool) -> None:
    """Add to an operation its id, the parameters in its path, its headers and the errors that it may answer with."""
    operation["operationId"] = "_".join([method, *re.findall(r"\w+", path)])
    examples = {"name": shown.spec.name, "version": shown.version, "label": "stable", "filename": "dog.jpg"}
    names = re.findall(r"{(\w+)}", path)
    parts = [
        {"name": key, "in": "path", "required": True, "schema": {"type": "string"}, "example": examples[key]}
        for key in names
    ]
    operation["parameters"] = parts + operation.get("parameters", [])
    if needs_key and has_key:
        operation["security"] = [{"key": []}]
    operation["responses"]["200"]["headers"] = REQUEST_ID
    kind = "ProtocolError" if path.startswith(("/v1", "/v2")) else "Error"
    possible = {
        401: needs_key,
        403: re.match("/v2/repository/models/", path),
        404: names or method == "post",
        422: path.endswith("/explain"),
        **dict.fromkeys(COMPUTED, method == "post"),
    }
    for status in ALWAYS | {status for status, holds in possible.items() if holds}:
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{kind}{status}"}


def error(kind: str, status: int) -> Schema:
    """Return the response with an error, whose body is of one of two kinds."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
    return {"description": ERRORS[status], "headers": REQUEST_ID | HEADERS.get(status, {}), "content": content}
