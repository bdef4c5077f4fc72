"""deploy/nginx.conf before real servers: what dies loses nothing, and nginx's own errors keep the contract."""

import json
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from conftest import ROOT, lacking
from fakes import PIXEL, FakeServer, post, request, wait_until
from proxies import Proxy, program

from keras_server.errors import OVERLOADED
from keras_server.settings import Settings

BLOCK = (ROOT / "deploy" / "nginx.conf").read_text("utf-8")
(UPSTREAM,) = re.findall(r"^ +server (127\.0\.0\.1:5000)( .+);$", BLOCK, re.MULTILINE)


def values(name: str) -> list[str]:
    """Return what the block gives a directive."""
    return re.findall(rf"^ +{name} ([^;]+);", BLOCK, re.MULTILINE)


@pytest.fixture
def before() -> Iterator[Callable[..., Proxy]]:
    """Start nginx with the block before servers on these ports."""
    with ExitStack() as stack:

        def start(*ports: int) -> Proxy:
            if not program("nginx"):
                lacking("nginx is not installed: apt-get install nginx.")
            address, options = UPSTREAM
            servers = " ".join(f"server 127.0.0.1:{port}{options};" for port in ports)
            block = BLOCK.replace(f"server {address}{options};", servers)
            block = block.replace("{", "{{").replace("}", "}}").replace("listen 80;", "listen 127.0.0.1:{port};")
            return stack.enter_context(Proxy("nginx", block=block))

        yield start


def ask(port: int, data: bytes, source: str = "127.0.0.1") -> tuple[int, dict[str, str], bytes]:
    """Return the status, the headers and the body that come of a request on a new connection, whole."""
    with socket.create_connection(("127.0.0.1", port), 60, (source, 0)) as sock:
        sock.sendall(data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        whole = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = whole.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert len(body) == int(fields["content-length"])
    return int(first.split()[1]), fields, body


def test_nginx_finds_no_fault(before: Callable[..., Proxy]) -> None:
    done = subprocess.run([*before(1).command, "-t"], capture_output=True, text=True, check=True)
    assert "test is successful" in done.stderr
    assert "[warn]" not in done.stderr


def test_a_server_of_two_that_is_killed_loses_no_request(before: Callable[..., Proxy]) -> None:
    """Neither those that it had, pictures that were too large for nginx's memory among them, nor those that come."""
    found, stopped = Counter[int](), threading.Event()
    large = PIXEL + bytes(1_500_000)
    # The first answers nothing itself, and has one request in its lane, so that the others wait.
    with FakeServer("--timeout", "300", "--max-batch", "1") as dying, FakeServer() as living:
        port = before(dying.port, living.port).port

        def client(data: bytes) -> None:
            while not stopped.is_set():
                found[ask(port, data)[0]] += 1

        for fake in (dying, living):  # so that nginx shares the clients out, however quick the living one is
            fake.tell("hold")
        clients = [threading.Thread(target=client, args=[data]) for data in [post(), post(large)] * 4]
        try:
            for thread in clients:
                thread.start()
            wait_until(lambda: dying.tell()["waiting"] >= 2)
            living.tell("go")
            wait_until(lambda: found[200] > 8)
            dying.popen.kill()
            answered = sum(found.values())
            wait_until(lambda: sum(found.values()) > answered + 50)
        finally:
            stopped.set()
            living.tell("go")
            for thread in clients:
                thread.join()
    assert [*found] == [200]


def test_an_overloaded_server_s_answer_reaches_the_client(before: Callable[..., Proxy]) -> None:
    """And leaves no server out: the next request is taken."""
    with FakeServer("--queue-size", "1", "--max-batch", "1") as fake:
        port = before(fake.port).port
        raws = fake.occupy(2)
        for _ in range(5):
            status, headers, body = ask(port, post())
            assert (status, headers["retry-after"]) == (503, "1")
            assert json.loads(body)["error"] == OVERLOADED
        fake.tell("go")
        for raw in raws:
            assert raw.answer()
            raw.close()
        assert ask(port, post())[0] == 200


@pytest.mark.parametrize(("path", "keys"), [("/predict", ["success", "error"]), ("/v1/models/m:predict", ["error"])])
def test_nginx_s_own_errors_are_in_the_contract_s_shape(
    path: str, keys: list[str], before: Callable[..., Proxy]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = closed.getsockname()[1]
    port = before(dead).port
    large = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {2**24 + 1}\r\n\r\n".encode()
    for data, expected, words in [
        (request(path), 502, "No server answers"),
        (large, 413, "larger than allowed"),
        (request(path, X="a" * 40_000), 400, "too large"),
        (request("/" * 10_000), 414, "too long"),
    ]:
        status, headers, body = ask(port, data)
        assert (status, headers["content-type"]) == (expected, "application/json")
        assert headers.get("retry-after") == ("1" if status == 502 else None)
        assert words in json.loads(body)["error"]
        if status != 414:
            assert [*json.loads(body)] == keys


def test_the_server_s_own_answers_pass_unchanged(before: Callable[..., Proxy]) -> None:
    with FakeServer() as fake:
        port = before(fake.port).port
        for data in (request("/none/such"), post(b"no picture"), request("/predict")):
            passed, direct = ask(port, data), ask(fake.port, data)
            assert (passed[0], passed[2]) == (direct[0], direct[2])
        assert ask(port, request("/metrics"))[0] == 404
        assert ask(fake.port, request("/metrics"))[0] == 200


def test_a_server_on_the_same_machine_is_told_the_names_of_the_site(before: Callable[..., Proxy]) -> None:
    for options, status in {(): 421, ("--allowed-hosts", "*"): 200, ("--allowed-hosts", "site.example"): 200}.items():
        with FakeServer(*options, any_host=False) as fake:
            assert ask(before(fake.port).port, post(Host="site.example"))[0] == status


def test_the_log_knows_the_client_and_no_liar(before: Callable[..., Proxy]) -> None:
    with FakeServer("--trusted-proxies", "127.0.0.1") as fake:
        port = before(fake.port).port
        assert ask(port, post(X_Forwarded_For="192.0.2.1"), source="127.0.0.2")[0] == 200
        wait_until(lambda: "client=" in fake.log)
        assert re.findall(r"client=(\S+)", fake.log) == ["127.0.0.2"]


def test_its_limits_are_the_server_s() -> None:
    settings = Settings()
    assert values("client_max_body_size") == [f"{settings.max_upload_mb:g}m"]
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        assert float(values(name)[0].removesuffix("s")) > settings.timeout
    assert float(values("keepalive_timeout")[0].removesuffix("s")) < settings.keep_alive
    assert UPSTREAM[0] == f"127.0.0.1:{settings.port}"
