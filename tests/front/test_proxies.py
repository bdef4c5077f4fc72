"""Behind nginx and HAProxy: paths of their own, whole and piecewise bodies, kept connections, and nothing smuggled."""

import contextlib
import re
import socket
from collections.abc import Iterator
from urllib.parse import urljoin

import pytest
import requests
from conftest import lacking
from fakes import PIXEL, FakeServer, request, wait_until
from framings import framings
from proxies import Proxy, program

from simple_request import PredictionError, classify

NAMES = ["nginx", "haproxy"]
LAST = request("/healthz", Connection="close")


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    """A server that closes idle connections soon."""
    options = ("--keep-alive", "0.5", "--timeout", "20", "--log-level", "debug")
    with FakeServer(*options, SILENT_SECONDS=0.2, LINGER_SECONDS=0.5) as server:
        yield server


def found(name: str, port: int) -> Proxy:
    """Return a proxy before a port, where it is installed."""
    return Proxy(name, port) if program(name) else lacking(f"{name} is not installed: apt-get install {name}.")


@pytest.fixture(scope="module", params=NAMES)
def proxy(request: pytest.FixtureRequest, fake: FakeServer) -> Iterator[Proxy]:
    """A proxy before it."""
    with found(request.param, fake.port) as proxy:
        yield proxy


@pytest.mark.parametrize("prefix", ["", "/buffered", "/streamed"])
def test_pictures_are_classified_under_any_path(proxy: Proxy, prefix: str) -> None:
    with requests.Session() as session:
        url = f"{proxy.url}{prefix}/predict"
        forms = {"image": ("a.png", PIXEL, "image/png")}
        pieces = iter([PIXEL[:20], PIXEL[20:]])
        for answer in (
            session.post(url, files=forms),
            session.post(url, data=pieces, headers={"Content-Type": "image/png"}),  # in chunks
            session.post(url, PIXEL, headers={"Content-Type": "image/png", "Expect": "100-continue"}),
            session.post(url, PIXEL.ljust(500_000, b"\0"), headers={"Content-Type": "image/png"}),
        ):
            assert answer.status_code == 200, answer.text
            assert answer.json()["predictions"][0]["label"] == "German_shepherd"
        answer = session.post(url, b"none", headers={"Content-Type": "image/png"})
        assert answer.status_code == 400
        assert "not an image" in answer.json()["error"]
    assert classify(PIXEL, url)[0]["label"] == "German_shepherd"


@pytest.mark.parametrize("prefix", ["/buffered/", "/streamed/"])
def test_pages_find_what_they_refer_to_under_any_path(proxy: Proxy, prefix: str) -> None:
    for page in ("", "docs"):
        address = f"{proxy.url}{prefix}{page}"
        links = re.findall(r'(?:href|src)="([^"#]+)"', requests.get(address).text)
        assert links
        for link in links:
            assert requests.get(urljoin(address, link)).status_code == 200, link
    document = f"{proxy.url}{prefix}openapi.json"
    (server,) = requests.get(document).json()["servers"]
    assert urljoin(document, server["url"]) == f"{proxy.url}{prefix}"


def test_clients_notice_nothing_as_the_server_closes_its_idle_connections(proxy: Proxy, fake: FakeServer) -> None:
    with requests.Session() as session:
        for number in range(3):
            kind = {"Content-Type": "image/png", "X-Request-ID": str(number)}
            answer = session.post(f"{proxy.url}/predict", PIXEL, headers=kind)
            assert (answer.status_code, answer.headers["X-Request-ID"]) == (200, str(number))
            wait_until(lambda: fake.tell()["connections"] == 0)


def test_connections_to_the_server_are_kept_meanwhile(proxy: Proxy, fake: FakeServer) -> None:
    with requests.Session() as session:
        for _ in range(20):
            assert session.get(f"{proxy.url}/healthz").ok
            assert fake.tell()["connections"] == 1


def converse(port: int, data: bytes) -> bytes:
    """Send requests and return all that comes until the connection is closed, or nothing comes any more."""
    got = b""
    with socket.create_connection(("127.0.0.1", port)) as client, contextlib.suppress(OSError):
        client.settimeout(10)
        client.sendall(data)
        while piece := client.recv(65536):
            got += piece
    return got


def test_nothing_is_smuggled_past_a_proxy(proxy: Proxy, fake: FakeServer) -> None:
    """Each client gets the answers to its own requests, and the server sees no others."""
    for name, data in framings():
        start = len(fake.log)
        got = converse(proxy.port, data + LAST)
        for victim in ("first", "second"):  # on the connection to the server that the attacker has used
            answer = converse(proxy.port, request(X_Request_ID=victim, Connection="close"))
            assert re.findall(rb"(?i)x-request-id: (\S+)", answer) == [victim.encode()], name
        answered = [*re.findall(r"(?i)x-request-id: (\S+)", got.decode("latin-1")), "first", "second"]
        wait_until(lambda: sorted(re.findall(r" id=(\S+)", fake.log[start:])) == sorted(answered))  # noqa: B023


def test_nothing_is_smuggled_past_the_server(fake: FakeServer) -> None:
    """It sees one request or refuses it, and does not look at what is inside or behind."""
    for name, data in framings():
        start = len(fake.log)
        got = converse(fake.port, data + LAST)
        assert b"\r\n\r\n" in got, name
        assert "smuggled" not in fake.log[start:], name


def test_a_size_that_the_proxy_refuses_is_not_said_to_be_the_servers_limit(fake: FakeServer) -> None:
    """Nginx takes a megabyte, unless it is told otherwise."""
    with found("nginx", fake.port) as proxy:
        with pytest.raises(PredictionError, match="A proxy before the server refused the size") as caught:
            classify(PIXEL.ljust(3_000_000, b"\0"), f"{proxy.url}/predict")
        assert caught.value.status == 413


@pytest.mark.parametrize(("name", "status"), [("nginx", 502), ("haproxy", 503)])
def test_a_server_that_is_gone_is_said_to_be(name: str, status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with found(name, port) as proxy, pytest.raises(PredictionError, match="A proxy before the server") as caught:
        classify(PIXEL, f"{proxy.url}/predict")
    assert caught.value.status == status
