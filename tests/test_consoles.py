"""Each console block of the documents: run, in order, in a fresh clone, against servers on ports of their own.

What a line shows is compared with what comes. A section's server is the one that it starts, or else the default one.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import DOG, ROOT
from PIL import Image

from keras_server.models.tracing import import_keras

# What begins like this is not run, and why. Whatever else a document shows is run, also what is added one day.
NOT_HERE = {
    "make test": "it is this suite",
    "make quick": "it is a part of this suite",
    "make mutants": "it runs this suite hundreds of times",
    "make lint": "it looks at the code, and CI runs it before this suite",
    "make format": "it looks at the code, as make lint does",
    "make fuzz": "it takes minutes, and CI runs it after this suite",
    "make bench": "it measures, for forty minutes",
    ".venv/bin/python benchmarks/": "it measures, and needs the benchmark's other servers",
    "make serve-ray": "it needs Ray, and tests/ray has it",
    ".venv-ray/": "it needs Ray, and tests/ray has it",
    "python run_keras_server.py --model cats=": "it needs ResNet50's weights; tests/test_many_models.py has three",
    "python run_keras_server.py export my.keras out --precision int8": "it takes a hundred pictures, and "
    "tests/models/test_int8.py has them",
    'curl -F image=@dog.jpg "http://localhost:5000/predict?model=digits"': "it asks that server",
    'curl -d "{\\"instances\\": [[1.0, 2.0]]}"': "it asks that server",
    "curl http://localhost:5000/v1/models/cats": "it asks that server",
    "pip install .": "it would go into the environment of these tests; tests/test_package.py installs the wheel",
    "pip install '.[": "it would go into the environment of these tests; tests/test_package.py installs the wheel",
    "apt-get ": "it needs root and the network",
    "docker ": "it needs Docker, and tests/test_deploy.py runs the steps of the image",
    "(printf 'apiVersion: ": "it needs a cluster, and tests/test_kubernetes.py holds what it applies",
    "kubectl ": "it needs a cluster, and tests/test_deploy.py holds the manifests against their schemas",
}
SHELLS = ("console", "bash", "sh", "shell")
SERVES = ("make serve", "python run_keras_server.py")
COMMANDS = ("predict", "check", "export")  # of run_keras_server.py, which end
# The model that a line takes for granted.
TAKEN_FOR_GRANTED = {"/v1/models/iris:predict": "python run_keras_server.py --model iris.xml"}
# What must be in the output of a line that shows none.
SAYS = {
    "python simple_request.py holiday/": r"(?s)holiday/a\.jpg.*1\. German_shepherd: 0\.9.*3\. .*holiday/b\.png",
    "run_keras_server.py predict holiday/": "",
    "-F image=@photos/cat/1.jpg": r'"label":"cat","probability":0\.9',
    "run_keras_server.py check my.keras": "^my: all 2 as expected",
    "/v1/models/iris:predict": r'"predictions":\s*\[\[0\.7983\d*,\s*0\.1255\d*,\s*0\.0761\d*\]\]',
    "pytest tests/api/test_predict.py -k top": r"\d+ passed",
}
# What must be there after it, and how it begins.
LEAVES = {
    "> labels.jsonl": ("labels.jsonl", b'{"filename'),
    "--output labels.csv": (
        "labels.csv",
        b"filename,label,probability,values,model,error\r\nholiday/a.jpg,German_shepherd,0.96",
    ),
    "--sheet labels.html": ("labels.html", b"<!doctype html>"),
    "export my.keras out": ("out/about.json", b"{"),
    "-o why.png": ("why.png", b"\x89PNG"),
}


@dataclass
class Line:
    """A line after `$ `, with what is shown below it."""

    section: str
    command: str
    shown: str = ""


def lines_of(document: Path) -> list[Line]:
    """Return what a document's console blocks have to be typed, and that they show."""
    found: list[Line] = []
    for section in re.split(r"(?m)^(?=## )", document.read_text("utf-8")):
        title = section.partition("\n")[0]
        for language, block in re.findall(r"(?ms)^ *```(\w+)\n(.*?)^ *```", section):
            if language not in SHELLS:
                continue
            for line in block.splitlines():
                if line.startswith("$ ") or language != "console":
                    found.append(Line(title, re.sub(r"\s+# .*", "", line.removeprefix("$ "))))
                else:
                    found[-1].shown += line + "\n"
    return found


DOCUMENTS = [
    path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"), *ROOT.glob("keras_server/*/*.md")])
    if lines_of(path)
]


def free_port() -> int:
    """Return a port that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def same(shown: str, printed: str) -> bool:
    """Tell whether the same is printed as is shown, to the digits that hold on every processor."""
    number = r"\d+\.\d+"
    return re.split(number, shown.strip()) == re.split(number, printed.strip()) and [
        float(text) for text in re.findall(number, printed)
    ] == pytest.approx([float(text) for text in re.findall(number, shown)], abs=1e-3)


class Reader:
    """Somebody who has cloned the repository and types what the documents show; the network is not there."""

    def __init__(self, folder: Path, cache: str) -> None:
        self.folder = folder / "clone"
        self.servers: dict[str, tuple[subprocess.Popen[str], int]] = {}  # by their command
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        # `make serve` makes a virtual environment, in which pip must find what it would download, and be itself found:
        # to set it up takes longer than all else.
        packages = Path(np.__file__).parents[1]
        python = folder / "python"
        python.write_text(
            f'#!/bin/sh\n"{sys.executable}" "$@" --without-pip\necho "{packages}" > '
            f".venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/found.pth\n"
        )
        python.chmod(0o755)
        (folder / ".curlrc").write_text("silent\nshow-error\nfail-with-body\nnoproxy = *\n")
        refused = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("KERAS_SERVER_", "MAKE"))},
            **refused,
            "no_proxy": "localhost,127.0.0.1",
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(python),
            "PIP_NO_INDEX": "1",
            "PYTHONUNBUFFERED": "1",
            "KERAS_SERVER_CACHE_DIR": cache,
            "KERAS_SERVER_MODEL": "bundled",  # as without a way to ResNet50's weights, which tests/test_process.py has
            "KERAS_SERVER_DRAIN_SECONDS": "0",
        }

    def serve(self, command: str) -> int:
        """Have a server of this command, started once, and return its port."""
        if command not in self.servers:
            port = free_port()
            process = subprocess.Popen(
                command,
                shell=True,
                cwd=self.folder,
                env=self.environment | {"KERAS_SERVER_PORT": str(port)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self.servers[command] = process, port
            assert process.stdout
            printed = ""
            while "Try: curl" not in printed:
                line = process.stdout.readline()
                assert line, f"{command}\n{printed}"
                printed += line
            assert "Traceback" not in printed
        return self.servers[command][1]

    def stop(self) -> None:
        """End all servers."""
        for process, _ in self.servers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def type(self, line: Line, port: int) -> None:
        """Run a command that ends, and compare."""
        if line.command.startswith(".venv/"):  # which an earlier line has made, and be it one that is not run here
            make = ["make", ".venv/serve"]
            subprocess.run(make, cwd=self.folder, env=self.environment, check=True, capture_output=True)
        command = line.command.replace("localhost:5000", f"localhost:{port}")
        command = command.replace("simple_request.py", f"simple_request.py --url http://localhost:{port}")
        done = subprocess.run(
            ["bash", "-ec", command], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        told = f"$ {command}\n{done.stdout}{done.stderr}"
        assert done.returncode == 0, told
        assert "Traceback" not in told
        if line.shown:
            assert same(line.shown, done.stdout), told
        for part, words in SAYS.items():
            if part in line.command:
                assert re.search(words, done.stdout), told
        for part, (name, start) in LEAVES.items():
            if part in line.command:
                assert (self.folder / name).read_bytes().startswith(start), told


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, cache: str) -> Iterator[Reader]:
    """A clone with what the README's reader has: photos, and a model that somebody has trained on irises."""
    reader = Reader(tmp_path_factory.mktemp("reader"), cache)
    folder = reader.folder
    for name in ("holiday", "photos/cat", "photos/dog"):
        (folder / name).mkdir(parents=True)
    shutil.copy(DOG, folder / "holiday/a.jpg")
    Image.new("RGB", (64, 48), "teal").save(folder / "holiday/b.png")
    for number in range(4):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"photos/cat/{number}.jpg")
        Image.new("RGB", (32, 32), (255, 255 - number, 255)).save(folder / f"photos/dog/{number}.jpg")
    shutil.copy(folder / "photos/cat/1.jpg", folder / "cat.jpg")
    openvino = pytest.importorskip("openvino")
    ops = openvino.opset8
    rows = ops.parameter([-1, 4], np.float32, name="rows")
    # Of 5.1, 3.5, 1.4 and 0.2 the scores are 2.55, 0.7 and 0.2, and the softmax 0.7983, 0.1255 and 0.0761.
    scores = ops.matmul(rows, np.array([[0.5, 0, 0], [0, 0, 0], [0, 0.5, 0], [0, 0, 1]], np.float32), False, False)
    openvino.save_model(openvino.Model([ops.softmax(scores, 1)], [rows], "iris"), folder / "iris.xml")
    yield reader
    reader.stop()


def test_what_differs_is_noticed() -> None:
    assert same("1. beagle: 0.9638\n2. pug: 0.0096", "1. beagle: 0.9641\n2. pug: 0.0095\n")
    for printed in ("1. beagle: 0.9618\n2. pug: 0.0096", "1. pug: 0.9638\n2. pug: 0.0096", "1. beagle: 0.9638", ""):
        assert not same("1. beagle: 0.9638\n2. pug: 0.0096", printed)


def test_every_block_of_commands_is_found() -> None:
    """However it is marked: none of another language has a prompt in it."""
    for document in [ROOT / "README.md", *DOCUMENTS]:
        blocks = re.findall(r"(?ms)^ *```(\w*)\n(.*?)^ *```", document.read_text("utf-8"))
        others = [code for language, code in blocks if language not in SHELLS]
        assert not [code for code in others if re.search(r"(?m)^\$ ", code)], document


@pytest.mark.timeout(900)  # it does what a day of a reader does
@pytest.mark.filterwarnings("ignore:.shuffle=True. was passed:UserWarning")  # Keras, of its own datasets
def test_every_line_of_the_readme(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader.folder)
    train(reader.folder)
    follow(reader, ROOT / "README.md")


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "README.md" or path.parent != ROOT])
def test_every_line_of_the_other_documents(reader: Reader, document: Path) -> None:
    follow(reader, document)


def follow(reader: Reader, document: Path) -> None:
    """Type each line of a document."""
    section, server = "", ""
    for line in lines_of(document):
        if line.section != section:
            section, server = line.section, "python run_keras_server.py"
        if any(line.command.startswith(start) for start in NOT_HERE):
            if line.command.startswith("make "):  # that there is such a target can be told
                make = ["make", "--dry-run", *shlex.split(line.command, comments=True)[1:]]
                assert subprocess.run(make, cwd=reader.folder, capture_output=True).returncode == 0, line
        elif line.command.startswith(SERVES) and not line.command.startswith(
            tuple(f"python run_keras_server.py {name}" for name in COMMANDS)
        ):
            server = line.command
            reader.serve(server)
        else:
            taken = [command for part, command in TAKEN_FOR_GRANTED.items() if part in line.command]
            reader.type(line, reader.serve(taken[0] if taken else server))


def train(folder: Path) -> None:
    """Run the README's lines of Python that save a model, in the clone."""
    (block,) = re.findall(r"(?s)```python\n([^`]*image_dataset_from_directory.*?)```", (ROOT / "README.md").read_text())
    keras = import_keras()
    dense = keras.layers.Dense(2, "softmax")
    layers = [keras.Input((128, 128, 3)), keras.layers.Rescaling(1 / 255), keras.layers.GlobalAveragePooling2D(), dense]
    model = keras.Sequential(layers)
    dense.set_weights([np.array([[-4.0, 4.0]] * 3), np.array([3.0, -3.0])])  # a cat is dark here, and a dog is bright
    model.compile(keras.optimizers.SGD(1e-6), "sparse_categorical_crossentropy")
    with (folder / "my.labels.txt").open("w") as labels:  # which the block leaves open, and pytest would tell us
        exec(block, {"keras": keras, "model": model, "open": lambda *_: labels})
    assert (folder / "my.labels.txt").read_text() == "cat\ndog"
