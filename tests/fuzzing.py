"""What strangers send, changed at random: pictures, forms, JSON, HTTP, and model files. Nothing is to fail.

    python tests/fuzzing.py --seconds 600

Each target takes bytes and raises where the answer to them is not sound. test_fuzz.py tries a few hundred, always the
same; this program others each time, for as long as it is told, and keeps what fails in tests/data/fuzz, where a test
finds it for ever.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import multiprocessing
import re
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from bombs import WORK, chunk
from conftest import FakeModel, encode
from fakes import PIXEL, FakeServer, Raw, post
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import run_keras_server as server
from keras_server.images import ImageError, Picture
from keras_server.models.errors import StartupError
from keras_server.models.registry import PredictorEngine
from keras_server.models.served import Served
from keras_server.models.source import Source
from keras_server.models.spec import Spec, Tensor

DATA = Path(__file__).parent / "data"
CORPUS = DATA / "fuzz"  # a folder a target

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


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n%b\r\n'
    b"--b\r\nContent-Disposition: form-data; name=\"image\"; filename*=UTF-8''%%e4.png\r\n\r\n%b\r\n--b--\r\n"
) % (PIXEL, PIXEL)


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


SOUND = {100, 200, 204, 206, 304, 400, 401, 404, 405, 408, 411, 413, 414, 415, 416, 422, 431, 503, 504}


def read_all(raw: Raw) -> Iterator[bytes]:
    """Yield what comes until the connection ends."""
    with contextlib.suppress(ConnectionResetError):
        while data := raw.socket.recv(65536):
            yield data


def check_answers(got: bytes, heads: bool) -> list[int]:
    """Return the statuses of the answers that came on one connection, each whole and sound; `heads`: some to HEAD."""
    statuses = []
    while got:
        head, separator, rest = got.partition(b"\r\n\r\n")
        line, *fields = head.split(b"\r\n")
        found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+", line)
        assert found, got[:200]
        assert separator, got[-200:]
        status = int(found[1])
        statuses.append(status)
        assert status in SOUND, line
        lengths = [int(field[15:]) for field in fields if field.lower().startswith(b"content-length:")]
        assert len(lengths) == (0 if status in (100, 204, 304) else 1), fields
        length = lengths[0] if lengths else 0
        if heads and (not rest or rest.startswith(b"HTTP/1.1 ")):  # the answer to a HEAD has no body
            length = 0
        assert len(rest) >= length, "cut"
        content, got = rest[:length], rest[length:]
        if status >= 400 and content:
            assert json.loads(content)["error"].endswith((".", "}", "]")), content
        assert status < 400 or content or heads, "an error without a sentence"
    return statuses


def check_picture(data: bytes) -> None:
    """Have a picture prepared, or refused."""
    with warnings.catch_warnings(), contextlib.suppress(ImageError):
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata: they say nothing about the answer
        picture = Picture(data, 50)
        work = picture.work(16)
        assert min(work) >= 0
        if work.bytes > 2**30:  # more than a server has
            return
        assert np.isfinite(server.prepare_image(picture.image(), (8, 8))).all()


def check_answer(path: str, data: bytes, kind: str, **headers: str) -> None:
    """POST to the app, which answers 200, or says what is wrong with the request."""
    answer = server.app.test_client().post(path, data=data, content_type=kind, headers=headers)
    assert answer.status_code in (200, 400, 413, 415), answer.data[:300]
    if answer.status_code != 200 or not answer.content_type.startswith("application/octet-stream"):
        assert isinstance(answer.json, dict)
        assert answer.status_code == 200 or answer.json["error"].endswith((".", "}", "]")), answer.json


KINDS = ["multipart/form-data; boundary=b", 'multipart/form-data; boundary="b"', "multipart/form-data", "image/png"]


def check_form(data: bytes) -> None:
    """POST a form."""
    check_answer("/predict?top=3", data, KINDS[data[-1] % 4 if data and data[-1] < 4 else 0])


def check_json(data: bytes) -> None:
    """POST a text to each route that reads JSON; what follows an object may be binary."""
    end = data.rfind(b"}") + 1
    check_answer("/predict", data, "application/json")
    served = server.model
    assert isinstance(served, Served)
    try:
        server.model = TABLE
        for path in ("/v1/models/table:predict", "/v2/models/table/infer"):
            check_answer(path, data, "application/json")
        check_answer("/v2/models/table/infer", data, "", **{"Inference-Header-Content-Length": str(end)})
    finally:
        server.model = served


def check_model(data: bytes) -> None:
    """Load a file of a model, or say why not."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.suppress(StartupError):
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.bin"
        file.write_bytes(data)
        source = Source(str(file))
        source.load()
        assert isinstance(source.loss, tuple)


class Apart:
    """Has a check done in a process of its own, as the server has model files converted, and ends one that is stuck."""

    def __init__(self, check: Callable[[bytes], None], seconds: float):
        self.check, self.seconds, self.stuck = check, seconds, 0
        self.pool: Pool | None = None

    def __call__(self, data: bytes) -> None:
        """Check, for so many seconds at most. Raises what the check raises."""
        self.pool = self.pool or multiprocessing.get_context("spawn").Pool(1)
        try:
            self.pool.apply_async(self.check, [data]).get(self.seconds)
        except multiprocessing.TimeoutError:  # it runs on in a library's loop, or has crashed
            self.stuck += 1
            self.pool.terminate()
            self.pool = None


@dataclass(frozen=True)
class Target:
    """What takes bytes, and the files that are changed for it."""

    check: Callable[[bytes], None]
    seeds: dict[str, bytes]

    def corpus(self, name: str) -> dict[str, bytes]:
        """Return what once failed, by file name."""
        return {file.name: file.read_bytes() for file in sorted((CORPUS / name).glob("*"))}


class Zeros:
    """Answers with zeros."""

    def predict(self, batch: np.ndarray) -> np.ndarray:
        return np.zeros((len(batch), 2), np.float32)


TABLE = Served(
    Spec("table", (Tensor("x", (2, 3), "float32"),), (Tensor("y", (2,), "float32"),), kind="none"),
    PredictorEngine(Zeros()),
)
X = {"name": "x", "datatype": "FP32", "shape": [1, 2, 3], "data": [[[1, 2.5, -3e-4], [0, 1e3, 7]]]}
TEXTS = [
    {"instances": [X["data"][0]]}, {"inputs": {"x": X["data"]}},
    {"signature_name": "serving_default", "instances": [1]},
    {"inputs": [X], "id": "a", "outputs": [{"name": "y", "parameters": {"classification": 1}}]},
    {"inputs": [X | {"data": [1, 2, 3, 4, 5, 6]}], "parameters": {"binary_data_output": True}},
    {"image": base64.b64encode(PIXEL).decode()}, {"images": ["data:image/png;base64,AAAA", "\u00e4\n"]},
]  # fmt: skip
MODELS = ("keras_model.h5", "lambda.h5", "flowers.h5", "silu.keras")

TARGETS = {
    "pictures": Target(check_picture, SEEDS | {name: data for name, (data, _) in WORK.items() if len(data) < 100_000}),
    "forms": Target(check_form, {"form": FORM}),
    "json": Target(check_json, {str(n): json.dumps(text).encode() for n, text in enumerate(TEXTS)}),
    "models": Target(check_model, {name: (DATA / "models" / name).read_bytes() for name in MODELS}),
}


@contextlib.contextmanager
def faked() -> Iterator[None]:
    """Put a fake in the place of the model."""
    before, server.model = server.model, Served(Spec(), PredictorEngine(FakeModel()))
    try:
        yield
    finally:
        server.model = before


def fuzz(name: str, target: Target, seconds: float) -> int:
    """Try inputs that no one has tried, for so long; returns how many. What fails is kept, made as small as can be."""
    end, tried, last, worst = time.monotonic() + seconds, 0, b"", (0.0, 0)
    seeds = [*target.seeds.values(), *target.corpus(name).values()]

    @settings(max_examples=300, phases=[Phase.generate, Phase.shrink])
    @given(st.integers(0, len(seeds) - 1), DICE)
    def holds(number: int, dice: int) -> None:
        nonlocal tried, last, worst
        if time.monotonic() > end:  # the rest of the examples
            return
        last = mutate(seeds[number], dice)
        started = time.monotonic()
        target.check(last)
        worst = max(worst, (time.monotonic() - started, len(last)))
        tried += 1

    while time.monotonic() < end:
        try:
            seed(Random().getrandbits(64))(holds)()
        except Exception:
            file = CORPUS / name / hashlib.sha256(last).hexdigest()[:16]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(last)
            print(f"{name}: failed, kept as {file}")
            raise
    print(f"{name}: {tried:,} inputs, the slowest {worst[0]:.2f} s for {worst[1]:,} bytes", flush=True)
    return tried


def fuzz_http(seconds: float) -> int:
    """Send messages to a server for so long; returns how many it answered."""
    end, answers = time.monotonic() + seconds, 0
    options = ("--timeout", "5", "--queue-size", "8", "--keep-alive", "2")
    with FakeServer(*options, HEAD_SECONDS=2, SILENT_SECONDS=1) as fake:
        while time.monotonic() < end:
            answers += send_messages(fake, 300, Random().getrandbits(64))
        assert fake.ask(post()).status == 200
        assert "Traceback" not in fake.log, fake.log
    print(f"http: {answers:,} answers")
    return answers


def send_messages(fake: FakeServer, examples: int, start: int | None) -> int:
    """Send connections with up to three messages each, random ones from a `start`; returns how many answers came."""
    answers = 0

    @settings(max_examples=examples, derandomize=start is None)
    @given(st.lists(message(), min_size=1, max_size=3), st.booleans())
    def holds(messages: list[bytes], apart: bool) -> None:
        nonlocal answers
        with fake.raw() as raw, contextlib.suppress(OSError):
            for data in messages if apart else [b"".join(messages)]:
                raw.send(data)
            raw.socket.shutdown(socket.SHUT_WR)
            answers += len(check_answers(b"".join(read_all(raw)), any(b"HEAD" in data for data in messages)))

    (holds if start is None else seed(start)(holds))()
    return answers


def main() -> None:
    """Fuzz every target for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--target", action="append", choices=[*TARGETS, "http"])
    options = parser.parse_args()
    chosen = options.target or [*TARGETS, "http"]
    settings.load_profile("fuzz")
    apart = Apart(check_model, 60)  # HDF5's library never ends with some files
    targets = TARGETS | {"models": Target(apart, TARGETS["models"].seeds)}
    with faked():
        for name in chosen:
            share = options.seconds / len(chosen)
            fuzz_http(share) if name == "http" else fuzz(name, targets[name], share)
    if apart.stuck:
        print(f"models: {apart.stuck} of the inputs kept the process that loads them busy, or ended it")


profile = {"deadline": None, "database": None, "suppress_health_check": [*HealthCheck], "print_blob": False}
settings.register_profile("fuzz", **profile)
settings.register_profile("server", derandomize=True, **profile)

if __name__ == "__main__":
    main()
