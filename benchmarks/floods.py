"""What four good clients keep beside four that send the same costly request again and again.

    python benchmarks/floods.py [--only REGEX] [--seconds 6] [--rounds 3] [--options="--queue-size 2000"]
        [--code FOLDER]

Needs wrk. Prints for each flood its bytes and its answer, what the good clients have of what they have alone (the
median of the rounds, each beside its own "alone"), the time in which 95 % of the answers of /healthz came, and the most
memory that the server had by then. Both kinds of clients compute on the server's processors. --code measures another
checkout, to compare with.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import http.client
import io
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from contestants import arguments_of, environment_of, make_model_of_numbers
from PIL import Image
from servers import HERE, Payload, Server, free_port, load, make_numbers, make_picture, wrk

ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bombs import scans, tiff, webp  # noqa: E402 - of the tests

CLIENTS = 4  # of each kind
FORM = "multipart/form-data; boundary=XX"
JSON = "application/json"
PREDICT = "/v1/models/numbers:predict"


class Flood(NamedTuple):
    """A request that is sent again and again, and the model that it is sent to."""

    model: str
    name: str
    body: bytes
    content_type: str
    route: str = "/predict"
    coding: str | None = None


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB", **options: object) -> bytes:
    """Return the sample photo in another size and format; of more than its own pixels one colour."""
    with Image.open(ROOT / "dog.jpg") as photo:
        image = photo.convert(mode).resize(size) if size[0] * size[1] < 2e7 else Image.new(mode, size)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def form(*files: bytes) -> bytes:
    """Return a form of pictures."""
    head = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--XX--\r\n"


def pictures() -> Iterator[Flood]:
    """Yield what is sent to a model of pictures."""
    large = encoded((7000, 7000), "WEBP", lossless=True)
    bits = encoded((7071, 7071), "PNG", "1")
    plain = io.BytesIO()
    Image.new("RGB", (1200, 1200), (9, 9, 9)).save(plain, "PNG")
    kinds = {
        "JPEG of 48 scans": scans(7071, 48),
        "PNG of one bit": bits,
        "WebP of one colour": large,
        "TIFF of 8 bits": encoded((7000, 7000), "TIFF", "L", compression="tiff_deflate"),
        "refused TIFF": tiff(60_000, 60_000),
        "refused WebP": webp(16_000, 16_000),
        "PNG of 1.4 megapixels": plain.getvalue(),
        "photo of 12 megapixels": encoded((4000, 3000), "JPEG", quality=97),
        "photo of 0.2 megapixels": encoded((500, 375), "JPEG", quality=90),
    }
    for name, data in kinds.items():
        yield Flood("bundled", name, data, "application/octet-stream")
    yield Flood("bundled", "heat map", encoded((224, 224), "JPEG"), "image/jpeg", "/explain")
    small, tiny = encoded((224, 224), "JPEG"), encoded((64, 64), "JPEG")
    yield Flood("bundled", "form of 32 pictures", form(*[small] * 32), FORM)
    yield Flood("bundled", "form of 128 pictures", form(*[tiny] * 128), FORM)
    yield Flood("bundled", "form of 100 tiny PNGs", form(*[encoded((8, 8), "PNG")] * 100), FORM)
    yield Flood("bundled", "form of 128 large PNGs", form(*[bits] * 128), FORM)
    empty = b'--XX\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n'
    for count in (100, 250, 1000):
        yield Flood("bundled", f"form of {count} empty parts", empty * count + b"--XX--\r\n", FORM)
    texts = b",".join(b'"%b"' % base64.b64encode(tiny) for _ in range(128))
    yield Flood("bundled", "JSON of 128 pictures", b'{"images":[%b]}' % texts, JSON)
    yield Flood("bundled", "JSON of 6,000 texts", b'{"images":[%b"a"]}' % (b'"abcdefg",' * 6000), JSON)


def numbers() -> Iterator[Flood]:
    """Yield what is sent to a model of four numbers."""

    def rows(*each: bytes) -> bytes:
        return b'{"instances":[%b]}' % b",".join(each)

    for name, body in {
        "one row": rows(b"[1,2,3,4]"),
        "32 rows": rows(*[b"[1,2,3,4]"] * 32),
        "128 rows": rows(*[b"[1.5,2.5,3.5,4.5]"] * 128),
        "2,000 rows": rows(*[b"[1.5,2.5,3.5,4.5]"] * 2000),
        "4,000 rows in 60 kB": rows(*[b"[1e-300,1,2,3]"] * 4000),
        "4,000 rows in 70 kB": rows(*[b"[1e-300,1,2,3]"] * 4000) + b" " * 10_000,
        "6,000 objects": rows(*[b'{"a":[1]}'] * 6000),
        "6,000 texts": rows(*[b'"abcdefg"'] * 6000),
        "20,000 empty lists": rows(*[b"[]"] * 20_000),
        "30,000 numbers": rows(*[b"1"] * 30_000),
        "long row": rows(b"[%b1]" % (b"1," * 30_000)),
        "128 objects of one name": rows(*[b'{"dense_input":[1,2,3,4]}'] * 128),
        "400 kB of rows": rows(*[b"[0.123456789,0.5,0.25,1]"] * 16_000),
    }.items():
        yield Flood("numbers", name, body, JSON, PREDICT)
    header = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[16000,4],"data":[%b1]}]}' % (b"1," * 63_999)
    yield Flood("numbers", "16,000 rows to /v2", header, JSON, "/v2/models/numbers/infer")
    for name, filling in {"empty objects": b'{"":{}},', "empty lists": b"[],", "texts": b'"",'}.items():
        for what, start in {"unread": b'{"x":[', "instances": b'{"instances":['}.items():
            text = gzip.compress(start + filling * (2**24 // len(filling) - 10) + b"0]}", 9)
            yield Flood("numbers", f"16 MiB of {name}, {what}", text, JSON, PREDICT, "gzip")


def answer(port: int, flood: Flood) -> int:
    """Return the status of the answer to a flood's request."""
    headers = {"Content-Type": flood.content_type} | ({"Content-Encoding": flood.coding} if flood.coding else {})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", flood.route, flood.body, headers)
    return connection.getresponse().status


def flooding(port: int, flood: Flood, folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Have as many clients send the request for so many seconds."""
    body = folder / "flood"
    body.write_bytes(flood.body)
    command, environment = wrk(port, Payload(body, flood.content_type, flood.route), CLIENTS, seconds)
    environment |= {"BENCH_CODING": flood.coding} if flood.coding else {}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def share(server: Server, good: Payload, flood: Flood, seconds: float) -> tuple[float, list[float]]:
    """Return the good clients' requests/s beside a flood as a share of theirs alone, and the times of /healthz."""
    times, done = list[float](), threading.Event()

    def probe() -> None:
        while not done.wait(0.1):
            started = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            connection.close()
            times.append(time.monotonic() - started)

    alone = load(server.port, good, CLIENTS, seconds)["rps"]
    with flooding(server.port, flood, server.folder, seconds + 2) as process:
        time.sleep(1)
        prober = threading.Thread(target=probe)
        prober.start()
        beside = load(server.port, good, CLIENTS, seconds)["rps"]
        done.set()
        prober.join()
        process.wait()
    server.settle()
    return beside / alone, sorted(times)


def peak(server: Server) -> int:
    """Return the most memory that the server had, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that a flood's name has to match")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="", help="of the server")
    parser.add_argument("--code", type=Path, default=ROOT)
    args = parser.parse_args()

    make_model_of_numbers()
    print("| flood | bytes | answer | share | /healthz, ms | peak, MiB |\n|---|---:|---:|---:|---:|---:|", flush=True)
    for make in (numbers, pictures):
        floods = [flood for flood in make() if re.search(args.only, flood.name)]
        if not floods:
            continue
        model, port = floods[0].model, free_port()
        command = [sys.executable, str(args.code / "run_keras_server.py"), "--port", str(port), "--log-level", "error"]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            good: Payload = make_numbers(folder) if model == "numbers" else make_picture(folder, "small", (224, 224))
            environment = environment_of(model, port, folder)
            with Server([*command, *arguments_of(model), *args.options.split()], environment, port, folder) as server:
                server.first_answer(good)
                load(port, good, CLIENTS, 3)
                for flood in floods:
                    status = answer(port, flood)
                    rounds = [share(server, good, flood, args.seconds) for _ in range(args.rounds)]
                    health = sorted(each for _, times in rounds for each in times)
                    print(
                        f"| {flood.name} | {len(flood.body):,} | {status} | {median(r for r, _ in rounds):.2f} | "
                        f"{1000 * health[int(0.95 * len(health))]:.0f} | {peak(server)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
