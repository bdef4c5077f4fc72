"""TensorFlow Serving's REST API and the Open Inference Protocol, in front of models of every kind."""

import base64
import gzip
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import FakeModel, encode, spec
from flask.testing import FlaskClient
from PIL import Image
from tiny_models import serve
from werkzeug.test import TestResponse

import run_keras_server as server
from keras_server import telemetry
from keras_server.api import tensors
from keras_server.models.batcher import ModelDied, Overdue, QueueFull
from keras_server.models.spec import Tensor

ROWS = {"age": [[30], [40.5]], "sizes": [[1, 2, 3], [4, 5, -6e-3]]}
JSON_LENGTH = "Inference-Header-Content-Length"


def predict_v1(client: FlaskClient, body: Any, version: str = "") -> TestResponse:
    """POST to TensorFlow Serving's path of the served model."""
    return client.post(f"/v1/models/{spec().name}{version}:predict", json=body)


def infer(client: FlaskClient, body: Any, tail: bytes | None = None, **headers: str) -> TestResponse:
    """POST to the Open Inference Protocol's path, with binary tensors after the JSON if there are any."""
    path = f"/v2/models/{spec().name}/infer"
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if tail is not None:
        headers = {JSON_LENGTH: str(len(data))} | headers
    return client.post(path, data=data + (tail or b""), headers=headers)


def tensor(name: str, values: Any, datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    """Return an input of the Open Inference Protocol."""
    return {"name": name, "shape": [*np.shape(values)], "datatype": datatype, "data": values} | more


def tabular_inputs() -> list[dict[str, Any]]:
    return [tensor(name, rows) for name, rows in ROWS.items()]


def refusal(response: TestResponse, status: int = 400) -> str:
    """Return the sentence of an error, which has the shape that these protocols' clients read."""
    assert response.status_code == status, response.data[:200]
    assert response.json
    assert [*response.json] == ["error"]
    return response.json["error"]


def parts(response: TestResponse) -> tuple[dict[str, Any], bytes]:
    """Return the JSON and the bytes of a binary answer."""
    assert response.status_code == 200, response.data[:200]
    assert response.content_type == "application/octet-stream"
    length = int(response.headers[JSON_LENGTH])
    return json.loads(response.data[:length]), response.data[length:]


@pytest.fixture
def tabular(monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    return serve(monkeypatch, "tabular")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    return serve(monkeypatch, "digits")


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    return serve(monkeypatch, "tokens")


@pytest.fixture
def digit() -> bytes:
    return encode(Image.linear_gradient("L").resize((28, 28)))


# TensorFlow Serving


def test_rows_and_columns_give_what_keras_gives(tabular: FlaskClient) -> None:
    price, risk = tiny_models.predict("tabular", ROWS["age"], ROWS["sizes"])
    rows = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
    found = predict_v1(tabular, {"signature_name": "serving_default", "instances": rows}, "/versions/1").json
    assert found
    assert np.allclose([row["price"] for row in found["predictions"]], price, atol=1e-5)
    assert np.allclose([row["risk"] for row in found["predictions"]], risk, atol=1e-5)
    found = predict_v1(tabular, {"inputs": ROWS}).json
    assert found
    assert {*found["outputs"]} == {"price", "risk"}
    assert np.allclose(found["outputs"]["risk"], risk, atol=1e-5)


def test_the_documented_curl_line(monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(monkeypatch, "half_plus_two")
    answer = client.post(  # as curl -d sends it
        "/v1/models/half_plus_two:predict",
        data='{"instances": [1.0, 2.0, 5.0]}',
        content_type="application/x-www-form-urlencoded",
    )
    assert answer.json == {"predictions": [2.5, 3.0, 4.5]}
    assert predict_v1(client, {"inputs": [1, 2]}).json == {"outputs": [2.5, 3.0]}
    assert predict_v1(client, {"inputs": {"x": [4]}}).json == {"outputs": [4]}
    assert predict_v1(client, {"instances": [{"x": 4}]}).json == {"predictions": [4]}


def test_status_metadata_and_list_of_tensorflow_serving(tabular: FlaskClient) -> None:
    assert tabular.get("/v1/models").json == {"models": ["tabular"]}
    for path in ("/v1/models/tabular", "/v1/models/tabular/versions/1"):
        status = tabular.get(path).json
        assert status
        assert status["name"] == "tabular"
        assert status["ready"] is True
        assert [(s["version"], s["state"]) for s in status["model_version_status"]] == [("1", "AVAILABLE")]
    metadata = tabular.get("/v1/models/tabular/metadata").json
    assert metadata
    signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["sizes"]["dtype"] == "DT_FLOAT"
    assert [d["size"] for d in signature["inputs"]["sizes"]["tensor_shape"]["dim"]] == ["-1", "3"]
    assert {*signature["outputs"]} == {"price", "risk"}


def test_encoded_images_stand_where_a_row_stands(digits: FlaskClient, digit: bytes, setting: Any) -> None:
    pixels = np.arange(784.0).reshape(28, 28, 1) % 255
    b64 = {"b64": base64.b64encode(digit).decode()}
    by_numbers, by_file = predict_v1(digits, {"instances": [pixels.tolist(), b64]}).get_json()["predictions"]
    assert np.allclose(by_numbers, tiny_models.predict("digits", [pixels])[0], atol=1e-5)
    upload = digits.post("/predict?top=10", data=digit, content_type="image/png").json
    assert upload
    assert np.allclose(sorted(by_file), sorted(row["probability"] for row in upload["predictions"]), atol=1e-6)
    for body in ({"instances": [{"digit": b64}]}, {"inputs": {"digit": [b64]}}, {"inputs": [b64]}):
        found = predict_v1(digits, body).json
        assert found
        (values,) = found.values()
        assert np.allclose(values, [by_file])
    assert "Image 1" in refusal(predict_v1(digits, {"instances": [b64, {"b64": "AAAA"}]}))
    assert "base64" in refusal(predict_v1(digits, {"instances": [{"b64": "!"}]}))
    assert "a list came" in refusal(predict_v1(digits, {"instances": [{"b64": []}]}))
    setting(queue_size=2)
    assert "3 rows: send 1 to 2" in refusal(predict_v1(digits, {"instances": 3 * [b64]}))


# Open Inference Protocol


def test_nested_flat_and_binary_tensors_are_alike(tabular: FlaskClient) -> None:
    price, risk = tiny_models.predict("tabular", ROWS["age"], ROWS["sizes"])
    nested = tabular_inputs()
    flat = [item | {"data": np.ravel(item["data"]).tolist()} for item in nested]
    binary, tail = [], b""
    for item in reversed(nested):  # any order will do
        memory = np.array(item["data"], "<f4").tobytes()
        binary.append(item | {"parameters": {"binary_data_size": len(memory)}})
        del binary[-1]["data"]
        tail += memory
    for inputs, end in ((nested, None), (flat, None), (binary, tail)):
        found = infer(tabular, {"id": "7", "inputs": inputs}, end).json
        assert found
        assert (found["id"], found["model_name"], found["model_version"]) == ("7", "tabular", "1")
        one, two = found["outputs"]
        assert (one["name"], one["datatype"], one["shape"]) == ("price", "FP32", [2, 1])
        assert np.allclose(one["data"], price.ravel(), atol=1e-5)
        assert np.allclose(two["data"], risk.ravel(), atol=1e-5)


def test_outputs_come_as_they_are_asked_for(tabular: FlaskClient) -> None:
    price, risk = tiny_models.predict("tabular", ROWS["age"], ROWS["sizes"])
    request: dict[str, Any] = {"inputs": tabular_inputs(), "outputs": [{"name": "risk"}]}
    found = infer(tabular, request).json
    assert found
    assert [output["name"] for output in found["outputs"]] == ["risk"]
    assert "id" not in found

    request = {"inputs": tabular_inputs(), "parameters": {"binary_data_output": True, "priority": 1}}
    head, tail = parts(infer(tabular, request))
    assert [output["parameters"]["binary_data_size"] for output in head["outputs"]] == [8, 16]
    assert np.allclose(np.frombuffer(tail[:8], "<f4"), price.ravel(), atol=1e-5)
    assert np.allclose(np.frombuffer(tail[8:], "<f4"), risk.ravel(), atol=1e-5)

    request["outputs"] = [{"name": "price", "parameters": {"binary_data": False}}, {"name": "risk"}]
    head, tail = parts(infer(tabular, request))
    assert np.allclose(head["outputs"][0]["data"], price.ravel(), atol=1e-5)
    assert len(tail) == 16


def test_classification_is_spelled_as_triton_spells_it(tabular: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    risk = tiny_models.predict("tabular", ROWS["age"], ROWS["sizes"])[1]
    wanted = {"name": "risk", "parameters": {"classification": 1}}
    found = infer(tabular, {"inputs": tabular_inputs(), "outputs": [wanted]}).json
    assert found
    (output,) = found["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, 1])
    assert output["data"] == [f"{row.max():f}:{row.argmax()}" for row in risk]

    labels = ("låg", "hög")
    monkeypatch.setattr(server.model, "spec", replace(spec(), labels=labels))
    wanted["parameters"] |= {"classification": 9, "binary_data": True}  # there are two
    head, tail = parts(infer(tabular, {"inputs": tabular_inputs(), "outputs": [wanted]}))
    assert head["outputs"][0]["shape"] == [2, 2]
    (size,) = struct.unpack_from("<I", tail)
    best = int(risk[0].argmax())
    assert tail[4 : 4 + size].decode() == f"{risk[0].max():f}:{best}:{labels[best]}"


def test_bytes_are_images_and_their_classes_those_of_predict(digits: FlaskClient, digit: bytes) -> None:
    upload = digits.post("/predict?top=2", data=digit, content_type="image/png").json
    assert upload
    expected = [f"{row['probability']:f}:{row['label']}" for row in upload["predictions"]]
    outputs = [{"name": spec().outputs[0].name, "parameters": {"classification": 2}}]
    text = base64.b64encode(digit).decode()
    for shape, data in (([2], [text, text]), ([2, 1], [[text], [text]])):
        item = {"name": "digit", "shape": shape, "datatype": "BYTES", "data": data}
        found = infer(digits, {"inputs": [item], "outputs": outputs}).json
        assert found
        assert found["outputs"][0]["data"] == 2 * expected
    memory = 3 * (struct.pack("<I", len(digit)) + digit)
    item = {"name": "digit", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(memory)}}
    found = infer(digits, {"inputs": [item], "outputs": outputs}, memory).json
    assert found
    assert found["outputs"][0]["data"] == 3 * expected

    short = item | {"parameters": {"binary_data_size": len(memory) - 1}}
    assert "breaks off" in refusal(infer(digits, {"inputs": [short]}, memory[:-1]))
    assert "has shape [2], and 3 images came" in refusal(infer(digits, {"inputs": [item | {"shape": [2]}]}, memory))
    assert "has shape [0], and 0 images came" in refusal(
        infer(digits, {"inputs": [item | {"shape": [0], "parameters": {}, "data": []}]})
    )


def test_logits_are_classified_by_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(monkeypatch, "logits")
    monkeypatch.setattr(server.model, "spec", replace(spec(), activation="softmax"))
    picture = np.linspace(0, 1, 192).reshape(1, 8, 8, 3)
    name = spec().outputs[0].name
    outputs = [{"name": name, "parameters": {"classification": 5}}]
    found = infer(client, {"inputs": [tensor("image", picture.tolist())], "outputs": outputs}).json
    assert found
    shares = [float(text.split(":")[0]) for text in found["outputs"][0]["data"]]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert shares == sorted(shares, reverse=True)
    plain = infer(client, {"inputs": [tensor("image", picture.tolist())]}).json
    assert plain  # a tensor is what the model answers
    assert np.allclose(plain["outputs"][0]["data"], tiny_models.predict("logits", picture)[0], atol=1e-4)


def test_metadata_of_the_open_inference_protocol(tokens: FlaskClient) -> None:
    for path in ("/v2/models/tokens", "/v2/models/tokens/versions/1"):
        metadata = tokens.get(path).json
        assert metadata
        assert metadata["inputs"] == [{"name": "tokens", "datatype": "INT32", "shape": [-1, -1]}]
        assert metadata["outputs"][0]["shape"] == [-1, 1]
        assert metadata["versions"] == ["1"]
    assert tokens.get("/v2").json == tokens.get("/v2/").json
    found = tokens.get("/v2").json
    assert found
    assert {"binary_tensor_data", "classification"} <= {*found["extensions"]}


def test_readiness_is_that_of_the_server(tabular: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = (
        "/v2/health/ready",
        "/v2/models/tabular/ready",
        "/v2/models/tabular/versions/1/ready",
        "/v1/models/tabular",
    )
    for path in paths:
        found = tabular.get(path).json
        assert found
        assert found["ready"] is True
    assert tabular.get("/v2/health/live").json == {"live": True}
    server.app.draining.set()
    try:
        for path in paths:
            refusal(tabular.get(path), 503)
    finally:
        server.app.draining.clear()
    assert tabular.get("/v2/health/live").status_code == 200
    monkeypatch.setattr(server, "model", None)
    refusal(tabular.get("/v2/health/ready"), 503)
    assert tabular.get("/v2/health/live").json == {"live": True}
    refusal(tabular.post("/v2/models/tabular/infer", json={"inputs": []}), 503)


# Models of every kind


def test_any_number_of_tokens(tokens: FlaskClient) -> None:
    for rows in ([[1, 2, 3]], [[5], [99]], [[7.0, 8]]):
        found = predict_v1(tokens, {"instances": rows}).json
        assert found
        assert np.allclose(found["predictions"], tiny_models.predict("tokens", rows)[0], atol=1e-5)
    assert infer(tokens, {"inputs": [tensor("tokens", [[1, 2], [3, 4]], "INT32")]}).status_code == 200
    assert predict_v1(tokens, {"instances": [[2_000_000_000, -5]]}).status_code == 200  # no such token, and no crash


def test_the_old_format_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve(monkeypatch, "h5")
    picture = np.zeros((1, 28, 28, 1))
    found = infer(client, {"inputs": [tensor("digit", picture.tolist())]}).json
    assert found
    assert found["model_name"] == "h5"
    assert np.allclose(found["outputs"][0]["data"], tiny_models.predict("h5", picture)[0], atol=1e-5)


@pytest.mark.parametrize("engine", ["openvino", "keras"])
def test_each_type_keeps_its_values(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    client = serve(monkeypatch, "mixed", engine)
    given = {"flag": [[True, False]], "byte": [[255, 0]], "long": [[-7, 1000]], "half": [[0.5, 0.25]]}
    found = predict_v1(client, {"instances": [{name: rows[0] for name, rows in given.items()}]}).json
    assert found
    assert found["predictions"] == [{"flag_again": [True, False], "sum": [249.5, 1000.25]}]
    datatypes = {"flag": ("BOOL", "?"), "byte": ("UINT8", "u1"), "long": ("INT64", "<i8"), "half": ("FP16", "<f2")}
    inputs, tail = [], b""
    for name, (datatype, dtype) in datatypes.items():
        memory = np.array(given[name], dtype).tobytes()
        tail += memory
        inputs.append(
            {"name": name, "shape": [1, 2], "datatype": datatype, "parameters": {"binary_data_size": len(memory)}}
        )
    head, end = parts(infer(client, {"inputs": inputs, "parameters": {"binary_data_output": True}}, tail))
    assert [output["datatype"] for output in head["outputs"]] == ["BOOL", "FP32"]
    assert end[:2] == b"\1\0"
    assert np.frombuffer(end[2:], "<f4").tolist() == [249.5, 1000.25]
    assert "bytes other than 0 and 1" in refusal(infer(client, {"inputs": inputs}, b"\2" + tail[1:]))


@pytest.mark.parametrize("engine", ["openvino", "keras"])
def test_many_inputs_and_outputs_keep_their_order(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    client = serve(monkeypatch, "many", engine)
    found = predict_v1(client, {"inputs": {f"input{n}": [[10.0**n]] for n in range(12)}}).json
    assert found
    values = [rows[0][0] for rows in found["outputs"].values()]
    assert np.allclose(values, [(n + 1) * 10.0**n for n in range(12)])


def test_a_model_that_only_predicts_is_enough(client: FlaskClient, model: FakeModel, dog: bytes) -> None:
    memory = struct.pack("<I", len(dog)) + dog
    item = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(memory)}}
    wanted = {"name": spec().outputs[0].name, "parameters": {"classification": 1}}
    found = infer(client, {"inputs": [item], "outputs": [wanted]}, memory).json
    assert found
    assert found["outputs"][0]["data"] == ["0.900000:235:German_shepherd"]
    assert model.batches[0].shape == (1, 224, 224, 3)


# What is refused


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "either 'instances'"),
        ({"instances": [], "inputs": {}}, "either 'instances'"),
        ({"instances": {}}, "'instances' has to be a list, and an object came"),
        ({"instances": [[1, 2]]}, "A row for tabular has to be an object, and a list came"),
        ({"instances": []}, "lists of shape [0] came"),
        ({"instances": [{"age": [1]}]}, "The input sizes is missing: the model tabular takes age, sizes."),
        ({"instances": [{"age": [1], "sizes": [1, 2, 3], "hat": 1}]}, 'no input "hat"'),
        ({"instances": [{"age": 1, "sizes": [1, 2, 3]}]}, "FP32 of shape [-1, 1], and lists of shape [1] came"),
        ({"instances": [{"age": [[1]], "sizes": [1, 2, 3]}]}, "[-1, 1], and lists of shape [1, 1, 1] came"),
        ({"instances": [{"age": [1], "sizes": [1, 2]}]}, "[-1, 3], and lists of shape [1, 2] came"),
        ({"instances": [{"age": ["1"], "sizes": [1, 2, 3]}]}, "text came"),
        ({"instances": [{"age": [None], "sizes": [1, 2, 3]}]}, "null came"),
        ({"instances": [{"age": [True], "sizes": [1, 2, 3]}]}, "true or false came"),
        ({"instances": [{"age": [{"b64": "AA=="}], "sizes": [1, 2, 3]}]}, "an object came"),
        ({"instances": [{"age": [1e39], "sizes": [1, 2, 3]}]}, "too large"),
        ({"instances": [{"age": [10**400], "sizes": [1, 2, 3]}]}, "too large"),
        ({"inputs": 5}, "'inputs' has to be an object, and 5 came"),
        ({"inputs": [[1]]}, "'inputs' has to be an object, and a list came"),
        ({"inputs": {"age": [[1], [2]], "sizes": [[1, 2, 3]]}}, "equally many rows: 1, 2 came"),
        ({"inputs": {"age": [[1], [2, 3]], "sizes": [[1, 2, 3]]}}, "lists of different lengths came"),
        ({"inputs": {"age": 1, "sizes": [[1, 2, 3]]}}, "1 came"),
        ({"signature_name": "classify", "inputs": {}}, "serving_default"),
        ([1], "The body has to be an object, and a list came"),
    ],
)
def test_requests_of_v1_that_do_not_fit(tabular: FlaskClient, body: Any, sentence: str) -> None:
    assert sentence in refusal(predict_v1(tabular, body))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "hat"}, 'There is no input "hat": the model tabular takes age, sizes.'),
        ({"name": 1}, "The name of each of 'inputs' has to be text, and 1 came"),
        ({"name": "sizes"}, "age is missing"),
        ({"datatype": "FP64"}, 'FP32 of shape [-1, 1], and "FP64" of shape [2, 1] came'),
        ({"datatype": "BYTES"}, "FP32 of shape [-1, 1]"),
        ({"datatype": None}, "null of shape"),
        ({"shape": [2, 2]}, 'and "FP32" of shape [2, 2] came'),
        ({"shape": [2]}, "of shape [2] came"),
        ({"shape": [0, 1]}, "of shape [0, 1] came"),
        ({"shape": "2, 1"}, "'shape' has to be a list, and text came"),
        ({"shape": [2.5, 1]}, "has to be a natural number, and 2.5 came"),
        ({"shape": [-1, 1]}, "has to be a natural number, and -1 came"),
        ({"shape": [True, 1]}, "has to be a natural number, and true or false came"),
        ({"shape": [10**30, 1]}, "Each of 'shape' has to be less than 2^63, and 1000000000"),
        ({"shape": [3, 1]}, "lists of shape [2, 1] came"),
        ({"data": [[1], [2], [3]]}, "lists of shape [3, 1] came"),
        ({"data": [1, 2, 3]}, "lists of shape [3] came"),
        ({"data": [[1], 2]}, "lists of different lengths came"),
        ({"data": []}, "lists of shape [0] came"),
        ({"data": None}, "null came"),
        ({"data": ["a", "b"]}, "text came"),
        ({"parameters": []}, "'parameters' has to be an object"),
        ({"parameters": {"binary_data_size": 8}}, "has 8 bytes, and 0 follow"),
        ({"parameters": {"binary_data_size": -1}}, "natural number"),
    ],
)
def test_inputs_of_v2_that_do_not_fit(tabular: FlaskClient, change: dict[str, Any], sentence: str) -> None:
    age, sizes = tabular_inputs()
    assert sentence in refusal(infer(tabular, {"inputs": [age | change, sizes]}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"inputs": {}}, "'inputs' has to be a list"),
        ({"inputs": []}, "age is missing"),
        ({"inputs": [1]}, "Each of 'inputs' has to be an object, and 1 came"),
        ({"inputs": 2 * [tensor("age", [[1]]), tensor("sizes", [[1, 2, 3]])]}, "twice"),
        ({"inputs": [*tabular_inputs(), tensor("hat", [[1]])]}, 'no input "hat": the model tabular takes age, sizes'),
        ({"outputs": [{"name": "hat"}]}, 'no output "hat": tabular has price, risk'),
        ({"outputs": [{}]}, "Each of 'outputs' has to be an object with a name."),
        ({"outputs": [{"name": "risk", "parameters": {"classification": -1}}]}, "natural number"),
        ({"outputs": [{"name": "risk", "parameters": {"binary_data": 1}}]}, "'binary_data' has to be true or false"),
        ({"parameters": {"binary_data_output": "yes"}}, "'binary_data_output' has to be true or false"),
        ({"id": 7}, "'id' has to be text, and 7 came"),
    ],
)
def test_requests_of_v2_that_do_not_fit(tabular: FlaskClient, change: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(infer(tabular, {"inputs": tabular_inputs()} | change))


def test_binary_tensors_that_do_not_fit(tabular: FlaskClient) -> None:
    inputs = [{"name": n, "shape": [*np.shape(v)], "datatype": "FP32"} for n, v in ROWS.items()]
    for item, size in zip(inputs, (8, 24), strict=True):
        item["parameters"] = {"binary_data_size": size}
    body = {"inputs": inputs}
    assert infer(tabular, body, bytes(32)).status_code == 200
    assert "1 bytes are left" in refusal(infer(tabular, body, bytes(33)))
    assert "has 24 bytes, and 23 follow" in refusal(infer(tabular, body, bytes(31)))
    inputs[0]["parameters"] = {"binary_data_size": 7}
    assert "shape [2, 1] has 8 bytes, of which 7 came" in refusal(infer(tabular, body, bytes(31)))
    for length in ("-1", "x", "1e3", "٣", "99999", "9" * 5000, "0" * 5000):
        assert JSON_LENGTH in refusal(infer(tabular, body, bytes(32), **{JSON_LENGTH: length}))


def test_binary_nan_comes_back_and_is_null_in_json(tabular: FlaskClient) -> None:
    memory = struct.pack("<4f", float("nan"), 1, 2, 3)
    inputs = [{"name": "age", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}]
    inputs += [{"name": "sizes", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}]
    outputs = [{"name": "price"}]
    answer = infer(tabular, {"inputs": inputs, "outputs": outputs}, memory)
    assert json.loads(answer.data, parse_constant=pytest.fail)["outputs"][0]["data"] == [None]
    outputs[0]["parameters"] = {"binary_data": True}  # type: ignore[assignment]
    assert np.isnan(np.frombuffer(parts(infer(tabular, {"inputs": inputs, "outputs": outputs}, memory))[1], "<f4"))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is not JSON"),
        (b"\xff\xfe\xfd", "The body is not JSON"),
        (b'{"inputs": [', "The body is not JSON"),
        (b'{"inputs": NaN}', "it has no NaN"),
        (b'{"inputs": [-Infinity]}', "it has no -Infinity"),
        (b'{"inputs": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"inputs": ' + b"[" * 100 + b"]" * 100 + b"}", "Each of 'inputs' has to be an object"),
        (b'{"inputs": ' + b"1" * 5000 + b"}", "'inputs' has to be a list, and 1111111111"),
        (b'{"inputs": [{"name": "age", "shape": [1, 1], "datatype": "FP32", "data": [1e999]},'
         b'{"name": "sizes", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}', "too large"),
        (b'{"inputs": [{"name": "\\ud800"}]}', "The body is not JSON"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_sound_json(tabular: FlaskClient, body: bytes, sentence: str) -> None:
    assert "is missing" in (found := refusal(infer(tabular, body))) or sentence in found
    refusal(tabular.post("/v1/models/tabular:predict", data=body))


@pytest.mark.parametrize(
    ("dtype", "values", "sentence"),
    [
        ("uint8", [256], "too large"),
        ("uint8", [-1], "too large"),
        ("int64", [2**63], "too large"),
        ("int32", [1.5], "and 1.5 came"),
        ("int32", [float("inf")], "and inf came"),
        ("float16", [65520], "too large"),
        ("float64", [10**309], "too large"),
        ("bool", [1], "and 1 came"),
    ],
)
def test_numbers_outside_their_type(dtype: str, values: list[Any], sentence: str) -> None:
    with pytest.raises(tensors.TensorError, match=sentence):
        tensors.from_values(values, Tensor("x", (), dtype))


def test_the_largest_numbers_of_each_type() -> None:
    for dtype in tensors.DATATYPES.keys() - {"bool", "string", "bfloat16"}:  # the last is taken as float32
        limits = np.finfo(dtype) if dtype.startswith("float") else np.iinfo(dtype)
        values = [limits.min.item(), limits.max.item()] if dtype.startswith("float") else [limits.min, limits.max]
        assert tensors.from_values(values, Tensor("x", (), dtype)).tolist() == values


def test_unknown_models_and_versions(tabular: FlaskClient) -> None:
    for path in ("/v1/models/hat", "/v1/models/hat/metadata", "/v2/models/hat", "/v2/models/hat/ready"):
        assert 'no model "hat": this server has "tabular"' in refusal(tabular.get(path), 404)
    for path in ("/v1/models/tabular/versions/2", "/v2/models/tabular/versions/x/ready"):
        assert "it has version 1" in refusal(tabular.get(path), 404)
    refusal(tabular.post("/v1/models/hat:predict", json={}), 404)
    refusal(tabular.post("/v2/models/tabular/versions/2/infer", json={}), 404)
    refusal(tabular.get("/v2/nothing"), 404)
    refusal(tabular.get("/v1/models/tabular:predict"), 405)
    refusal(tabular.get("/v2/models/tabular/infer"), 405)


def test_pictures_are_refused_by_models_of_numbers(tabular: FlaskClient, dog: bytes) -> None:
    answer = tabular.post("/predict", data=dog, content_type="image/jpeg")
    assert answer.status_code == 400
    assert answer.json
    assert "/v2/models/tabular/infer" in answer.json["error"]


# Limits, which are those of images


def test_bodies_may_be_compressed(tabular: FlaskClient) -> None:
    body = json.dumps({"inputs": tabular_inputs()}).encode()
    for coding, data in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
        assert infer(tabular, data, **{"Content-Encoding": coding}).status_code == 200
    packed = gzip.compress(body)
    assert "gzip" in refusal(infer(tabular, body, **{"Content-Encoding": "gzip"}))
    assert "breaks off" in refusal(infer(tabular, packed[:-9], **{"Content-Encoding": "gzip"}))
    assert "Something follows" in refusal(infer(tabular, packed + b"junk", **{"Content-Encoding": "gzip"}))
    assert "cannot unpack" in refusal(infer(tabular, body, **{"Content-Encoding": "br"}), 415)


def test_sizes_are_limited_also_once_unpacked(tabular: FlaskClient, setting: Callable[..., None]) -> None:
    setting(max_upload_mb=0.01)
    bomb = gzip.compress(bytes(10_000_000))
    assert len(bomb) < 10_486
    refusal(infer(tabular, bomb, **{"Content-Encoding": "gzip"}), 413)
    refusal(infer(tabular, bytes(20_000)), 413)


def test_rows_are_limited(tabular: FlaskClient, setting: Callable[..., None]) -> None:
    setting(queue_size=1)
    assert "2 rows: send 1 to 1" in refusal(infer(tabular, {"inputs": tabular_inputs()}))
    assert "2 rows: send 1 to 1" in refusal(predict_v1(tabular, {"inputs": ROWS}))


@pytest.mark.parametrize(("error", "status"), [(QueueFull(), 503), (Overdue(), 504), (ModelDied(), 500)])
def test_what_happens_to_images_happens_to_tensors(
    tabular: FlaskClient, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def compute(_: Any) -> Any:
        raise error

    monkeypatch.setattr(server.model, "compute", compute)
    refusal(infer(tabular, {"inputs": tabular_inputs()}), status)
    refusal(predict_v1(tabular, {"inputs": ROWS}), status)


def test_keys_are_asked_for(tabular: FlaskClient, setting: Callable[..., None]) -> None:
    setting(api_key=("secret",))
    body = {"inputs": tabular_inputs()}
    refusal(infer(tabular, body), 401)
    refusal(tabular.get("/v1/models"), 401)
    assert infer(tabular, body, Authorization="Bearer secret").status_code == 200


def test_rows_are_counted(tabular: FlaskClient) -> None:
    before = telemetry.IMAGES.labels("tabular", "1")._value.get()
    infer(tabular, {"inputs": tabular_inputs()})
    assert telemetry.IMAGES.labels("tabular", "1")._value.get() == before + 2
