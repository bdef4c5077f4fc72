"""The log and what the start prints, where nobody reads them or they cannot be written."""

import contextlib
import io
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import HERE, PIXEL, FakeServer, Raw, post, request, wait_until
from PIL import Image

MISSING = re.compile(r"WARNING (\d+) lines of the log are missing here")


class Pipe:
    """A pipe that nobody reads until read() is called."""

    def __init__(self) -> None:
        self.ours, self.theirs = os.pipe()

    def fill(self) -> None:
        """Leave no room in it."""
        os.set_blocking(self.theirs, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.theirs, b"x" * 4096)
        os.set_blocking(self.theirs, True)

    def read(self) -> str:
        """Read what is in it, until for half a second nothing more comes."""
        found = b""
        while select.select([self.ours], [], [], 0.5)[0] and (piece := os.read(self.ours, 65536)):
            found += piece
        return found.decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe."""
    made = Pipe()
    yield made
    os.close(made.ours)
    os.close(made.theirs)


def requests_on(raw: Raw, count: int) -> None:
    """Ask one after the other on a connection; each leaves a line in the log."""
    for number in range(count):
        raw.send(request("/nothing", X_Request_ID=f"n{number}")).expect(404)


def dropped(fake: FakeServer) -> int:
    """Return how many lines the metrics say were dropped."""
    text = fake.ask(request("/metrics")).body.decode()
    (found,) = re.findall(r"^keras_server_log_lines_dropped_total (\S+)", text, re.MULTILINE)
    return int(float(found))


def test_a_log_that_nobody_reads_holds_up_no_answer_and_says_later_what_it_lacks(pipe: Pipe) -> None:
    with FakeServer(stderr=pipe.theirs, LINES=50, LAST_SECONDS=0.1) as fake:
        with fake.raw() as raw:
            requests_on(raw, 1000)  # of which a pipe of 64 KiB holds half
        lost = dropped(fake)
        assert 100 < lost < 900
        assert len(re.findall("id=n", pipe.read())) == 1000 - lost
        fake.ask(request("/nothing", X_Request_ID="after"))  # now there is room again
        lines = pipe.read().splitlines()
        assert [int(count) for line in lines for count in MISSING.findall(line)] == [lost + 1]  # with that of /metrics
        assert "id=after" in lines[-1]
        assert MISSING.search(lines[-2])


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_server_whose_log_nobody_reads_drains_and_ends(pipe: Pipe, log_format: str) -> None:
    with FakeServer("--log-format", log_format, stderr=pipe.theirs, LINES=50, LAST_SECONDS=0.5) as fake:
        with fake.raw() as raw:
            requests_on(raw, 1000)
        fake.signal()
        assert fake.end() == 0


def test_what_is_logged_last_is_written_before_the_process_ends(pipe: Pipe) -> None:
    with FakeServer(stderr=pipe.theirs, LAST_SECONDS=60) as fake:
        with fake.raw() as raw:
            requests_on(raw, 1000)
        fake.signal()
        wait_until(lambda: fake.ready() == 0)
        time.sleep(1)  # in which it would end
        text = pipe.read()
        assert fake.end() == 0
        text += pipe.read()
        assert re.findall(r"id=(n\d+)", text) == [f"n{number}" for number in range(1000)]  # in order, none twice
        assert "Stopping" in text.splitlines()[-1]


def test_why_the_server_does_not_start_is_said_after_the_log() -> None:
    program = (
        "import logging, sys; from keras_server.front import logs; logs.log.addHandler(logs.Log())\n"
        "for n in range(1000): logs.log.warning('n%d', n)\n"
        "sys.exit(logs.stop('this is why'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [*(f"n{n}" for n in range(1000)), "error: this is why"]


def bad_tiff() -> bytes:
    """Return a TIFF about which libtiff writes to standard error itself."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "TIFF", compression="tiff_lzw")
    data = bytearray(file.getvalue())
    data[10], data[11] = 0xFF, data[11] ^ 0x55
    return bytes(data)


def test_what_decoders_write_to_the_log_keeps_no_thread(pipe: Pipe) -> None:
    with FakeServer(stderr=pipe.theirs) as fake:
        assert fake.ask(post(bad_tiff())).status == 400
        assert "tempfile.tif: Using code not yet in table." in pipe.read()
        pipe.fill()
        with contextlib.ExitStack() as stack:
            raws = [stack.enter_context(fake.raw()).send(post(bad_tiff())) for _ in range(60)]
            for raw in raws:
                raw.expect(400)
        assert fake.ask(post()).status == 200
        fake.signal()
        assert fake.end() == 0


def test_others_that_have_the_same_pipe_may_wait_for_it_as_before(pipe: Pipe) -> None:
    with FakeServer(stderr=pipe.theirs) as fake:
        assert fake.ask(request()).status == 200
        assert os.get_blocking(pipe.theirs)


def test_what_clients_send_does_not_fill_the_log_with_warnings() -> None:
    file = io.BytesIO()
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\x64\0\0\0\x88\x13\0\0\0\0\0\0"  # a text past the end
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)
    with FakeServer() as fake:
        assert fake.ask(post(file.getvalue())).status == 200
        (line,) = fake.log.splitlines()
        assert "status=200" in line


def test_a_log_on_a_full_disk_holds_up_no_answer() -> None:
    with open("/dev/full", "wb") as full, FakeServer(stderr=full.fileno()) as fake:
        for _ in range(20):
            assert fake.ask(request("/nothing")).status == 404
        wait_until(lambda: dropped(fake) >= 20)
        assert fake.ask(post()).status == 200
        fake.signal()
        assert fake.end() == 0


def test_a_log_whose_reader_has_left_holds_up_no_answer() -> None:
    ours, theirs = os.pipe()
    with FakeServer(stderr=theirs) as fake:
        os.close(theirs)
        os.close(ours)
        for _ in range(20):
            assert fake.ask(request("/nothing")).status == 404
        fake.signal()
        assert fake.end() == 0


@contextlib.contextmanager
def server_of(
    redirection: str, *options: str, stdout: int = subprocess.DEVNULL, stderr: int = subprocess.PIPE
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the fake server as a shell does, with its output sent elsewhere; yields it and its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "fake_server.py"), "{}", "--port", str(port), "--drain-seconds", "0"]
    command += ["--allowed-hosts", "*", *options]
    shell = ["bash", "-c", f'exec "$@" {redirection}', "-", *command]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, text=True) as process:
        try:
            yield process, port
        finally:
            process.kill()


def ask(port: int, data: bytes) -> int:
    """Return the status of an answer, once there is somebody to give one."""

    def answer() -> int:
        try:
            with Raw(port) as raw:
                found = raw.send(data).answer()
        except ConnectionRefusedError:
            return 0
        return found.status if found else 0

    return int(wait_until(answer))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
@pytest.mark.parametrize("told", [True, False])
def test_standard_output_on_a_full_disk_ends_the_start_with_a_sentence(told: bool) -> None:
    with server_of(">/dev/full" if told else ">/dev/full 2>&1") as (process, _):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        if told:
            assert errors.startswith("error: Standard output cannot be written to (No space left on device): ")
            assert errors.count("\n") == 1


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-", ">&-", "2>/dev/full"])
def test_without_a_place_for_its_words_the_server_serves(redirection: str) -> None:
    with server_of(redirection) as (process, port):
        for _ in range(3):
            assert ask(port, post()) == 200
        for number in (1, 2):  # which no socket of a client has got
            assert "socket" not in os.readlink(f"/proc/{process.pid}/fd/{number}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_where_nobody_reads_anything_the_server_starts_serves_and_ends(pipe: Pipe) -> None:
    """Standard output and standard error are one pipe, which is full from the beginning."""
    pipe.fill()
    with server_of("", stdout=pipe.theirs, stderr=pipe.theirs) as (process, port):
        for _ in range(3):
            assert ask(port, post(PIXEL)) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_start_that_fails_ends_where_nobody_reads_why(pipe: Pipe) -> None:
    pipe.fill()
    with server_of("", "--host", "256.0.0.1", stderr=pipe.theirs) as (process, _):
        assert process.wait(60) == 1


def test_another_program_may_have_made_the_log_s_pipe_one_that_does_not_wait(pipe: Pipe) -> None:
    os.set_blocking(pipe.theirs, False)
    with FakeServer(stderr=pipe.theirs, LAST_SECONDS=60) as fake:
        with fake.raw() as raw:
            requests_on(raw, 1000)
        text = pipe.read()
        assert re.findall(r"id=(n\d+)", text) == [f"n{number}" for number in range(1000)]
        assert text.count("\n") == 1000  # none was torn


def test_what_nobody_reads_on_standard_output_stands_in_the_log(pipe: Pipe) -> None:
    pipe.fill()
    lines: list[str] = []
    with server_of("", stdout=pipe.theirs) as (process, port):
        assert process.stderr
        reader = threading.Thread(target=lambda: lines.extend(process.stderr))  # type: ignore[arg-type]
        reader.start()
        assert ask(port, request()) == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        reader.join()
    assert any(f"http://127.0.0.1:{port}/predict" in line for line in lines)
