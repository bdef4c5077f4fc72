"""What tests on Ray share: a path to the service for every process of a cluster, and pictures.

Each of these tests imports this module before Ray, since it skips them where Ray is not installed. It is no conftest.py
because two of that name would be one module, and that of the other tests needs what is not installed beside Ray.
"""

import contextlib
import http.client
import json
import os
import socket
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

try:
    metadata.version("ray")  # where it is missing `import ray` finds this folder
except metadata.PackageNotFoundError:
    pytest.skip("Ray is not installed: make test-ray sets it up", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PHOTO = (ROOT / "dog.jpg").read_bytes()
LARGE = PHOTO + bytes(2**20)  # the same picture as a file of 1.3 MiB
EXPORT = ROOT / "build" / "bundled"  # which make test-ray has written

os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
os.environ["RAY_AUTH_MODE"] = "disabled"  # or it would leave a token in the home folder
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
os.environ["KERAS_SERVER_MODEL"] = str(EXPORT)

with warnings.catch_warnings():  # of Ray's own use of pydantic and others
    warnings.simplefilter("ignore")
    import keras_server.ray_app  # noqa: F401

HAPROXY = os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"  # or Ray's Python proxy


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def processes(name: str) -> set[int]:
    """Return the processes of this machine with such a name, of which the kernel keeps 15 letters."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if path.read_text().strip() == name:
                found.add(int(path.parent.name))
    return found


def lives(pid: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def predict(port: int, data: bytes = PHOTO, timeout: float = 60) -> tuple[int, Any, dict[str, str]]:
    """POST a picture on a new connection; returns status, the JSON or else the text, and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/predict", data, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        headers = {name.lower(): value for name, value in answer.getheaders()}
        body = answer.read().decode()
        return answer.status, json.loads(body) if headers["content-type"] == "application/json" else body, headers
    finally:
        connection.close()
