"""`python -m keras_server.ray_app` on this machine keeps the contract of the plain server, and stops as it does."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import cluster_helpers  # noqa: F401 - before Ray
import pytest
import ray
from cluster_helpers import EXPORT, ROOT, free_port, predict, processes

pytestmark = pytest.mark.ray
TESTS = ROOT / ".venv" / "bin" / "python"
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\n\r\n"


@pytest.fixture(scope="module", params=["1", "0"], ids=["HAProxy", "Python proxy"])
def laptop(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    before = processes("haproxy")
    command = [sys.executable, "-m", "keras_server.ray_app", "--model", str(EXPORT), "--port", str(port)]
    command += ["--top", "5"]  # which is the default, and wins over the variable below
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"RAY_SERVE_ENABLE_HA_PROXY": request.param, "KERAS_SERVER_TOP": "3"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        assert process.stdout
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if "is ready at" in line:
                break
        else:
            raise AssertionError("".join(lines))
        reader = threading.Thread(target=process.stdout.read)  # or the pipe fills, and the server waits
        reader.start()
        assert bool(processes("haproxy") - before) == (request.param == "1")
        yield process, port
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join()
    assert processes("haproxy") <= before


def test_the_contract(laptop: tuple[subprocess.Popen[str], int]) -> None:
    command = [TESTS, "-m", "pytest", "-q", "tests/test_contract.py", "--base-url"]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{laptop[1]}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_client(laptop: tuple[subprocess.Popen[str], int]) -> None:
    command = [sys.executable, "simple_request.py", "dog.jpg", "--url", f"http://127.0.0.1:{laptop[1]}/predict"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1. German_shepherd: 0.96")


def test_clients_that_nobody_here_wrote(laptop: tuple[subprocess.Popen[str], int]) -> None:
    command = [CLIENTS, "tests/real_clients.py", f"http://127.0.0.1:{laptop[1]}", "efficientnet_lite0", "dog.jpg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rays_own_health(laptop: tuple[subprocess.Popen[str], int]) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{laptop[1]}/-/healthz", timeout=30) as answer:
        assert answer.status == 200


def test_nothing_is_open_to_other_machines(laptop: tuple[subprocess.Popen[str], int]) -> None:
    own = ray.util.get_node_ip_address()
    if own.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((own, laptop[1]), timeout=5)


def test_slow_clients_take_no_place(laptop: tuple[subprocess.Popen[str], int]) -> None:
    """Far more of them than a replica has places, with bodies that HAProxy holds, and with ones that it passes on."""
    with contextlib.ExitStack() as slow:
        for announced, sent in [(2**20, 700_000), (300_000, 100)] * 50:
            client = slow.enter_context(socket.create_connection(("127.0.0.1", laptop[1]), timeout=30))
            client.sendall(HEAD.format(announced).encode() + bytes(sent))
        started = time.monotonic()
        assert [predict(laptop[1])[0] for _ in range(5)] == [200] * 5
        assert time.monotonic() - started < 20  # long before the slow ones are given up


def test_it_ends_within_its_patience_and_answers_what_it_accepted(laptop: tuple[subprocess.Popen[str], int]) -> None:
    process, port = laptop
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(predict(port)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    assert set(answers) <= {200, 503}
    assert 200 in answers


@pytest.mark.parametrize("engine", ["auto", "keras"])
def test_what_needs_keras_is_refused_in_a_sentence_where_there_is_none(engine: str) -> None:
    command = [
        sys.executable,
        "-m",
        "keras_server.ray_app",
        "--model",
        "bundled",
        "--engine",
        engine,
        "--cache-dir",
        "",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: keras and tensorflow must be installed to convert a model (pip install -r ")
    assert done.stderr.count("\n") == 1
