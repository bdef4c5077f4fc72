"""JSON of strangers: what nobody reads costs nothing, and what is read is counted before it is made."""

import gzip
import json
import tracemalloc
from base64 import b64encode
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import tiny_models
from conftest import encode
from flask.testing import FlaskClient
from PIL import Image

import run_keras_server as server
from keras_server.api import parsing
from keras_server.api.parsing import Counts, read_small
from keras_server.api.tensors import TensorError
from keras_server.models.registry import PredictorEngine
from keras_server.models.served import Served
from keras_server.models.spec import Spec, Tensor


@pytest.fixture
def tabular(monkeypatch: pytest.MonkeyPatch) -> FlaskClient:
    return tiny_models.serve(monkeypatch, "tabular")


ROW = '{"instances": [{"age": [30], "sizes": [1, 2, 3]}]'


def peak_of(client: FlaskClient, path: str, body: bytes, **headers: str) -> tuple[int, int, str]:
    """Return the status, the most bytes that Python's objects took meanwhile, and the sentence."""
    tracemalloc.start()
    try:
        answer = client.post(path, data=body, headers=headers, content_type="application/json")
        return answer.status_code, tracemalloc.get_traced_memory()[1], (answer.json or {}).get("error", "")
    finally:
        tracemalloc.stop()


def test_each_mark_is_counted_and_charged() -> None:
    text = b'{"a": [1, 2, [3, "x, y"]], "b": {}}'
    counts = Counts.of(memoryview(text))
    assert counts == (1 + 5, 2, 2, 6)
    assert counts.memory == 40 * 6 + 88 * 2 + 240 * 2 + 32 * 6


@pytest.mark.parametrize("fill", ['{"":{}},', "[],", '"",', "0.5,"])
def test_what_nobody_reads_becomes_no_object(tabular: FlaskClient, fill: str) -> None:
    text = (ROW + ', "x": [' + fill * (2**22 // len(fill)) + "0]}").encode()
    packed = gzip.compress(text)
    headers = {"Content-Encoding": "gzip"}
    status, peak, _ = peak_of(tabular, "/v1/models/tabular:predict", packed, **headers)
    assert status == 200
    assert peak < 4 * len(text)


@pytest.mark.parametrize("fill", ["{},", "[],", "0,", '"",', "[[1]],"])
@pytest.mark.parametrize(
    ("path", "start", "end"),
    [
        ("/v1/models/tabular:predict", '{"instances": [', "0]}"),
        ("/v1/models/tabular:predict", '{"inputs": {"sizes": [[1, 2, 3]], "age": [', "0]}}"),
        ("/v2/models/tabular/infer", '{"inputs": [{"name": "age", "datatype": "FP32", "shape": [1, 1], "data": [',
         '0]}, {"name": "sizes", "datatype": "FP32", "shape": [1, 3], "data": [[1, 2, 3]]}]}'),
        ("/v2/models/tabular/infer", '{"inputs": [', "0]}"),
        ("/v2/models/tabular/infer", '{"outputs": [{"name": "price"}], "parameters": {"x": [', "0]}}"),
        ("/v2/models/tabular/infer", '{"inputs": [{"name": "age", "shape": [', "0]}]}"),
    ],
)  # fmt: skip
def test_counts_are_compared_before_anything_is_listed(
    tabular: FlaskClient, path: str, start: str, end: str, fill: str
) -> None:
    text = (start + fill * (2**22 // len(fill)) + end).encode()
    status, peak, sentence = peak_of(tabular, path, text)
    assert status == 400
    assert sentence
    assert peak < 4 * len(text)


@pytest.mark.parametrize("fill", ["{},", "[],", "0,", '"",'])
def test_counts_of_images_are_compared_before_anything_is_listed(client: FlaskClient, fill: str) -> None:
    for start, end in ('{"images": [', "0]}"), ('{"image": [', "0]}"):
        text = (start + fill * (2**22 // len(fill)) + end).encode()
        status, peak, sentence = peak_of(client, "/predict", text)
        assert status == 400
        assert sentence
        assert peak < 4 * len(text)


def test_more_inputs_than_any_model_has_are_not_listed(tabular: FlaskClient) -> None:
    text = b'{"inputs": [' + b'{"name":""},' * (2**22 // 12) + b"0]}"
    status, peak, sentence = peak_of(tabular, "/v2/models/tabular/infer", text)
    assert (status, sentence) == (400, "'inputs' has more than 20 objects: send only those that the model has.")
    assert peak < 4 * len(text)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The texts of JSON that became objects."""
    texts: list[bytes] = []
    read = parsing.read
    monkeypatch.setattr(parsing, "read", lambda text: (texts.append(bytes(text)), read(text))[1])
    return texts


def rows_of(count: int) -> list[dict[str, list[float]]]:
    return [{"age": [n], "sizes": [n, 2, 3]} for n in range(count)]


def columns_of(count: int) -> list[dict[str, object]]:
    age = {"name": "age", "datatype": "FP32", "shape": [count, 1], "data": [*range(count)]}
    return [age, {"name": "sizes", "datatype": "FP32", "shape": [count, 3], "data": [*range(3 * count)]}]


@pytest.mark.parametrize("fill", ["{},", "[],", "0,", '"",', "[1],"])
def test_texts_of_some_kilobytes_are_counted_and_shorter_ones_made(
    tabular: FlaskClient, made: list[bytes], fill: str
) -> None:
    for size in 4096, 4097:
        text = "[" + fill * ((size - 3) // len(fill)) + "0]"
        made.clear()
        answer = tabular.post("/v1/models/tabular:predict", data=f'{{"instances": {text.ljust(size - 1)}}}')
        assert answer.status_code == 400
        padded = text[:-1].ljust(size - 1) + "]"
        assert tabular.post("/v1/models/tabular:predict", data=f'{{"instances": {padded}}}').status_code == 400
        assert [len(each) for each in made if len(each) == size] == ([size] if size == 4096 else [])


@pytest.mark.parametrize("count", [128, 129, 2000])
def test_rows_that_find_no_place_become_no_objects(
    tabular: FlaskClient, made: list[bytes], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """More than queue_size, or just now."""
    for path, body in (
        ("/v1/models/tabular:predict", {"instances": rows_of(count)}),
        ("/v2/models/tabular/infer", {"inputs": columns_of(count)}),
    ):
        for waiting in 0, 1:
            monkeypatch.setattr(server.app.current_model().batcher, "waiting", waiting)
            made.clear()
            answer = tabular.post(path, json=body)
            expected = 400 if count > 128 else 503 if waiting else 200
            assert answer.status_code == expected, answer.text
            assert max(map(len, made), default=0) < (100 if expected != 200 else 1e9)
            if expected == 400:
                assert answer.json["error"] == f"There are {count} rows: send 1 to 128 at once."


class Sums:
    """Answers with the sum of each row, over all inputs."""

    def predict(self, *inputs: np.ndarray) -> np.ndarray:
        return sum(array.reshape(len(array), -1).sum(axis=1, keepdims=True, dtype=np.float64) for array in inputs)


def sums(monkeypatch: pytest.MonkeyPatch, **shapes: tuple[int | None, ...]) -> FlaskClient:
    """Serve a model of inputs of these names and shapes that answers with sums."""
    inputs = tuple(Tensor(name, shape, "float32") for name, shape in shapes.items())
    spec = Spec("sums", inputs, (Tensor("sum", (1,), "float32"),), preprocess="none", kind="none")
    monkeypatch.setattr(server, "model", Served(spec, PredictorEngine(Sums())))
    return server.app.test_client()


def answers(client: FlaskClient, **body: object) -> list[float]:
    answer = client.post("/v1/models/sums:predict", json=body)
    assert answer.status_code == 200, answer.text
    return [row[0] for row in answer.json.get("predictions", answer.json.get("outputs"))]


@pytest.mark.parametrize("names", [("a[x]", "b{y}"), ("age, years", "size[cm]"), ('a "q"', "b\\"), ("a", "b")])
def test_names_may_hold_the_marks_that_are_counted(
    monkeypatch: pytest.MonkeyPatch, made: list[bytes], names: tuple[str, str]
) -> None:
    client = sums(monkeypatch, **{names[0]: (1,), names[1]: (2,)})
    rows = [{names[0]: [n], names[1]: [n + 0.125, 1000.25]} for n in range(128)]
    expected = [2 * n + 1000.375 for n in range(128)]
    assert answers(client, instances=rows) == expected
    columns = {name: [row[name] for row in rows] for name in names}
    assert answers(client, inputs=columns) == expected
    assert min(map(len, made)) > 2000


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 3), (2, 2, 1), (4, 4, 3)])
@pytest.mark.parametrize("count", [30, 64, 128])
def test_pictures_in_base64_or_as_data_uris_are_counted_as_such(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, channels: int, count: int
) -> None:
    """Also beside rows of numbers."""
    client = sums(monkeypatch, image=(height, width, channels))
    png = encode(Image.new("RGB" if channels == 3 else "L", (width, height), "white"))
    base64 = b64encode(png).decode()
    white, zeros = 255.0 * height * width * channels, np.zeros((height, width, channels)).tolist()
    for text in base64, f"data:image/png;base64,{base64}":
        for picture in {"b64": text}, {"image": {"b64": text}}:
            assert answers(client, instances=[picture] * count) == pytest.approx([white] * count, rel=0.01)
        assert answers(client, inputs=[{"b64": text}] * count) == pytest.approx([white] * count, rel=0.01)
        mixed = answers(client, instances=[{"b64": text}, zeros] * (count // 2))
        assert mixed == pytest.approx([white, 0] * (count // 2), rel=0.01)


def test_what_is_wrong_with_some_kilobytes_is_said_as_of_less(monkeypatch: pytest.MonkeyPatch) -> None:
    client = sums(monkeypatch, x=())
    for rows, sentence in (
        ([{"x": n, "id": f"row, number {n}"} for n in range(100)], 'There is no input "id": the model sums takes x.'),
        ([f"number {n:20}" for n in range(128)], "The input x takes FP32 of shape [-1], and text came."),
        ([1.000000000000001] * 2000, "There are 2000 rows: send 1 to 128 at once."),
        ([{"x": 1.000000000000001}] * 2000, "There are 2000 rows: send 1 to 128 at once."),
    ):  # fmt: skip
        answer = client.post("/v1/models/sums:predict", json={"instances": rows})
        assert (answer.status_code, answer.json["error"]) == (400, sentence)


def test_rows_of_free_length_are_counted_by_their_lists(monkeypatch: pytest.MonkeyPatch, made: list[bytes]) -> None:
    client = sums(monkeypatch, tokens=(None,))
    long = [[n, *[0.5] * 99] for n in range(128)]
    assert answers(client, instances=long) == [n + 49.5 for n in range(128)]
    assert answers(client, inputs={"tokens": long}) == [n + 49.5 for n in range(128)]
    made.clear()
    answer = client.post("/v1/models/sums:predict", json={"instances": [[1]] * 15_000})
    assert "15,000 values in 15,001 lists" in answer.json["error"]
    assert answer.json["error"].endswith("does not fit the shapes that the model takes in at most 128 rows.")
    assert made == []
    client = sums(monkeypatch, pairs=(None, 2))  # whose rows have any number of lists
    assert answers(client, instances=[[[1, 2]] * 2000]) == [6000]


@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_names_that_are_spelled_otherwise_are_counted(tabular: FlaskClient, made: list[bytes], key: str) -> None:
    body = b'{"inputs": %b}' % json.dumps(columns_of(1)).encode().replace(b'"name"', b'"\\u006eame"')
    assert tabular.post("/v2/models/tabular/infer", data=body).status_code == 200
    for count, sentence in (20, "no"), (21, "more than 20 objects: send only"), (20_000, "more than 20 objects: send"):
        items = b",".join([b'{"\\u006eame": "%d"}' % number for number in range(count)])
        answer = tabular.post("/v2/models/tabular/infer", data=b'{"%b": [%b]}' % (key.encode(), items))
        assert (answer.status_code, sentence in answer.json["error"]) == (400, True), answer.json
    nested = b'{"name": "price", "parameters": {"a": {}, "b": {}}}'
    body = b'{"inputs": %b, "outputs": [%b]}' % (json.dumps(columns_of(1)).encode(), b", ".join([nested] * 20))
    assert tabular.post("/v2/models/tabular/infer", data=body).status_code == 200


def test_texts_may_hold_what_looks_like_objects_and_are_charged_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    charged = list[int]()
    monkeypatch.setattr("keras_server.api.oip.charge", charged.append)
    client = sums(monkeypatch, text=())
    texts = (Tensor("text", (), "string"),)
    monkeypatch.setattr(server.model, "spec", replace(server.model.spec, inputs=texts))
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["{name}" * 1000]}]}
    client.post("/v2/models/sums/infer", json=body)
    assert charged == [240 * 1001]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"instances": [NaN]}', "it has no NaN"),
        ('\ufeff{"instances": [Infinity]}', "it has no Infinity"),
        ('{"x": "Infinity", "instances": [1, -Infinity', "it has no -Infinity"),
        ('{"x": "NaN", "instances": [1, nan]}', "invalid character"),
        ('{"x": NaN', "it has no NaN"),
        ('{"x": [Infinity "NaN"', "it has no Infinity"),
        ('{"x": "-Infinity NaN", "y": ["' + "-" * 100_000 + '"}', "expected ',' or ']'"),
    ],
)
def test_a_constant_that_json_has_not_is_named_where_it_stands(tabular: FlaskClient, text: str, what: str) -> None:
    answer = tabular.post("/v1/models/tabular:predict", data=text.encode())
    assert answer.status_code == 400
    assert f"The body is not JSON: {what}" in answer.json["error"]


def test_many_rows_that_fit_are_computed(tabular: FlaskClient) -> None:
    """More text than is made objects of uncounted."""
    rows = [{"age": [n + 1e-9], "sizes": [n / 3e9, *[1.000000000000001e-300] * 2]} for n in range(128)]
    text = json.dumps({"instances": rows}, indent=120).encode()
    assert len(text) > 65_536
    answer = tabular.post("/v1/models/tabular:predict", data=text).json
    assert answer
    price, _ = tiny_models.predict("tabular", [row["age"] for row in rows], [row["sizes"] for row in rows])
    assert np.allclose([row["price"] for row in answer["predictions"]], price, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("digits", [19, 400, 4299, 4300, 4301, 100_000])
def test_numbers_of_any_length_are_answered(tabular: FlaskClient, digits: int) -> None:
    number = b"9" * digits
    v2 = b'{"inputs": [{"name": "age", "datatype": "FP32", "shape": [%b], "data": [%b]}]}'
    for path, body in (
        ("/v2/models/tabular/infer", v2 % (number + b", 1", b"1")),
        ("/v2/models/tabular/infer", v2 % (b"1, 1", number)),
        ("/v2/models/tabular/infer", b'{"id": %b}' % number),
        ("/v1/models/tabular:predict", ROW.replace("30", number.decode()).encode() + b"}"),
        ("/v1/models/tabular:predict", b'{"instances": %b}' % number),
        ("/predict", b'{"image": %b}' % number),
    ):
        answer = tabular.post(path, data=body, content_type="application/json")
        assert answer.status_code in (200, 400), (path, answer.json)
        assert len(answer.data) < 1000


def test_deep_nesting_is_answered(tabular: FlaskClient) -> None:
    for depth in (500, 5000, 1_000_000):
        for text in (b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            for path in ("/v1/models/tabular:predict", "/v2/models/tabular/infer"):
                for field in (b"inputs", b"x", b"instances", b"id"):
                    answer = tabular.post(path, data=b'{"%b": %b}' % (field, text))
                    assert answer.status_code == 400, answer.json


def test_deep_nesting_of_images_is_answered(client: FlaskClient) -> None:
    for text in (b"[" * 1_000_000, b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000):
        for field in (b"image", b"images", b"x"):
            answer = client.post("/predict", data=b'{"%b": %b}' % (field, text), content_type="application/json")
            assert answer.status_code == 400, answer.json


def test_json_with_a_byte_order_mark_is_read(tabular: FlaskClient) -> None:
    assert tabular.post("/v1/models/tabular:predict", data=b"\xef\xbb\xbf" + ROW.encode() + b"}").status_code == 200


def test_a_small_field_has_4096_bytes_and_no_more() -> None:
    text = json.dumps("x" * 4094).encode()  # with its two quotes
    assert read_small(msgspec.Raw(text), None, "'id'") == "x" * 4094
    with pytest.raises(TensorError, match="'id' is longer than 4,096 bytes"):
        read_small(msgspec.Raw(b" " + text), None, "'id'")
