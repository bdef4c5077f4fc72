"""What strangers could make the server spend: work that ends, memory that is bounded, small requests first."""

import base64
import io
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bombs import (
    AFTER_HEADER,
    FIRST_BLOCK,
    GIF,
    JPEG,
    NOISE,
    PNG,
    WEBP,
    WORK,
    chunk,
    inserted,
    runs,
    scans,
    segment,
    strips,
    webp,
)
from conftest import FakeModel, encode, serve_with
from fakes import PIXEL, wait_until
from flask.testing import FlaskClient
from PIL import Image

import run_keras_server as server
from keras_server import machine
from keras_server.api import context
from keras_server.api.budget import LIGHT_BYTES, MIB, Budget, Memory, Turns
from keras_server.api.tensors import TensorError
from keras_server.images import ImageError, Picture, open_image
from keras_server.models.batcher import Overdue, QueueFull
from keras_server.models.registry import PredictorEngine
from keras_server.models.served import Served
from keras_server.models.spec import Spec
from keras_server.pictures import limits
from keras_server.pictures.ifd import is_modest
from keras_server.pictures.parts import read_jpeg
from keras_server.pictures.work import Work
from keras_server.ticket import TICKET, Ticket

# Numbers of more digits than Python makes a number of


@pytest.mark.parametrize("digits", [19, 400, 4299, 5000])
@pytest.mark.parametrize(
    ("target", "header", "statuses"),
    [
        ("/predict?top={}", "", (400,)),
        ("/predict?model={}", "", (404,)),
        ("/explain?label={}", "", (400,)),
        ("/v2/models/resnet50/versions/{}/infer", "", (404,)),
        ("/v1/models/resnet50/versions/{}:predict", "", (404,)),
        ("/v2/models/resnet50/infer", "Inference-Header-Content-Length", (400,)),
        ("/predict", "Retry-After", (200,)),
        ("/predict", "X-Forwarded-For", (200,)),
        ("/predict", "Content-Encoding", (415,)),
        ("/predict", "traceparent", (200,)),
        ("/predict", "Host", (200, 400)),  # as a name it may be too long
    ],
)
def test_numbers_of_any_length_are_answered(
    monkeypatch: pytest.MonkeyPatch, target: str, header: str, statuses: tuple[int, ...], digits: int
) -> None:
    number = "9" * digits
    headers = {header: number} if header else {}
    client = serve_with(monkeypatch)
    answer = client.post(target.format(number), data=PIXEL, content_type="image/png", headers=headers)
    assert answer.status_code in statuses
    assert answer.is_json


@pytest.mark.parametrize("ranges", ["bytes=0-{}", "bytes={}-", "bytes=-{}", "{}=0-1", "bytes=0-0,{}-{}"])
def test_ranges_of_any_length_are_answered(client: FlaskClient, ranges: str) -> None:
    for number in ("9" * 19, "9" * 5000):
        with client.get("/static/page.js", headers={"Range": ranges.replace("{}", number)}) as answer:
            assert answer.status_code in (200, 206, 416)


# Work that a picture asks for


@pytest.mark.parametrize("name", WORK)
def test_work_without_end_is_refused_before_anything_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    data, sentence = WORK[name]
    with pytest.raises(ImageError, match=sentence):
        Picture(data, 50)


def reason(data: bytes) -> str:
    """Return why a picture is refused, or nothing."""
    try:
        Picture(data, 50)
    except ImageError as error:
        return str(error)
    return ""


def tags(count: int) -> bytes:
    """Return the first directory of a TIFF, with so many tags."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, 1) for tag in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)


def below(count: int) -> bytes:
    """Return a TIFF that names so many directories below its first one."""
    return strips(4, t330=0).replace(struct.pack("<HHI", 330, 4, 1), struct.pack("<HHI", 330, 4, count))


PLAIN_GIF = b"GIF89a\1\0\1\0\0\0\0"  # without a palette
AS_MANY: dict[str, tuple[Callable[[int], bytes], int]] = {  # what makes a picture with so many parts, and the most
    "segments of a JPEG": (lambda n: inserted(JPEG, 2, segment(0xE3, b""), n - 9), 256),
    "filling of a JPEG": (lambda n: inserted(JPEG, 2, b"\xff", n), 1024),
    "scans of a JPEG": (lambda n: scans(2000, n - 1), 50),
    "chunks of a PNG": (lambda n: inserted(PNG, AFTER_HEADER, chunk(b"prVt", b""), n - 1), 256),
    "pixels' chunks of a PNG": (lambda n: inserted(PNG, AFTER_HEADER, chunk(b"IDAT", b""), n - 1), 20_000),
    "frames of a PNG": (lambda n: inserted(PNG, AFTER_HEADER, chunk(b"fcTL", b""), n - 1), 20_000),
    "blocks of a GIF": (lambda n: inserted(GIF, FIRST_BLOCK, b"!\xfe\1x\0", n), 256),
    "blocks of a GIF without a palette": (lambda n: PLAIN_GIF + b"!\xfe\1x\0" * n + GIF[FIRST_BLOCK:], 256),
    "pieces of a GIF": (lambda n: inserted(GIF, FIRST_BLOCK, b"!\xfe" + b"\1x" * n + b"\0", 1), 20_000),
    "chunks of a WebP": (lambda n: WEBP + (b"prVt" + bytes(4)) * (n - 1), 256),
    "chunks of a WebP that are filled up": (lambda n: WEBP + b"prVt\1\0\0\0x\0" * (n - 1), 256),
    "frames of a WebP": (lambda n: WEBP + (b"ANMF" + bytes(4)) * n, 20_000),
    "bytes of a BMP in runs": (lambda n: runs(9, 9, bytes(n - len(runs(9, 9, b"")))), 2**20),
    "pixels of a BMP in runs": (lambda n: runs(n, -1, b""), 2_000_000),
    "strips of a TIFF": (strips, 20_000),
    "tags of a TIFF": (tags, 256),
    "directories of a TIFF": (below, 16),
}


@pytest.mark.parametrize(("make", "most"), AS_MANY.values(), ids=AS_MANY)
def test_a_picture_may_have_as_many_parts_as_are_allowed_and_not_one_more(
    make: Callable[[int], bytes], most: int
) -> None:
    sentence = f"more than {most:,} "
    assert sentence not in reason(make(most))
    assert sentence in reason(make(most + 1))


def test_exif_of_more_bytes_than_are_looked_into_is_not() -> None:
    exif = b"Exif\0\0" + tags(1)
    assert is_modest(exif.ljust(2**17, b"\0"))
    assert not is_modest(exif.ljust(2**17 + 1, b"\0"))


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
    scaled = bytearray(kinds[0])
    scaled[27], scaled[29] = scaled[27] | 0x40, scaled[29] | 0xC0  # how a viewer is to enlarge it: RFC 6386, 9.1
    assert Picture(bytes(scaled), 50).work(448).pixels == 5000 * 321
    for data in (kinds[0][:25], kinds[0].replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b")):
        with pytest.raises(ImageError, match="damaged or cut off"):
            Picture(data, 50)


@pytest.mark.parametrize(
    ("code", "factors", "scanned", "said"),
    [
        # width, height, bits; samples of all components; those that scans go through; arithmetic, buffered
        (0xC0, (0x22, 0x11, 0x11), [(1, 2, 3)], (16, 8, 8, 192, 192, False, False)),
        (0xC0, (0x22, 0x11, 0x11), [(1,), (2,), (3,)], (16, 8, 8, 192, 192, False, True)),
        (0xC0, (0x11,), [(1,)], (16, 8, 8, 128, 128, False, False)),
        (0xC2, (0x11,), [(1,), (1,)], (16, 8, 8, 128, 256, False, True)),
        (0xC9, (0x21, 0x11, 0x11), [(1, 2, 3)], (16, 8, 8, 256, 256, True, False)),
        (0xCA, (0x11,), [(1,)], (16, 8, 8, 128, 128, True, True)),
    ],
)
def test_what_a_jpeg_says_of_itself(
    code: int, factors: tuple[int, ...], scanned: list[tuple[int, ...]], said: tuple[object, ...]
) -> None:
    """By ITU-T T.81, B.2: components of a half of the width or height have a half of the samples."""
    parts = b"".join(bytes([number, factor, 0]) for number, factor in enumerate(factors, 1))
    data = b"\xff\xd8" + segment(code, struct.pack(">BHHB", 8, 8, 16, len(factors)) + parts)
    for numbers in scanned:
        data += segment(0xDA, bytes([len(numbers), *(part for each in numbers for part in (each, 0)), 0, 63, 0]))
    found = read_jpeg(data + b"\xff\xd9")
    assert found
    assert found[:7] == said
    assert not found.missing


def test_a_jpeg_that_is_too_short_for_its_size_is_cut_unless_it_is_coded_arithmetically() -> None:
    """A bit is the least for a block of 8 x 8 pixels."""
    data = encode(Image.new("L", (64, 64)), "JPEG")
    start = data.index(b"\xff\xc0")
    for blocks, code, is_cut in ((0, 0xC0, False), (1, 0xC0, True), (1, 0xC9, False)):
        size = struct.pack(">HH", 8, 8 * (8 * len(data) + blocks))
        claims = data[:start] + bytes([0xFF, code]) + data[start + 2 : start + 5] + size + data[start + 9 :]
        assert bool(reason(claims)) is is_cut


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
    assert photo.work(448).bytes == 12 * 12_000_000 // 16  # at a quarter a side, and copied to be resized
    assert photo.work(4000).bytes == 5 * 12_000_000
    assert photo.work(448).seconds < photo.work(4000).seconds / 4
    endless = Picture(photo.data[:-2], 50)  # decoded whole, and three times, to see that nothing else is missing
    assert endless.work(448).bytes == photo.work(448).bytes + 11 * 12_000_000
    assert endless.work(448).seconds > 3 * photo.work(4000).seconds
    tiles = Picture(strips(4, t322=2000, t323=2000, t324=200), 50)
    assert tiles.work(448).pixels == 4_000_000  # of a tile that juts out
    progressive = Picture(encode(Image.new("RGB", (4000, 3000)), "JPEG", progressive=True), 50)
    assert progressive.work(448).bytes == photo.work(448).bytes + 2 * 18_000_000  # its coefficients, 4:2:0
    assert Picture(scans(2000, 40), 50).work(448).seconds > 3 * Picture(scans(2000, 2), 50).work(448).seconds
    assert Picture(encode(Image.new("RGB", (2000, 1000)), "WEBP"), 50).work(448).bytes == 21 * 2_000_000
    for kind in ("JPEG", "PNG"):
        data = encode(NOISE, kind)
        apart = Picture(data + bytes(1_000_000), 50).work(448).seconds - Picture(data, 50).work(448).seconds
        assert apart == pytest.approx(0.01)  # 10 ns a byte
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


def test_who_is_next_is_woken_and_nobody_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras_server.api.budget.LOOK_SECONDS", 3600)
    turns, done = Turns(2, 100, 50, 60), list[float]()
    with turns.turn(Work(1, 0, 0), 0), turns.turn(Work(1, 0, 90), 0):
        threads = [queue(turns, n, Work(1, 0, 90 if n % 3 else 0), done) for n in range(40)]
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(done) == [*range(40)]


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


def small_turn(light: Turns) -> None:
    with light.turn(Work(1, 0, 0), 0):
        pass


@pytest.mark.parametrize("come", [small_turn, Turns.pass_by])
def test_a_large_turn_rests_as_long_as_it_worked_where_small_ones_came(come: Callable[[Turns], None]) -> None:
    light = Turns(1, 100, 10, 60)
    heavy = Turns(1, 100, 10, 60, light)
    with heavy.turn(Work(1, 1, 0), 0):
        time.sleep(0.05)
    assert heavy.free[0] <= time.monotonic()
    with heavy.turn(Work(1, 1, 0), 0):
        time.sleep(0.05)
        come(light)
        ended = time.monotonic()
    assert heavy.free[0] >= ended + 0.05
    with heavy.turn(Work(1, 1, 0), 0):
        assert time.monotonic() >= ended + 0.05


def test_small_tensors_make_large_turns_rest_too(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [server.app.budget.light.taken]
    for size in 4096, 4097:
        client.post("/v1/models/resnet50:predict", data=b'{"instances": []}'.ljust(size))
        taken.append(server.app.budget.light.taken)
    assert taken[1] == taken[0] + 1
    assert taken[2] > taken[1]  # by its turn


def test_one_picture_passes_those_of_a_request_that_came_before(ticket: Ticket) -> None:
    budget, done = Budget(800 * MIB, 1, 4, 60, 50), list[str]()
    later = Ticket(60)
    later.arrived = ticket.arrived + 0.1

    def decode(which: Ticket, name: str, pictures: int) -> None:
        TICKET.set(which)
        for _ in range(pictures):
            with budget.turn(Work(1, 0.001, 0)):
                done.append(name)

    with budget.light.turn(Work(1, 0, 0), -math.inf):
        threads = [threading.Thread(target=decode, args=args) for args in ((ticket, "many", 50), (later, "one", 1))]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(budget.light.waiting) == 2)
    for thread in threads:
        thread.join()
    assert done.index("one") in (5, 6)  # 20 times 0.001 s for each picture are the 0.1 s that it came later


def test_a_small_picture_costs_what_it_takes_to_prepare_it(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = []
    turn = Budget.turn
    monkeypatch.setattr(Budget, "turn", lambda self, work: (seconds.append(work.seconds), turn(self, work))[1])
    data = encode(Image.new("1", (8, 8)))
    assert client.post("/predict", data=data, content_type="image/png").status_code == 200
    assert seconds[-1] == pytest.approx(12e-9 * 224 * 224 + Picture(data, 50).work(448).seconds)


def test_what_finds_no_place_for_its_rows_is_not_decoded(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app, "prepare", None)
    monkeypatch.setattr(server.app.current_model().batcher, "waiting", 127)  # of 128
    form = {"image": [(io.BytesIO(encode(Image.new("1", (8, 8)))), f"{n}.png") for n in range(2)]}
    encoded = {"b64": base64.b64encode(encode(Image.new("1", (8, 8)))).decode()}
    name = server.app.current_model().spec.name
    for answer in (
        client.post("/predict", data=form),
        client.post(f"/v1/models/{name}:predict", json={"instances": [encoded] * 2}),
    ):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"]


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
    memory.change(0, LIGHT_BYTES)  # more than there is
    assert not got
    memory.change(10 * LIGHT_BYTES, 0)
    thread.join()
    memory.change(3 * LIGHT_BYTES, 0)
    assert memory.left == memory.size


def test_two_mebibytes_are_had_without_waiting() -> None:
    memory = Memory(0, 0)
    memory.change(0, 2 * 2**20)
    with pytest.raises(QueueFull):
        memory.change(0, 2 * 2**20 + 1)


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


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/sys/fs/cgroup/pod/box/memory.max": "max", "/sys/fs/cgroup/pod/memory.max": "1000"}, 1000),
        ({"/sys/fs/cgroup/pod/box/memory.max": "500", "/sys/fs/cgroup/pod/memory.max": "1000"}, 500),
        ({"/sys/fs/cgroup/memory.max": "nonsense"}, 4096 * 2000),
        ({}, 4096 * 2000),
    ],
)
def test_a_container_s_memory_counts(files: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what it and those around it may have, and of what the machine has."""

    def read_text(path: machine.Path, *_: object) -> str:
        if str(path) == "/proc/self/cgroup":
            return "0::/pod/box\n"
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(machine.Path, "read_text", read_text)
    monkeypatch.setattr(machine.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2000}.__getitem__)
    assert machine.memory() == expected


def test_what_explains_is_no_small_request(ticket: Ticket) -> None:
    """Else each heat map would make the next one wait."""
    budget = Budget(800 * MIB, 2, 4, 60, 50)
    served = Served(Spec(), PredictorEngine(FakeModel()))
    with budget.map_turn(served):
        with budget.turn(Work(1, 100, 0)):  # among the large
            pass
        ticket.seconds = 0
        with budget.turn(Work(1, 0, 0)):
            pass
    assert budget.light.taken == 0
    assert budget.maps[served].free[0] <= time.monotonic()
    served.close()
    with budget.turn(Work(1, 0, 0)):
        pass
    assert budget.light.taken == 1
