"""Fixtures: a fake model of ten lines, the Flask test client, pictures, and a real server process."""

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pytest
from flask.testing import FlaskClient
from packaging.requirements import Requirement
from PIL import Image

import run_keras_server as server
from keras_server import resampling
from keras_server.models import convert, opening, precision, quantize
from keras_server.models.engines import Engine
from keras_server.models.registry import Predictor, PredictorEngine
from keras_server.models.served import Served
from keras_server.models.source import Source
from keras_server.models.spec import Spec
from keras_server.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["scripted_server", "browsing"]  # fixtures of the clients' tests, and of the page's
ROOT = Path(server.__file__).parent
DOG = ROOT / "dog.jpg"
# Nothing that reaches for the outside, and no sandbox, which root in a container cannot have.
BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync", "--disable-component-update",
    "--disable-background-networking", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip


# What takes long, the longest first: it loads Keras, starts browsers and many servers, or waits for them. `make quick`
# leaves it out.
SLOW = [
    "tests/explain/test_explain.py", "tests/models/test_conversion.py", "tests/api/test_page.py",
    "tests/models/test_loading.py", "tests/front/test_slow_clients.py", "tests/test_real_clients.py",
    "tests/api/test_page_many.py", "tests/test_consoles.py", "tests/models/test_child.py",
    "tests/front/test_logs.py", "tests/models/test_int8.py", "tests/test_process.py",
    "tests/models/test_addresses.py", "tests/models/test_swapping.py", "tests/test_deploy.py",
    "tests/commands/test_export.py", "tests/front/test_systemd.py", "tests/models/test_formats.py",
    "tests/models/test_cache.py", "tests/test_package.py", "tests/test_prometheus.py", "tests/test_fuzz.py",
    "tests/test_nginx.py", "tests/front/test_proxies.py", "tests/front/test_origins.py",
    "tests/models/test_beside.py", "tests/test_tutorial.py", "tests/api/test_page_models.py",
    "tests/test_many_models.py", "tests/front/test_clients.py", "tests/commands/test_check.py",
    "tests/test_cropping.py", "tests/test_images.py", "tests/api/test_openapi.py", "tests/api/test_protocols.py",
    "tests/api/test_parsing.py", "tests/models/test_mistakes.py", "tests/models/test_suspicion.py",
    "tests/models/test_bundled_model.py", "tests/test_contract.py", "tests/test_readme.py", "tests/ray",
]  # fmt: skip


def rank(path: Path) -> int:
    """Return the place of a file in SLOW, or the one behind the last."""
    name = path.relative_to(ROOT).as_posix()
    return next((number for number, slow in enumerate(SLOW) if name.startswith(slow)), len(SLOW))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out of `make quick` already the imports of what takes long, for they take long, too."""
    return True if config.option.markexpr.startswith("not slow") and rank(collection_path) < len(SLOW) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes long, and have it begin first, so that the two processes of `make test` end together."""
    items.sort(key=lambda item: rank(item.path))
    for item in items:
        if rank(item.path) < len(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The contract's tests take a server that runs already."""
    parser.addoption("--base-url", metavar="URL", help="server for test_contract.py, instead of one of its own")


@pytest.fixture(autouse=True)
def _log_as_at_first() -> None:
    """A command takes the log for itself: it is a process of its own, whose standard error ends with the test."""
    server.log.handlers, server.log.propagate = [], True
    server.log.setLevel(logging.INFO)  # for some of the libraries change that of all logs


class FakeModel:
    """Answers with class 235, German_shepherd, and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []

    def predict(self, batch: np.ndarray) -> np.ndarray:
        self.batches.append(batch)
        preds = np.full((len(batch), 1000), 0.0001, np.float32)
        preds[:, 235] = 0.9
        return preds


@pytest.fixture
def without_nohup() -> Iterator[None]:
    """Let processes that the test starts hear SIGHUP, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session", autouse=True)
def _conversion_in_this_process() -> Iterator[None]:
    """Convert models here, not in a child that would import TensorFlow each time; test_child.py has the child."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "convert_in_child", lambda name, job: convert.do(job, lambda words: None))
        patch.setattr(precision, "quantize_in_child", lambda name, job: quantize.do(job, lambda words: None))
        yield


def engine_and_spec(source: Source, settings: Settings) -> tuple[Engine, Spec]:
    """Open a model, and return what computes it and what it is."""
    opened = opening.open_model(source, settings)
    return opened.engine, opened.spec


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """A fake in place of the model."""
    fake = FakeModel()
    monkeypatch.setattr(server, "model", fake)
    return fake


@pytest.fixture
def client(model: FakeModel) -> FlaskClient:
    """The app's test client, with the fake model behind it."""
    return server.app.test_client()


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings for one test."""

    def change(**values: Any) -> None:
        monkeypatch.setattr(server, "settings", replace(server.settings, **values))

    return change


def spec() -> Spec:
    """Return the spec of what is served."""
    return server.app.current_model().spec


def serve_with(monkeypatch: pytest.MonkeyPatch, predictor: Predictor | None = None, **values: Any) -> FlaskClient:
    """Serve a fake whose spec has these values where it differs from ResNet50's."""
    served = Served(Spec(**values), PredictorEngine(predictor or FakeModel()))
    monkeypatch.setattr(server, "model", served)
    return server.app.test_client()


@pytest.fixture
def pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Pillow resize, for whoever compares to the last bit; test_resampling.py compares what else does with it."""
    monkeypatch.setattr(resampling, "simd", None)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image's file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def dog() -> bytes:
    """The sample photo, small enough for werkzeug's test client to leave no temporary files open."""
    return encode(Image.open(DOG).resize((512, 384)), "JPEG")


class Process:
    """A server in a process of its own."""

    def __init__(
        self,
        *arguments: str,
        command: Sequence[str] = (str(ROOT / "run_keras_server.py"),),
        folder: Path = ROOT,
        python: str = sys.executable,
        **environment: str,
    ):
        variables = {k: v for k, v in os.environ.items() if not k.startswith("KERAS_SERVER_")}
        self.popen = subprocess.Popen(
            [python, *command, "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=variables | {"PYTHONUNBUFFERED": "1"} | environment,
        )
        self.lines: list[str] = []
        self.url = ""

    def wait_until_ready(self) -> "Process":
        """Read its output up to the line that says how to try it."""
        assert self.popen.stdout
        for line in self.popen.stdout:
            self.lines.append(line)
            if found := re.search(r"Try: curl .* (http://\S+)/predict", line):
                self.url = found[1]
                return self
        raise AssertionError("The server did not start:\n" + "".join(self.lines))

    def stop(self) -> tuple[int, str]:
        """End it as Ctrl-C would; returns its exit status and all that it printed."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.terminate()
        output, _ = self.popen.communicate()
        return self.popen.returncode, "".join(self.lines) + output


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache folder that the session's servers share, also those of pytest-xdist's other processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(0o700, exist_ok=True)
    return str(folder)


@pytest.fixture
def start(cache: str) -> Iterator[Callable[..., Process]]:
    """Start server processes, which end with the test."""
    running: list[Process] = []

    def run(*arguments: str, **environment: str) -> Process:
        process = Process(*arguments, "--cache-dir", cache, "--drain-seconds", "0", **environment)
        running.append(process)
        return process

    yield run
    for process in running:
        process.popen.kill()
        process.popen.wait()
        assert process.popen.stdout
        process.popen.stdout.close()


@pytest.fixture(scope="session")
def serving_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds what requirements-serve.txt installs, and nothing else: no TensorFlow."""
    folder = tmp_path_factory.mktemp("serving")
    wanted = [Requirement(line) for line in (ROOT / "requirements-serve.txt").read_text().splitlines()]
    known: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        if requirement.name in known or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        known.add(requirement.name)
        found = metadata.distribution(requirement.name)
        wanted += [Requirement(text) for text in found.requires or ()]
        for name in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(found.locate_file(name))).resolve())
    return folder


def lacking(sentence: str) -> NoReturn:
    """Skip what cannot be tested here; in CI nothing may be skipped."""
    if os.environ.get("CI"):
        pytest.fail(sentence)
    pytest.skip(sentence)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Chromium, without a window."""
    from playwright.sync_api import sync_playwright  # only here: most tests want none

    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        lacking("No browser is installed: apt-get install chromium.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=BROWSER_OPTIONS)
        yield chromium
        chromium.close()
