"""Models at an address: downloaded once, checked, and refused in a sentence."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ROOT, Process

from keras_server.models.addresses import fetch
from keras_server.models.beside import locate
from keras_server.models.errors import StartupError
from keras_server.settings import read_settings

DATA = ROOT / "tests" / "data" / "models"
MODEL = (DATA / "silu.keras").read_bytes()
SUM = hashlib.sha256(MODEL).hexdigest()


class Site(ThreadingHTTPServer):
    """A server of files on this machine, and what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Site)
        self.server.asked.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/moved"))
            self.end_headers()
        elif path == "/away":
            self.send_response(302)
            self.send_header("Location", f"http://0.0.0.0:{self.server.server_port}/silu.keras")
            self.end_headers()
        elif path == "/page.keras":
            self.answer(b"<!doctype html><title>Sign in</title>")
        elif path == "/cut.keras":
            self.answer(MODEL[:5000], len(MODEL))
        elif (DATA / path[1:]).is_file():
            self.answer((DATA / path[1:]).read_bytes())
        else:
            self.send_error(404)

    def answer(self, content: bytes, length: int = 0) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name in [name for name in os.environ if name.startswith("KERAS_SERVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    with Site() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"{site.url}/silu.keras"
    path = Path(fetch(address, "", str(tmp_path / "cache")))
    assert (path.name, path.read_bytes()) == ("silu.keras", MODEL)
    assert capsys.readouterr().err == f"Downloading {address}\n"
    assert fetch(address, "", str(tmp_path / "cache")) == str(path)
    assert fetch(address, SUM, str(tmp_path / "cache")) == str(path)
    assert site.asked == ["/silu.keras"]
    assert capsys.readouterr().err == ""
    assert path.is_relative_to(tmp_path / "cache" / "downloads")
    assert [*path.parent.iterdir()] == [path]


def test_another_address_is_another_file(site: Site, tmp_path: Path) -> None:
    addresses = [f"{site.url}/silu.keras?v=1", f"{site.url}/silu.keras?v=2", f"{site.url}/moved/silu.keras"]
    paths = {fetch(address, SUM.upper(), str(tmp_path)) for address in addresses}
    assert len(paths) == 3
    assert {Path(path).name for path in paths} == {"silu.keras"}


def test_without_a_cache_it_is_kept_for_the_process(site: Site, tmp_path: Path) -> None:
    code = "import sys; from keras_server.models.addresses import fetch; print(fetch(sys.argv[1], '', sys.argv[2]))"
    (tmp_path / "file").write_text("")
    (tmp_path / "others").mkdir(mode=0o777)
    (tmp_path / "others").chmod(0o777)  # where others could put another model in its place
    for cache_dir in ("", str(tmp_path / "file"), str(tmp_path / "others")):
        command = [sys.executable, "-c", code, f"{site.url}/silu.keras", cache_dir]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        path = Path(done.stdout.strip())
        assert path.name == "silu.keras"
        assert not path.is_relative_to(tmp_path)
        assert not path.parent.exists(), "the process has ended"


def test_a_file_that_changed_is_fetched_anew_where_its_checksum_says_so(site: Site, tmp_path: Path) -> None:
    path = Path(fetch(f"{site.url}/silu.keras", "", str(tmp_path)))
    path.write_bytes(b"PK older")
    assert fetch(f"{site.url}/silu.keras", "", str(tmp_path)) == str(path)
    assert path.read_bytes() == b"PK older"
    fetch(f"{site.url}/silu.keras", SUM, str(tmp_path))
    assert path.read_bytes() == MODEL


BAD: dict[str, tuple[str, str, str]] = {
    "no such page": ("/none.keras", "", "/none.keras cannot be downloaded: its server answered 404 Not Found."),
    "another file": ("/silu.keras", "0" * 64, f"has the SHA-256 {SUM}, and not the one that --sha256 says"),
    "half of it": ("/cut.keras", "", "/cut.keras cannot be downloaded: the connection broke off."),
    "a web page": ("/page.keras", "", "/page.keras is not a Keras model, but a web page: download the file itself"),
    "moved to http": ("/away", "", "what comes over http:// may be anybody's: take https://."),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_downloaded(name: str, site: Site, tmp_path: Path) -> None:
    path, sha256, words = BAD[name]
    with pytest.raises(StartupError) as error:
        fetch(f"{site.url}{path}", sha256, str(tmp_path))
    assert words in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing stays"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:1/net.keras", "cannot be downloaded: Connection refused."),
        ("https://no-such-host.invalid/net.keras", "no such server is known, or there is no network."),
        ("http://example.org/net.keras", "what comes over http:// may be anybody's: take https://."),
        ("https:///net.keras", "names no server."),
        ("gs://bucket/net.keras", "gs:// is no address that is read, as https:// and hf:// are: copy the model here."),
        ("hf://net", "hf://net is no address of a model: write hf://OWNER/NAME."),
        ("hf://someone/net", "needs the package huggingface_hub: pip install huggingface_hub."),
    ],
)
def test_addresses_that_lead_nowhere(
    address: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SystemExit) as stop:
        read_settings(["--model", address, "--cache-dir", str(tmp_path)], locate)
    assert stop.value.code == 2
    line = capsys.readouterr().err.removeprefix(f"Downloading {address}\n")
    assert line.startswith(f"error: {address.partition('/bucket')[0]}")
    assert line.endswith(f"{words}\n")
    assert line.count("\n") == 1


def test_a_file_here_has_a_checksum_too(tmp_path: Path) -> None:
    file = tmp_path / "net.keras"
    file.write_bytes(MODEL)
    assert fetch(str(file), SUM, "") == str(file)
    with pytest.raises(StartupError, match=r"has the SHA-256 .*, and not the one that --sha256 says"):
        fetch(str(file), "1" * 64, "")
    for model in ("", "bundled", "resnet50", str(tmp_path)):
        with pytest.raises(StartupError, match="--sha256 is for a file or an https:// address that --model names"):
            fetch(model, SUM, "")
    with pytest.raises(StartupError, match="--sha256 is for a file: hf:// names a whole repository"):
        fetch("hf://someone/net", SUM, "")
    assert fetch("resnet50", "", "") == "resnet50"


def test_what_stands_inside_an_archive_is_found(site: Site, tmp_path: Path) -> None:
    arguments = ["--model", f"{site.url}/converted_keras.zip", "--cache-dir", str(tmp_path)]
    found = read_settings(arguments, locate)
    assert (found.preprocess, found.crop, found.interpolation) == ("tf", "centre", "lanczos")
    assert found.labels == f"{found.model}/labels.txt"
    assert read_settings([*arguments, "--crop", "none"], locate).crop == "none"
    assert site.asked == ["/converted_keras.zip"]


def answers(process: Process, name: str, rows: np.ndarray) -> np.ndarray:
    body = {"instances": rows.tolist()}
    answer = requests.post(f"{process.url}/v1/models/{name}:predict", json=body, timeout=60)
    return np.array(answer.json()["predictions"])


def test_a_server_serves_an_address(site: Site, start: Callable[..., Process]) -> None:
    numbers = np.load(DATA / "silu.keras.npz")
    for _ in range(2):
        process = start("--model", f"{site.url}/silu.keras", "--sha256", SUM, NO_PROXY="*").wait_until_ready()
        np.testing.assert_allclose(answers(process, "silu", numbers["in0"]), numbers["out0"], rtol=1e-4)
    assert site.asked == ["/silu.keras"]


HUB = """
import json
from pathlib import Path

def snapshot_download(**options):
    Path(__file__).with_name("asked.json").write_text(json.dumps(options))
    return str(Path(__file__).with_name("snapshots") / "0123abcd")
"""


def test_hf_loads_what_keras_own_loader_does(start: Callable[..., Process], tmp_path: Path) -> None:
    """The one call that goes to the network is replaced, for both."""
    (tmp_path / "huggingface_hub.py").write_text(HUB)
    with zipfile.ZipFile(io.BytesIO(MODEL)) as archive:
        archive.extractall(tmp_path / "snapshots" / "0123abcd")
    rows = np.load(DATA / "silu.keras.npz")["in0"]
    code = (
        "import json, keras, numpy, sys; model = keras.saving.load_model('hf://someone/net.v2', compile=False);"
        "print(json.dumps(model(numpy.array(json.loads(sys.argv[1]))).numpy().tolist()))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code, json.dumps(rows.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    theirs = json.loads((tmp_path / "asked.json").read_text())
    process = start("--model", "hf://someone/net.v2", PYTHONPATH=str(tmp_path)).wait_until_ready()
    assert json.loads((tmp_path / "asked.json").read_text()) == theirs
    np.testing.assert_allclose(answers(process, "net.v2", rows), json.loads(done.stdout), rtol=1e-4)
