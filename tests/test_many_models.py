"""Several models in a real process: swapped by --watch and SIGHUP, loaded by request, and each on its own."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, Process
from fakes import wait_until
from multiplying import times

from keras_server.models.source import BUNDLED

CLIENTS = ROOT / ".venv-clients" / "bin"
ONES = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}]}
KEY = {"Authorization": "Bearer secret"}
Start = Callable[..., Process]


def factor(url: str, where: str, **headers: str) -> float:
    """Return what a model multiplies with, whose answer has to name its version."""
    answer = requests.post(f"{url}/v2/models/{where}/infer", json=ONES, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["outputs"][0]["data"][0]


def read_away(process: Process) -> None:
    """Read the log, so that the process never waits for a reader."""
    assert process.popen.stdout
    output = process.popen.stdout
    threading.Thread(target=lambda: [process.lines.append(line) for line in output], daemon=True).start()


@pytest.mark.usefixtures("without_nohup")
def test_new_versions_come_by_watching_and_by_signal(start: Start, tmp_path: Path) -> None:
    times(tmp_path / "m/cats/1/model.xml", 1)
    times(tmp_path / "m/dogs.xml", 5)
    process = start("--model-dir", str(tmp_path / "m"), "--watch", "1000").wait_until_ready()
    url = process.url
    assert any("Serving cats, dogs with openvino" in line for line in process.lines)
    read_away(process)
    assert (factor(url, "cats"), factor(url, "dogs")) == (1, 5)
    times(tmp_path / "m/cats/2/model.xml", 2)
    times(tmp_path / "m/birds.xml", 7)
    process.popen.send_signal(signal.SIGHUP)
    wait_until(lambda: factor(url, "cats") == 2)
    wait_until(lambda: "birds" in requests.get(f"{url}/v1/models", timeout=60).json()["models"])
    assert factor(url, "birds") == 7
    assert requests.get(f"{url}/readyz", timeout=60).status_code == 200
    process.popen.terminate()
    assert process.popen.wait(60) == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep their memory otherwise")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of a process' pages")
def test_the_version_that_was_there_at_start_gives_its_memory_back(start: Start, tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path(f"/proc/{process.popen.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 25_000_000  # numbers of four bytes
    times(tmp_path / "m/cats/1/model.xml", 1, size)
    process = start("--model-dir", str(tmp_path / "m"), "--watch", "0.1").wait_until_ready()
    read_away(process)
    before = resident()
    times(tmp_path / "m/cats/2/model.xml", 2)
    wait_until(lambda: resident() < before - 3 * size)
    assert factor(process.url, "cats") == 2


SLOW = """
import os, pathlib, time
new = pathlib.Path(__file__).with_suffix(".new")
new.write_text(str(os.getpid()))
new.rename(new.with_suffix(".pid"))
time.sleep(1000)
"""


def slow_models(folder: Path) -> tuple[Path, list[str]]:
    """Return a file of Python whose process waits for long, and the options of a server that runs it for a model."""
    times(folder / "m/cats/1/model.xml", 1)
    (folder / "slow.py").write_text(SLOW)
    options = ["--model-dir", str(folder / "m"), "--import", str(folder / "slow.py")]
    return folder / "slow.pid", options


def is_running(pid: Path) -> bool:
    """Return whether the process of this number is there."""
    return Path("/proc", pid.read_text()).exists()


@pytest.mark.parametrize("by_request", [False, True])
def test_it_ends_in_time_while_a_new_model_is_converted(start: Start, tmp_path: Path, by_request: bool) -> None:
    pid, options = slow_models(tmp_path)
    options += ["--api-key", "secret", "--timeout", "1", *([] if by_request else ["--watch", "0.1"])]
    process = start(*options).wait_until_ready()
    read_away(process)
    shutil.copy(BUNDLED, tmp_path / "m" / "new.keras")
    if by_request:
        answer = requests.post(f"{process.url}/v2/repository/models/new/load", headers=KEY, timeout=60)
        assert answer.status_code == 504
    wait_until(pid.exists)
    process.popen.terminate()
    assert process.popen.wait(30) == 0
    wait_until(lambda: not is_running(pid))


@pytest.mark.usefixtures("without_nohup")
def test_a_hangup_while_it_loads_asks_for_a_look(start: Start, tmp_path: Path) -> None:
    pid, options = slow_models(tmp_path)
    shutil.copy(BUNDLED, tmp_path / "m" / "dogs.keras")
    process = start(*options)
    wait_until(pid.exists)
    times(tmp_path / "m/cats/2/model.xml", 2)
    process.popen.send_signal(signal.SIGHUP)
    os.kill(int(pid.read_text()), signal.SIGKILL)
    process.wait_until_ready()
    read_away(process)
    wait_until(lambda: factor(process.url, "cats") == 2)


def test_no_request_is_lost_while_versions_change(start: Start, tmp_path: Path) -> None:
    """Asked by several clients, over HTTP; the answer's numbers are those of the version that it names."""
    times(tmp_path / "m/cats/1/model.xml", 1)
    process = start("--model-dir", str(tmp_path / "m"), "--watch", "0.1").wait_until_ready()
    read_away(process)
    seen: set[str] = set()
    asking = True

    def ask() -> int:
        answers = 0
        with requests.Session() as session:
            while asking:
                answer = session.post(f"{process.url}/v2/models/cats/infer", json=ONES, timeout=60)
                assert answer.status_code == 200, answer.text
                version = answer.json()["model_version"]
                assert answer.json()["outputs"][0]["data"] == [float(version)] * 3
                seen.add(version)
                answers += 1
        return answers

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        wait_until(lambda: seen or clients[0].done())
        for number in range(2, 7):
            times(tmp_path / f"m/cats/{number}/model.xml", number)
            wait_until(lambda number=number: str(number) in seen or clients[0].done())  # type: ignore[misc]
            shutil.rmtree(tmp_path / f"m/cats/{number - 1}")
        asking = False
        assert all(client.result(60) for client in clients)
    assert seen == {"1", "2", "3", "4", "5", "6"}


@pytest.fixture
def three() -> Iterator[subprocess.Popen[str]]:
    """The server with three models and a first one; `url` is set once it is ready."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("KERAS_SERVER_")}
    command = [sys.executable, "-u", str(ROOT / "tests" / "three_models.py"), "--port", "0", "--drain-seconds", "0"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    )
    yield process
    process.kill()
    process.communicate()


def test_a_stuck_model_and_one_that_raises_take_nothing_from_the_others(three: Any) -> None:
    """More requests for the stuck one than there are threads, and than may wait for it."""
    assert three.stdout
    url = next(found[1] for line in three.stdout if (found := re.search(r"Try: curl .* (http://\S+)/predict", line)))
    log: list[str] = []
    threading.Thread(target=lambda: [log.append(line) for line in three.stdout], daemon=True).start()
    statuses: list[int] = []

    def ask(name: str) -> int:
        status = requests.post(f"{url}/v2/models/{name}/infer", json=ONES, timeout=120).status_code
        statuses.append(status)
        return status

    with ThreadPoolExecutor(150) as pool:
        waiting = [pool.submit(ask, "stuck") for _ in range(150)]
        wait_until(lambda: 503 in statuses)  # as many wait as may
        for _ in range(20):
            assert factor(url, "fast") == 2
            assert factor(url, "first") == 2
            assert requests.post(f"{url}/v2/models/raises/infer", json=ONES, timeout=120).status_code == 500
        assert {*statuses} == {503}, "the stuck one has answered nobody"
        three.stdin.write("\n")
        three.stdin.flush()
        assert {one.result(120) for one in waiting} == {200, 503}
    assert sum(status == 200 for status in statuses) >= 100


def test_models_are_loaded_and_unloaded_by_request(start: Start, tmp_path: Path) -> None:
    times(tmp_path / "m/cats/1/model.xml", 1)
    times(tmp_path / "m/dogs.xml", 5)
    times(tmp_path / "outside.xml", 6)
    process = start("--model-dir", str(tmp_path / "m"), "--api-key", "secret").wait_until_ready()
    read_away(process)

    def post(path: str, **options: Any) -> tuple[int, Any]:
        answer = requests.post(f"{process.url}/v2/repository/{path}", headers=KEY, timeout=60, **options)
        return answer.status_code, answer.json()

    times(tmp_path / "m/cats/2/model.xml", 2)
    assert post("models/cats/load") == (200, {})
    assert factor(process.url, "cats", **KEY) == 2
    assert post("models/dogs/unload", json={"parameters": {"unload_dependents": False}}) == (200, {})
    ready = post("index", json={"ready": True})
    assert ready == (200, [{"name": "cats", "version": "2", "state": "READY", "reason": ""}])
    assert {"name": "dogs", "state": "UNAVAILABLE", "reason": "unloaded"} in post("index")[1]
    for name in ("hats", "..", "%2e%2e%2foutside", "outside", "%2Fetc%2Fpasswd", "m%5Ccats"):
        status, answer = post(f"models/{name}/load")
        assert status == 404
        assert "outside.xml" not in str(answer)
    (tmp_path / "m/cats/3").write_text("text")
    status, answer = post("models/cats/load")
    assert status == 400
    assert "is not a Keras model, but a text file" in answer["error"]
    assert factor(process.url, "cats", **KEY) == 2
    status, answer = post("models/dogs/load", json={"parameters": {"config": "{}"}})
    assert (status, answer["error"]) == (400, "A model is loaded as it is in the folder: send no parameters.")
    assert requests.post(f"{process.url}/v2/repository/models/dogs/load", timeout=60).status_code == 401


def test_loading_needs_a_key(start: Start, tmp_path: Path) -> None:
    times(tmp_path / "m/cats.xml", 1)
    process = start("--model-dir", str(tmp_path / "m")).wait_until_ready()
    read_away(process)
    for act in ("load", "unload"):
        answer = requests.post(f"{process.url}/v2/repository/models/cats/{act}", timeout=60)
        assert answer.status_code == 403
        assert "--api-key" in answer.json()["error"]
    assert factor(process.url, "cats") == 1


TRITON = """
import sys
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

with triton.InferenceServerClient(sys.argv[1]) as client:
    headers = {"Authorization": "Bearer secret"}
    index = client.get_model_repository_index(headers=headers)
    assert [row["name"] for row in index] == ["cats", "cats", "dogs"], index
    client.unload_model("dogs", headers=headers)
    assert not client.is_model_ready("dogs", headers=headers)
    assert client.is_model_ready("cats", "2", headers=headers)
    client.load_model("dogs", headers=headers)
    assert client.is_model_ready("dogs", headers=headers)
    assert client.get_model_metadata("cats", "2", headers=headers)["versions"] == ["1", "2"]
    try:
        client.load_model("hats", headers=headers)
    except InferenceServerException as error:
        assert "cats, dogs" in str(error), error
    else:
        raise AssertionError("a model was loaded that is not there")
"""


@pytest.mark.skipif(not CLIENTS.exists() and not os.environ.get("CI"), reason="make test sets up the clients")
def test_tritonclient_loads_and_unloads(start: Start, tmp_path: Path) -> None:
    times(tmp_path / "m/cats/1/model.xml", 1)
    times(tmp_path / "m/cats/2/model.xml", 2)
    times(tmp_path / "m/dogs.xml", 5)
    options = ("--model-dir", str(tmp_path / "m"), "--versions", "3", "--api-key", "secret")
    process = start(*options).wait_until_ready()
    read_away(process)
    address = process.url.removeprefix("http://")
    done = subprocess.run([CLIENTS / "python", "-c", TRITON, address], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_the_curl_lines_of_tensorflow_serving_with_versions_and_labels(start: Start, tmp_path: Path) -> None:
    """Of "RESTful API", for a folder as TensorFlow Serving has it."""
    folder = tmp_path / "m" / "half_plus_two"
    for number in (1, 2, 123):
        times(folder / str(number) / "model.xml", number)
    (tmp_path / "m" / "half_plus_two.toml").write_text("[version_labels]\nstable = 2\ncanary = 123")
    process = start("--model-dir", str(tmp_path / "m"), "--versions", "2").wait_until_ready()
    read_away(process)

    def curl(path: str, *arguments: str) -> Any:
        command = ["curl", "-sS", *arguments, f"{process.url}/v1/models/half_plus_two{path}"]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    body = ("-X", "POST", "-d", '{"instances": [[1, 2, 5]]}')
    assert curl(":predict", *body) == {"predictions": [[123, 246, 615]]}
    assert curl("/versions/2:predict", *body) == {"predictions": [[2, 4, 10]]}
    assert curl("/labels/stable:predict", *body) == {"predictions": [[2, 4, 10]]}
    assert curl("/labels/canary:predict", *body) == {"predictions": [[123, 246, 615]]}
    assert [*curl("/versions/1:predict", *body)] == ["error"]
    good = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert curl("")["model_version_status"] == [{"version": "123", **good}, {"version": "2", **good}]
    assert curl("/versions/2")["model_version_status"] == [{"version": "2", **good}]
    assert curl("/versions/2/metadata")["model_spec"]["version"] == "2"
