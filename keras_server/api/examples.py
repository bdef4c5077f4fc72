"""Examples for the document of the routes: requests that the served model takes, and lines of curl to copy."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any
from urllib.parse import quote

from keras_server.api.tensors import DATATYPES
from keras_server.models.spec import Spec, Tensor
from keras_server.settings import Settings

# A grey pixel, the smallest of PNGs, in base64.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
MOST_NUMBERS = 512  # of a row that anybody would copy
# Stands for what a model takes where that is too much to show, or where strangers without a key can read it.
MEASURES = (Tensor("measures", (4,), "float32"),)


def requests_of(spec: Spec, settings: Settings) -> dict[str, dict[str, Any]]:
    """Return a request of one row for each protocol, "v1" and "v2"; the served model takes it wherever that can be."""
    shapes = spec.sizes or tuple(tuple(length or 1 for length in tensor.shape) for tensor in spec.inputs)
    inputs = spec.inputs
    if spec.image:
        name = "image" if settings.api_key else inputs[0].name
        encoded = {"name": name, "shape": [1], "datatype": "BYTES", "data": [PIXEL]}
        return {"v1": {"instances": [{"b64": PIXEL}]}, "v2": {"inputs": [encoded]}}
    if settings.api_key or sum(map(math.prod, shapes)) > MOST_NUMBERS:
        inputs, shapes = MEASURES, ((4,),)
    rows = {tensor.name: nested(value_of(tensor), shape) for tensor, shape in zip(inputs, shapes, strict=True)}
    tensors = [
        {"name": tensor.name, "shape": [1, *shape], "datatype": DATATYPES[tensor.dtype][0], "data": [rows[tensor.name]]}
        for tensor, shape in zip(inputs, shapes, strict=True)
    ]
    return {"v1": {"instances": [rows if len(rows) > 1 else rows[inputs[0].name]]}, "v2": {"inputs": tensors}}


def value_of(tensor: Tensor) -> Any:
    """Return a value that an input takes, whatever it is for."""
    return {"bool": True, "string": "text"}.get(tensor.dtype, 1 if "int" in tensor.dtype else 0.5)


def nested(value: Any, shape: tuple[int, ...]) -> Any:
    """Return lists of the value, nested as the shape says."""
    for length in reversed(shape):
        value = [value] * length
    return value


def curl(path: str, operation: dict[str, Any], settings: Settings) -> str:
    """Return the line of curl that sends an operation's example, with $KEY for the key where one is asked for."""
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            path = path.replace(f"{{{parameter['name']}}}", quote(parameter["example"], safe=""))
    words = ["curl"]
    if "security" in operation:
        words.append('-H "Authorization: Bearer $KEY"')
    content = operation.get("requestBody", {}).get("content", {})
    if "multipart/form-data" in content:
        words.append("-F image=@dog.jpg")
    elif not content and operation["operationId"].startswith("post"):
        words.append("-X POST")
    elif content:
        words.append(f"-d {shlex.quote(json.dumps(content['application/json']['example']))}")
    answers = operation["responses"]["200"]["content"]
    words += ["-o heat.png"] if "image/png" in answers else ["-O"] if "*/*" in answers else []
    return " ".join([*words, shlex.quote(f"http://localhost:{settings.port or 5000}{path}")])
