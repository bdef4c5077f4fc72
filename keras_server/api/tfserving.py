"""TensorFlow Serving's REST API, which KServe calls V1.

    curl -d '{"instances": [[5.1, 3.5, 1.4, 0.2]]}' http://localhost:5000/v1/models/iris:predict

Taken from "RESTful API" of TensorFlow Serving (tensorflow.org/tfx/serving/api_rest) and "Data Plane (V1)" of KServe.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from keras_server.api.context import current_app, current_model, current_settings
from keras_server.api.inference import (
    Arrays,
    check_names,
    check_rows,
    compute,
    from_image,
    protocol,
    read_request,
)
from keras_server.api.pages import check_ready
from keras_server.api.parsing import ABSENT, Counts, read_large, read_small
from keras_server.api.tensors import (
    DATATYPES,
    TensorError,
    from_lists,
    is_encoded,
    lists_in,
    shape_of,
    short,
    to_lists,
    typed,
)
from keras_server.api.uploads import from_text
from keras_server.models.spec import Tensor

routes = protocol("tfserving")
MARKS = {*',[{"\\'}  # which Counts counts, or that change what it counts
STRANGE = 4  # times the rows that may come, of as many values as rows have that name what the model does not


class Request(msgspec.Struct):
    """What is read of a request."""

    signature_name: msgspec.Raw = ABSENT
    instances: msgspec.Raw = ABSENT
    inputs: msgspec.Raw = ABSENT


def decode_v1(request: Request) -> Arrays:
    """Return the arrays in a request of rows ("instances") or of a column for each input ("inputs")."""
    tensors, name = {tensor.name: tensor for tensor in current_model().spec.inputs}, current_model().spec.name
    signature = read_small(request.signature_name, "", "'signature_name'")
    if signature not in ("", "serving_default"):
        raise TensorError(f"There is no signature {short(signature)}: {name} has serving_default.")
    if (request.instances == ABSENT) == (request.inputs == ABSENT):
        raise TensorError("Send either 'instances', a list of rows, or 'inputs', a list of values for each input.")
    if request.instances == ABSENT:
        columns = read_large(request.inputs, fits, "'inputs'")
        named = type(columns) is dict or len(tensors) > 1
        check_names(typed(columns, dict, "'inputs'") if named else tensors)
    else:
        columns = rows = typed(read_large(request.instances, fits, "'instances'"), list, "'instances'")
        named = len(tensors) > 1 or any(type(row) is dict and not is_encoded(row) for row in rows)
        if named:
            for row in rows:
                check_names(typed(row, dict, f"A row for {name}"))
            columns = {key: [row[key] for row in rows] for key in tensors}
    return {key: from_column(columns[key] if named else columns, tensor) for key, tensor in tensors.items()}


def fits(counts: Counts) -> bool:
    """Return whether rows for the model can have so many values, lists and objects.

    Raises as check_rows() where they tell how many rows there are.
    """
    rows, inputs = current_settings().queue_size, current_model().spec.inputs
    if any(tensor.dtype == "string" or MARKS & {*tensor.name} for tensor in inputs):
        return True  # texts may hold what is counted: the charge is all that limits them
    lists = sum(lists_in(tensor.shape) for tensor in inputs)
    beside = 1 + len(inputs)
    if any(None in tensor.shape for tensor in inputs):
        return any(None in tensor.shape[:-1] for tensor in inputs) or counts.lists <= rows * lists + beside
    # All texts are names, and none an encoded image, which is one value, or two with the comma of a data URI.
    named = counts.quotes == 2 * len(inputs) * counts.objects
    encoded = 0 if named else 2 * counts.objects
    values = sum(math.prod(length or 0 for length in tensor.shape) for tensor in inputs)
    least, most = max(counts.values - encoded, 0) // values, counts.values // values + 1  # rows
    if not least * lists <= counts.lists <= most * lists + beside:
        return False
    if named:
        check_rows(least)
    return least <= STRANGE * rows and counts.objects <= 1 + rows * (1 + len(inputs))


def from_column(column: Any, tensor: Tensor) -> np.ndarray:
    """Return the array of one input: of numbers or, where the model takes images, of encoded ones, too."""
    shape = shape_of(tensor)
    if not current_model().spec.image or type(column) is not list or not any(map(is_encoded, column)):
        return from_lists(column, shape, tensor)
    check_rows(len(column))  # before the work of decoding
    rows = []
    for number, row in enumerate(column):
        image = is_encoded(row)
        rows.append(from_image(from_text(row["b64"]), number) if image else from_lists([row], shape, tensor))
    return np.concatenate(rows)


def encode_v1(outputs: list[np.ndarray], by_row: bool) -> dict[str, Any]:
    """Return the answer; a lone output goes without its name."""
    columns = {
        tensor.name: to_lists(array) for tensor, array in zip(current_model().spec.outputs, outputs, strict=True)
    }
    if len(columns) == 1:
        return {"predictions" if by_row else "outputs": next(iter(columns.values()))}
    if by_row:
        return {"predictions": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}
    return {"outputs": columns}


ONE = "/v1/models/<segment:name>"
OTHERS = f"{ONE}/versions/<segment:version>", f"{ONE}/labels/<segment:label>"


@routes.post(f"{ONE}:predict")
@routes.post(f"{OTHERS[0]}:predict")
@routes.post(f"{OTHERS[1]}:predict")
def v1_predict(**_: str) -> Any:
    """Compute the rows of a request."""
    request, _tail = read_request(Request)
    return encode_v1(compute(decode_v1(request)), request.instances != ABSENT)


@routes.get("/v1/models")
def v1_models() -> Any:
    """Name the models."""
    return {"models": [*current_app().registry.names()]}


@routes.get(ONE)
@routes.get(OTHERS[0])
@routes.get(OTHERS[1])
def v1_status(**parts: str) -> Any:
    """Say that a model can be used, in TensorFlow Serving's words and in KServe's: all of its versions, or one."""
    check_ready()
    served = current_model()
    all_versions = [served] if len(parts) > 1 else current_app().registry.versions(served.spec.name)
    good = {"error_code": "OK", "error_message": ""}
    status = [{"version": each.version_name, "state": "AVAILABLE", "status": good} for each in all_versions]
    return {"name": served.spec.name, "ready": True, "model_version_status": status}


@routes.get(f"{ONE}/metadata")
@routes.get(f"{OTHERS[0]}/metadata")
@routes.get(f"{OTHERS[1]}/metadata")
def v1_metadata(**_: str) -> Any:
    """Describe the inputs and outputs as TensorFlow does."""
    served = current_model()
    signature: dict[str, Any] = {"method_name": "tensorflow/serving/predict", "inputs": {}, "outputs": {}}
    for key, tensors in ("inputs", served.spec.inputs), ("outputs", served.spec.outputs):
        for tensor in tensors:
            sizes = [{"size": str(length), "name": ""} for length in shape_of(tensor)]
            shape = {"dim": sizes, "unknown_rank": False}
            info = {"name": tensor.name, "dtype": DATATYPES[tensor.dtype][1], "tensor_shape": shape}
            signature[key][tensor.name] = info
    return {
        "model_spec": {"name": served.spec.name, "signature_name": "", "version": served.version_name},
        "metadata": {"signature_def": {"signature_def": {"serving_default": signature}}},
    }
