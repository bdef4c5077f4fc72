"""Tensors over HTTP, for clients that exist already: TensorFlow Serving's REST API and the Open Inference Protocol.

    curl -d '{"instances": [[5.1, 3.5, 1.4, 0.2]]}' http://localhost:5000/v1/models/iris:predict

Each protocol has a function that decodes a request into one array for each input of the model, and one that encodes
the outputs. In between, whatever the protocol, the rows join the queue in which images wait.

The protocols were taken from "RESTful API" of TensorFlow Serving (tensorflow.org/tfx/serving/api_rest), "Data Plane
(V1)" of KServe, the Open Inference Protocol (github.com/kserve/open-inference-protocol), and Triton's binary tensor
data and classification extensions (github.com/triton-inference-server/server, docs/protocol).
"""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import flask
import numpy as np
from werkzeug.routing import BaseConverter

from keras_server import __version__
from keras_server import ticket as account
from keras_server.api.tensors import (
    DATATYPES,
    TensorError,
    check_header,
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

Arrays = dict[str, np.ndarray]  # by the name of the input

JSON_LENGTH = "Inference-Header-Content-Length"  # the header that says where JSON ends and binary tensors begin

server: Any = None  # the module run_keras_server, under whatever name it runs
routes = flask.Blueprint("protocols", __name__)


def blueprint(module: Any) -> flask.Blueprint:
    """Return the routes of both protocols, for the app of the module run_keras_server."""
    global server
    server = module
    return routes


class Segment(BaseConverter):
    """A part of a path without a colon, so that ":predict" is part of no name."""

    regex = "[^/:]+"


routes.record_once(lambda state: state.app.url_map.converters.update(segment=Segment))


@routes.before_request
def find_model() -> Any:
    """Answer 404 for a model or version that is not served."""
    given, name = flask.request.view_args or {}, server.spec.name
    if given.get("name", name) != name:
        return {"error": f"There is no model {short(given['name'])}: this server has {short(name)}."}, 404
    if given.get("version", "1") != "1":
        return {"error": f"There is no version {short(given['version'])} of {name}: it has version 1."}, 404
    return None


@routes.errorhandler(TensorError)
def refuse(error: TensorError) -> Any:
    """Answer what the model cannot take."""
    return {"error": str(error)}, error.status


# ----------------------------------------------------------------------------------------------------------
# What both protocols do
# ----------------------------------------------------------------------------------------------------------


def read_request() -> tuple[dict[str, Any], memoryview]:
    """Return the JSON object in the request's body, and the bytes that follow it."""

    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"it has no {name}")

    if server.model is None:
        raise TensorError("The model is not loaded yet: try again in a moment.", 503)
    body = read_body()
    length = flask.request.headers.get(JSON_LENGTH, str(len(body)))
    if not re.fullmatch("[0-9]{1,12}", length) or int(length) > len(body):
        raise TensorError(f"{JSON_LENGTH} is the size of the JSON, of {len(body)} bytes in all: {short(length)} came.")
    end = int(length)
    try:
        with server.decoder():  # few at a time, for lists take many times the memory of their text
            found = json.loads(body[:end], parse_constant=refuse_constant)
    except RecursionError:
        raise TensorError("The JSON is nested too deeply.") from None
    except ValueError as error:
        raise TensorError(f"The body is not JSON: {error}.") from None
    return typed(found, dict, "The body"), memoryview(body)[end:]


def read_body() -> bytes:
    """Return the request's body, unpacked where it is compressed, and never larger than the server takes."""
    request = flask.request
    if (size := request.content_length) is None or size > server.body_limit():
        data = request.get_data(cache=False)
    else:  # in one piece, where werkzeug would copy it piece by piece
        data = request.environ["wsgi.input"].read(size)
    coding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if coding == "identity":
        return data
    if coding not in ("gzip", "deflate"):
        raise TensorError(f"The server cannot unpack {short(coding)}: take gzip, deflate or none.", 415)
    unpacker = zlib.decompressobj(wbits=47)  # tells gzip and deflate apart itself
    try:
        data = unpacker.decompress(data, server.body_limit() + 1)
    except zlib.error:
        raise TensorError(f"The body is not {coding}, although its Content-Encoding says so.") from None
    if len(data) > server.body_limit():
        raise TensorError(f"Unpacked, the body is larger than {server.settings.max_upload_mb:g} MiB.", 413)
    if not unpacker.eof or unpacker.unused_data:
        raise TensorError(f"The body is not one whole stream of {coding}.")
    return data


def check_names(given: Iterable[str]) -> None:
    """Raise TensorError unless the names are those of the model's inputs."""
    names, given = [tensor.name for tensor in server.spec.inputs], [*given]
    for name in names:
        if name not in given:
            raise TensorError(f"The input {name} is missing: {server.spec.name} takes {', '.join(names)}.")
    for name in given:
        if name not in names:
            raise TensorError(f"There is no input {short(name)}: {server.spec.name} takes {', '.join(names)}.")


def check_rows(count: int) -> None:
    """Raise TensorError for more rows than may wait."""
    if count > server.settings.queue_size:
        raise TensorError(f"There are {count} rows: send 1 to {server.settings.queue_size} at once.")


def from_image(file: bytes, number: int) -> np.ndarray:
    """Return the row of one encoded image, the request's `number`th, prepared as /predict prepares it."""
    try:
        return server.decode(file)
    except server.ImageError as error:
        raise TensorError(f"Image {number}: {error}") from None


def from_base64(text: Any) -> bytes:
    """Return the bytes that a text of JSON stands for."""
    try:
        return base64.b64decode("".join(typed(text, str, "An encoded image").split()), validate=True)
    except ValueError as error:
        raise error if isinstance(error, TensorError) else TensorError("An encoded image is not in base64.") from None


def compute(arrays: Arrays) -> list[np.ndarray]:
    """Return the model's outputs for an array for each of its inputs."""
    rows = {len(array) for array in arrays.values()}
    if len(rows) > 1:
        raise TensorError(f"The inputs have to have equally many rows: {', '.join(map(str, sorted(rows)))} came.")
    check_rows(*rows)
    if ticket := account.TICKET.get():
        (ticket.images,) = rows
    inputs, model = [arrays[tensor.name] for tensor in server.spec.inputs], server.model
    outputs = model.compute(inputs) if hasattr(model, "compute") else [model.predict(inputs[0])]
    account.IMAGES.inc(*rows)
    return outputs


# ----------------------------------------------------------------------------------------------------------
# TensorFlow Serving's REST API, which KServe calls V1
# ----------------------------------------------------------------------------------------------------------


def is_encoded(row: Any) -> bool:
    """Return whether a row of JSON is TensorFlow Serving's object for binary data."""
    return type(row) is dict and row.keys() == {"b64"}


def decode_v1(request: dict[str, Any]) -> Arrays:
    """Return the arrays in a request of rows ("instances") or of a column for each input ("inputs")."""
    tensors, name = {tensor.name: tensor for tensor in server.spec.inputs}, server.spec.name
    if request.get("signature_name", "") not in ("", "serving_default"):
        raise TensorError(f"There is no signature {short(request['signature_name'])}: {name} has serving_default.")
    if ("instances" in request) == ("inputs" in request):
        raise TensorError("Send either 'instances', a list of rows, or 'inputs', a list of values for each input.")
    if "inputs" in request:
        columns = request["inputs"]
        named = type(columns) is dict or len(tensors) > 1
        check_names(typed(columns, dict, "'inputs'") if named else tensors)
    else:
        columns = rows = typed(request["instances"], list, "'instances'")
        named = len(tensors) > 1 or any(type(row) is dict and not is_encoded(row) for row in rows)
        if named:
            for row in rows:
                check_names(typed(row, dict, f"A row for {name}"))
            columns = {key: [row[key] for row in rows] for key in tensors}
    return {key: from_column(columns[key] if named else columns, tensor) for key, tensor in tensors.items()}


def from_column(column: Any, tensor: Any) -> np.ndarray:
    """Return the array of one input: of numbers or, where the model takes images, of encoded ones, too."""
    shape = shape_of(tensor)
    if not server.spec.image or type(column) is not list or not any(map(is_encoded, column)):
        return from_lists(column, shape, tensor)
    check_rows(len(column))  # before the work of decoding
    rows = []
    for number, row in enumerate(column):
        image = is_encoded(row)
        rows.append(from_image(from_base64(row["b64"]), number) if image else from_lists([row], shape, tensor))
    return np.concatenate(rows)


def encode_v1(outputs: list[np.ndarray], by_row: bool) -> dict[str, Any]:
    """Return the answer; a lone output goes without its name."""
    columns = {tensor.name: to_lists(array) for tensor, array in zip(server.spec.outputs, outputs, strict=True)}
    if len(columns) == 1:
        return {"predictions" if by_row else "outputs": next(iter(columns.values()))}
    if by_row:
        return {"predictions": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]}
    return {"outputs": columns}


@routes.post("/v1/models/<segment:name>:predict")
@routes.post("/v1/models/<segment:name>/versions/<segment:version>:predict")
def v1_predict(**_: str) -> Any:
    """Compute the rows of a request."""
    request, _tail = read_request()
    return encode_v1(compute(decode_v1(request)), "instances" in request)


@routes.get("/v1/models")
def v1_models() -> Any:
    """Name the models: there is one."""
    return {"models": [server.spec.name]}


@routes.get("/v1/models/<segment:name>")
@routes.get("/v1/models/<segment:name>/versions/<segment:version>")
def v1_status(**_: str) -> Any:
    """Say that the model can be used, in TensorFlow Serving's words and in KServe's."""
    server.readyz()
    status = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    return {"name": server.spec.name, "ready": True, "model_version_status": [status]}


@routes.get("/v1/models/<segment:name>/metadata")
@routes.get("/v1/models/<segment:name>/versions/<segment:version>/metadata")
def v1_metadata(**_: str) -> Any:
    """Describe the inputs and outputs as TensorFlow does."""
    spec = server.spec
    signature: dict[str, Any] = {"method_name": "tensorflow/serving/predict", "inputs": {}, "outputs": {}}
    for key, tensors in ("inputs", spec.inputs), ("outputs", spec.outputs):
        for tensor in tensors:
            sizes = [{"size": str(length), "name": ""} for length in shape_of(tensor)]
            shape = {"dim": sizes, "unknown_rank": False}
            found = {"name": tensor.name, "dtype": DATATYPES[tensor.dtype][1], "tensor_shape": shape}
            signature[key][tensor.name] = found
    return {
        "model_spec": {"name": spec.name, "signature_name": "", "version": "1"},
        "metadata": {"signature_def": {"signature_def": {"serving_default": signature}}},
    }


# ----------------------------------------------------------------------------------------------------------
# The Open Inference Protocol, which KServe calls V2
# ----------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """An output that a request asks for."""

    number: int
    classes: int  # to be named of each row; 0 for the tensor itself
    binary: bool


def parameters_of(item: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output."""
    return typed(item.get("parameters", {}), dict, "'parameters'")


def by_name(request: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Return a request's inputs or outputs, in their order."""
    found: dict[str, dict[str, Any]] = {}
    for item in typed(request.get(key, []), list, f"'{key}'"):
        name = typed(typed(item, dict, f"Each of '{key}'").get("name"), str, f"The name of each of '{key}'")
        found[name] = item
    return found


def decode_v2(request: dict[str, Any], binary: memoryview) -> Arrays:
    """Return the arrays in a request; `binary` is what follows its JSON."""
    arrays: Arrays = {}
    items = by_name(request, "inputs")
    check_names(items)
    if len(items) < len(request["inputs"]):
        raise TensorError("An input came twice.")
    tensors = {tensor.name: tensor for tensor in server.spec.inputs}
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


def from_input(item: dict[str, Any], data: Any, tensor: Any) -> np.ndarray:
    """Return the array of one input, whose data are lists or bytes."""
    shape = [whole(length, "Each of 'shape'") for length in typed(item.get("shape"), list, "'shape'")]
    datatype = item.get("datatype")
    if datatype == "BYTES" and server.spec.image:
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


def wanted_outputs(request: dict[str, Any]) -> list[Wanted]:
    """Return the outputs that a request asks for; without a word about them, all."""
    numbers = {tensor.name: number for number, tensor in enumerate(server.spec.outputs)}
    binary = typed(parameters_of(request).get("binary_data_output", False), bool, "'binary_data_output'")
    found = []
    for name, item in (by_name(request, "outputs") or {name: {} for name in numbers}).items():
        if name not in numbers:
            raise TensorError(f"There is no output {short(name)}: {server.spec.name} has {', '.join(numbers)}.")
        parameters = parameters_of(item)
        classes = whole(parameters.get("classification", 0), "'classification'")
        in_binary = typed(parameters.get("binary_data", binary), bool, "'binary_data'")
        found.append(Wanted(numbers[name], classes, in_binary))
    return found


def classify(output: np.ndarray, wanted: Wanted) -> np.ndarray:
    """Return the highest values of each row as Triton spells them, "value:index:label", or without a label."""
    values = output.reshape(len(output), -1)
    if server.spec.image and wanted.number == 0:
        values = server.probabilities(values)
    labels = [f":{label}" for label in server.spec.labels]
    labels = labels if len(labels) == values.shape[1] else [""] * values.shape[1]
    order = np.argsort(-values.astype(float), axis=1, kind="stable")[:, : wanted.classes]
    spelled = [[f"{row[i]:f}:{i}{labels[i]}" for i in best] for row, best in zip(values, order, strict=True)]
    return np.array(spelled, object)


def encode_v2(request: dict[str, Any], wanted: list[Wanted], outputs: list[np.ndarray]) -> Any:
    """Return the answer: JSON, and after it the tensors that were asked for in binary."""
    found, tail = [], []
    for want in wanted:
        tensor, array = server.spec.outputs[want.number], outputs[want.number]
        item = {"name": tensor.name, "datatype": DATATYPES[tensor.dtype][0]}
        if want.classes:
            array, item["datatype"] = classify(array, want), "BYTES"
        item["shape"] = [*array.shape]
        if want.binary:
            tail.append(join_elements(array) if want.classes else array.tobytes())
            item["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            item["data"] = to_lists(array.reshape(-1))
        found.append(item)
    given = {"id": request["id"]} if "id" in request else {}
    answer = {"model_name": server.spec.name, "model_version": "1", **given, "outputs": found}
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
    wanted = wanted_outputs(request)
    return encode_v2(request, wanted, compute(decode_v2(request, binary)))


@routes.get("/v2", strict_slashes=False)
def v2_server() -> Any:
    """Describe the server."""
    extensions = ["classification", "binary_tensor_data"]
    return {"name": "keras-rest-server", "version": __version__, "extensions": extensions}


@routes.get("/v2/health/live")
def v2_live() -> Any:
    """Liveness: the process answers."""
    return {"live": True}


@routes.get("/v2/health/ready")
def v2_ready() -> Any:
    """Readiness: a request would be taken."""
    server.readyz()
    return {"ready": True}


@routes.get("/v2/models/<segment:name>/ready")
@routes.get("/v2/models/<segment:name>/versions/<segment:version>/ready")
def v2_model_ready(**_: str) -> Any:
    """Readiness of the model, which is that of the server."""
    return {"name": server.spec.name} | v2_ready()


@routes.get("/v2/models/<segment:name>")
@routes.get("/v2/models/<segment:name>/versions/<segment:version>")
def v2_metadata(**_: str) -> Any:
    """Describe the inputs and outputs."""

    def described(tensor: Any) -> dict[str, Any]:
        return {"name": tensor.name, "datatype": DATATYPES[tensor.dtype][0], "shape": shape_of(tensor)}

    spec = server.spec
    tensors = {"inputs": [*map(described, spec.inputs)], "outputs": [*map(described, spec.outputs)]}
    return {"name": spec.name, "versions": ["1"], "platform": "keras"} | tensors
