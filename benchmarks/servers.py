"""Servers under load: start one, watch all of its processes, send it pictures, end it. Linux only (/proc)."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).resolve().parent
START_TIMEOUT = 180  # seconds; Ray takes half a minute on two busy cores
BOUNDARY = "a-boundary-that-no-picture-contains"


class StartError(Exception):
    """A server did not come up; the message is the end of its log."""


# ----------------------------------------------------------------------------------------------------------------------
# Payloads and load
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Payload:
    """What a request posts: the file of its body, the type of that, and where it goes."""

    body: Path
    content_type: str
    route: str = "/predict"


@dataclass(frozen=True, kw_only=True)
class Picture(Payload):
    """A JPEG file, and the request that uploads it."""

    path: Path


def make_numbers(folder: Path) -> Payload:
    """Write one row of four numbers, as TensorFlow Serving's REST API takes them."""
    numbers = Payload(folder / "four.json", "application/json", "/v1/models/numbers:predict")
    numbers.body.write_text('{"instances": [[5.1, 3.5, 1.4, 0.2]]}')
    return numbers


def make_picture(folder: Path, name: str, size: tuple[int, int]) -> Picture:
    """Write dog.jpg in another size, plainly and as a form."""
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    picture = Picture(folder / f"{name}.form", content_type, path=folder / f"{name}.jpg")
    with Image.open(HERE.parent / "dog.jpg") as image:
        image.convert("RGB").resize(size).save(picture.path, "JPEG", quality=90)
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="dog.jpg"\r\n'
    head += "Content-Type: image/jpeg\r\n\r\n"
    picture.body.write_bytes(head.encode() + picture.path.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode())
    return picture


def wrk(port: int, payload: Payload, clients: int, seconds: float) -> tuple[list[str], dict[str, str]]:
    """Return the command that posts the payload again and again, and its environment."""
    whole = f"{seconds:.0f}"
    command = ["wrk", "--threads=1", f"--connections={clients}", f"--duration={whole}s", "--timeout=30s"]
    command += [f"--script={HERE / 'post.lua'}", f"http://127.0.0.1:{port}{payload.route}"]
    environment = os.environ | {"BENCH_BODY": str(payload.body), "BENCH_CONTENT_TYPE": payload.content_type}
    return command, environment | {"BENCH_SECONDS": whole}


def load(port: int, payload: Payload, clients: int, seconds: float) -> dict[str, Any]:
    """Post the payload from a number of clients, each again as soon as it has its answer; return what wrk counted."""
    command, environment = wrk(port, payload, clients, seconds)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "clients": clients,
        "answers": found["answers"],
        "rps": found["rps"],
        "p50_ms": found["p50_ms"],
        "p99_ms": found["p99_ms"],
        "errors": found["bad_status"] + found["socket_errors"],
    }


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def used(stat: str) -> float:
    """Return the seconds of a processor that a process has taken, from its file stat in /proc."""
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def best_label(predictions: list[Any]) -> str:
    """Return the most probable label of five, or the number of the class of one row; nothing for anything else."""
    if len(predictions) == 5:
        return predictions[0]["label"]
    if len(predictions) == 1 and len(row := predictions[0]) == 3:
        return str(row.index(max(row)))
    return ""


class Server:
    """A server, from the start of its first process to the end of its last."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], port: int, folder: Path):
        self.command, self.environment, self.port, self.folder = command, environment, port, folder
        # Some of Ray's processes leave the group and the parent, but all inherit the environment.
        self.tag = uuid.uuid4().hex
        self.log = folder / "server.log"

    def __enter__(self) -> "Server":
        """Start it."""
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment | {"BENCH_TAG": self.tag},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Ask it to end, and end what is left of it after ten seconds."""
        self.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (self.process.poll() is None or self.pids()):
            time.sleep(0.1)
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.kill()
        self.process.wait()

    def pids(self) -> list[int]:
        """Return its processes that live."""
        return [int(folder.name) for folder, text in self._each("environ") if f"BENCH_TAG={self.tag}" in text]

    def _each(self, file: str, pids: Sequence[int] | None = None) -> list[tuple[Path, str]]:
        """Read one file in /proc of the given processes, or of all."""
        texts = []
        for folder in Path("/proc").glob("[0-9]*") if pids is None else [Path(f"/proc/{pid}") for pid in pids]:
            try:
                texts.append((folder, (folder / file).read_text(errors="replace")))
            except OSError:  # it has ended, or is another user's
                continue
        return texts

    def memory_mb(self) -> float:
        """Return the memory of its processes, with each shared page counted once (PSS)."""
        texts = self._each("smaps_rollup", self.pids())
        return sum(int(size) for _, text in texts for size in re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)) / 1024

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have used."""
        return sum(used(text) for _, text in self._each("stat", self.pids()))

    def post(self, body: bytes, content_type: str, route: str = "/predict") -> tuple[int, bytes]:
        """Send one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", route, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def first_answer(self, payload: Payload) -> tuple[float, str]:
        """Wait for the first 200; return the seconds since the start and the most probable label.

        Of numbers the label is that of the most probable class. Raises StartError.
        """
        body = payload.body.read_bytes()
        while time.monotonic() < self.started + START_TIMEOUT and self.process.poll() is None:
            try:
                status, answer = self.post(body, payload.content_type, payload.route)
            except (OSError, http.client.HTTPException):  # it does not listen yet
                status = 0
            if status == 200:
                seconds, found = time.monotonic() - self.started, json.loads(answer)
                found = found[0] if isinstance(found, list) else found  # BentoML answers a batch of one
                if label := best_label(found["predictions"]):
                    return seconds, label
            time.sleep(0.05)
        raise StartError(self.log.read_text(errors="replace")[-2000:] or "(its log is empty)")

    def settle(self) -> None:
        """Wait until it has stopped working for clients that have gone."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(0.4)
            if self.cpu_seconds() - before < 0.2:  # Ray's processes are never quite idle
                return
