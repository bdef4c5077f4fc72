"""Clients that nobody here wrote, unchanged, against a real server; and schemathesis against its document."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
from conftest import DOG, ROOT, Process, engine_and_spec

from keras_server.models.source import Source
from keras_server.settings import Settings

CLIENTS = ROOT / ".venv-clients" / "bin"
clients = pytest.mark.skipif(
    not CLIENTS.exists() and not os.environ.get("CI"), reason="make test sets up the clients in .venv-clients"
)


@pytest.fixture(scope="module")
def url_of(cache: str) -> Iterator[Callable[[str], str]]:
    """Return the address of a model's server, which all tests of this model share."""
    running: dict[str, Process] = {}

    def url(name: str) -> str:
        if name not in running:
            # Converted here, where TensorFlow is loaded once for all.
            engine_and_spec(Source(str(tiny_models.file_of(name))), Settings(cache_dir=cache))
            # With few rows at most, the requests that schemathesis makes up stay small, and so do its time and memory.
            options = ("--queue-size", "4", "--cache-dir", cache, "--drain-seconds", "0")
            running[name] = Process("--model", str(tiny_models.file_of(name)), *options).wait_until_ready()
            threading.Thread(target=read_away, args=[running[name]], daemon=True).start()
        return running[name].url

    yield url
    for process in running.values():
        process.popen.terminate()
        process.popen.wait(60)


def read_away(process: Process) -> None:
    """Read a server's log, which nobody else does: it would stop once the pipe is full."""
    assert process.popen.stdout
    with process.popen.stdout as output:
        output.read()


def run(*command: str | Path) -> str:
    """Run a command and return what it prints; fails with it if the command fails."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@clients
def test_tritonclient_and_kserve(url_of: Callable[[str], str]) -> None:
    servers = {name: url_of(name) for name in ("tabular", "tokens", "digits")}
    command = [CLIENTS / "python", "tests/real_clients.py", DOG, *(f"{name}={url}" for name, url in servers.items())]
    assert run(*command).split()[-3:] == [*servers]


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_the_curl_lines_of_tensorflow_serving(url_of: Callable[[str], str]) -> None:
    """Of "RESTful API", with the port and the name changed."""
    url = url_of("half_plus_two")

    def curl(*arguments: str) -> dict[str, object]:
        return json.loads(run("curl", "-sS", *arguments))

    status = curl(f"{url}/v1/models/half_plus_two")
    assert status["model_version_status"] == [
        {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
    answer = curl("-d", '{"instances": [1.0,2.0,5.0]}', "-X", "POST", f"{url}/v1/models/half_plus_two:predict")
    assert answer == {"predictions": [2.5, 3.0, 4.5]}
    answer = curl("-d", '{"instances": [1.0,5.0]}', "-X", "POST", f"{url}/v1/models/half:predict")
    assert [*answer] == ["error"]


@clients
@pytest.mark.parametrize("name", ["tabular", "digits", "photos"])
def test_schemathesis_finds_nothing(url_of: Callable[[str], str], name: str) -> None:
    """With the settings of tests/schemathesis.toml, as anybody has them who names it."""
    url = url_of(name)
    options = ("--checks=all", "--max-examples=5", "--continue-on-failure", "--seed=1", "--no-color")
    assert "passed" in run(
        CLIENTS / "schemathesis", "--config-file", "tests/schemathesis.toml", "run", f"{url}/openapi.json", *options
    )
