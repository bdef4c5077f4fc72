"""The wheel: installed without this folder it has all that it needs, and serves from another one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import requests
from conftest import DOG, ROOT, Process

import keras_server


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel; built from a copy, since a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in (
        "pyproject.toml",
        "requirements-serve.txt",
        "README.md",
        "LICENSE",
        "run_keras_server.py",
        "simple_request.py",
    ):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "keras_server", copy / "keras_server", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*pip, str(copy)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert keras_server.__version__ in wheel.name
    return wheel


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The wheel's content, unpacked as pip unpacks it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


def test_installed_in_an_empty_environment_it_serves_an_export(
    wheel: Path, serving_site: Path, tmp_path: Path, cache: str
) -> None:
    """By its command, with what its requirements name and nothing else, from another folder."""
    home, export = tmp_path / "home", tmp_path / "export"
    subprocess.run(
        [sys.executable, str(ROOT / "run_keras_server.py"), "export", "bundled", str(export)],
        env=os.environ | {"KERAS_SERVER_CACHE_DIR": cache},
        check=True,
        capture_output=True,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = str(home / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "serving.pth").write_text(f"{serving_site}\n")
    command = str(home / "bin" / "keras-server")
    told = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert told.stdout == f"keras-server {keras_server.__version__}\n"
    process = Process("--model", str(export), "--drain-seconds", "0", command=[command], folder=tmp_path, python=python)
    try:
        url = process.wait_until_ready().url
        answer = requests.post(f"{url}/predict", files={"image": DOG.read_bytes()}, timeout=60).json()
        assert answer["predictions"][0]["label"] == "German_shepherd"
    finally:
        status, output = process.stop()
    assert status == 0
    assert str(ROOT) not in output


def test_it_serves_from_another_folder(site: Path, tmp_path: Path, cache: str) -> None:
    options = ["--model", "bundled", "--cache-dir", cache, "--port", "0", "--drain-seconds", "0"]
    process = Process(*options, command=["-m", "keras_server"], folder=tmp_path, PYTHONPATH=str(site))
    try:
        url = process.wait_until_ready().url
        answer = requests.post(f"{url}/predict", files={"image": DOG.read_bytes()}, timeout=60).json()
        assert answer["predictions"][0]["label"] == "German_shepherd"
        for path in ("/", "/docs", "/openapi.json", "/static/page.js", "/static/dog.jpg"):
            assert requests.get(url + path, timeout=60).status_code == 200, path
    finally:
        status, output = process.stop()
    assert status == 0
    assert str(ROOT) not in output


def test_the_command_is_the_files_main(site: Path, tmp_path: Path) -> None:
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "keras-server = run_keras_server:main" in entry_points.read_text()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, run_keras_server as s; sys.argv[1:] = ['--model', 'no.keras']; sys.exit(s.main())",
        ],
        env=os.environ | {"PYTHONPATH": str(site), "KERAS_SERVER_PORT": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: There is no file no.keras."
