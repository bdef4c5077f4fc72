"""JSON of strangers: what nobody reads costs nothing, and what is read is counted before it is made."""

import gzip
import json
import tracemalloc

import msgspec
import numpy as np
import pytest
import tiny_models
from flask.testing import FlaskClient

import run_keras_server as server
from keras_server.api import parsing
from keras_server.api.parsing import Counts, read_small
from keras_server.api.tensors import TensorError


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


def test_a_small_field_has_65536_bytes_and_no_more() -> None:
    text = json.dumps("x" * 65_534).encode()  # with its two quotes
    assert read_small(msgspec.Raw(text), None, "'id'") == "x" * 65_534
    with pytest.raises(TensorError, match="'id' is longer than 65,536 bytes"):
        read_small(msgspec.Raw(b" " + text), None, "'id'")
