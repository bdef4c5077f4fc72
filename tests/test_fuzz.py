"""Mutated images and malformed requests: no answer but a sound one, and nothing is left behind."""

import contextlib
import io
import re
import socket
import struct
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from bombs import chunk
from conftest import FakeModel, encode
from fakes import PIXEL, FakeServer, Raw, post, request
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import run_keras_server as server
from keras_server.images import open_image

settings.register_profile(
    "server", deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck], print_blob=False
)
settings.load_profile("server")

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8))
GREY = NOISE.convert("L")
SEEDS = {
    "JPEG": encode(NOISE, "JPEG"),
    "progressive JPEG": encode(NOISE, "JPEG", progressive=True, comment=b"comment"),
    "CMYK JPEG": encode(NOISE.convert("CMYK"), "JPEG"),
    "JPEG with EXIF": encode(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    "MPO": encode(NOISE, "MPO", save_all=True, append_images=[GREY]),
    "PNG": encode(NOISE),
    "PNG of a palette": encode(NOISE.quantize(7), transparency=3),
    "16-bit PNG": encode(Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20))),
    "APNG": encode(NOISE, "PNG", save_all=True, append_images=[GREY.convert("RGB")]),
    "PNG with text": encode(NOISE)[:33]
    + chunk(b"tEXt", b"a\0b")
    + chunk(b"gAMA", struct.pack(">I", 1))
    + encode(NOISE)[33:],
    "GIF": encode(NOISE, "GIF"),
    "film": encode(NOISE, "GIF", save_all=True, append_images=[GREY], transparency=0),
    "WebP": encode(NOISE, "WEBP"),
    "lossless WebP": encode(NOISE.convert("RGBA"), "WEBP", lossless=True),
    "moving WebP": encode(NOISE, "WEBP", save_all=True, append_images=[GREY]),
    "BMP": encode(NOISE, "BMP"),
    "BMP of a palette": encode(NOISE.quantize(16), "BMP"),
    "TIFF": encode(NOISE, "TIFF"),
    "LZW TIFF": encode(NOISE, "TIFF", compression="tiff_lzw"),
    "deflated TIFF": encode(NOISE, "TIFF", compression="tiff_adobe_deflate"),
    "JPEG TIFF": encode(NOISE, "TIFF", compression="jpeg"),
    "fax TIFF": encode(NOISE.convert("1"), "TIFF", compression="group4"),
    "float TIFF": encode(Image.fromarray(np.asarray(GREY, np.float32) / 255), "TIFF"),
    "16-bit TIFF": encode(Image.fromarray(np.arange(300, dtype=np.uint16).reshape(15, 20)), "TIFF"),
}
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
DICE = st.integers(0, 2**40)  # of which each makes one mutation; drawing its parts one by one takes ten times longer


def mutate(seed: bytes, dice: int) -> bytes:
    """Return the seed with a few bytes, numbers or stretches of it changed, half of them in its head."""
    data, random = bytearray(seed), Random(dice)
    for _ in range(random.randint(1, 6)):
        at = random.randint(0, min(120, len(data)) if random.random() < 0.5 else len(data))
        length = random.choice([1, 2, 4])
        number = random.choice(NUMBERS) % 256**length
        match random.randrange(5):
            case 0:
                data[at : at + 1] = random.randbytes(1)
            case 1:
                data[at : at + length] = number.to_bytes(length, random.choice(["big", "little"]))
            case 2:
                del data[at : at + random.randint(1, 40)]
            case 3:
                data[at:at] = random.randbytes(random.randint(1, 20))
            case 4:
                other = random.randint(0, len(data))
                data[at:at] = data[other : other + random.randint(1, 60)]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata: they say nothing about the answer
@pytest.mark.parametrize("name", SEEDS)
def test_mutated_images_are_classified_or_refused(name: str) -> None:
    app, model = server.app.test_client(), FakeModel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "model", model)

        @settings(max_examples=200)
        @given(DICE)
        def holds(dice: int) -> None:
            data = mutate(SEEDS[name], dice)
            answer = app.post("/predict", data=data, content_type="image/x")
            assert answer.status_code in (200, 400), answer.json
            assert (answer.json or {})["success"] is (answer.status_code == 200)
            if answer.status_code == 200:
                assert np.isfinite(model.batches.pop()).all()

        holds()


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%b\r\n'
    b"--b\r\nContent-Disposition: form-data; name=\"image\"; filename*=UTF-8''%%e4.png\r\n\r\n%b\r\n--b--\r\n"
) % (PIXEL, PIXEL)


def test_mutated_forms_are_answered_or_refused() -> None:
    app, model = server.app.test_client(), FakeModel()
    kinds = ["multipart/form-data; boundary=b", 'multipart/form-data; boundary="b"', "multipart/form-data", "image/png"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "model", model)

        @settings(max_examples=400)
        @given(DICE, st.sampled_from(kinds), st.text(max_size=6))
        def holds(dice: int, kind: str, top: str) -> None:
            data = mutate(FORM, dice)
            answer = app.post("/predict", data=data, content_type=kind, query_string={"top": top} if top else {})
            assert answer.status_code in (200, 400, 413), answer.json
            assert (answer.json or {})["success"] is (answer.status_code == 200)

        holds()


# Pieces of HTTP, whole and broken, from which requests are put together.
LINES = [b"GET /healthz HTTP/1.1", b"POST /predict HTTP/1.1", b"HEAD / HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET /"]
LINES += [b"GET http://a/readyz HTTP/1.0", b"PUT /%ff%00 HTTP/1.1", b"GET /?\xff=%zz HTTP/1.1", b"\0 / HTTP/1.1", b""]
LINES += [b"POST /v2/models/x/infer HTTP/1.1", b"POST /v1/models/x:predict HTTP/1.1", b"POST /explain HTTP/1.1"]
FIELDS = [b"Host: a", b"Host: \xff", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 99999999999"]
FIELDS += [b"Content-Length: x", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Expect: 100-continue"]
FIELDS += [b"Content-Type: image/png", b"Content-Type: multipart/form-data; boundary=b", b"Content-Type: \xff;;=", b"A"]
FIELDS += [b"Content-Type: application/json", b"Authorization: Bearer \xe4", b"X-Request-ID: \x7f", b"Range: bytes=9-1"]
FIELDS += [b"Connection: close", b"Connection: upgrade", b"Upgrade: websocket", b"If-None-Match: *", b" folded", b": v"]
FIELDS += [b"Accept-Encoding: \xff", b"Cookie: a=b; \x80", b"If-Modified-Since: never", b"X-Forwarded-Host: \r"]
BODIES = [
    b"",
    b"5\r\nabcde\r\n0\r\n\r\n",
    b"abcde",
    b"ffffffff\r\n",
    b"0\r\n\r\n",
    b"0\r\nA: b\r\n\r\n",
    PIXEL,
    FORM,
    b"{}",
]
BODIES += [b'{"instances": [1]}', b'{"inputs": 1}', b"\r\n\r\n", b"-1\r\n"]
ENDS = st.sampled_from([b"\r\n"] * 30 + [b"\n", b"\r", b"", b"\0"])


@st.composite
def message(draw: st.DrawFn) -> bytes:
    """Return something between a request and noise."""
    fields = draw(st.lists(st.sampled_from(FIELDS), max_size=6))
    if draw(st.integers(0, 3)):  # most often one that is understood that far
        fields.insert(0, b"Host: a")
    lines = [draw(st.sampled_from(LINES)), *fields, b""]
    data = b"".join(line + draw(ENDS) for line in lines) + draw(st.sampled_from(BODIES))
    return data if draw(st.integers(0, 4)) else mutate(data, draw(DICE))


SOUND = {100, 200, 204, 206, 304, 400, 401, 404, 405, 408, 411, 413, 414, 415, 416, 422, 431, 501, 503, 504}


def read_all(raw: Raw) -> Iterator[bytes]:
    """Yield what comes until the connection ends."""
    with contextlib.suppress(ConnectionResetError):
        while data := raw.socket.recv(65536):
            yield data


def test_malformed_http_is_answered_soundly_and_leaves_nothing_behind() -> None:
    with FakeServer("--timeout", "5", "--queue-size", "8", HEAD_SECONDS=2, IDLE_SECONDS=2, SILENT_SECONDS=1) as fake:
        for _ in range(30):  # so that all threads are there
            fake.ask(post())
        fake.wait(connections=0)
        before = fake.tell("forget")
        answers = 0

        @settings(max_examples=800)
        @given(st.lists(message(), min_size=1, max_size=3), st.booleans())
        def holds(messages: list[bytes], apart: bool) -> None:
            nonlocal answers
            with fake.raw() as raw, contextlib.suppress(OSError):
                for data in messages if apart else [b"".join(messages)]:
                    raw.send(data)
                raw.socket.shutdown(socket.SHUT_WR)
                got = b"".join(read_all(raw))
                statuses = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3}) ", got, re.MULTILINE)]
                answers += len(statuses)
                assert {*statuses} <= SOUND, got
                assert not re.search(rb"Traceback|<title>[45]", got), got
                if statuses and statuses[-1] >= 400:
                    assert re.search(rb'\n(\{.*"error": ?".+"\}\n)?\Z', got), got

        holds()
        assert answers > 500
        assert fake.ask(request("/readyz")).status == 200
        assert fake.ask(post()).status == 200
        fake.wait(connections=0, queued=0, running=0, held=0)
        after = fake.tell("forget")
        assert after["files"] == before["files"]
        assert after["threads"] <= before["threads"] + 36  # those of the pool
        assert after["resident"] - before["resident"] < 10e6
        assert not [line for line in fake.log.splitlines() if not re.match(r"\S+ \S+ INFO method=", line)]


def test_noise_is_refused() -> None:
    with FakeServer(SILENT_SECONDS=0.2) as fake:

        @settings(max_examples=300)
        @given(st.binary(min_size=1, max_size=300))
        def holds(data: bytes) -> None:
            with fake.raw() as raw:
                raw.send(data + b"\r\n\r\n").socket.shutdown(socket.SHUT_WR)
                assert raw.file.read(12) in (b"HTTP/1.1 400", b"")

        holds()
        assert "Traceback" not in fake.log


def test_the_seeds_are_all_read(client: FlaskClient) -> None:
    for name, data in SEEDS.items():
        image = open_image(data, 50)
        assert server.prepare_image(image, (8, 8)).shape == (1, 8, 8, 3), name
        assert Image.open(io.BytesIO(data)).format
