"""The process that converts: what it tells, how it fails, and that it ends. Each of these starts one."""

import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import ROOT

from keras_server.models import child, convert, opening
from keras_server.models.child import convert_in_child
from keras_server.models.convert import Job
from keras_server.models.engines import OpenVINOEngine
from keras_server.models.errors import DownloadError, StartupError
from keras_server.models.export import Export
from keras_server.models.source import Source, run_file
from keras_server.models.tracing import import_keras
from keras_server.settings import Settings

DATA = ROOT / "tests" / "data" / "models"
Maker = Callable[..., Job]
CRASHING = """
import os, sys
if "pytest" not in sys.modules:
    sys.modules["openvino_telemetry"] = None
    import openvino
    openvino.convert_model = lambda *_, **__: os.abort()
"""


@pytest.fixture
def job(tmp_path: Path) -> Maker:
    """Makes jobs that write into the test's folder."""

    def make(model: Path | str, program: str = "", **values: Any) -> Job:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        imports = []
        if program:
            (tmp_path / "program.py").write_text(program)
            imports = [str(tmp_path / "program.py")]
        return Job(
            **{"model": str(model), "weights": "", "unsafe": False, "imports": imports, "output": "", "cache_dir": "",
               "useless": False, "elsewhere": str(elsewhere)} | values
        )  # fmt: skip

    return make


def test_an_export_is_written_and_nothing_printed(job: Maker, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    folder = convert_in_child("own", job(DATA / "silu.keras", cache_dir=str(tmp_path / "cache")))
    assert folder.parent == tmp_path / "cache"
    export = Export.read(folder)
    assert (export.why, export.spec.engine) == ("", "openvino")
    assert "takes no pictures" in export.flaw
    assert [record.getMessage() for record in caplog.records] == [
        "own is being converted for OpenVINO, in a process of its own, which Keras and TensorFlow end with."
    ]
    assert capfd.readouterr() == ("", "")


def test_where_the_cache_cannot_be_used_it_is_written_elsewhere(job: Maker, tmp_path: Path) -> None:
    """In this process, for it is no matter of another one."""
    (tmp_path / "file").write_text("mine")
    made = job(DATA / "silu.keras", cache_dir=str(tmp_path / "file"))
    assert convert.do(made, lambda words: None) == tmp_path / "elsewhere"
    assert Export.read(tmp_path / "elsewhere").why == ""


def test_what_is_wrong_with_a_file_is_told_without_noise(job: Maker, capfd: Any) -> None:
    with pytest.raises(StartupError, match="Scale") as error:
        convert_in_child("custom", job(DATA / "custom.keras"))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_failed_download_is_told_as_one(job: Maker) -> None:
    program = "import keras\ndef fail(**_): raise Exception('URL fetch failure on x: None -- no route')\n"
    program += "keras.applications.ResNet50 = fail\n"
    with pytest.raises(DownloadError, match="cannot be downloaded") as error:
        convert_in_child("resnet50", job("resnet50", program))
    assert error.value.reason == "no route"


SCALE = """
class Scale(keras.layers.Layer):
    def __init__(self, by=1.0, **options):
        super().__init__(**options)
        self.by = by

    def call(self, x):
        return x * self.by
"""


def test_own_layers_are_there_before_the_model_is_loaded(job: Maker) -> None:
    register = "import keras\n\n@keras.saving.register_keras_serializable('mine')"
    folder = convert_in_child("custom", job(DATA / "custom.keras", register + SCALE))
    engine = OpenVINOEngine(folder / "model.xml", "float32", 1, 1)
    with zipfile.ZipFile(DATA / "custom.keras") as archive, h5py.File(archive.open("model.weights.h5")) as weights:
        kernel, bias = (np.asarray(weights[f"layers/dense/vars/{number}"]) for number in (0, 1))
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(engine([rows])[0], 3 * rows @ kernel + bias, atol=1e-5)


def test_own_layers_need_not_be_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keras = import_keras()
    file = tmp_path / "mine.py"
    file.write_text("import keras\nfrom keras import Sequential\n" + SCALE)
    with keras.saving.custom_object_scope({}):
        run_file(file)
        objects = keras.saving.get_custom_objects()
        assert objects["Scale"](by=3.0).by == 3
        assert "Sequential" not in objects
    monkeypatch.delitem(sys.modules, "mine")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("raise ValueError('no such thing')", r"--import .*program.py fails: ValueError: no such thing"),
        ("raise SystemExit", r"--import .*program.py fails: SystemExit"),
        ("import os; os.kill(os.getpid(), 9)", "killed while loading it with Keras, as when memory"),
        ("import os; print('NOISE'); os.abort()", "ended with signal 6 while loading it with Keras"),
        ("import os; os._exit(3)", "ended with status 3 while loading"),
        ("import os; os._exit(0)", "ended with status 0 while loading"),
        ("input()", r"--import .*program.py fails: EOFError"),
    ],
)
def test_however_it_ends_there_is_a_sentence(program: str, words: str, job: Maker, capfd: Any) -> None:
    with pytest.raises(StartupError, match=words) as raised:
        convert_in_child("own", job(DATA / "silu.keras", program))
    assert "\n" not in str(raised.value)
    assert ("NOISE" in capfd.readouterr().err) == ("NOISE" in program)


def test_one_that_does_not_end_is_ended(job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(child.LONGEST, "convert", 2.0)
    with pytest.raises(StartupError, match=r"own cannot be served: .* was still \w+.* after 2 seconds"):
        convert_in_child("own", job(DATA / "silu.keras", "while True: pass"))
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_conversion_that_crashes_leaves_the_model_to_keras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "crash.py"
    program.write_text(CRASHING)
    monkeypatch.setattr(opening, "convert_in_child", convert_in_child)
    source = Source(str(DATA / "silu.keras"), imports=[str(program)])
    opened = opening.open_model(source, Settings(cache_dir=str(tmp_path / "cache")))
    assert opened.spec.engine == "keras/tensorflow"
    (told,) = (record.getMessage() for record in caplog.records if "Keras itself runs it" in record.getMessage())
    assert "ended with signal 6 while converting it for OpenVINO): Keras itself runs it" in told
    assert "\n" not in told


def test_a_program_may_change_the_folder_and_what_it_leaves_running_is_not_waited_for(
    job: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import os, sys, time\nos.chdir('/')\nif 'pytest' not in sys.modules and os.fork() == 0:\n"
    program += (
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\n    os._exit(0)\n"
    )
    monkeypatch.chdir(DATA)
    try:
        folder = convert_in_child("own", job("./silu.keras", program))
        assert folder == tmp_path / "elsewhere", "without a cache"
        assert Export.read(folder).why == ""
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # it was there all the time


def test_it_ends_with_the_server(job: Maker) -> None:
    """However the server ends: the pipe that it holds is closed then, and its folder is nobody else's to remove."""
    slow = job(DATA / "silu.keras", "import time; time.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_server.models.convert"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True,
    )  # fmt: skip
    from dataclasses import asdict

    assert process.stdin
    assert process.stdout
    print(json.dumps(asdict(slow)), file=process.stdin, flush=True)
    assert json.loads(process.stdout.readline()) == {"stage": "loading it with Keras"}
    assert Path(slow.elsewhere).exists()
    process.stdin.close()
    assert process.wait(60) == 1
    assert not Path(slow.elsewhere).exists()
    process.stdout.close()
