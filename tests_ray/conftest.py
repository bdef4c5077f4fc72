"""What tests on Ray share: a path to the service for every process of a cluster, and pictures.

These tests stand outside `testpaths`: `make test-ray` runs them, in an environment that has Ray.
"""

import contextlib
import http.client
import json
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PHOTO = (ROOT / "dog.jpg").read_bytes()
LARGE = PHOTO + bytes(2**20)  # the same picture, too large for HAProxy to ask again with it

os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
os.environ["RAY_AUTH_MODE"] = "disabled"  # or it would leave a token in the home folder
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
os.environ["KERAS_SERVER_MODEL"] = "bundled"
sys.path.insert(0, str(ROOT))

with warnings.catch_warnings():  # of Ray's own use of pydantic and others
    warnings.simplefilter("ignore")
    import keras_server.ray_app  # noqa: F401


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


def predict(port: int, data: bytes = PHOTO, timeout: float = 60) -> tuple[int, dict[str, Any], dict[str, str]]:
    """POST a picture on a new connection; returns status, JSON and headers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/predict", data, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), {k.lower(): v for k, v in answer.getheaders()}
    finally:
        connection.close()
