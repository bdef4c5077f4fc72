"""Several models on one port: named, found in a folder, versioned, swapped and removed while requests go on."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from multiplying import times

from keras_server.models.errors import StartupError
from keras_server.models.folder import models_in, versions_in
from keras_server.models.registry import NotServed, Registry, UnknownModel, in_words
from keras_server.models.repository import Repository, has_several, load
from keras_server.readers import model_option
from keras_server.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KERAS_SERVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def serve() -> Iterator[Callable[..., Repository]]:
    """Load a repository with the options of a command line; it is closed with the test."""
    loaded: list[Repository] = []

    def run(*arguments: str) -> Repository:
        found = load(read_settings(["--cache-dir", "", *arguments]))
        assert isinstance(found, Repository)
        loaded.append(found)
        return found

    yield run
    for each in loaded:
        each.close()


def factor(registry: Registry, *which: str | None) -> float:
    """Return what a model multiplies with."""
    served = registry.take(*which)
    try:
        return float(served.compute([np.ones((1, 3), np.float32)])[0][0, 0])
    finally:
        served.let_go()


def look_twice(repository: Repository) -> None:
    """Look until what is there has not changed between two looks."""
    repository.look()
    repository.look()


def test_names_and_settings_of_models_are_read(tmp_path: Path) -> None:
    for name in ("a=b.keras", "x,y=1.keras", "cats.keras"):
        Path(name).touch()
    expected = {
        "a=b.keras": ("", "a=b.keras", {}),
        "cats=cats.keras": ("cats", "cats.keras", {}),
        "digits=./digits": ("digits", "./digits", {}),
        "..=cats.keras": ("", "..=cats.keras", {}),  # no address could hold that name
        "resnet50": ("", "resnet50", {}),
        "cats=cats.keras,preprocess=tf,labels=c.txt": ("cats", "cats.keras", {"preprocess": "tf", "labels": "c.txt"}),
        "x,y=1.keras": ("", "x,y=1.keras", {}),
        "x,y=1.keras,crop=centre": ("", "x,y=1.keras", {"crop": "centre"}),
        "n=a=b.keras,threads=2": ("n", "a=b.keras", {"threads": "2"}),
        "n=no.keras,labels=a,b.txt,crop=none": ("n", "no.keras", {"labels": "a,b.txt", "crop": "none"}),
        r"C:\m\a=b.keras": ("", r"C:\m\a=b.keras", {}),
        r"cats=C:\x.keras,crop=none": ("cats", r"C:\x.keras", {"crop": "none"}),
        "https://example.org/?a=1": ("", "https://example.org/?a=1", {}),
    }
    found = {text: model_option(text) for text in expected}
    assert {text: (each.name, each.model, each.values) for text, each in found.items()} == expected


def test_one_model_alone_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (read_settings(["--model", "a.keras"]).model, read_settings(["--model", "a.keras"]).models) == (
        "a.keras",
        (),
    )
    both = read_settings(["--model", "a.keras", "--model", "b=b.keras"])
    assert (both.model, [each.name for each in both.models]) == ("", ["", "b"])
    monkeypatch.setenv("KERAS_SERVER_MODEL", "a.keras;b=b.keras")
    assert read_settings() == both
    for name, value in both.environment().items():
        monkeypatch.setenv(name, value)
    assert read_settings() == both


def test_the_first_is_the_default_and_each_has_its_name(serve: Callable[..., Repository]) -> None:
    times(Path("two.xml"), 2)
    times(Path("three.xml"), 3)
    served = serve("--model", "two.xml", "--model", "tres=three.xml")
    assert served.names() == ("two", "tres")
    assert (factor(served), factor(served, "two"), factor(served, "tres")) == (2, 2, 3)
    assert served.find("tres").title == {"model": "tres"}
    with pytest.raises(UnknownModel, match=re.escape('There is no model "three": this server has "two", "tres".')):
        served.find("three")
    with pytest.raises(UnknownModel, match=re.escape('There is no version "2" of tres: it has version 1.')):
        served.find("tres", "2")
    with pytest.raises(UnknownModel, match=re.escape('There is no label "stable" of tres: it has no labels.')):
        served.find("tres", None, "stable")


def test_settings_of_each(serve: Callable[..., Repository]) -> None:
    """What follows the model comes first, then the command line, then what stands beside it."""
    for name in ("a", "b", "c"):
        times(Path(f"{name}.xml"), 2)
        Path(f"{name}.toml").write_text('crop = "centre"\nbackground = "red"\nthreads = 1\ninterpolation = "box"')
    names = ["--model", "a.xml", "--model", "b.xml,crop=none,background=blue", "--model", "c.xml"]
    served = serve(*names, "--background", "white")
    found = {name: served.find(name).settings for name in "abc"}
    assert [
        (each.crop, each.background, each.engine_threads, each.interpolation) for each in found.values() if each
    ] == [
        ("centre", "white", 1, "box"),
        ("none", "blue", 1, "box"),
        ("centre", "white", 1, "box"),
    ]
    assert served.find("a").batcher.lanes == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a=two.xml", "a=three.xml"], "--model: two models are called a: give one another name, NAME=three.xml"),
        (["two.xml", "no.xml"], "There is no file no.xml"),
        (
            ["two.xml", "three.xml,preproces=tf"],
            "--model: 'preproces' is no setting of a model: did you mean preprocess",
        ),
        (["two.xml", "three.xml,port=80"], "--model: port belongs to the server and not to the model"),
        (["two.xml", "three.xml,crop=left"], "--model: crop: 'left' is none of none, centre"),
        (["two.xml", "three.xml,threads=x"], "--model: engine_threads: 'x' is not a whole number"),
        (["two.xml", "text.xml"], "text.xml is not a Keras model, but a text file"),
        (["three.xml", "bad.xml"], "bad.toml: 'x' is no setting of a model"),
    ],
)
def test_what_cannot_be_served_ends_the_start(arguments: list[str], sentence: str) -> None:
    for name in ("two", "three", "bad"):
        times(Path(f"{name}.xml"), 2)
    Path("text.xml").write_text("text")
    Path("bad.toml").write_text("x = 1")
    before = threading.active_count()
    with pytest.raises(StartupError) as error:
        load(read_settings(["--cache-dir", "", *(word for each in arguments for word in ("--model", each))]))
    assert sentence in str(error.value)
    for thread in threading.enumerate()[before:]:
        thread.join(20)
    assert threading.active_count() <= before


def test_what_a_folder_holds() -> None:
    times(Path("m/plain.xml"), 2)
    times(Path("m/versions/1/model.xml"), 2)
    times(Path("m/versions/12/any.xml"), 2)
    for name in ("m/README.txt", "m/plain.toml", "m/.hidden.keras", "m/versions/notes.txt", "m/versions/3"):
        Path(name).touch()
    for name in ("m/saved", "m/empty", "m/versions/tmp-13"):
        Path(name).mkdir()
    Path("m/saved/saved_model.pb").touch()
    assert models_in(Path("m")) == {
        "plain": [Path("m/plain.xml")], "saved": [Path("m/saved")], "versions": [Path("m/versions")]
    }  # fmt: skip
    assert versions_in(Path("m/versions")) == {
        1: Path("m/versions/1/model.xml"), 3: Path("m/versions/3"), 12: Path("m/versions/12/any.xml")
    }  # fmt: skip
    assert versions_in(Path("m/plain.xml")) == versions_in(Path("m/saved")) == {}


def test_a_folder_as_tensorflow_serving_has_it(serve: Callable[..., Repository], caplog: Any) -> None:
    """A version that is a text file, or a folder with nothing in it, is said and keeps no other from being served."""
    for number in (1, 2, 9, 10):
        times(Path(f"m/cats/{number}/model.xml"), number)
    times(Path("m/dogs.xml"), 7)
    Path("m/cats/11").write_text("not there yet")
    Path("m/cats/12").mkdir()
    Path("m/cats.toml").write_text("[version_labels]\nstable = 9\nold = 1\n")
    served = serve("--model-dir", "m", "--versions", "2")
    assert served.names() == ("cats", "dogs")
    assert [each.version_name for each in served.versions("cats")] == ["10", "9"]
    assert (factor(served), factor(served, "cats", "9"), factor(served, "cats", None, "stable")) == (10, 9, 9)
    assert served.find("cats").title == {"model": "cats", "version": "10"}
    assert served.find("dogs").title == {"model": "dogs"}
    with pytest.raises(UnknownModel, match=re.escape('There is no version "1" of cats: it has versions 9, 10.')):
        served.find("cats", None, "old")
    assert "version 11 of cats is not served: m/cats/11 is not a Keras model, but a text file" in caplog.text
    assert "version 12 of cats is not served: m/cats/12 is not a Keras model, but an empty folder" in caplog.text
    assert served.problem(30) == ""


def test_which_is_missing_is_said(serve: Callable[..., Repository]) -> None:
    times(Path("m/dogs.xml"), 7)
    Path("m/cats.keras").write_text("text")
    served = serve("--model-dir", "m")
    assert served.names() == ("dogs",)
    assert factor(served) == 7
    assert (
        served.problem(30)
        == "cats: m/cats.keras is not a Keras model, but a text file: save one with model.save('name.keras')."
    )
    with pytest.raises(NotServed, match=re.escape("cats is not served: m/cats.keras is not a Keras model")):
        served.find("cats")


@pytest.mark.parametrize("folder", ["empty", "no", "file"])
def test_a_folder_without_models_ends_the_start(folder: str) -> None:
    Path("empty").mkdir()
    Path("file").touch()
    with pytest.raises(StartupError, match=f"--model-dir: .*{folder}"):
        load(Settings(model_dir=folder))


def test_what_was_not_named_cannot_change() -> None:
    """So it stays ResNet50, or the bundled one where its weights cannot be had."""
    for settings in (Settings(watch=1), Settings(versions=2), Settings()):
        assert not has_several(settings)
    for settings in (Settings(model="bundled", watch=1), Settings(model="x", versions=2), Settings(model_dir="m")):
        assert has_several(settings)


@pytest.mark.parametrize(("count", "end"), [(19, "n18"), (20, "n19"), (21, "n19 and 1 more"), (25, "n19 and 5 more")])
def test_a_sentence_names_twenty_models_at_most(count: int, end: str) -> None:
    names = in_words([f"n{number}" for number in range(count)])
    assert names.startswith("n0, n1, ")
    assert names.rpartition(", ")[2] == end
