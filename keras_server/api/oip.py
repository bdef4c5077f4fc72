"""The Open Inference Protocol, which KServe calls V2, with Triton's binary tensors and classification.

Taken from github.com/kserve/open-inference-protocol and, for the extensions, from docs/protocol of
github.com/triton-inference-server/server.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flask
import numpy as np

from keras_server import __version__
from keras_server.api.context import current_model
from keras_server.api.inference import (
    JSON_LENGTH,
    Arrays,
    check_names,
    check_rows,
    compute,
    from_image,
    protocol,
    read_request,
)
from keras_server.api.pages import check_ready
from keras_server.api.tensors import (
    DATATYPES,
    TensorError,
    check_header,
    from_base64,
    from_lists,
    from_memory,
    join_elements,
    shape_of,
    short,
    split_elements,
    to_lists,
    typed,
    whole,
)
from keras_server.models.spec import Tensor, probabilities

routes = protocol("oip")


class RequestedOutput(NamedTuple):
    """An output that a request asks for."""

    number: int
    classes: int  # to be named of each row; 0 for the tensor itself
    binary: bool


def parameters_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output."""
    parameters: dict[str, Any] = typed(item.get("parameters", {}), dict, "'parameters'")
    return parameters


def by_name(request: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Return a request's inputs or outputs, in their order."""
    items: dict[str, dict[str, Any]] = {}
    for item in typed(request.get(key, []), list, f"'{key}'"):
        name = typed(typed(item, dict, f"Each of '{key}'").get("name"), str, f"The name of each of '{key}'")
        items[name] = item
    return items


def decode_v2(request: dict[str, Any], binary: memoryview) -> Arrays:
    """Return the arrays in a request; `binary` is what follows its JSON."""
    arrays: Arrays = {}
    items = by_name(request, "inputs")
    check_names(items)
    if len(items) < len(request["inputs"]):
        raise TensorError("An input came twice.")
    tensors = {tensor.name: tensor for tensor in current_model().spec.inputs}
    for name, item in items.items():
        data, size = item.get("data"), parameters_of(item).get("binary_data_size")
        if size is not None:
            size = whole(size, "'binary_data_size'")
            if size > len(binary):
                raise TensorError(f"The input {name} has {size} bytes, and {len(binary)} follow: see {JSON_LENGTH}.")
            data, binary = binary[:size], binary[size:]
        arrays[name] = from_input(item, data, tensors[name])
    if binary:
        raise TensorError(f"{len(binary)} bytes are left after the last tensor: see 'binary_data_size'.")
    return arrays


def from_input(item: dict[str, Any], data: Any, tensor: Tensor) -> np.ndarray:
    """Return the array of one input, whose data are lists or bytes."""
    shape = [whole(length, "Each of 'shape'") for length in typed(item.get("shape"), list, "'shape'")]
    datatype = item.get("datatype")
    if datatype == "BYTES" and current_model().spec.image:
        if type(data) is memoryview:
            files = [*split_elements(data)]
        else:  # JSON has no bytes, so they come in base64
            rows = typed(data, list, "'data'")
            files = [from_base64(row[0] if type(row) is list and len(row) == 1 else row) for row in rows]
        if not files or shape not in ([len(files)], [len(files), 1]):
            raise TensorError(f"The input {tensor.name} has shape {short(shape)}, and {len(files)} images came.")
        check_rows(len(files))
        return np.concatenate([from_image(file, number) for number, file in enumerate(files)])
    check_header(shape, datatype, tensor)
    if type(data) is memoryview:
        return from_memory(data, shape, tensor)
    flat = type(data) is list and data and type(data[0]) is not list
    return from_lists(data, [math.prod(shape)] if flat else shape, tensor).reshape(shape)


def requested_outputs(request: dict[str, Any]) -> list[RequestedOutput]:
    """Return the outputs that a request asks for; without a word about them, all."""
    numbers = {tensor.name: number for number, tensor in enumerate(current_model().spec.outputs)}
    binary = typed(parameters_of(request).get("binary_data_output", False), bool, "'binary_data_output'")
    requested = []
    for name, item in (by_name(request, "outputs") or {name: {} for name in numbers}).items():
        if name not in numbers:
            raise TensorError(
                f"There is no output {short(name)}: {current_model().spec.name} has {', '.join(numbers)}."
            )
        parameters = parameters_of(item)
        classes = whole(parameters.get("classification", 0), "'classification'")
        in_binary = typed(parameters.get("binary_data", binary), bool, "'binary_data'")
        requested.append(RequestedOutput(numbers[name], classes, in_binary))
    return requested


def classify(output: np.ndarray, requested: RequestedOutput) -> np.ndarray:
    """Return the highest values of each row as Triton spells them, "value:index:label", or without a label."""
    values = output.reshape(len(output), -1)
    spec = current_model().spec
    if spec.kind == "classes" and requested.number == spec.output:
        values = probabilities(values, spec)
    labels = [f":{label}" for label in spec.labels]
    labels = labels if len(labels) == values.shape[1] else [""] * values.shape[1]
    order = np.argsort(-values.astype(float), axis=1, kind="stable")[:, : requested.classes]
    spelled = [[f"{row[i]:f}:{i}{labels[i]}" for i in best] for row, best in zip(values, order, strict=True)]
    return np.array(spelled, object)


def encode_v2(request: dict[str, Any], requested: list[RequestedOutput], outputs: list[np.ndarray]) -> Any:
    """Return the answer: JSON, and after it the tensors that were asked for in binary."""
    items: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for one in requested:
        tensor, array = current_model().spec.outputs[one.number], outputs[one.number]
        item: dict[str, Any] = {"name": tensor.name, "datatype": DATATYPES[tensor.dtype][0]}
        if one.classes:
            array, item["datatype"] = classify(array, one), "BYTES"
        item["shape"] = [*array.shape]
        if one.binary:
            tail.append(join_elements(array) if one.classes else array.tobytes())
            item["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            item["data"] = to_lists(array.reshape(-1))
        items.append(item)
    request_id = {"id": request["id"]} if "id" in request else {}
    answer = {"model_name": current_model().spec.name, "model_version": "1", **request_id, "outputs": items}
    if not tail:
        return answer
    head = flask.json.dumps(answer).encode()
    return flask.Response([head, *tail], headers={JSON_LENGTH: str(len(head))}, content_type="application/octet-stream")


@routes.post("/v2/models/<segment:name>/infer")
@routes.post("/v2/models/<segment:name>/versions/<segment:version>/infer")
def v2_infer(**_: str) -> Any:
    """Compute the tensors of a request."""
    request, binary = read_request()
    typed(request.get("id", ""), str, "'id'")
    requested = requested_outputs(request)
    return encode_v2(request, requested, compute(decode_v2(request, binary)))


@routes.get("/v2", strict_slashes=False)
def v2_server() -> Any:
    """Describe the server."""
    extensions = ["classification", "binary_tensor_data"]
    return {"name": "keras-rest-server", "version": __version__, "extensions": extensions}


@routes.get("/v2/models/<segment:name>/ready")
@routes.get("/v2/models/<segment:name>/versions/<segment:version>/ready")
def v2_model_ready(**_: str) -> Any:
    """Readiness of the model, which is that of the server."""
    check_ready()
    return {"name": current_model().spec.name, "ready": True}


@routes.get("/v2/models/<segment:name>")
@routes.get("/v2/models/<segment:name>/versions/<segment:version>")
def v2_metadata(**_: str) -> Any:
    """Describe the inputs and outputs."""

    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "datatype": DATATYPES[tensor.dtype][0], "shape": shape_of(tensor)}

    spec = current_model().spec
    tensors = {"inputs": [*map(described, spec.inputs)], "outputs": [*map(described, spec.outputs)]}
    return {"name": spec.name, "versions": ["1"], "platform": "keras"} | tensors
