"""The fake model's server seen from outside, and a client that speaks HTTP by hand."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from supervisor import handing

HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")  # a second, in /proc
# A grey pixel, the smallest of uploads.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)

# The head of a prediction, up to where it says how long the body is.
PREDICT = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)


class Raw:
    """A connection on which bytes are sent as they are, and every answer is held against what all have in common."""

    def __init__(self, port: int, window: int = 0, address: str = "127.0.0.1"):
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.socket.settimeout(30)
        if window:  # how much the kernel takes for this client
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        try:
            self.socket.connect((address, port))
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave."""
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> Self:
        """Send bytes, for as long as the server takes them."""
        self.socket.sendall(data)
        return self

    def answer(self, head: bool = False) -> Answer | None:
        """Read one answer; None where the connection ends before it."""
        try:
            line = self.file.readline()
        except ConnectionResetError:
            return None
        if not line:
            return None
        found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]*\r\n", line)
        assert found, line
        headers = http.client.parse_headers(self.file)
        status = int(found[1])
        if status == 100:
            return Answer(100, headers, b"")
        body = b"" if head or status in (204, 304) else self.file.read(int(headers["Content-Length"]))
        assert "Server" not in headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert re.fullmatch("[A-Za-z0-9._-]{1,64}", headers["X-Request-ID"])
        if status >= 400 and not head:
            assert headers["Content-Type"] == "application/json"
            assert json.loads(body)["error"]
        return Answer(status, headers, body)

    def expect(self, status: int) -> Answer:
        """Read one answer, which has to come and to have this status."""
        answer = self.answer()
        assert answer
        assert answer.status == status
        return answer

    def ended(self) -> bool:
        """Whether the server has closed the connection; waits for it."""
        try:
            return not self.file.read(1)
        except ConnectionResetError:
            return True


def has_ipv6() -> bool:
    """Whether this machine has IPv6's own address."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def request(target: str = "/healthz", method: str = "GET", body: bytes | None = None, **headers: str) -> bytes:
    """Return a well-formed request; the headers' underscores stand for hyphens."""
    fields = {"Host": "test"} | {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def post(body: bytes = PIXEL, target: str = "/predict", **headers: str) -> bytes:
    """Return the request that has an image classified."""
    return request(target, "POST", body, Content_Type="image/png", **headers)


def wait_until(true: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until something holds, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


class FakeServer:
    """The process of fake_server.py; a context manager that ends it."""

    def __init__(
        self,
        *options: str,
        environment: dict[str, str] | None = None,
        files: int = 0,
        stderr: int | None = None,
        any_host: bool = True,
        handed: Sequence[socket.socket] = (),
        **constants: Any,
    ):
        """Start it; `files` is how many it may have open, `handed` what systemd hands over."""
        constants = {"METRICS_SECONDS": 0} | constants  # so that tests see at once what they did
        options = ("--port", "0", "--drain-seconds", "0", *(["--allowed-hosts", "*"] if any_host else []), *options)
        command = [sys.executable, str(HERE / "fake_server.py"), json.dumps(constants), *options]
        if files:
            command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "-", *command]
        numbers = [sock.fileno() for sock in handed]
        if handed:
            command = handing(numbers, command)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_SERVER_")}
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors if stderr is None else stderr,
            text=True,
            env=inherited | (environment or {}),
            pass_fds=numbers,
        )
        assert self.popen.stdin
        assert self.popen.stdout
        self.stdin, self.stdout, self.port = self.popen.stdin, self.popen.stdout, 0
        for line in self.stdout:
            if found := re.search(r"Try: .*:(\d+)/predict", line):
                self.port = int(found[1])
                self.url = f"http://127.0.0.1:{self.port}"
                return
        raise AssertionError(self.log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        self.stdin.close()
        self.stdout.close()
        self.errors.close()

    @property
    def log(self) -> str:
        """What the process has logged by now."""
        with contextlib.suppress(OSError):  # it has ended
            if self.popen.poll() is None and self.port:
                print("stats", file=self.stdin, flush=True)
                while (line := self.stdout.readline()) and not line.startswith("told "):
                    pass
        self.errors.seek(0)
        return self.errors.read().decode()

    @property
    def seconds(self) -> float:
        """What the process has taken of the processors, which is the same on a machine that is busy with others."""
        return sum(map(int, Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / TICKS

    def tell(self, command: str = "stats") -> dict[str, Any]:
        """Give a command; returns the figures after it."""
        print(command, file=self.stdin, flush=True)
        while not (line := self.stdout.readline()).startswith("told "):
            assert line, self.log
        return json.loads(line[5:])

    def wait(self, **wanted: int) -> dict[str, Any]:
        """Wait until the figures are as wanted."""

        def reached() -> dict[str, Any] | None:
            found = self.tell()
            return found if all(found[name] == value for name, value in wanted.items()) else None

        return wait_until(reached)

    def raw(self) -> Raw:
        """Connect."""
        return Raw(self.port)

    def ask(self, data: bytes) -> Answer:
        """Send a request on a new connection and return its answer."""
        with self.raw() as raw:
            answer = raw.send(data).answer(head=data.startswith(b"HEAD"))
        assert answer
        return answer

    def occupy(self, requests: int) -> list[Raw]:
        """Hold the model, and send that many predictions: the first is being computed, the others wait."""
        self.tell("hold")
        raws = [self.raw().send(post())]
        self.wait(busy=True, waiting=0)
        for _ in range(1, requests):
            raws.append(self.raw().send(post()))
            wait_until(lambda: (found := self.tell())["queued"] + found["running"] == len(raws))
        return raws

    def rest(self) -> None:
        """Let everything through and wait until nothing is left of it, whatever a test has left."""
        self.tell("go")
        self.wait(queued=0, running=0)

    def ready(self, address: str = "127.0.0.1") -> int:
        """Return the status of /readyz, or 0 where the port is closed, or closes before the request is sent."""
        try:
            with Raw(self.port, address=address) as raw:
                answer = raw.send(request("/readyz")).answer()
        except (ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            return 0
        return answer.status if answer else 0

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send a signal."""
        self.popen.send_signal(number)

    def end(self) -> int:
        """Wait for its end; returns the exit status."""
        return self.popen.wait(timeout=60)
