"""The settings that stand beside a model: found, read, weaker than options, and what is wrong with them."""

import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import requests
import tiny_models
from conftest import Process, encode, engine_and_spec
from PIL import Image

from keras_server.models.beside import ROWS, beside, locate
from keras_server.models.export import Cache, write_export
from keras_server.models.source import BUNDLED, Source
from keras_server.models.spec import Spec
from keras_server.settings import Beside, Settings, read_settings

FULL = """
labels = "names/pets.txt"
preprocess = "tf"
activation = "sigmoid"
output = "scores"
precision = "bfloat16"
background = "#102030"
crop = "centre"
interpolation = "lanczos"
threads = 3
calibrate = "photos"
min_agreement = 0.9
"""


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in, and no setting in the environment."""
    for name in [name for name in os.environ if name.startswith("KERAS_SERVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("my.keras").write_bytes(b"PK")


def read(*arguments: str) -> Settings:
    return read_settings(arguments, locate)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line with which the start ends."""
    with pytest.raises(SystemExit) as stop:
        read(*arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_each_setting_of_a_model_is_read() -> None:
    Path("my.toml").write_text(FULL)
    found = read("--model", "my.keras")
    expected: dict[str, Any] = dict(re.findall('(.*) = "(.*)"', FULL)) | {"engine_threads": 3, "min_agreement": 0.9}
    assert {name: getattr(found, name) for name in ROWS} == expected
    assert found == Settings(model="my.keras", **expected)
    assert read() == Settings()
    assert read("--model", "bundled") == Settings(model="bundled")


def test_the_command_line_comes_first_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.toml").write_text('preprocess = "tf"\nactivation = "softmax"\nbackground = "black"')
    Path("my.labels.txt").write_text("cat\ndog\n")
    monkeypatch.setenv("KERAS_SERVER_ACTIVATION", "none")
    monkeypatch.setenv("KERAS_SERVER_MODEL", "my.keras")
    found = read("--background", "white")
    assert (found.preprocess, found.activation, found.background) == ("tf", "none", "white")
    assert found.labels == "my.labels.txt"
    assert read("--labels", "other.txt").labels == "other.txt"


def test_what_is_as_by_default_is_handed_on_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As replicas on Ray read it, who look beside the model, too."""
    Path("my.toml").write_text('background = "black"\npreprocess = "tf"')
    found = read("--model", "my.keras", "--background", "white")
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    assert read() == found
    assert found.background == "white"


def test_its_labels_may_be_named_in_it() -> None:
    Path("my.labels.txt").write_text("cat\ndog\n")
    Path("my.toml").write_text('labels = "names.json"')
    assert read("--model", "my.keras").labels == "names.json"


def test_files_are_looked_for_from_its_folder() -> None:
    Path("deep/er").mkdir(parents=True)
    Path("deep/er/net.h5").write_bytes(b"\x89HDF")
    Path("deep/er/net.toml").write_text('labels = "../names.txt"')
    assert read("--model", "deep/er/net.h5").labels == "deep/er/../names.txt"
    Path("deep/er/net.toml").write_text('calibrate = "../photos"')
    assert read("--model", "deep/er/net.h5").calibrate == "deep/er/../photos"
    Path("deep/er/net.toml").write_text('labels = "/names.txt"')
    assert read("--model", "deep/er/net.h5").labels == "/names.txt"
    Path("deep/er/net.toml").write_text('labels = ""')
    assert read("--model", "deep/er/net.h5").labels == ""


@pytest.mark.parametrize("place", ["net.v2.toml", "net.v2/net.v2.toml"])
@pytest.mark.parametrize("model", ["net.v2", "net.v2/", "./net.v2", "net.v2/../net.v2"])
def test_a_folder_has_it_beside_or_in_it(place: str, model: str) -> None:
    Path("net.v2/1").mkdir(parents=True)
    Path(place).write_text('crop = "centre"' if "crop" in ROWS else 'preprocess = "tf"')
    assert beside(model).values
    assert os.path.samefile(beside(model).where, place)


def test_the_working_folder_may_be_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("net").mkdir()
    Path("net.toml").write_text('preprocess = "tf"')
    monkeypatch.chdir("net")
    assert read("--model", ".").preprocess == "tf"
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    assert read("--model", "..").preprocess == "tf"


def test_beside_a_link_stands_the_links() -> None:
    Path("blobs").mkdir()
    Path("my.keras").rename("blobs/0123")
    Path("my.keras").symlink_to("blobs/0123")
    Path("my.toml").write_text('preprocess = "tf"')
    Path("blobs/0123.toml").write_text('preprocess = "caffe"')
    assert read("--model", "my.keras").preprocess == "tf"


def test_the_bundled_model_has_none() -> None:
    Path("bundled").mkdir()
    Path("bundled.toml").write_text('preprocess = "tf"')
    assert beside("bundled") == Beside()


BAD: dict[str, tuple[str | bytes, str]] = {
    "a key that is near one": ('preproces = "tf"', "my.toml: 'preproces' is no setting of a model: did you mean pre"),
    "a key that is far": ('"" = "tf"', "my.toml: '' is no setting of a model: did you mean "),
    "a table": ('[model]\npreprocess = "tf"', "my.toml: 'model' is a table: write its settings without one"),
    "of the server": ("port = 80", "my.toml: port belongs to the server and not to the model: give it as --port"),
    "of the server, as its option": ('max-batch = "8"', "max-batch belongs to the server and not to the model"),
    "a list": ('labels = ["cat", "dog"]', "my.toml: labels has to be the name of a file in quotes, and ['cat', 'dog']"),
    "a switch": ("preprocess = true", "my.toml: preprocess has to be a text in quotes, and True is none"),
    "a bad value": ('activation = "soft"', "my.toml: activation: 'soft' is none of auto, none, softmax, sigmoid"),
    "a bad colour": ('background = "blu"', "my.toml: background: 'blu' is no colour"),
    "a number in quotes": ('threads = "2"', "my.toml: threads has to be a whole number, and '2' is none"),
    "a bad number": ("threads = 2000", "my.toml: engine_threads: '2000' is not a whole number from 0 to 1024"),
    "labels of versions": ("version_labels = 3", "my.toml: version_labels has to be a table of names and versions"),
    "a version that is none": ('[version_labels]\nstable = "3"', "version_labels has to be a table of names and vers"),
    "no quotes": ("preprocess = tf", "my.toml is no TOML (Invalid value (at line 1, column 14)): write preprocess ="),
    "twice": ('output = "a"\noutput = "b"', "my.toml is no TOML (Cannot overwrite a value"),
    "YAML": ("preprocess: tf", "my.toml is no TOML (Expected '=' after a key"),
    "Latin-1": (b'output = "stra\xdfe"', "my.toml is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_in_it_name_the_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content, sentence = BAD[name]
    Path("my.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in refused(capsys, "--model", "my.keras")


def test_two_of_them_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net").mkdir()
    for place in ("net.toml", "net/net.toml"):
        Path(place).write_text("")
    assert "net.toml and net/net.toml are both there" in refused(capsys, "--model", "net")


def test_one_that_may_not_be_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.toml").write_text("")

    def forbidden(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", forbidden)
    assert "my.toml cannot be read (Permission denied)" in refused(capsys, "--model", "my.keras")


def test_options_that_an_export_was_made_with(tmp_path: Path) -> None:
    """They stand in its about.json; a damaged one has none, and what is wrong with it is said where it is opened."""
    about = {"spec": asdict(Spec()), "settings": {"preprocess": "tf", "background": "black"}}
    Path("out").mkdir()
    write_export(Path("out"), {}, about)
    found = read("--model", "out", "--background", "red")
    assert (found.preprocess, found.background) == ("tf", "red")
    Path("out/about.json").write_text("{}")
    assert read("--model", "out") == Settings(model="out")


def test_a_copy_of_the_bundled_model_has_an_export_of_its_own() -> None:
    """In it no classes are named, as in any file."""
    Path(BUNDLED.name).symlink_to(BUNDLED)
    ours, bundled = (Cache.of(Source(model), "cache", "").entry for model in (f"./{BUNDLED.name}", "bundled"))
    assert ours != bundled
    assert ours.name[:18] == bundled.name[:18] == "efficientnet_lite0"


def test_a_server_takes_them(start: Callable[..., Process], cache: str) -> None:
    """The real process, with two settings beside its model: a picture through which the background is seen."""
    Path("net.keras").symlink_to(tiny_models.file_of("colours"))
    Path("net.labels.txt").write_text("red\ngreen\nblue")
    Path("net.toml").write_text('background = "blue"')
    model = os.path.abspath("net.keras")
    engine_and_spec(Source(model), Settings(cache_dir=cache))  # converted here, where TensorFlow is loaded already
    process = start("--model", model).wait_until_ready()
    clear = encode(Image.new("RGBA", (24, 24)))
    answer = requests.post(f"{process.url}/predict?top=1", data=clear, timeout=60).json()
    assert answer["predictions"][0]["label"] == "blue"
