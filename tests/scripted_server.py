"""A small scripted server for the clients' tests, and fixtures with it; and a terminal for what they print."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60  # seconds until a hanging test fails; no test waits that long


@dataclass
class Request:
    path: str
    headers: Message
    image: bytes  # what was in the form's field `image`


Answer = tuple[int, dict[str, str], bytes]


def rows(*labels: str) -> list[dict[str, Any]]:
    return [{"label": label, "probability": 0.5**i} for i, label in enumerate(labels)]


def as_json(status: int, body: object, **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"Content-Type": "application/json"} | fields, json.dumps(body).encode()


def see_text(request: Request) -> Answer:
    """Answer as the server does, where an image of the text `beagle` shows a beagle and `bad` is no image."""
    label = request.image.decode()
    if label.startswith("bad"):
        return as_json(400, {"success": False, "error": f"This is not an image: {label}."})
    return as_json(200, {"success": True, "model": "fake", "predictions": rows(label, "pot")})


class Server(ThreadingHTTPServer):
    """Answers with `answer(request)`, or drops the connection where that is None; counts what comes in."""

    daemon_threads = False  # so that closing the server waits until every socket is closed

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[Request], Answer | None] = see_text
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self.release = threading.Event()  # what a blocked answer waits for; set at the end at the latest

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.base}/predict"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        for connection in self.connections:  # an error that a test still holds also holds its connection
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave in the middle
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        field = re.search(rb'name="image".*?\r\n\r\n(.*)\r\n--[0-9a-f]+--', body, re.DOTALL)
        assert field is not None
        request = Request(self.path, self.headers, field[1])
        self.server.requests.append(request)
        answer = self.server.answer(request)
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def nobody() -> Iterator[str]:
    """Return a URL where nobody listens, and nobody can begin to while the test runs."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}/predict"


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Take away what clients read from the environment."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("KERAS_SERVER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path_factory.getbasetemp() / "no-netrc"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of four images, the third of which is bad."""
    for name, label in {"a": "beagle", "b": "tabby", "c": "bad", "d": "pug"}.items():
        (tmp_path / f"{name}.jpg").write_text(label)
    return tmp_path


def on_terminal(*command: object, cwd: Path | None = None) -> str:
    """Run a program on a terminal of 80 columns; return what it showed."""
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    terminal, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    shown = b""
    with subprocess.Popen([sys.executable, *map(str, command)], stdin=slave, stdout=slave, stderr=slave, cwd=cwd):
        os.close(slave)
        with contextlib.suppress(OSError):  # Linux says EIO when the other side is gone
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    return shown.decode()


def lines_of_json(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
