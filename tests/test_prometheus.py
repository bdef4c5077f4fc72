"""Alerts, dashboard and scaling against a Prometheus of Debian's that scrapes a server: every query has an answer."""

import contextlib
import json
import math
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import ROOT, lacking
from fakes import FakeServer, post, request, wait_until

from keras_server.settings import Settings

yaml: Any = pytest.importorskip("yaml")

CONFIG = ROOT / "deploy" / "prometheus.yml"
RULES = ROOT / "deploy" / "prometheus-rules.yml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text("utf-8"))
PANELS = DASHBOARD["panels"]
ALERTS = [rule for group in yaml.safe_load(RULES.read_text("utf-8"))["groups"] for rule in group["rules"]]
VARIABLES = {"$job": "keras-server", "$instance": ".*", "$__rate_interval": "30s"}
METRICS_KEY = "only-for-metrics"


def program(name: str) -> str:
    """Return where a program of Debian's prometheus is."""
    return shutil.which(name) or lacking(f"{name} is not installed: apt-get install prometheus.")


def queries() -> dict[str, str]:
    """Return all queries: the dashboard's with its variables put in, what the alerts compare, and KEDA's."""
    found = {}
    for panel in PANELS:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for row in DASHBOARD["templating"]["list"]:
        if match := re.fullmatch(r"label_values\((.*), (\w+)\)", row.get("definition", "")):
            found[f"variable {row['name']}"] = f"count by ({match[2]}) ({match[1]})"
    for name, query in found.items():
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query
        found[name] = query
    for rule in ALERTS:
        compared, comparison, limit = re.split(r" (==|>) (?=[0-9.]+$)", rule["expr"])
        assert comparison
        assert float(limit) >= 0
        found[rule["alert"]] = compared
    (scaled,) = yaml.safe_load_all((ROOT / "deploy" / "kubernetes-keda.yaml").read_text("utf-8"))
    found["KEDA"] = scaled["spec"]["triggers"][0]["metadata"]["query"]
    return found


class Prometheus:
    """Debian's, with the configuration that is tested, for one server."""

    def __init__(self, folder: Path, server: int):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = yaml.safe_load(CONFIG.read_text("utf-8"))
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{server}"]}]
        job["authorization"]["credentials_file"] = str(folder / "key")
        config["global"]["scrape_interval"] = "1s"
        (folder / "key").write_text(METRICS_KEY)
        shutil.copy(RULES, folder)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}"]
        self.popen = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            wait_until(self.ready, 60)
        except AssertionError:
            self.close()
            raise

    def ready(self) -> bool:
        """Whether it answers."""
        assert self.popen.poll() is None, "Prometheus has ended"
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/-/ready", timeout=10).ok
        except requests.ConnectionError:
            return False

    def close(self) -> None:
        """End it."""
        self.popen.terminate()
        self.popen.wait(30)

    def ask(self, query: str) -> list[float]:
        """Return the numbers that a query gives now."""
        answer = requests.get(f"http://127.0.0.1:{self.port}/api/v1/query", {"query": query}, timeout=30).json()
        assert answer["status"] == "success", (query, answer)
        return [float(row["value"][1]) for row in answer["data"]["result"]]


def keep_busy(fake: FakeServer, stopped: threading.Event) -> None:
    """Have a server answer, fail, turn away, and be left by a client."""
    key = {"Authorization": "Bearer key"}
    while not stopped.is_set():
        assert fake.ask(post(**key)).status == 200
        fake.tell("fail")
        assert fake.ask(post(**key)).status == 500
        fake.tell("hold")
        with fake.raw() as first, fake.raw() as second:
            first.send(post(**key))
            fake.wait(busy=True, waiting=0)
            second.send(post(**key))
            fake.wait(waiting=1)
            assert fake.ask(post(**key)).status == 503
            fake.tell("go")
            assert first.answer()
            assert second.answer()
        stopped.wait(0.2)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a server which is kept busy; the server asks both for keys."""
    options = ["--queue-size", "1", "--max-batch", "1", "--metrics-key", METRICS_KEY, "--api-key", "key"]
    stopped = threading.Event()
    with FakeServer(*options) as fake:
        assert fake.ask(request("/metrics")).status == 401
        clients = threading.Thread(target=keep_busy, args=[fake, stopped])
        clients.start()
        try:
            with contextlib.closing(Prometheus(tmp_path, fake.port)) as found:
                yield found
        finally:
            stopped.set()
            clients.join()


def test_every_query_has_an_answer(prometheus: Prometheus) -> None:
    """A number for each: not nothing, as where a metric or a label is misspelt, and not only 0 / 0."""
    unanswered = queries()
    assert len(unanswered) > 25

    def answered() -> bool:
        for name, query in list(unanswered.items()):
            if any(map(math.isfinite, prometheus.ask(query))):
                del unanswered[name]
        return not unanswered

    try:
        wait_until(answered, 120)
    except AssertionError:
        pytest.fail(f"without an answer: {unanswered}")


def test_promtool_finds_no_fault(tmp_path: Path) -> None:
    config = shutil.copy(CONFIG, tmp_path)
    shutil.copy(RULES, tmp_path)
    for command in (["config", "--syntax-only", str(config)], ["rules", str(RULES)]):
        done = subprocess.run([program("promtool"), "check", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should_and_not_before() -> None:
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(ROOT / "tests" / "data" / "alerts.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tried = set(re.findall(r"alertname: (\w+)", (ROOT / "tests" / "data" / "alerts.yml").read_text("utf-8")))
    assert tried == {rule["alert"] for rule in ALERTS}


def test_the_alerts_are_about_the_job_that_is_scraped_and_name_options_that_are_there() -> None:
    (job,) = yaml.safe_load(CONFIG.read_text("utf-8"))["scrape_configs"]
    assert {*re.findall('job="([^"]+)"', RULES.read_text("utf-8"))} == {job["job_name"]}
    options = {f"--{name}" for name in re.findall(r"--([a-z-]+)", RULES.read_text("utf-8"))}
    assert options <= {f"--{name.replace('_', '-')}" for name in vars(Settings())}
    (queue,) = (rule for rule in ALERTS if rule["alert"] == "KerasServerQueueGrows")
    assert queue["expr"].endswith(f"> {Settings().queue_size // 2}")


def test_the_dashboard_is_whole() -> None:
    """Ids and places are each its own, each panel says what it shows, and has a data source that can be chosen."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len({*cells}) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert {target["datasource"]["uid"] for target in [panel, *panel["targets"]]} == {"${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
