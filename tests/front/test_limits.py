"""What an upload may be, how much may wait, for how long, and for whom."""

import contextlib
import io
import platform
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from bombs import BOMBS, chunk, film, png, zeros
from conftest import FakeModel, encode
from fakes import PIXEL, PREDICT, FakeServer, post, request, wait_until
from flask.testing import FlaskClient
from PIL import Image

import run_keras_server as server
from keras_server.api import uploads

MEBIBYTE = 2**20
CURL = ["curl", "--silent", "--show-error", "--max-time", "60", "--write-out", "\n%{http_code}"]


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeServer]:
    """A server that takes bodies of a mebibyte."""
    with FakeServer("--max-upload-mb", "1", "--queue-size", "4", "--max-batch", "1") as server:
        yield server


@pytest.fixture
def fake(shared: FakeServer) -> Iterator[FakeServer]:
    """That server, which rests after the test."""
    yield shared
    shared.rest()


# Bodies


@pytest.mark.parametrize("size", [MEBIBYTE + 1, 60 * MEBIBYTE])
def test_each_client_can_read_that_its_body_is_too_large(fake: FakeServer, tmp_path: Path, size: int) -> None:
    before = fake.tell("forget")["resident"]
    file = tmp_path / "large.png"
    file.write_bytes(bytes(size))
    url, kind = f"{fake.url}/predict", {"Content-Type": "image/png"}
    answers = []
    with file.open("rb") as opened:
        answer = requests.post(url, opened, headers=kind, timeout=60)
        answers.append((answer.status_code, answer.text))
    with file.open("rb") as opened:
        pieces = iter(lambda: opened.read(65536), b"")
        answer = requests.post(url, pieces, headers=kind, timeout=60)
        answers.append((answer.status_code, answer.text))
    for options in (
        ["-F", f"image=@{file}"],
        ["-F", f"image=@{file}", "-H", "Expect:"],
        ["-X", "POST", "-T", str(file), "-H", "Content-Type: image/png", "-H", "Transfer-Encoding: chunked"],
    ):
        output, _, code = subprocess.check_output([*CURL, *options, url], text=True).rpartition("\n")
        answers.append((int(code), output))
    chunk_size = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size
    for head, end in ((b"Content-Length: %d\r\n\r\n" % size, b""), (chunk_size, b"\r\n0\r\n\r\n")):
        with fake.raw() as raw:
            got = raw.send(PREDICT + head + bytes(size) + end).answer()
            assert got
            answers.append((got.status, got.body.decode()))
    for status, text in answers:
        assert status == 413
        assert "larger than the 1 MiB" in text
    assert fake.tell()["peak"] - before < 10e6


def test_a_body_that_says_it_is_too_large_need_not_be_sent(fake: FakeServer) -> None:
    for field in (b"", b"Expect: 100-continue\r\n"):
        with fake.raw() as raw:
            raw.send(PREDICT + field + b"Content-Length: %d\r\n\r\n" % (MEBIBYTE + 1)).expect(413)


def test_a_body_of_exactly_the_limit_is_taken(fake: FakeServer) -> None:
    body = PIXEL.ljust(MEBIBYTE, b"\0")
    assert fake.ask(post(body)).status == 200
    head = PREDICT + b"Transfer-Encoding: chunked\r\n\r\n"
    assert fake.ask(head + b"100000\r\n" + body + b"\r\n0\r\n\r\n").status == 200
    halves = b"80001\r\n%b\r\n80000\r\n%b\r\n0\r\n\r\n" % (bytes(2**19 + 1), bytes(2**19))
    assert fake.ask(head + halves).status == 413


def test_the_app_itself_has_the_limit_under_another_server(client: FlaskClient, setting: Callable[..., None]) -> None:
    setting(max_upload_mb=0.01)
    answer = client.post("/predict", data=bytes(20_000), content_type="image/png")
    assert answer.status_code == 413
    assert "0.01 MiB" in answer.text


@pytest.mark.parametrize(
    ("status", "error", "form"),
    [
        (400, "5 images: send at most 4", {"image": [(io.BytesIO(PIXEL), "a.png") for _ in range(5)]}),
        (400, "no image among the form's fields", {"a": ["b"] * 36}),
        (400, "36 images: send at most 4", {"a": [(io.BytesIO(b""), "a") for _ in range(36)]}),
        (400, "no image among the form's fields", {"a": "b" * 600_000}),
        (400, "too many fields, over 36: send at most 4 images", {"a": ["b"] * 37}),
        (400, "no image among the form's fields", {"a" * 4053: ["b"]}),  # in a head of 4,096 bytes
        (400, "a head of more than 4,096 bytes", {"a" * 4054: ["b"]}),
    ],
)
def test_the_parts_of_a_form_are_bounded(
    client: FlaskClient, setting: Callable[..., None], status: int, error: str, form: dict[str, object]
) -> None:
    setting(queue_size=4)
    answer = client.post("/predict", data=form, content_type="multipart/form-data")
    assert answer.status_code == status
    assert error in answer.text


def test_an_address_has_a_hundred_parameters_and_no_more(fake: FakeServer) -> None:
    for count, status in (100, 200), (101, 414):
        answer = fake.ask(post(target="/predict?" + "&".join(["a"] * (count - 1) + ["top=1"])))
        assert answer.status == status
    assert answer.json["error"] == "The address has more than 100 parameters."


def test_a_delimiter_that_ends_nothing_hides_no_parts(client: FlaskClient) -> None:
    """The decoder looks for delimiters where lines start."""
    part = b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n%b\r\n'
    for count, sentence in (159, "no image among the form's fields"), (160, "too many fields, over 160"):
        body = part % b"a--XX--" + part % b"" * (count - 1) + b"--XX--\r\n"
        answer = client.post("/predict", data=body, content_type="multipart/form-data; boundary=XX")
        assert (answer.status_code, sentence in answer.text) == (400, True), (count, answer.text)


def test_heads_are_charged_by_their_length(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    charged = list[float]()
    monkeypatch.setattr(uploads, "turn", lambda nanoseconds: charged.append(nanoseconds) or contextlib.nullcontext())
    head = b'Content-Disposition: form-data; name="a"'
    for end in b"\r\n", b"\n", b"\r":
        for padding in b"", b" " * 5000:
            one = b"--XX" + padding + end + head + 2 * end + b"a" * 1000 + b"--XX--" + end
            body = one * 3 + b"--XX--" + padding + end + b"x" * 9000
            client.post("/predict", data=body, content_type="multipart/form-data; boundary=XX")
            assert charged[-1] == 15 * len(body) + 1500 * 3 * len(head + 2 * end)


# Images


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_fast_and_cost_no_memory(fake: FakeServer, name: str) -> None:
    fake.ask(post())  # so that what the first picture needs is there
    before = fake.tell("forget")["resident"]
    spent = fake.seconds
    answer = fake.ask(post(BOMBS[name]))
    assert fake.seconds - spent < 1
    assert answer.status == 400
    assert fake.tell()["peak"] - before < 50e6


def test_many_small_bombs_in_one_file_cost_no_memory(fake: FakeServer) -> None:
    fake.ask(post())
    before = fake.tell("forget")["resident"]
    assert fake.ask(post(png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zeros(1)) for _ in range(60)]))).status == 400
    assert fake.tell()["peak"] - before < 50e6


def test_bombs_leave_no_memory_with_the_threads(fake: FakeServer) -> None:
    before = fake.tell("forget")["resident"]
    for _ in range(30):
        assert fake.ask(post(BOMBS["bmp just inside the limit"])).status == 400
    assert fake.tell("forget")["peak"] - before < 50e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their memory otherwise")
def test_large_pictures_leave_no_memory_with_the_threads() -> None:
    """Of those that are decoded side by side each thread would keep the most that it ever had."""
    data = post(encode(Image.new("RGB", (2600, 2000), "red")))
    with FakeServer("--decode-threads", "4") as fake:
        fake.ask(post())
        before = fake.tell("forget")["resident"]
        with ThreadPoolExecutor(8) as pool:
            assert {answer.status for answer in pool.map(fake.ask, [data] * 24)} == {200}
        assert fake.tell("forget")["resident"] - before < 30e6


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_a_film_the_first_frame_counts(fake: FakeServer, kind: str) -> None:
    assert fake.ask(post(film(kind, 50))).status == 200


def test_pixels_are_counted_before_they_are_decoded(
    client: FlaskClient, setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting(max_megapixels=0.01)
    answer = client.post("/predict", data=encode(Image.new("L", (100, 100))), content_type="image/png")
    assert answer.status_code == 200
    monkeypatch.setattr(server, "prepare_image", None)  # would be an error 500
    answer = client.post("/predict", data=encode(Image.new("L", (100, 101))), content_type="image/png")
    assert answer.status_code == 400
    assert "100 x 101 pixels" in answer.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_refused(client: FlaskClient, model: FakeModel, kind: str, dog: bytes) -> None:
    whole = encode(Image.open(io.BytesIO(dog)).resize((150, 100)), kind)
    assert client.post("/predict", data=whole, content_type="image/x").status_code == 200
    for part in (0.05, 0.3, 0.6, 0.9):
        answer = client.post("/predict", data=whole[: int(len(whole) * part)], content_type="image/x")
        assert answer.status_code == 400, part
    assert len(model.batches) == 1


@pytest.mark.parametrize("kind", ["ICO", "PPM", "PCX", "TGA", "SGI", "JPEG2000", "EPS", "PDF", "DDS", "ICNS", "SPIDER"])
def test_other_formats_of_pillow_are_refused(client: FlaskClient, kind: str) -> None:
    image = Image.new("F" if kind == "SPIDER" else "RGB", (64, 64))
    answer = client.post("/predict", data=encode(image, kind), content_type="image/x")
    assert answer.status_code == 400
    named = {
        "ICO": "an icon",
        "PPM": "a picture in PNM",
        "JPEG2000": "a JPEG 2000",
        "PDF": "a PDF",
        "EPS": "a PostScript file",
        "ICNS": "an icon",
    }.get(kind, "")
    assert f"This is {named}, which is not read" in answer.text if named else "JPEG, PNG, WebP, GIF, BMP" in answer.text


# Overload and deadlines


def test_past_the_queue_requests_are_refused_at_once_and_those_in_it_answered(fake: FakeServer) -> None:
    rows = fake.tell()["rows"]
    raws = fake.occupy(5)  # one is computed, four wait
    for _ in range(20):
        answer = fake.ask(post())
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "1"
    with fake.raw() as raw:  # a client that asks first need not send
        raw.send(post(Expect="100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n").expect(503)
    with fake.raw() as raw:  # others may keep their connection
        for _ in range(2):
            raw.send(post(PIXEL.ljust(100_000, b"\0"))).expect(503)
    assert fake.tell()["held"] == 5 * len(PIXEL)
    fake.tell("go")
    for raw in raws:
        raw.expect(200)
        raw.close()
    assert fake.tell()["rows"] == rows + 5
    assert fake.ask(post()).status == 200


@pytest.fixture
def full(fake: FakeServer) -> Iterator[FakeServer]:
    """The server with a full queue, which it answers after the test."""
    raws = fake.occupy(5)
    yield fake
    fake.tell("go")
    assert all(raw.answer() for raw in raws)
    for raw in raws:
        raw.close()


UNUSUAL: dict[str, dict[str, str]] = {
    "a query": {"target": "/predict?top=1"},
    "an id": {"X_Request_ID": "mine"},
    "an id that is none": {"X_Request_ID": "not mine"},
    "kept alive": {"Connection": "Keep-Alive"},
    "to be closed": {"Connection": "close"},
    "an escaped path": {"target": "/%70redict"},
    "a foreign path": {"target": "/v1/models/a:predict"},
    "bytes beyond ASCII": {"X_Name": "\xe4"},
}


@pytest.mark.parametrize("given", UNUSUAL.values(), ids=UNUSUAL)
def test_a_refusal_is_the_same_however_its_head_arrives(full: FakeServer, given: dict[str, str]) -> None:
    before = full.log.count("status=503")
    with full.raw() as quick, full.raw() as long:
        quick.send(post(**given))
        data = post(**given)
        long.send(data[:30])
        time.sleep(0.05)
        long.send(data[30:])
        answers = [raw.answer() for raw in (quick, long)]
    first, second = (answer for answer in answers if answer)
    assert first.status == second.status == 503
    assert first.body == second.body
    assert first.headers.keys() == second.headers.keys()
    for answer in (first, second):
        assert answer.headers["Retry-After"] == "1"
        assert (answer.headers["X-Request-ID"] == "mine") == (given.get("X_Request_ID") == "mine")
        assert answer.headers["Connection"] == ("close" if given.get("Connection") == "close" else "keep-alive")
    assert full.log.count("status=503") == before + 2
    *_, one, other = (line.partition(" INFO ")[2] for line in full.log.splitlines() if "status=503" in line)
    without = [re.sub(" (ms|id)=[^ ]+", "", line) for line in (one, other)]
    assert without[0] == without[1]


MALFORMED = {
    "two lengths": (400, PREDICT + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na"),
    "two hosts": (400, PREDICT + b"Host: b\r\nContent-Length: 1\r\n\r\na"),
    "no host": (400, b"POST /predict HTTP/1.1\r\nContent-Length: 1\r\n\r\na"),
    "length and chunks": (400, PREDICT + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a negative length": (400, PREDICT + b"Content-Length: -1\r\n\r\na"),
    "a length in other digits": (400, PREDICT + b"Content-Length: \xb2\r\n\r\na"),
    "a name with a space": (400, PREDICT + b"Content-Length : 1\r\n\r\na"),
    "a folded line": (400, PREDICT + b"Content-Length: 1\r\n b\r\n\r\na"),
    "too large": (413, PREDICT + b"Content-Length: 999999999\r\n\r\na"),
    "a body that breaks off": (400, PREDICT + b"Content-Length: 10\r\n\r\na"),
    "chunks": (503, PREDICT + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"),
    "no length": (503, PREDICT + b"\r\n"),
}


@pytest.mark.parametrize(("status", "data"), MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_so_under_overload_too(full: FakeServer, status: int, data: bytes) -> None:
    with full.raw() as raw:
        raw.send(data)
        raw.socket.shutdown(socket.SHUT_WR)
        answer = raw.answer()
    assert answer
    assert answer.status == status


def test_refused_requests_may_follow_each_other_without_a_pause(full: FakeServer) -> None:
    with full.raw() as raw:
        raw.send(post() * 3 + request() + post(PIXEL.ljust(200_000, b"\0")))
        answers = [raw.answer() for _ in range(5)]
    assert [answer.status for answer in answers if answer] == [503, 503, 503, 200, 503]


def test_the_queue_is_counted_in_images(fake: FakeServer) -> None:
    raws = fake.occupy(2)
    wait_until(lambda: fake.tell()["waiting"] == 1)
    form = [("image", ("a.png", PIXEL))]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(requests.post, f"{fake.url}/predict", files=form * 3, timeout=30)
        wait_until(lambda: fake.tell()["waiting"] == 4)
        answer = requests.post(f"{fake.url}/predict", files=form * 3, timeout=30)
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        fake.tell("go")
        assert first.result().status_code == 200
    assert all(raw.answer() for raw in raws)
    assert requests.post(f"{fake.url}/predict", files=form * 4, timeout=30).status_code == 200
    for raw in raws:
        raw.close()


def test_health_metrics_and_the_page_are_answered_while_every_thread_is_taken() -> None:
    options = ("--max-batch", "1", "--decode-threads", "1", "--queue-size", "50")
    with FakeServer(*options) as fake:
        raws = fake.occupy(20)
        assert fake.tell()["queued"] == 15
        for target in ("/healthz", "/readyz", "/metrics", "/"):
            assert fake.ask(request(target)).status == 200
        fake.tell("go")
        for raw in raws:
            assert raw.answer()
            raw.close()


def test_at_its_deadline_a_request_is_answered_504_and_its_image_dropped() -> None:
    with FakeServer("--timeout", "1", "--max-batch", "1", "--decode-threads", "1", "--queue-size", "50") as fake:
        raws = fake.occupy(6)  # one is computed, four wait for the model and one for a thread
        for raw in raws:
            raw.expect(504)
            raw.close()
        fake.wait(queued=0, running=0)
        fake.tell("go")
        assert fake.ask(post()).status == 200
        assert fake.tell()["rows"] == 2  # that which was being computed, and the last one


def test_a_body_that_comes_too_late_is_answered_408() -> None:
    with FakeServer("--timeout", "0.5", STALL_SECONDS=60) as fake, fake.raw() as raw:
        raw.send(post()[:-1]).expect(408)
        assert not fake.tell()["rows"]


# Health


def test_readiness_follows_the_model(fake: FakeServer, client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake.ask(request("/readyz")).json["status"] == "ready"
    assert fake.ask(request("/healthz")).status == 200
    batcher = server.app.current_model().batcher
    for attribute, value in (("dead", True), ("busy", {0: time.monotonic() - server.settings.timeout - 1})):
        with monkeypatch.context() as patch:
            patch.setattr(batcher, attribute, value)
            answer = client.get("/readyz")
            assert answer.status_code == 503
            assert answer.headers["Retry-After"]
            assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(server, "model", None)
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_a_stuck_model_makes_the_server_unready() -> None:
    with FakeServer("--timeout", "0.5") as fake:
        (raw,) = fake.occupy(1)
        assert fake.ready() == 200
        wait_until(lambda: fake.ready() == 503)
        fake.tell("go")
        wait_until(lambda: fake.ready() == 200)
        raw.close()


# Keys and origins


def test_everything_but_health_and_the_page_asks_for_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("from-a-file\n\nand-another\n")
    options = ("--api-key", "first", "--api-key", "second", "--api-key-file", str(file))
    with FakeServer(*options) as fake:
        for target in ("/healthz", "/readyz", "/"):
            assert fake.ask(request(target)).status == 200
        for key in ("first", "second", "from-a-file", "and-another"):
            for scheme in ("Bearer", "bearer"):
                assert fake.ask(post(Authorization=f"{scheme} {key}")).status == 200
        wrong = ["Bearer", "Bearer ", "Bearer firs", "Bearer first2", "first", "Basic first", "Bearer \xe4\xff", "\xff"]
        wrong += ["Bearer first,second", "Bearer " + "a" * 10_000]
        for field in wrong:
            for message in (post(Authorization=field), request("/metrics", Authorization=field)):
                answer = fake.ask(message)
                assert answer.status == 401, field
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert "Authorization: Bearer" in answer.json["error"]
        assert fake.ask(post()).status == 401
        assert fake.ask(request("/nothing")).status == 401
        assert not re.search("first|second|from-a-file|and-another", fake.log)


def test_keys_come_from_the_environment_too() -> None:
    with FakeServer(environment={"KERAS_SERVER_API_KEY": "one, two"}) as fake:
        assert fake.ask(post()).status == 401
        assert fake.ask(post(Authorization="Bearer two")).status == 200


def test_listening_beyond_the_loopback_without_a_key_is_warned_of() -> None:
    for options, warned in (
        (("--host", "0.0.0.0"), True),
        (("--host", "0.0.0.0", "--api-key", "k"), False),
        ((), False),
    ):
        with FakeServer(*options) as fake:
            assert ("--api-key asks them for a key" in fake.log) is warned


def test_pages_of_other_origins_are_let_in_only_where_the_operator_says_so(
    client: FlaskClient, setting: Callable[..., None]
) -> None:
    ask = {"Origin": "https://there", "Access-Control-Request-Method": "POST"}
    for answer in (client.options("/predict", headers=ask), client.get("/healthz", headers=ask)):
        assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]
    setting(cors_origin=("https://there",), api_key=("secret",))
    answer = client.options("/predict", headers=ask)
    assert answer.status_code == 200  # browsers ask without the key
    assert answer.headers["Access-Control-Allow-Origin"] == "https://there"
    assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
    assert client.post("/predict", headers=ask).headers["Access-Control-Allow-Origin"] == "https://there"
