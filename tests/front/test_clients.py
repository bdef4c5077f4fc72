"""Clients as their platforms bring them: Node's fetch and http, Java's HttpClient and HttpURLConnection."""

import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from conftest import DOG, ROOT, lacking
from fakes import FakeServer, has_ipv6

CLIENTS = ROOT / "tests" / "clients"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def run(*command: object) -> str:
    """Return what a program prints; fails with it where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_node(fake: FakeServer, host: str) -> None:
    if not shutil.which("node"):
        lacking("Node is not installed: apt-get install nodejs.")
    if host == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    found = json.loads(run("node", CLIENTS / "node.mjs", f"http://{host}:{fake.port}", DOG))
    assert len(found) == 7
    assert {*found.values()} == {"German_shepherd"}, found


def test_java(fake: FakeServer) -> None:
    if not shutil.which("javac"):
        pytest.skip("no JDK is installed")
    lines = run("java", CLIENTS / "Java.java", fake.url, DOG).splitlines()
    assert len(lines) == 9
    for line in lines:
        assert json.loads(line)["predictions"][0]["label"] == "German_shepherd", line
