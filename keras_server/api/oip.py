"""The Open Inference Protocol, which KServe calls V2, with Triton's binary tensors and classification.

Taken from github.com/kserve/open-inference-protocol and, for the extensions, from docs/protocol of
github.com/triton-inference-server/server.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, NamedTuple

import flask
import msgspec
import numpy as np

from keras_server import __version__
from keras_server.api.context import charge, current_app, current_model, current_settings
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
from keras_server.api.parsing import (
    ABSENT,
    SMALL,
    Counts,
    count,
    is_list,
    kind_of,
    read_large,
    read_object,
    read_small,
    reading,
)
from keras_server.api.tensors import (
    DATATYPES,
    JSON_TYPES,
    TensorError,
    check_header,
    from_lists,
    from_memory,
    join_elements,
    lists_in,
    mismatch,
    shape_of,
    short,
    split_elements,
    to_lists,
    typed,
    whole,
)
from keras_server.api.uploads import from_text
from keras_server.models.spec import Tensor, probabilities

routes = protocol("oip")
ITEMS = 16  # inputs or outputs that a request may name beside those of the model
ITEM = 240  # bytes that one takes
NESTED = 4  # objects that one has, with its parameters


class RequestedOutput(NamedTuple):
    """An output that a request asks for."""

    number: int
    classes: int  # to be named of each row; 0 for the tensor itself
    binary: bool


class Parameters(msgspec.Struct):
    """What is read of the parameters of a request, an input or an output."""

    binary_data_size: Any = None
    binary_data_output: Any = False
    binary_data: Any = None
    classification: Any = 0


class Item(msgspec.Struct):
    """What is read of an input, or of an output that is asked for."""

    name: msgspec.Raw
    shape: msgspec.Raw = ABSENT
    datatype: msgspec.Raw = ABSENT
    parameters: msgspec.Raw = ABSENT
    data: msgspec.Raw = ABSENT


class Request(msgspec.Struct):
    """What is read of a request."""

    id: msgspec.Raw = ABSENT
    parameters: msgspec.Raw = ABSENT
    inputs: msgspec.Raw = ABSENT
    outputs: msgspec.Raw = ABSENT


def parameters_of(item: Request | Item) -> Parameters:
    """Return the parameters of a request, an input or an output."""
    if item.parameters == ABSENT:
        return Parameters()
    read_small(item.parameters, {}, "'parameters'")
    return read_object(bytes(item.parameters), Parameters, "'parameters'")


def by_name(raw: msgspec.Raw, key: str) -> dict[str, Item]:
    """Return a request's inputs or outputs, in their order. Raises TensorError for an input that comes twice."""
    items: dict[str, Item] = {}
    repeated = False
    for item in read_items(raw, key):
        name = typed(read_small(item.name, None, "A name"), str, f"The name of each of '{key}'")
        repeated = repeated or name in items
        items[name] = item
    if repeated and key == "inputs":
        check_names(items)  # which may be more to the point
        raise TensorError("An input came twice.")
    return items


def read_items(raw: msgspec.Raw, key: str) -> list[Item]:
    """Return a request's inputs or outputs. Raises TensorError where it is no list of objects, or longer than any."""
    if raw == ABSENT:
        return []
    if not is_list(raw):
        raise TensorError(f"'{key}' has to be a list, and {kind_of(raw)} came.")
    spec = current_model().spec
    text, most = memoryview(raw), ITEMS + len(spec.inputs) + len(spec.outputs)
    too_many = TensorError(f"'{key}' has more than {most} objects: send only those that the model has.")
    if len(text) > SMALL:
        objects = count(text).objects
        if key == "inputs" and any(tensor.dtype == "string" for tensor in spec.inputs):
            charge(ITEM * objects)  # or texts that look like one
        elif objects > NESTED * most:
            raise too_many
    try:
        with reading(text):
            items = msgspec.json.decode(text, type=list[Item])
    except msgspec.ValidationError:
        for each in msgspec.json.decode(text, type=list[msgspec.Raw]) if len(text) <= SMALL else ():
            if kind_of(each) != JSON_TYPES[dict]:
                raise TensorError(f"Each of '{key}' has to be an object, and {kind_of(each)} came.") from None
        raise TensorError(f"Each of '{key}' has to be an object with a name.") from None
    if len(items) > most:
        raise too_many
    return items


def decode_v2(request: Request, binary: memoryview) -> Arrays:
    """Return the arrays in a request; `binary` is what follows its JSON."""
    arrays: Arrays = {}
    items = by_name(request.inputs, "inputs")
    check_names(items)
    tensors = {tensor.name: tensor for tensor in current_model().spec.inputs}
    for name, item in items.items():
        memory, size = None, parameters_of(item).binary_data_size
        if size is not None:
            size = whole(size, "'binary_data_size'")
            if size > len(binary):
                raise TensorError(f"The input {name} has {size} bytes, and {len(binary)} follow: see {JSON_LENGTH}.")
            memory, binary = binary[:size], binary[size:]
        arrays[name] = from_input(item, memory, tensors[name])
    if binary:
        raise TensorError(f"{len(binary)} bytes are left after the last tensor: see 'binary_data_size'.")
    return arrays


def from_input(item: Item, memory: memoryview | None, tensor: Tensor) -> np.ndarray:
    """Return the array of one input, whose data are lists or memory."""
    shape = [
        whole(length, "Each of 'shape'") for length in typed(read_small(item.shape, None, "'shape'"), list, "'shape'")
    ]
    datatype = read_small(item.datatype, None, "'datatype'")
    if datatype == "BYTES" and current_model().spec.image:
        if memory is not None:
            files = [*split_elements(memory)]
        else:  # JSON has no bytes, so they come in base64; a data URI has a comma
            most = current_settings().queue_size
            rows = typed(
                read_large(item.data, lambda counts: counts.values <= 2 * most and counts.lists <= most + 1, "'data'"),
                list,
                "'data'",
            )
            files = [from_text(row[0] if type(row) is list and len(row) == 1 else row) for row in rows]
        if not files or shape not in ([len(files)], [len(files), 1]):
            raise TensorError(f"The input {tensor.name} has shape {short(shape)}, and {len(files)} images came.")
        check_rows(len(files))
        return np.concatenate([from_image(file, number) for number, file in enumerate(files)])
    check_header(shape, datatype, tensor)
    check_rows(shape[0])  # before the work of reading them
    size = math.prod(shape)
    if memory is not None:
        return from_memory(memory, shape, tensor)
    if item.data == ABSENT:
        raise mismatch(tensor, "null came")
    nested = (1, lists_in(shape))

    def fits(counts: Counts) -> bool:
        return tensor.dtype == "string" or (counts.values == size and counts.lists in nested and not counts.objects)

    data = read_large(item.data, fits, "'data'")
    flat = type(data) is list and data and type(data[0]) is not list
    return from_lists(data, [size] if flat else shape, tensor).reshape(shape)


def requested_outputs(request: Request) -> list[RequestedOutput]:
    """Return the outputs that a request asks for; without a word about them, all."""
    numbers = {tensor.name: number for number, tensor in enumerate(current_model().spec.outputs)}
    binary = typed(parameters_of(request).binary_data_output, bool, "'binary_data_output'")
    requested = []
    for name, item in (by_name(request.outputs, "outputs") or {name: Item(ABSENT) for name in numbers}).items():
        if name not in numbers:
            raise TensorError(
                f"There is no output {short(name)}: {current_model().spec.name} has {', '.join(numbers)}."
            )
        parameters = parameters_of(item)
        classes = whole(parameters.classification, "'classification'")
        in_binary = binary if parameters.binary_data is None else typed(parameters.binary_data, bool, "'binary_data'")
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


def encode_v2(request_id: str | None, requested: list[RequestedOutput], outputs: list[np.ndarray]) -> Any:
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
    named = {} if request_id is None else {"id": request_id}
    served = current_model()
    answer = {"model_name": served.spec.name, "model_version": served.version_name, **named, "outputs": items}
    if not tail:
        return answer
    head = flask.json.dumps(answer).encode()
    return flask.Response([head, *tail], headers={JSON_LENGTH: str(len(head))}, content_type="application/octet-stream")


@routes.post("/v2/models/<segment:name>/infer")
@routes.post("/v2/models/<segment:name>/versions/<segment:version>/infer")
def v2_infer(**_: str) -> Any:
    """Compute the tensors of a request."""
    request, binary = read_request(Request)
    request_id = None if request.id == ABSENT else typed(read_small(request.id, "", "'id'"), str, "'id'")
    requested = requested_outputs(request)
    return encode_v2(request_id, requested, compute(decode_v2(request, binary)))


@routes.get("/v2", strict_slashes=False)
def v2_server() -> Any:
    """Describe the server."""
    extensions = ["classification", "binary_tensor_data", "model_repository"]
    return {"name": "keras-rest-server", "version": __version__, "extensions": extensions}


@routes.get("/v2/models/<segment:name>/ready")
@routes.get("/v2/models/<segment:name>/versions/<segment:version>/ready")
def v2_model_ready(**_: str) -> Any:
    """Readiness of the model."""
    check_ready()
    return {"name": current_model().spec.name, "ready": True}


@routes.get("/v2/models/<segment:name>")
@routes.get("/v2/models/<segment:name>/versions/<segment:version>")
def v2_metadata(**_: str) -> Any:
    """Describe the inputs and outputs, and how far the precision agrees with float32."""

    def described(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "datatype": DATATYPES[tensor.dtype][0], "shape": shape_of(tensor)}

    spec = current_model().spec
    versions = [served.version_name for served in reversed(current_app().registry.versions(spec.name))]
    tensors = {"inputs": [*map(described, spec.inputs)], "outputs": [*map(described, spec.outputs)]}
    tested = {"parameters": asdict(spec.tested)} if spec.tested else {}
    return {"name": spec.name, "versions": versions, "platform": "keras"} | tensors | tested
