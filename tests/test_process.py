"""The real process, as its users meet it: started, called with curl, the client and the tutorial's snippet, stopped."""

import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import requests
from conftest import DOG, ROOT, Process

from keras_server import resampling
from simple_request import classify


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server of the bundled model, with a cache folder of its own, that never had a model in it."""
    folder = tmp_path_factory.mktemp("cache") / "new"
    process = Process("--model", "bundled", "--cache-dir", str(folder), "--drain-seconds", "0")
    yield process.wait_until_ready()
    process.stop()


def curl(*arguments: str) -> str:
    """Return what curl prints."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_start_up_says_what_is_served_and_how_to_try_it(bundled: Process) -> None:
    serving, resized, try_it = bundled.lines[-3:]
    assert "efficientnet_lite0" in serving
    assert "openvino" in serving
    assert bundled.url in serving
    assert resized == f" * Pictures are resized by {resampling.RESIZER}\n"
    assert f"curl -X POST -F image=@dog.jpg {bundled.url}/predict" in try_it


def test_curl_as_the_tutorial_has_it(bundled: Process) -> None:
    answer = json.loads(curl("-X", "POST", "-F", "image=@dog.jpg", f"{bundled.url}/predict"))
    assert answer["success"] is True
    assert answer["predictions"][0]["label"] == "German_shepherd"
    assert answer["predictions"][0]["probability"] > 0.9
    assert len(answer["predictions"]) == 5


def test_the_line_that_start_up_prints(bundled: Process) -> None:
    words = bundled.lines[-1].split("curl ")[1].split()
    assert json.loads(curl(*words))["predictions"][0]["label"] == "German_shepherd"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their memory otherwise")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what a process has mapped")
def test_the_server_holds_no_tensorflow(bundled: Process) -> None:
    """Whatever is asked of it: the model was converted by another process, and heat maps are OpenVINO's, too."""
    base, picture = bundled.url, DOG.read_bytes()
    name = requests.get(f"{base}/v2/health/ready", timeout=60) and "efficientnet_lite0"
    row = [[[[0, 0, 0]] * 224] * 224]
    infer = {"inputs": [{"name": "image", "shape": [1, 224, 224, 3], "datatype": "FP32", "data": row}]}
    infer["inputs"][0]["name"] = requests.get(f"{base}/v2/models/{name}", timeout=60).json()["inputs"][0]["name"]
    answers = [
        requests.post(f"{base}/predict", data=picture, headers={"Content-Type": "image/jpeg"}, timeout=60),
        requests.post(f"{base}/explain", data=picture, headers={"Content-Type": "image/jpeg"}, timeout=60),
        requests.post(f"{base}/v1/models/{name}:predict", json={"instances": row}, timeout=60),
        requests.post(f"{base}/v2/models/{name}/infer", json=infer, timeout=60),
        *(requests.get(f"{base}{path}", timeout=60) for path in ("/", "/docs", "/openapi.json", "/metrics")),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    mapped = Path(f"/proc/{bundled.popen.pid}/maps").read_text()
    assert "libopenvino" in mapped
    assert not re.search(r"libtensorflow|/(site|dist)-packages/(tensorflow|tf_keras|keras|h5py)/", mapped)


def test_threads_do_not_keep_a_heap_each(bundled: Process) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(classify, DOG, f"{bundled.url}/predict") for _ in range(32)]
    assert all(answer.result() for answer in answers)
    maps = re.findall(r"^(\w+)-(\w+) (\S+)", Path(f"/proc/{bundled.popen.pid}/maps").read_text(), re.MULTILINE)
    parts = [(int(start, 16), int(end, 16), access) for start, end, access in maps]
    size = 2**26  # glibc's on 64 bits: each starts at a multiple of it, and what it does not use yet is inaccessible
    heaps = [
        start
        for (start, _, access), (_, end, rest) in pairwise(parts)
        if start % size == 0 and end == start + size and (access, rest) == ("rw-p", "---p")
    ]
    assert len(heaps) <= 2


SNIPPET = """
import requests
KERAS_REST_API_URL = "{url}/predict"
IMAGE_PATH = "dog.jpg"
image = open(IMAGE_PATH, "rb").read()
payload = {{"image": image}}
r = requests.post(KERAS_REST_API_URL, files=payload).json()
if r["success"]:
    for (i, result) in enumerate(r["predictions"]):
        print("{{}}. {{}}: {{:.4f}}".format(i + 1, result["label"],
            result["probability"]))
else:
    print("Request failed")
"""


def test_the_tutorials_snippet(bundled: Process) -> None:
    """The calls that the article makes, as it makes them."""
    command = [sys.executable, "-c", SNIPPET.format(url=bundled.url)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("1. German_shepherd: 0.9")
    assert len(done.stdout.splitlines()) == 5


def test_the_client(bundled: Process) -> None:
    command = [sys.executable, "simple_request.py", "--url", f"{bundled.url}/predict"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("1. German_shepherd: 0.9")
    assert len(done.stdout.splitlines()) == 5
    assert done.stderr == ""


def test_the_clients_function(bundled: Process) -> None:
    rows = classify(DOG, url=f"{bundled.url}/predict", top=3)
    assert rows[0]["label"] == "German_shepherd"
    assert len(rows) == 3


def test_a_hundred_bad_uploads(bundled: Process) -> None:
    """Not one 5xx, not one answer that is not JSON, and good ones are answered in between."""
    good = DOG.read_bytes()
    with requests.Session() as session:
        for i in range(100):
            cut = good[: i * 97] if i % 3 else bytes([i]) * i * 50
            kind = ("image/jpeg", "multipart/form-data; boundary=x", "application/octet-stream", "text/plain", "")[
                i % 5
            ]
            answer = session.post(f"{bundled.url}/predict", data=cut, headers={"Content-Type": kind} if kind else {})
            assert answer.status_code in (400, 415), (i, answer.text)
            assert answer.json()["success"] is False
        assert session.post(f"{bundled.url}/predict", data=good, headers={"Content-Type": "image/jpeg"}).ok


def test_the_default_model_without_a_way_to_its_weights(start: Callable[..., Process], tmp_path: Path) -> None:
    """One line says what is served instead; that the download was tried and refused is arranged by a proxy."""
    refused = "http://127.0.0.1:9"
    process = start(KERAS_HOME=str(tmp_path), https_proxy=refused, http_proxy=refused, no_proxy="localhost,127.0.0.1")
    process.wait_until_ready()
    told = [line for line in process.lines if "WARNING" in line and "ResNet50" in line]
    assert len(told) == 1
    assert "--weights" in told[0]
    with urllib.request.urlopen(f"{process.url}/readyz") as answer:
        assert json.load(answer)["model"] == "efficientnet_lite0"


def test_an_architecture_that_was_asked_for_is_not_replaced(start: Callable[..., Process], tmp_path: Path) -> None:
    refused = "http://127.0.0.1:9"
    process = start("--model", "mobilenet", KERAS_HOME=str(tmp_path), https_proxy=refused, http_proxy=refused)
    output, _ = process.popen.communicate()
    assert process.popen.returncode == 1
    assert output.splitlines()[-1].startswith("error: The weights of mobilenet")
    assert "Traceback" not in output


MISTAKES = [
    (["--model", "no/such.keras"], 1, "no file"),
    (["--model", "README.md"], 1, "not a Keras model"),
    (["--port", "http"], 2, "--port"),
    (["--host", "256.0.0.1", "--model", "bundled"], 1, "Cannot listen"),
    (["--model", "bundled", "--labels", "requirements.txt"], 1, "1000 classes"),
]


@pytest.mark.parametrize(("arguments", "status", "words"), MISTAKES)
def test_start_up_mistakes_end_with_one_line(
    arguments: list[str], status: int, words: str, start: Callable[..., Process]
) -> None:
    process = start(*arguments)
    output, _ = process.popen.communicate()
    assert process.popen.returncode == status
    assert words in output.splitlines()[-1]
    assert "Traceback" not in output


def test_a_port_that_is_taken_shows_before_the_model_is_loaded(start: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = start("--model", "bundled", "--port", str(other.getsockname()[1]))
        output, _ = process.popen.communicate()
    assert process.popen.returncode == 1
    assert output.count("\n") == 1
    assert "--port" in output


def test_the_port_is_closed_until_the_model_is_loaded(start: Callable[..., Process]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    process = start("--model", "bundled", "--port", str(port), PYTHONUNBUFFERED="")  # as in a pipe of a user's
    assert process.popen.stdout
    assert "Loading" in process.popen.stdout.readline()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    process.wait_until_ready()
    socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_without_a_traceback(number: int, start: Callable[..., Process]) -> None:
    process = start("--model", "bundled").wait_until_ready()
    os.kill(process.popen.pid, number)
    output, _ = process.popen.communicate()
    assert process.popen.returncode == 0
    assert "Traceback" not in output


def test_ctrl_c_while_loading(start: Callable[..., Process]) -> None:
    process = start("--model", "bundled", "--cache-dir", "")
    assert process.popen.stdout
    process.popen.stdout.readline()
    process.popen.send_signal(signal.SIGINT)
    output, _ = process.popen.communicate()
    assert process.popen.returncode == -signal.SIGINT  # a shell says 130
    assert "Traceback" not in output


def test_importing_the_app_loads_nothing_heavy() -> None:
    script = (
        "import sys; from run_keras_server import app, model; assert model is None; "
        "print(sorted({'keras', 'tensorflow', 'openvino', 'torch', 'jax', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_app_under_another_wsgi_server(tmp_path: Path) -> None:
    """`flask run` serves what create_app() returns, set by the environment."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    command = [sys.executable, "-m", "flask", "--app", "run_keras_server:create_app", "run", "--port", str(port)]
    environment = os.environ | {"KERAS_SERVER_MODEL": "bundled", "KERAS_SERVER_TOP": "2"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            for line in process.stderr:
                if "Running on" in line or "WARNING: This is a development" in line:
                    break
            rows = requests.post(f"http://127.0.0.1:{port}/predict", files={"image": DOG.read_bytes()}).json()
            assert len(rows["predictions"]) == 2
        finally:
            process.kill()
