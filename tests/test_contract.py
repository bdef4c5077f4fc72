"""What POST /predict promises, over HTTP, whoever serves it: `pytest tests/test_contract.py --base-url URL`.

Without the option the plain server is started. The server has its default limits and any model of ImageNet's classes.
"""

import io
import json
import re
import socket
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from conftest import DOG, Process, encode
from PIL import Image

Form = list[tuple[str, Any]]
PHOTO = DOG.read_bytes()
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, cache: str) -> Iterator[str]:
    """The address of the server under test."""
    if given := request.config.getoption("--base-url"):
        yield given.rstrip("/")
        return
    process = Process("--model", "bundled", "--cache-dir", cache, "--drain-seconds", "0")
    yield process.wait_until_ready().url
    process.stop()


def form(*files: tuple[str, bytes]) -> Form:
    return [("image", file) for file in files]


def post(url: str, data: bytes, kind: str = "image/jpeg", path: str = "/predict", **headers: str) -> requests.Response:
    """Send a raw body."""
    return requests.post(url + path, data=data, headers={"Content-Type": kind} | headers, timeout=60)


def check_error(answer: requests.Response, status: int) -> str:
    """Pin the one shape of every error; returns its sentence."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert re.fullmatch("[A-Za-z0-9._-]{1,64}", answer.headers["X-Request-ID"])
    assert answer.json().keys() == {"success", "error"}
    assert answer.json()["success"] is False
    assert re.fullmatch(r".*[.:].*", answer.json()["error"]), "a sentence"
    return answer.json()["error"]


def check_rows(rows: list[dict[str, Any]], count: int = 5) -> None:
    """Hold an answer's rows against the promise."""
    assert len(rows) == count
    assert all(list(row) == ["label", "probability"] for row in rows)
    probabilities = [row["probability"] for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= p <= 1 for p in probabilities)


def test_one_file(url: str) -> None:
    answer = requests.post(f"{url}/predict", files={"image": PHOTO}, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert list(answer.json()) == ["success", "model", "predictions"]
    assert answer.json()["success"] is True
    check_rows(answer.json()["predictions"])
    if answer.json()["model"] == "efficientnet_lite0":
        assert answer.json()["predictions"][0]["label"] == "German_shepherd"
        assert answer.json()["predictions"][0]["probability"] > 0.9


def test_the_answer_is_always_the_same(url: str) -> None:
    """From whichever replica, alone or in a batch; batches may differ in the last digits."""
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(url, PHOTO).json()["predictions"], range(32)))
    for rows in answers:
        assert [row["label"] for row in rows] == [row["label"] for row in answers[0]]
        for row, first in zip(rows, answers[0], strict=True):
            assert row["probability"] == pytest.approx(first["probability"], abs=1e-4)


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_top(url: str, n: int) -> None:
    check_rows(post(url, PHOTO, path=f"/predict?top={n}").json()["predictions"], n)


@pytest.mark.parametrize("top", ["0", "1001", "five", "", "-1"])
def test_top_that_is_no_number_of_rows(url: str, top: str) -> None:
    assert "1 to 1000" in check_error(post(url, PHOTO, path=f"/predict?top={top}"), 400)


def test_several_files(url: str) -> None:
    files = form(("a.jpg", PHOTO), ("b.txt", b"no image"), ("c.png", encode(Image.new("RGB", (9, 9)))))
    answer = requests.post(f"{url}/predict?top=2", files=files, timeout=60)
    assert answer.status_code == 200
    assert list(answer.json()) == ["success", "model", "results"]
    first, second, third = answer.json()["results"]
    assert [r["filename"] for r in (first, second, third)] == ["a.jpg", "b.txt", "c.png"]
    assert [r["success"] for r in (first, second, third)] == [True, False, True]
    check_rows(first["predictions"], 2)
    assert "not an image" in second["error"]


def test_several_files_and_none_good(url: str) -> None:
    answer = requests.post(f"{url}/predict", files=form(("a", b"x"), ("b", b"y")), timeout=60)
    assert answer.status_code == 400
    assert [result["success"] for result in answer.json()["results"]] == [False, False]


@pytest.mark.parametrize("kind", ["image/jpeg", "image/anything", "application/octet-stream"])
def test_raw_body(url: str, kind: str) -> None:
    answer = post(url, PHOTO, kind)
    assert answer.status_code == 200
    check_rows(answer.json()["predictions"])


def test_chunked_body(url: str) -> None:
    """As curl sends what it reads from a pipe."""
    parts = (PHOTO[i : i + 10_000] for i in range(0, len(PHOTO), 10_000))
    answer = requests.post(f"{url}/predict", data=parts, headers={"Content-Type": "image/jpeg"}, timeout=60)
    assert answer.status_code == 200
    check_rows(answer.json()["predictions"])


BAD = {
    "empty": b"",
    "text": b"this is text",
    "cut off": PHOTO[:5000],
    "not on the list": encode(Image.new("L", (9, 9)), "ICO"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(url: str, name: str) -> None:
    check_error(post(url, BAD[name]), 400)
    check_error(requests.post(f"{url}/predict", files=form(("a", BAD[name])), timeout=60), 400)


def test_no_image(url: str) -> None:
    assert "-F image=@" in check_error(requests.post(f"{url}/predict", timeout=60), 400)
    two = {"left": PHOTO, "right": PHOTO}
    assert "-F image=@" in check_error(requests.post(f"{url}/predict", files=two, timeout=60), 400)


def test_more_pixels_than_allowed(url: str) -> None:
    """A small file that would be 300 MB of pixels."""
    head = encode(Image.new("RGB", (1, 1)))[:8]
    chunks = [(b"IHDR", (10_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])), (b"IDAT", b""), (b"IEND", b"")]
    for kind, data in chunks:
        head += len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    assert "10000 x 10000" in check_error(post(url, head, "image/png"), 400)


@pytest.mark.parametrize("chunked", [False, True])
def test_body_over_the_limit(url: str, chunked: bool) -> None:
    """The client reads the answer although it sends on."""
    block = bytes(MEBIBYTE)
    sender = (block for _ in range(17))
    data: Any = sender if chunked else block * 17
    answer = requests.post(f"{url}/predict", data=data, headers={"Content-Type": "image/jpeg"}, timeout=60)
    assert "16 MiB" in check_error(answer, 413)


@pytest.mark.parametrize("kind", ["text/plain", "multipart/mixed", "video/mp4"])
def test_other_content_types(url: str, kind: str) -> None:
    assert "multipart/form-data" in check_error(post(url, PHOTO, kind), 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/predict", 405), ("PUT", "/predict", 405), ("GET", "/nothing", 404), ("POST", "/nothing", 404)],
)
def test_other_paths_and_methods(url: str, method: str, path: str, status: int) -> None:
    answer = requests.request(method, url + path, timeout=60)
    check_error(answer, status)
    assert ("Allow" in answer.headers) == (status == 405)


def test_health_and_metrics(url: str) -> None:
    assert requests.get(f"{url}/healthz", timeout=60).json() == {"status": "alive"}
    ready = requests.get(f"{url}/readyz", timeout=60).json()
    assert ready["status"] == "ready"
    assert ready["model"] == post(url, PHOTO).json()["model"]
    assert "keras_server_requests_total" in requests.get(f"{url}/metrics", timeout=60).text


def test_the_page(url: str) -> None:
    answer = requests.get(f"{url}/", timeout=60)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/html")


def test_request_id_that_the_client_chose(url: str) -> None:
    """And once: two would be joined with a comma."""
    assert post(url, PHOTO, **{"X-Request-ID": "chosen-1"}).headers["X-Request-ID"] == "chosen-1"
    assert post(url, b"x", **{"X-Request-ID": "chosen-2"}).headers["X-Request-ID"] == "chosen-2"


def test_a_connection_serves_many_requests(url: str) -> None:
    with requests.Session() as session:
        for data, status in ((PHOTO, 200), (b"x", 400), (PHOTO, 200)):
            answer = session.post(f"{url}/predict", data=data, headers={"Content-Type": "image/jpeg"}, timeout=60)
            assert answer.status_code == status


def test_slow_clients_keep_nobody_waiting(url: str) -> None:
    """More of them than there are threads, each with half a request."""
    found = urlsplit(url)
    head = f"POST /predict HTTP/1.1\r\nHost: {found.netloc}\r\nContent-Length: {len(PHOTO)}\r\n\r\n"
    slow = [socket.create_connection((found.hostname, found.port or 80), timeout=60) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(head.encode() + PHOTO[:1000])
        assert post(url, PHOTO).status_code == 200
        slow[0].sendall(PHOTO[1000:])
        answer = io.BytesIO(slow[0].recv(65536)).readline()
        assert answer.startswith(b"HTTP/1.1 200")
    finally:
        for connection in slow:
            connection.close()


def test_answers_are_one_line_of_json(url: str) -> None:
    for answer in (post(url, PHOTO), post(url, b"x")):
        json.loads(answer.text)
        assert answer.text.count("\n") == 1
        assert answer.text.endswith("}\n")
