"""Several nodes on this machine: killed nodes, dead models, overload. No answer may ever be wrong.

RAY_SERVE_ENABLE_HA_PROXY=0 has them pass Ray's Python proxy instead of HAProxy.
"""

import itertools
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_helpers  # noqa: F401 - before Ray
import fragile
import pytest
import ray
from cluster_helpers import HAPROXY, LARGE, PHOTO, free_port, predict
from ray import serve
from ray.cluster_utils import Cluster

from keras_server.ray_app import deployment

pytestmark = pytest.mark.ray
CLIENTS = 6
PATIENCE = 180  # seconds for what a busy machine takes its time with
OPTIONS: dict[str, Any] = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}, "graceful_shutdown_timeout_s": 5}


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
def cluster() -> Iterator[Cluster]:
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
def port(cluster: Cluster) -> int:
    """The port of the cluster's proxy."""
    number = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": number})
    return number


def replicas(key: str = "node_id") -> dict[str, Any]:
    """Return the running replicas and their nodes, or what else Ray knows of them."""
    applications = serve.status().applications
    client: Any = serve.context._get_global_client()
    details: Any = ray.get(client._controller.get_serve_instance_details.remote())
    if not applications:
        return {}
    deployments = details["applications"]["default"]["deployments"]
    rows = [row for found in deployments.values() for row in found["replicas"]]
    return {row["replica_id"]: row[key] for row in rows if row["state"] == "RUNNING"}


def wait_for_replicas(count: int, without: set[str] = frozenset()) -> float:  # type: ignore[assignment]
    """Wait until so many replicas run, none of them of `without`; returns the seconds that it took."""
    started = time.monotonic()
    while len(replicas()) < count or without & replicas().keys():
        assert time.monotonic() < started + PATIENCE, replicas()
        time.sleep(0.1)
    return time.monotonic() - started


def note(name: str, text: str) -> None:
    """Print a figure, and keep it where the caller of the tests asks for it."""
    print(f"\n{name}: {text}")
    if folder := os.environ.get("KERAS_TEST_FIGURES"):
        Path(folder, f"{name}.txt").write_text(text + "\n")


def test_requests_go_on_while_a_node_is_killed(cluster: Cluster, port: int) -> None:
    serve.run(deployment.options(**OPTIONS).bind())
    wait_for_replicas(2)
    workers = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
    before = replicas()
    with Load(port, clients=CLIENTS) as load:
        load.wait_for(30)
        killed = time.monotonic()
        cluster.remove_node(workers[0], allow_graceful=False)
        load.wait_for(30)
        after_kill = load.statuses(killed)
        lost = {replica for replica, node in before.items() if node == workers[0].node_id}
        cluster.add_node(num_cpus=1)
        wait_for_replicas(2, without=lost)
        recovered = time.monotonic() - killed
        load.wait_for(30)
    assert not load.wrong
    assert len(load.lost) <= CLIENTS  # what was on its way, and nothing later
    assert len(lost) == 1
    times = [killed, *(at for at, status in sorted(load.answers) if at > killed and status == 200)]
    gap = max(later - sooner for sooner, later in itertools.pairwise(times))
    figures = f"longest time without a good answer {gap:.1f} s, all replicas back after {recovered:.1f} s"
    note(
        "node",
        f"{figures}, answers meanwhile {dict(after_kill)}, in all {dict(load.statuses())}, lost {len(load.lost)}",
    )


def test_large_requests_go_on_while_a_replica_is_killed(cluster: Cluster, port: int) -> None:
    serve.run(deployment.options(**OPTIONS).bind())
    wait_for_replicas(2)
    with Load(port, clients=CLIENTS, data=LARGE) as load:
        load.wait_for(30)
        killed = time.monotonic()
        victim, process = next(iter(replicas("pid").items()))
        os.kill(process, signal.SIGKILL)
        load.wait_for(30)
        wait_for_replicas(2, without={victim})
    assert not load.wrong
    assert len(load.lost) <= CLIENTS  # what was on its way, and nothing later
    note("large", f"answers after a replica was killed {dict(load.statuses(killed))}, lost {len(load.lost)}")


def test_a_replica_whose_model_died_is_replaced(cluster: Cluster, port: int, tmp_path: Path) -> None:
    poison = tmp_path / "poison"
    environment = {"env_vars": {fragile.POISON: str(poison)}}
    actor = {"num_cpus": 1, "runtime_env": environment}
    serve.run(fragile.fragile.options(**OPTIONS | {"ray_actor_options": actor}).bind())
    wait_for_replicas(2)
    before = set(replicas())
    with Load(port, clients=CLIENTS) as load:
        load.wait_for(20)
        poison.touch()
        died = time.monotonic()
        while len(before & replicas().keys()) == 2:
            assert time.monotonic() < died + PATIENCE
            time.sleep(0.1)
        wait_for_replicas(2)
        recovered = time.monotonic() - died
        load.wait_for(20)
    assert not load.wrong
    assert len(load.lost) <= CLIENTS  # what was on its way, and nothing later
    assert not poison.exists()
    assert len(before & replicas().keys()) == 1
    note("model", f"replaced after {recovered:.1f} s, answers {dict(load.statuses())}, lost {len(load.lost)}")


def test_overload_is_answered_at_once(cluster: Cluster, port: int) -> None:
    small = OPTIONS | {"num_replicas": 1, "max_ongoing_requests": 2, "max_queued_requests": 2}
    serve.run(deployment.options(**small).bind())
    wait_for_replicas(1)
    with Load(port, clients=16) as load:
        load.wait_for(20)
    assert not load.wrong
    assert not load.lost
    assert set(load.statuses()) == {200, 503}


def test_what_was_accepted_is_answered_when_the_app_is_taken_away(cluster: Cluster, port: int) -> None:
    serve.run(deployment.options(**OPTIONS | {"num_replicas": 1, "graceful_shutdown_timeout_s": 35}).bind())
    wait_for_replicas(1)
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
