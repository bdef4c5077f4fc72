"""What the document cannot say: which bytes are an image, which model is served, and which tensors it takes.

The document is generic in the tensors. So files are drawn from real images, and requests that are made to be valid get
the served model's name, and tensors of random numbers as its metadata describe them. Requests that are made to be
invalid stay as they are.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import random
import urllib.parse
import urllib.request
from typing import Any

import schemathesis
from hypothesis import strategies
from PIL import Image


def image(kind: str) -> bytes:
    """Return the file of a small picture."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((5, 4)).save(out, kind)
    return out.getvalue()


random.seed(1)  # each run asks for the same
IMAGES = [image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]
schemathesis.openapi.format("binary", strategies.sampled_from(IMAGES))


@functools.cache
def metadata(base_url: str) -> dict[str, Any]:
    """Return what the served model says of itself."""

    def get(path: str) -> Any:
        with urllib.request.urlopen(urllib.parse.urljoin(base_url, path)) as answer:
            return json.load(answer)

    return get(f"/v2/models/{get('/v1/models')['models'][0]}")


def number(datatype: str) -> Any:
    """Return a random value of a type of the Open Inference Protocol."""
    if datatype == "BOOL":
        return random.random() < 0.5
    return random.randrange(5) if "INT" in datatype else random.uniform(-2, 2)


def nested(values: list[Any], shape: list[int]) -> Any:
    """Return flat values as lists that are nested as the shape says."""
    if not shape:
        return values[0]
    size = len(values) // shape[0]
    return [nested(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def tensors(model: dict[str, Any]) -> list[dict[str, Any]]:
    """Return inputs for a model, of one to three rows."""
    rows, length = random.randint(1, 3), random.randint(1, 4)
    inputs = []
    for tensor in model["inputs"]:
        shape = [rows, *(length if size == -1 else size for size in tensor["shape"][1:])]
        if math.prod(shape) > 5_000:  # nobody would write that in JSON
            data = [base64.b64encode(random.choice(IMAGES)).decode() for _ in range(rows)]
            inputs.append(tensor | {"shape": [rows], "datatype": "BYTES", "data": data})
        else:
            values = [number(tensor["datatype"]) for _ in range(math.prod(shape))]
            inputs.append(tensor | {"shape": shape, "data": random.choice([values, nested(values, shape)])})
    return inputs


def for_v1(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the request of TensorFlow Serving's API for these inputs: by column or by row, named or not."""
    columns = {}
    for item in inputs:
        data, shape = item["data"], item["shape"]
        if item["datatype"] == "BYTES":
            columns[item["name"]] = [{"b64": text} for text in data]
        else:
            is_flat = len(shape) > 1 and not isinstance(data[0], list)
            columns[item["name"]] = nested(data, shape) if is_flat else data
    if random.random() < 0.5:
        return {"inputs": columns if len(columns) > 1 or random.random() < 0.5 else next(iter(columns.values()))}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"instances": rows if len(columns) > 1 or random.random() < 0.5 else [*next(iter(columns.values()))]}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Make a request that is to be valid one for the model that is served."""
    if not (case.meta and case.meta.generation.mode.is_positive):
        return
    model = metadata(case.operation.base_url)
    if "name" in case.path_parameters:
        case.path_parameters["name"] = model["name"]
    if "version" in case.path_parameters:
        case.path_parameters["version"] = "1"
    query = case.query or {}
    for key, value in (("model", model["name"]), ("label", "0"), ("top", 1)):
        if key in query:
            query[key] = value
    if case.operation.path.endswith("infer"):
        names = [output["name"] for output in model["outputs"]]
        body = case.body if isinstance(case.body, dict) else {}
        body["inputs"] = tensors(model)
        for item in body.get("outputs", ()):
            item["name"] = random.choice(names)
        case.body = body
    elif case.operation.path.endswith(":predict"):
        signature = case.body.get("signature_name", "") if isinstance(case.body, dict) else ""
        case.body = for_v1(tensors(model)) | {"signature_name": signature}
