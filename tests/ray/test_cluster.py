"""Several nodes on this machine: killed nodes and replicas, dead models, overload. No answer may ever be wrong.

One cluster and one deployment serve all of these tests, in turn: each leaves two replicas, but for the last.

RAY_SERVE_ENABLE_HA_PROXY=0 has them pass Ray's Python proxy instead of HAProxy.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_helpers  # noqa: F401 - before Ray
import pytest
import ray
import watched
from cluster_helpers import HAPROXY, LARGE, PHOTO, ROOT, free_port, lives, predict
from ray import serve
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray
CLIENTS = 6
PATIENCE = 180  # seconds for what a busy machine takes its time with
PLACES = 8  # that a replica has for requests that it works on, and as many for requests that wait


class Load:
    """Clients that ask again and again; every answer is noted with its time and checked.

    What HAProxy answers by itself is text, here of the status `text`. Where a replica dies that, or a connection that
    breaks off, counts as `lost`.
    """

    def __init__(self, port: int, clients: int, data: bytes = PHOTO, text: int = 500):
        self.port, self.data, self.text, self.ended = port, data, text, threading.Event()
        self.answers: list[tuple[float, int]] = []
        self.lost: list[Any] = []
        self.wrong: list[Any] = []
        self.threads = [threading.Thread(target=self.ask) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def ask(self) -> None:
        while not self.ended.is_set():
            try:
                status, answer, headers = predict(self.port, self.data)
            except Exception as error:  # noqa: BLE001 - the proxy lives, so every request is to have an answer
                broken_off = HAPROXY and isinstance(error, ConnectionError)
                (self.lost if broken_off else self.wrong).append(error)
                continue
            if status == 200:
                best = answer["predictions"][0]
                right = best["label"] == "German_shepherd" and abs(best["probability"] - 0.964) < 0.01
            elif HAPROXY and headers["content-type"] == "text/plain":
                right = status == self.text
                self.lost += [(status, answer)] if status == 500 else []
            else:
                right = status == 503 and answer["success"] is False and headers.get("retry-after") == "1"
            if not right:
                self.wrong.append((status, answer, headers))
            self.answers.append((time.monotonic(), status))

    def statuses(self, since: float = 0) -> Counter[int]:
        return Counter(status for at, status in self.answers if at > since)

    def wait_for(self, answers: int) -> None:
        """Wait for so many more good answers."""
        since, deadline = time.monotonic(), time.monotonic() + PATIENCE
        while self.statuses(since)[200] < answers:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the replicas say who they are (see watched.py)."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("replicas")
        patch.setenv(watched.FOLDER, str(path))
        yield path


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """A head that computes nothing but has the proxy, and two nodes with a CPU each."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    serve.shutdown()
    ray.shutdown()
    found.shutdown()


@pytest.fixture(scope="module")
def port(cluster: Cluster, folder: Path) -> int:
    """The port of the cluster's proxy, with two replicas behind it."""
    number = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": number})
    actor = {"num_cpus": 1}
    places = {"max_ongoing_requests": PLACES, "max_queued_requests": PLACES}
    serve.run(watched.watched.options(num_replicas=2, ray_actor_options=actor, **places).bind())
    wait_for_two(folder)
    return number


def replicas(folder: Path) -> dict[int, str]:
    """Return the processes of the replicas that have loaded their model and live, and their nodes."""
    return {
        int(path.name): path.read_text()
        for path in folder.glob("[0-9]*")
        if path.name.isdigit() and lives(int(path.name))
    }


def wait_for_two(folder: Path, without: int = 0) -> float:
    """Wait until two replicas run, none of them in the process `without`; returns the seconds that it took."""
    started = time.monotonic()
    while True:
        (deployment,) = serve.status().applications["default"].deployments.values()
        found = replicas(folder)
        if deployment.replica_states == {"RUNNING": 2} and len(found) == 2 and without not in found:
            return time.monotonic() - started
        assert time.monotonic() < started + PATIENCE, (deployment, found)
        time.sleep(0.1)


def note(name: str, text: str) -> None:
    """Print a figure, and keep it where the caller of the tests asks for it."""
    print(f"\n{name}: {text}")
    if kept := os.environ.get("KERAS_TEST_FIGURES"):
        Path(kept, f"{name}.txt").write_text(text + "\n")


def test_requests_go_on_while_a_node_is_killed(cluster: Cluster, port: int, folder: Path) -> None:
    workers = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    (victim,) = (process for process, node in replicas(folder).items() if node == workers[0].node_id)
    with Load(port, clients=CLIENTS) as load:
        load.wait_for(30)
        killed = time.monotonic()
        cluster.remove_node(workers[0], allow_graceful=False)
        load.wait_for(30)
        after_kill = load.statuses(killed)
        cluster.add_node(num_cpus=1)
        wait_for_two(folder, without=victim)
        recovered = time.monotonic() - killed
        load.wait_for(30)
    assert not load.wrong
    assert len(load.lost) <= 2 * CLIENTS  # what was on its way, and what came before HAProxy had seen that it died
    times = [killed, *(at for at, status in sorted(load.answers) if at > killed and status == 200)]
    gap = max(later - sooner for sooner, later in itertools.pairwise(times))
    figures = f"longest time without a good answer {gap:.1f} s, all replicas back after {recovered:.1f} s"
    note(
        "node",
        f"{figures}, answers meanwhile {dict(after_kill)}, in all {dict(load.statuses())}, lost {len(load.lost)}",
    )


def test_large_requests_go_on_while_a_replica_is_killed(port: int, folder: Path) -> None:
    """And the client that comes with the service copes: it asks again for what was lost."""
    victim = min(replicas(folder))
    command = [sys.executable, "simple_request.py", *["dog.jpg"] * 60, "--url", f"http://127.0.0.1:{port}"]
    with (
        Load(port, clients=CLIENTS, data=LARGE) as load,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as client,
    ):
        load.wait_for(30)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        load.wait_for(30)
        wait_for_two(folder, without=victim)
        recovered = time.monotonic() - killed
        load.wait_for(30)
        shown, _ = client.communicate(timeout=PATIENCE)
    assert client.returncode == 0
    assert shown.count(b"1. German_shepherd: 0.96") == 60
    assert not load.wrong
    assert len(load.lost) <= 2 * CLIENTS  # likewise
    note("large", f"replaced after {recovered:.1f} s, answers {dict(load.statuses())}, lost {len(load.lost)}")


def test_a_replica_whose_model_died_is_replaced(port: int, folder: Path) -> None:
    before = replicas(folder).keys()
    with Load(port, clients=CLIENTS) as load:
        load.wait_for(20)
        (folder / watched.POISON).touch()
        died = time.monotonic()
        while len(left := before & replicas(folder).keys()) == 2:
            assert time.monotonic() < died + PATIENCE
            time.sleep(0.1)
        (victim,) = before - left
        wait_for_two(folder, without=victim)
        recovered = time.monotonic() - died
        load.wait_for(20)
    assert not load.wrong
    assert len(load.lost) <= 2 * CLIENTS  # likewise
    assert not (folder / watched.POISON).exists()
    note("model", f"replaced after {recovered:.1f} s, answers {dict(load.statuses())}, lost {len(load.lost)}")


def test_overload_is_answered_at_once(port: int) -> None:
    with Load(port, clients=6 * PLACES) as load:  # of which two replicas take four times as many as they have places
        load.wait_for(40)
    assert not load.wrong
    assert not load.lost
    assert set(load.statuses()) == {200, 503}


def test_what_was_accepted_is_answered_when_the_app_is_taken_away(port: int) -> None:
    with Load(port, clients=4, text=404) as load:
        load.wait_for(10)
        serve.delete("default")
        ended = time.monotonic()
        time.sleep(1)
    assert not load.wrong
    assert not load.lost
    assert 200 not in load.statuses(ended + 0.5)
    assert load.statuses(ended)[404 if HAPROXY else 503]
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/efficientnet_lite0", timeout=60)
    with raised.value as answer:
        assert answer.code == (404 if HAPROXY else 503)
        if not HAPROXY:
            assert json.load(answer).keys() == {"error"}  # as clients of TensorFlow Serving read it
