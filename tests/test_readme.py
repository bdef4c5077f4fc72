"""The README: what it prints is what comes, what it names is there, and its code runs."""

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from conftest import DOG, ROOT

import run_keras_server as server
from keras_server.commands.check import command as check_command
from keras_server.commands.export import command as export_command
from keras_server.commands.predict import command as predict_command
from keras_server.settings import SETTINGS

COMMANDS = [check_command(), export_command(), predict_command()]
README = (ROOT / "README.md").read_text("utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)


def test_both_ways_in_stand_on_the_first_screen() -> None:
    first = "\n".join(README.splitlines()[:20])
    for words in ("make serve", "make test", "pip install -r requirements.txt", "python run_keras_server.py"):
        assert words in first


def test_its_answer_is_the_servers(setting: Callable[..., None], monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """The line under curl, and the rows under the client, to the digits that hold on every processor."""
    monkeypatch.setattr(server, "model", None)
    setting(model="bundled", cache_dir=cache)
    server.load_model()
    (printed,) = (json.loads(line) for line in README.splitlines() if line.startswith('{"success":true'))
    answer = server.app.test_client().post("/predict", data=DOG.read_bytes(), content_type="image/jpeg").json
    assert answer["model"] == printed["model"]
    for ours, theirs in zip(answer["predictions"], printed["predictions"], strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-3)
    rows = re.findall(r"^(\d)\. (\w+): ([0-9.]+)$", README, re.M)
    assert [(label, float(p)) for _, label, p in rows] == [
        (row["label"], pytest.approx(row["probability"], abs=1e-3)) for row in answer["predictions"]
    ]


def test_the_example_of_a_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (code for language, code in BLOCKS if language == "python" and "def test_" in code)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(block, names)
    # One line of the example leaves closing its file to Python, which pytest would tell us.
    with open("dog.jpg", "rb") as dog:
        names["open"] = lambda *_: dog
        names["test_it"](monkeypatch)


def test_python_blocks_are_python() -> None:
    for language, code in BLOCKS:
        if language == "python":
            compile(code, "README.md", "exec")


def test_every_option_that_it_names_exists() -> None:
    text = re.sub(r"(pip|curl|gunicorn|simple_request\.py|flask)[^\n`]*", "", README)
    known = {setting.option for setting in SETTINGS}
    known |= {option for command in COMMANDS for row in command.params for option in row.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= known
    for variable in re.findall(r"KERAS_SERVER_\w+", README):
        assert any(setting.variable == variable for setting in SETTINGS)


def test_every_file_that_it_names_exists() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path


def test_the_page_on_operations_names_what_is_there() -> None:
    named = {*re.findall(r"`(?:deploy/)?([\w-]+\.(?:yaml|yml|json|conf|service|socket))`", OPERATIONS)}
    there = {path.name for path in (ROOT / "deploy").rglob("*.*")}
    assert named <= there
    assert there - {"ray.Dockerfile", "rayservice.yaml", "keras-server.socket", "keras-server.service"} <= named
    options = {setting.option for setting in SETTINGS} | {"--read-only", "--tmpfs", "--build-arg"}
    assert {*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", OPERATIONS)} <= options
    rules = (ROOT / "deploy" / "prometheus-rules.yml").read_text("utf-8")
    assert re.findall(r"^\| `(Keras\w+)`", OPERATIONS, re.MULTILINE) == re.findall(r"alert: (\w+)", rules)


def test_its_command_for_the_alerts_makes_what_kubernetes_takes() -> None:
    yaml = pytest.importorskip("yaml")
    (command,) = re.findall(r"\$ (\(printf.*?)\| kubectl apply", OPERATIONS, re.DOTALL)
    command = re.sub(r"\n *>", "\n", command)
    made = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rule = yaml.safe_load(made)
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy" / "prometheus-rules.yml").read_text("utf-8"))


def test_every_file_of_the_house_is_named() -> None:
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name


def test_each_promise_of_security_names_tests_that_are_there() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    promises = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise ")]
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", promise)
        assert named, promise
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / file).read_text("utf-8"), test
