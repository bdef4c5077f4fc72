"""`python ray_serve_app.py` on this machine keeps the contract of the plain server, and stops as it does."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from conftest import ROOT, free_port, predict


@pytest.fixture(scope="module")
def laptop() -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    command = [sys.executable, "ray_serve_app.py", "--model", "bundled", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
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
        yield process, port
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            reader.join()


def test_the_contract(laptop: tuple[subprocess.Popen[str], int]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_contract.py", "--base-url"]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{laptop[1]}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_rays_own_health(laptop: tuple[subprocess.Popen[str], int]) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{laptop[1]}/-/healthz", timeout=30) as answer:
        assert answer.status == 200


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
