"""What strangers could make the server spend: work that ends, memory that is bounded, small requests first."""

import gzip
import io
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny_models
from bombs import NOISE, WORK, inserted, scans, segment, strips, webp
from conftest import encode, serve_with
from fakes import wait_until
from flask.testing import FlaskClient
from PIL import Image

import run_keras_server as server
from keras_server import machine
from keras_server.api import context
from keras_server.api.budget import LIGHT_BYTES, MIB, Budget, Memory, Turns
from keras_server.api.tensors import TensorError
from keras_server.images import ImageError, Picture, open_image
from keras_server.models.batcher import Overdue, QueueFull
from keras_server.pictures import limits
from keras_server.pictures.work import Work
from keras_server.ticket import TICKET, Ticket

# Work that a picture asks for


@pytest.mark.parametrize("name", WORK)
def test_work_without_end_is_refused_before_anything_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    data, sentence = WORK[name]
    with pytest.raises(ImageError, match=sentence):
        Picture(data, 50)


def test_what_is_just_inside_the_limits_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess="none")
    jpeg = encode(NOISE, "JPEG", quality=100, subsampling=0)
    expected = np.asarray(Image.open(io.BytesIO(jpeg)), np.float32)
    many = inserted(jpeg, 2, segment(0xE3, b""), limits.PARTS - 20)
    filled = inserted(jpeg, 2, b"\xff", 900)
    for data in (jpeg, many, filled):
        assert np.array_equal(server.prepare_image(open_image(data, 50), (64, 64))[0], expected)
    assert open_image(scans(2000, limits.SCANS - 1), 50).size == (2000, 2000)
    assert server.prepare_image(open_image(strips(2000), 50), (64, 64)).max() == 0


def test_what_pillow_need_not_see_of_a_jpeg_it_does_not_see() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(NOISE, "JPEG", exif=exif, icc_profile=b"p" * 200, comment=b"c" * 5000)
    data = inserted(data, 2, segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 5000), 3)
    picture = Picture(data, 50)
    assert picture.jpeg
    assert b"8BIM" not in picture.jpeg.lean
    assert b"cccc" not in picture.jpeg.lean
    assert picture.opened
    assert picture.opened.info["icc_profile"] == b"p" * 200
    assert picture.opened.getexif()[0x0112] == 6


def test_a_webp_is_opened_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes memory for the whole picture as soon as it opens one; of each kind the size is known before."""
    image = Image.new("RGB", (5000, 321))
    kinds = [
        encode(image, "WEBP"),
        encode(image, "WEBP", lossless=True),
        encode(image, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    ]
    assert [data[12:16] for data in kinds] == [b"VP8 ", b"VP8L", b"VP8X"]
    assert all(open_image(data, 50).size == image.size for data in kinds)
    monkeypatch.setattr(Image, "open", None)
    for data in kinds:
        assert Picture(data, 50).work(448).pixels == 5000 * 321
        with pytest.raises(ImageError, match="5000 x 321 pixels, more than the 1 million"):
            Picture(data, 1)
    for data in (kinds[0][:25], kinds[0].replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b")):
        with pytest.raises(ImageError, match="damaged or cut off"):
            Picture(data, 50)


def test_long_exif_turns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, preprocess="none")
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = np.asarray(NOISE, np.float32)
    for tags, turned in (0, True), (limits.PARTS, False):
        exif.update({40_000 + n: 1 for n in range(tags)})
        shown = server.prepare_image(open_image(encode(NOISE, exif=exif), 50), (64, 64))[0]
        assert np.array_equal(shown, upright[::-1, ::-1] if turned else upright)


def test_the_work_of_pictures() -> None:
    """By the figures of pictures/work.py: a JPEG that is shrunk as it is decoded, one that is not, one in scans."""
    photo = Picture(encode(Image.new("RGB", (4000, 3000)), "JPEG"), 50)
    assert photo.work(448).pixels == 12_000_000
    assert photo.work(448).bytes == 5 * 12_000_000 // 16  # at a quarter a side
    assert photo.work(4000).bytes == 5 * 12_000_000
    assert photo.work(448).seconds < photo.work(4000).seconds / 4
    progressive = Picture(encode(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True), 50)
    assert progressive.work(448).bytes == photo.work(448).bytes + 2 * 18_000_000  # its coefficients, 4:2:0
    assert Picture(scans(2000, 40), 50).work(448).seconds > 3 * Picture(scans(2000, 2), 50).work(448).seconds
    assert Picture(encode(Image.new("RGB", (2000, 1000)), "WEBP"), 50).work(448).bytes == 21 * 2_000_000
    deep = Image.fromarray(np.zeros((100, 200), np.float32))
    assert Picture(encode(deep, "TIFF"), 50).work(448).bytes == 18 * 20_000


# Turns


def queue(turns: Turns, rank: float, work: Work, done: list[float]) -> threading.Thread:
    def run() -> None:
        with turns.turn(work, rank):
            done.append(rank)

    thread = threading.Thread(target=run)
    before = len(turns.waiting)
    thread.start()
    wait_until(lambda: len(turns.waiting) > before)
    return thread


def test_the_least_work_has_the_first_turn_and_memory_is_never_exceeded() -> None:
    turns, done = Turns(2, 100, 10, 60), list[float]()
    with turns.turn(Work(1, 1, 70), 0):
        threads = [queue(turns, rank, Work(1, 1, 40), done) for rank in (3, 1, 2)]
        assert not done  # a slot is free, and too little memory
    for thread in threads:
        thread.join()
    assert done == [1, 2, 3]
    assert turns.left == 100
    assert len(turns.free) == 2


def test_past_the_queue_nobody_waits_for_a_turn() -> None:
    turns, done = Turns(1, 100, 2, 60), list[float]()
    with turns.turn(Work(1, 1, 0), 0):
        threads = [queue(turns, rank, Work(1, 1, 0), done) for rank in (1, 2)]
        with pytest.raises(QueueFull), turns.turn(Work(1, 1, 0), 0):
            pass
    for thread in threads:
        thread.join()
    with turns.turn(Work(1, 1, 0), 0):
        thread = queue(turns, 1, Work(1, 61, 0), done)  # longer than anybody waits
        with pytest.raises(QueueFull), turns.turn(Work(1, 1, 0), 0):
            pass
    thread.join()


def test_who_has_left_gives_up_the_turn() -> None:
    turns = Turns(1, 100, 2, 60)
    TICKET.set(Ticket(0))
    try:
        with pytest.raises(Overdue), turns.turn(Work(1, 1, 10), 0):
            pass
    finally:
        TICKET.set(None)
    assert (turns.left, len(turns.free), turns.waiting) == (100, 1, [])


def test_a_large_turn_rests_as_long_as_it_worked_where_small_ones_came() -> None:
    light = Turns(1, 100, 10, 60)
    heavy = Turns(1, 100, 10, 60, light)
    with heavy.turn(Work(1, 1, 0), 0):
        time.sleep(0.05)
    assert heavy.free[0] <= time.monotonic()
    with heavy.turn(Work(1, 1, 0), 0):
        time.sleep(0.05)
        with light.turn(Work(1, 0, 0), 0):
            ended = time.monotonic()
    assert heavy.free[0] >= ended + 0.05
    with heavy.turn(Work(1, 1, 0), 0):
        assert time.monotonic() >= ended + 0.05


@pytest.fixture
def ticket() -> Iterator[Ticket]:
    """The ticket of a request of a MiB."""
    ticket = Ticket(60)
    ticket.size = MIB
    TICKET.set(ticket)
    yield ticket
    TICKET.set(None)


def test_requests_are_charged_by_what_they_cost_and_what_they_bring(ticket: Ticket) -> None:
    budget = Budget(800 * MIB, 2, 4, 60, 50)

    def lane(work: Work) -> str:
        before = budget.light.taken, budget.heavy.taken
        with budget.turn(work):
            return "light" if budget.light.taken > before[0] else "heavy"

    assert lane(Work(1_000_000, 0.3, MIB)) == "light"
    assert lane(Work(1_000_000, 0.2, MIB)) == "light"
    assert lane(Work(1_000_000, 0.2, MIB)) == "heavy"  # 0.05 s, and half a second for the MiB
    ticket.seconds = 0
    assert lane(Work(1_000_000, 0.1, 101 * MIB)) == "heavy"  # an eighth is for small ones
    with pytest.raises(ImageError, match="301 MiB to decode the image, more than the 300 MiB"):
        lane(Work(1_000_000, 0.1, 301 * MIB))
    lane(Work(100_000_000, 0, 0))
    with pytest.raises(ImageError, match="more than 200 million pixels in all: send fewer at once"):
        lane(Work(100_000_000, 0, 0))


def test_pictures_in_one_request_are_limited_together(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(max_megapixels=0.01)
    image = encode(Image.new("1", (100, 100)))
    form = {"image": [(io.BytesIO(image), f"{n}.png") for n in range(6)]}
    answer = client.post("/predict", data=form).json
    assert answer
    assert [result["success"] for result in answer["results"]] == 4 * [True] + 2 * [False]
    assert "more than 0.04 million pixels in all" in answer["results"][5]["error"]


def test_small_pictures_pass_large_ones_and_past_the_queue_these_are_503(client: FlaskClient) -> None:
    heavy = server.app.budget.heavy
    large, small = encode(Image.new("1", (7000, 7000))), encode(Image.new("1", (50, 50)))
    answers: list[int] = []

    def post(data: bytes) -> int:
        return client.post("/predict", data=data, content_type="image/png").status_code

    threads = [threading.Thread(target=lambda: answers.append(post(large))) for _ in range(heavy.most)]
    slots = [heavy.turn(Work(1, 1, 0), 0) for _ in heavy.free]
    for slot in slots:
        slot.__enter__()
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(heavy.waiting) == heavy.most)
        assert post(large) == 503
        assert post(small) == 200
    finally:
        for slot in slots:
            slot.__exit__(None, None, None)
    for thread in threads:
        thread.join()
    assert answers == [200] * heavy.most


# Memory


def test_requests_wait_for_memory_and_small_ones_do_not() -> None:
    memory, got = Memory(10 * LIGHT_BYTES, 1), list[int]()
    memory.change(0, 9 * LIGHT_BYTES)

    def run() -> None:
        memory.change(0, 2 * LIGHT_BYTES)
        got.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: memory.waiting == 1)
    with pytest.raises(QueueFull):
        memory.change(0, 2 * LIGHT_BYTES)
    memory.change(0, LIGHT_BYTES)
    assert not got
    memory.change(9 * LIGHT_BYTES, 0)
    thread.join()
    memory.change(3 * LIGHT_BYTES, 0)
    assert memory.left == memory.size


def test_what_takes_more_memory_than_there_is_is_413() -> None:
    budget = Budget(400 * MIB, 1, 1, 60, 50)
    with pytest.raises(TensorError, match="takes 101 MiB of memory, more than the 100 MiB") as caught:
        budget.charge(60 * MIB, 41 * MIB)
    assert caught.value.status == 413
    assert budget.requests.left == 160 * MIB  # what it held is given back


def test_a_request_gives_back_what_it_was_charged(client: FlaskClient, dog: bytes) -> None:
    memory = server.app.budget.requests
    for data in (dog, b"no picture"):
        client.post("/predict", data=data, content_type="image/jpeg")
        assert memory.left == memory.size


def test_memory_is_half_of_the_containers_unless_it_is_set(setting: Callable[..., None]) -> None:
    assert context.memory_limit(server.settings) == machine.memory() // 2
    setting(memory=300)
    assert context.memory_limit(server.settings) == 300 * MIB
    assert server.app.budget.heavy.memory == 3 * context.LEAST // 8  # the model leaves less than that


def test_a_picture_that_takes_more_memory_than_there_is(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(memory=1)
    answer = client.post("/predict", data=webp(7000, 7000), content_type="image/webp")
    assert answer.status_code == 400
    assert answer.json
    assert "It takes 981 MiB to decode the image, more than the 96 MiB" in answer.json["error"]


# JSON


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
