"""What the server answers, route by route, as an OpenAPI 3.1 document; and the page that shows it.

The routes stand in templates/openapi.json. Added to them is what follows from the model that is served, the shapes of
its tensors above all, and from the settings, and the errors that many routes share. What JSON Schema cannot say stands
in words: that the shape of a tensor has to agree with its data, that a file has to be an image.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flask
import numpy as np

from keras_server import __version__
from keras_server.api.context import NEED_NO_KEY
from keras_server.api.tensors import DATATYPES
from keras_server.explain.heatmap import ramp
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings

Schema = dict[str, Any]

ERRORS = {
    400: "The request is malformed, or the model cannot take what it holds; the sentence says why.",
    401: "The server asks for a key, and the request has none or another one.",
    404: "There is nothing by this name.",
    408: "The request did not arrive in time.",
    413: "The body is larger than the server takes.",
    414: "The address is too long.",
    415: "The content type, or the content encoding, is none that is read here.",
    422: "This model cannot be explained; the sentence says why.",
    431: "The head of the request is too large.",
    500: "The server failed; its log says why, under the X-Request-ID.",
    501: "The server cannot do this: read a transfer encoding other than chunked.",
    503: "The server has more to do than it can, loads its model, or shuts down: try again later.",
    504: "The answer was not ready in time.",
}
ALWAYS = {400, 408, 413, 414, 431, 500, 501, 503}  # before it is known which route a request is for
COMPUTED = {415, 504}  # where there is a body, too
REQUEST_ID = {"X-Request-ID": {"required": True, "schema": {"type": "string"}}}
HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}}},
    503: {"Retry-After": {"required": True, "schema": {"type": "string", "pattern": "^[0-9]+$"}}},
}


Render = Callable[[Spec, Settings], str]  # makes a document that depends on nothing else


def page(spec: Spec, settings: Settings) -> str:
    """Return the page for a person with a browser."""
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in ramp(9)]
    return flask.render_template("index.html", spec=spec, limit=settings.max_upload_mb, ramp=" ".join(colours))


def openapi(spec: Spec, settings: Settings) -> str:
    """Return the description of every route for a program."""
    return flask.json.dumps(document(spec, settings))


def documentation(spec: Spec, settings: Settings) -> str:
    """Return the description of every route for a person."""
    return flask.render_template("docs.html", document=document(spec, settings), spec=spec)


def document(spec: Spec, settings: Settings) -> dict[str, Any]:
    """Return the document for what is served now."""
    classes = spec.classes if spec.image else 1
    text = flask.render_template("openapi.json", version=__version__, spec=spec, classes=classes, settings=settings)
    found = json.loads(text)
    found["info"]["description"] = f"Serves {spec.name}. " + found["info"]["description"]
    paths = found["paths"]
    for path, item in [*paths.items()]:
        if "/models/{name}" in path:  # its only version has a path of its own
            paths[path.replace("{name}", "{name}/versions/{version}")] = copy.deepcopy(item)
        elif path in ("/predict", "/explain") and not spec.image:
            paths[path] = {"description": "This model takes no pictures: here each request is answered 400."}
    free = {path_of(rule) for rule in NEED_NO_KEY}
    for path, item in paths.items():
        for method in item.keys() & {"get", "post"}:
            complete(item[method], method, path, spec.name, path not in free, bool(settings.api_key))
    schemas = (
        common_schemas(spec, classes) | v1_schemas(spec, settings.queue_size) | v2_schemas(spec, settings.queue_size)
    )
    shared = {f"{kind}{status}": error(kind, status) for kind in ("Error", "ProtocolError") for status in ERRORS}
    found["components"] = {"schemas": schemas, "responses": shared}
    if settings.api_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def path_of(rule: str) -> str:
    """Return a route's path as OpenAPI writes it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def complete(operation: Schema, method: str, path: str, name: str, needs_key: bool, has_key: bool) -> None:
    """Add to an operation its id, the parameters in its path, its headers and the errors that it may answer with."""
    operation["operationId"] = "_".join([method, *re.findall(r"\w+", path)])
    values = {"name": {"const": name}, "version": {"const": "1"}, "filename": {"type": "string"}}
    names = re.findall(r"{(\w+)}", path)
    given = [{"name": key, "in": "path", "required": True, "schema": values[key]} for key in names]
    operation["parameters"] = given + operation.get("parameters", [])
    if needs_key and has_key:
        operation["security"] = [{"key": []}]
    operation["responses"]["200"]["headers"] = REQUEST_ID
    kind = "ProtocolError" if path.startswith(("/v1", "/v2")) else "Error"
    possible = {401: needs_key, 404: names, 422: path == "/explain", **dict.fromkeys(COMPUTED, method == "post")}
    for status in ALWAYS | {status for status, holds in possible.items() if holds}:
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{kind}{status}"}


def error(kind: str, status: int) -> Schema:
    """Return the response with an error, whose body is of one of two kinds."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind}"}}}
    return {"description": ERRORS[status], "headers": REQUEST_ID | HEADERS.get(status, {}), "content": content}


# ----------------------------------------------------------------------------------------------------------
# Schemas of what the routes take and answer
# ----------------------------------------------------------------------------------------------------------

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
LENGTH: Schema = {"type": "integer", "minimum": 1}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
ENCODED: Schema = {"type": "string", "format": "base64-image", "description": "An image file, in base64."}


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """Return the schema of a list of `least` to `most` items."""
    return {"type": "array", "items": items, "minItems": least} | ({} if most is None else {"maxItems": most})


def record(required: dict[str, Schema], optional: dict[str, Schema] | None = None, **more: Any) -> Schema:
    """Return the schema of an object."""
    return {"type": "object", "required": [*required], "properties": required | (optional or {}), **more}


def common_schemas(spec: Spec, classes: int) -> dict[str, Schema]:
    """Return what is not about tensors: errors, labels, and the descriptions of server and model."""
    rows = array(record({"label": TEXT, "probability": SHARE}), 1, classes)
    served = {"success": {"const": True}, "model": {"const": spec.name}}
    failed = {"success": {"const": False}, "error": TEXT}
    good = record({"filename": TEXT, "success": {"const": True}, "predictions": rows})
    results = array({"anyOf": [good, record({"filename": TEXT} | failed)]}, 2)
    heat = {"label": TEXT, "probability": SHARE, "map": array(array(SHARE, 1), 1), "width": LENGTH, "height": LENGTH}
    tensors = array(record({"name": TEXT, "datatype": TEXT, "shape": array({"type": "integer", "minimum": -1}, 1)}), 1)
    named = {"name": {"const": spec.name}}
    sides = record({"inputs": {"type": "object"}, "outputs": {"type": "object"}})
    signature = record({"signature_def": record({"signature_def": record({"serving_default": sides})})})
    status = record({"version": {"const": "1"}, "state": {"const": "AVAILABLE"}, "status": {"type": "object"}})
    return {
        "Error": record(failed, {"results": results}),
        "ProtocolError": record({"error": TEXT}),
        "Predictions": {"anyOf": [record(served | {"predictions": rows}), record(served | {"results": results})]},
        "Explanation": record(served | heat),
        "ModelNames": record({"models": array(TEXT, 1)}),
        "ModelStatus": record(named | {"ready": {"const": True}, "model_version_status": array(status, 1)}),
        "ModelSignature": record({"model_spec": {"type": "object"}, "metadata": signature}),
        "ServerMetadata": record({"name": TEXT, "version": TEXT, "extensions": array(TEXT)}),
        "ModelMetadata": record(
            named | {"platform": TEXT, "inputs": tensors, "outputs": tensors, "versions": array(TEXT)}
        ),
    }


def value_of(dtype: str) -> Schema:
    """Return the schema of one value of an input."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return BOOLEAN
    if kind == "f":
        limit = float(np.finfo(dtype).max)
        return {"type": "number", "minimum": -limit, "maximum": limit}
    limits = np.iinfo(dtype)
    return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}


def row_of(tensor: Tensor) -> Schema:
    """Return the schema of one row of an input: lists that are nested as its shape says."""
    found = value_of(tensor.dtype)
    for length in reversed(tensor.shape):
        found = array(found, length or 1, length)
    return found


def is_vast(spec: Spec) -> bool:
    """Return whether the pictures have so many numbers that nobody would write them in JSON, nor try them out."""
    return math.prod(length or 1 for length in spec.inputs[0].shape) > 4096


def answer_of(tensor: Tensor) -> Schema:
    """Return the schema of one row of an output, with null for what is not finite."""
    found: Schema = {"type": {"b": ["boolean"], "f": ["number", "null"]}.get(np.dtype(tensor.dtype).kind, ["integer"])}
    for _ in tensor.shape:
        found = array(found)
    return found


def v1_schemas(spec: Spec, most: int) -> dict[str, Schema]:
    """Return what TensorFlow Serving's REST API takes and answers."""
    rows = {tensor.name: row_of(tensor) for tensor in spec.inputs}
    if spec.image:
        ((name, row),) = rows.items()
        encoded = record({"b64": ENCODED}, additionalProperties=False)
        rows = {name: encoded if is_vast(spec) else {"anyOf": [row, encoded]}}
    columns = {name: array(row, 1, most) for name, row in rows.items()}
    instances = array(record(rows, additionalProperties=False), 1, most)
    inputs = record(columns, additionalProperties=False)
    if len(rows) == 1:  # which may go without its name
        (column,) = columns.values()
        instances, inputs = {"anyOf": [column, instances]}, {"anyOf": [column, inputs]}
    outputs = {tensor.name: answer_of(tensor) for tensor in spec.outputs}
    by_row, by_column = array(record(outputs)), record({name: array(schema) for name, schema in outputs.items()})
    if len(outputs) == 1:
        by_row = by_column = array(next(iter(outputs.values())))
    signature: dict[str, Any] = {"signature_name": {"enum": ["serving_default", ""]}}
    of_rows = record({"instances": instances}, signature | {"inputs": False})
    of_columns = record({"inputs": inputs}, signature | {"instances": False})
    return {
        "PredictRequest": {"anyOf": [of_rows, of_columns]},
        "PredictResponse": {"anyOf": [record({"predictions": by_row}), record({"outputs": by_column})]},
    }


def v2_schemas(spec: Spec, most: int) -> dict[str, Schema]:
    """Return what the Open Inference Protocol takes and answers, as far as it is JSON."""

    def tensor_of(name: str, datatype: str, lengths: Sequence[int | None], data: Schema) -> Schema:
        axes = [LENGTH | {"maximum": most}, *({"const": length} if length else LENGTH for length in lengths)]
        shape = {"type": "array", "prefixItems": axes, "minItems": len(axes), "maxItems": len(axes)}
        return record({"name": {"const": name}, "datatype": {"const": datatype}, "shape": shape, "data": data})

    inputs = []
    for tensor in spec.inputs:
        data = array(row_of(tensor), 1, most)
        if tensor.shape:  # flat, too
            size = math.prod(length or 1 for length in tensor.shape)
            flat = array(value_of(tensor.dtype), size, None if None in tensor.shape else most * size)
            data = {"anyOf": [data, flat]}
        inputs.append(tensor_of(tensor.name, DATATYPES[tensor.dtype][0], tensor.shape, data))
    if spec.image:
        images = tensor_of(spec.inputs[0].name, "BYTES", [], array(ENCODED, 1, most))
        inputs = [images if is_vast(spec) else {"anyOf": [inputs[0], images]}]
    names = {"enum": [tensor.name for tensor in spec.outputs]}
    wanted = record({"name": names}, {"parameters": record({}, {"classification": COUNT, "binary_data": BOOLEAN})})
    options = {"id": TEXT, "parameters": record({}, {"binary_data_output": BOOLEAN}), "outputs": array(wanted)}
    all_inputs = {"type": "array", "prefixItems": inputs, "minItems": len(inputs), "maxItems": len(inputs)}
    datatypes = {"enum": sorted({DATATYPES[tensor.dtype][0] for tensor in spec.outputs} | {"BYTES"})}
    data = {"data": {"type": "array"}, "parameters": record({"binary_data_size": COUNT})}
    output = record({"name": names, "datatype": datatypes, "shape": array(COUNT, 1)}, data)
    answer = {"model_name": {"const": spec.name}, "model_version": {"const": "1"}, "outputs": array(output, 1)}
    return {"InferRequest": record({"inputs": all_inputs}, options), "InferResponse": record(answer, {"id": TEXT})}
