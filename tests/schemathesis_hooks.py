"""What schemathesis cannot read in the document: which bytes are an image, and that tensors have to be consistent.

JSON Schema can say neither. So files are drawn from real images, and of the requests that are made to be valid the
tensors are cut to what they have in common. Requests that are made to be invalid stay as they are.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import schemathesis
from hypothesis import strategies
from PIL import Image


def image(kind: str) -> bytes:
    """Return the file of a small picture."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((5, 4)).save(out, kind)
    return out.getvalue()


FILES = strategies.sampled_from([image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")])
schemathesis.openapi.format("binary", FILES)
schemathesis.openapi.format("base64-image", FILES.map(lambda file: base64.b64encode(file).decode()))


def cut(tensors: list[list[Any]]) -> None:
    """Cut tensors to equally many rows, and inside of each the lists of one depth to the length of the shortest."""
    rows = min(map(len, tensors))
    for tensor in tensors:
        del tensor[rows:]
        level = [row for row in tensor if isinstance(row, list)]
        while level:
            shortest = min(map(len, level))
            for found in level:
                del found[shortest:]
            level = [inner for found in level for inner in found if isinstance(inner, list)]


def fit(inputs: list[dict[str, Any]], axes: dict[str, list[int | None]]) -> None:
    """Make tensors of the Open Inference Protocol agree with their shapes, and have equally many rows.

    `axes` are the lengths of the inputs' axes, None where any will do, as it will for the first.
    """
    for tensor in inputs:
        data, shape = tensor["data"], tensor["shape"]
        for axis, length in enumerate(axes[tensor["name"]][: len(shape)]):
            shape[axis] = length or 1
        if len(shape) > 1 and not isinstance(data[0], list):  # flat: the last axis that is free takes it all
            last = max(axis for axis, length in enumerate(axes[tensor["name"]]) if length is None)
            shape[last] = len(data) // math.prod(shape)
            size = math.prod(shape[1:])
            tensor["data"] = [data[i : i + size] for i in range(0, shape[0] * size, size)]
    cut([tensor["data"] for tensor in inputs])
    for tensor in inputs:
        data, shape = tensor["data"], tensor["shape"]
        shape[0], first = len(data), data[0]
        if len(shape) > 2 and not isinstance(first[0], list):
            tensor["data"] = [value for row in data for value in row]
            continue
        for axis in range(1, len(shape)):
            shape[axis], first = len(first), first[0]


def axes_of(case: Any) -> dict[str, list[int | None]]:
    """Return the lengths of each input's axes, out of the document."""
    found = {}
    inputs = case.operation.schema.raw_schema["components"]["schemas"]["InferRequest"]["properties"]["inputs"]
    for item in inputs["prefixItems"]:
        numbers = item.get("anyOf", [item])[0]["properties"]
        found[numbers["name"]["const"]] = [axis.get("const") for axis in numbers["shape"]["prefixItems"]]
    return found


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Make the tensors of a request that is to be valid agree with each other."""
    body = case.body
    if not isinstance(body, dict) or not (case.meta and case.meta.generation.mode.is_positive):
        return
    rows, columns = body.get("instances"), body.get("inputs")
    if case.path.endswith("infer"):
        fit(columns, axes_of(case))
    elif columns is not None:
        cut([*columns.values()] if isinstance(columns, dict) else [columns])
    elif rows is not None and isinstance(rows[0], dict):
        for name in rows[0]:
            cut([[row[name] for row in rows if name in row]])
    elif rows is not None:
        cut([rows])
