"""Clients that nobody here wrote, unchanged, against a real server; and schemathesis against its document."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from conftest import DOG, ROOT, Process

CLIENTS = ROOT / ".venv-clients" / "bin"
clients = pytest.mark.skipif(not CLIENTS.exists(), reason="make test sets up the clients in .venv-clients")


def run(*command: str | Path) -> str:
    """Run a command and return what it prints; fails with it if the command fails."""
    done = subprocess.run([*map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def model(name: str) -> str:
    return "bundled" if name == "bundled" else str(tiny_models.file_of(name))


@clients
@pytest.mark.parametrize("name", ["tabular", "tokens", "digits"])
def test_tritonclient_and_kserve(start: Callable[..., Process], name: str) -> None:
    url = start("--model", model(name)).wait_until_ready().url
    run(CLIENTS / "python", "tests/real_clients.py", url, name, *([DOG] if name == "digits" else []))


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_the_curl_lines_of_tensorflow_serving(start: Callable[..., Process]) -> None:
    """Of "RESTful API", with the port and the name changed."""
    url = start("--model", model("half_plus_two")).wait_until_ready().url

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
@pytest.mark.parametrize("name", ["tabular", "digits", "bundled"])
def test_schemathesis_finds_nothing(start: Callable[..., Process], name: str) -> None:
    """With the settings of schemathesis.toml, as anybody has them who runs it in this folder."""
    url = start("--model", model(name)).wait_until_ready().url
    options = ("--checks=all", "--max-examples=5", "--continue-on-failure", "--seed=1", "--no-color")
    assert "passed" in run(CLIENTS / "schemathesis", "run", f"{url}/openapi.json", *options)
