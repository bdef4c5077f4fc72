"""Settings: one table, read from the command line and the environment, and listed in the README."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from keras_server import machine
from keras_server.settings import SETTINGS, Setting, read_settings, shown_default

BAD = [
    ("--port", "abc"),
    ("--port", "70000"),
    ("--port", "-1"),
    ("--top", "0"),
    ("--top", "1.5"),
    ("--timeout", "nan"),
    ("--timeout", "inf"),
    ("--timeout", "0"),
    ("--engine", "cuda"),
    ("--precision", "float16"),
    ("--max-batch", "0"),
    ("--max-upload-mb", "-3"),
    ("--log-format", "xml"),
    ("--unsafe-model", "perhaps"),
    ("--nothing", "x"),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


def test_defaults() -> None:
    found = read_settings()
    assert (found.host, found.port, found.top, found.timeout) == ("127.0.0.1", 5000, 5, 30)
    for setting in SETTINGS:
        if setting.default not in ((), ""):
            assert getattr(found, setting.name) == setting.default


def test_command_line_before_environment_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_SERVER_PORT", "6000")
    monkeypatch.setenv("KERAS_SERVER_TOP", "7")
    found = read_settings(["--port", "7000"])
    assert (found.port, found.top, found.host) == (7000, 7, "127.0.0.1")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_can_stand_in_both(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"engine": "keras", "precision": "bfloat16", "activation": "softmax", "log_format": "json"}.get(
        setting.name, "on" if isinstance(setting.default, bool) else "7" if setting.default != () else "k"
    )
    if setting.name == "api_key_file":
        text = str(ROOT / "requirements.txt")
    given = getattr(read_settings([setting.option, text]), setting.name)
    monkeypatch.setenv(setting.variable, text)
    assert getattr(read_settings(), setting.name) == given
    assert given not in ("", [], False)
    assert given != setting.default


@pytest.mark.parametrize(("option", "value"), BAD)
def test_mistakes_end_with_status_2_and_a_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings([f"{option}={value}"])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]
    variable = "KERAS_SERVER_" + option[2:].upper().replace("-", "_")
    if any(setting.variable == variable for setting in SETTINGS):
        monkeypatch.setenv(variable, value)
        with pytest.raises(SystemExit) as stop:
            read_settings()
        assert stop.value.code == 2
        assert variable in capsys.readouterr().err.splitlines()[-1]


def test_keys_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n\nsecond\n")
    monkeypatch.setenv("KERAS_SERVER_API_KEY", "one, two")
    found = read_settings(["--api-key", "three", "--api-key", "four", "--api-key-file", str(file)])
    assert found.api_key == ["one", "two", "three", "four", "from-file", "second"]


@pytest.mark.parametrize("content", [None, "", "\n \n", "schlüssel\n"])
def test_a_key_file_without_keys_opens_no_door(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content, "utf-8")
    with pytest.raises(SystemExit) as stop:
        read_settings(["--api-key-file", str(file)])
    assert stop.value.code == 2
    assert "schl" not in capsys.readouterr().err


def test_an_empty_key_opens_no_door(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--api-key", ""])
    monkeypatch.setenv("KERAS_SERVER_API_KEY", "")
    assert read_settings().api_key == [], "an empty variable is no variable"


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for setting in SETTINGS:
        assert setting.option in text
    assert "KERAS_SERVER_PORT" in text


def test_readme_lists_the_table() -> None:
    """The README's table of options is the settings', row by row."""
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (.*?) \| (.*?) \|$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [(s.option, shown_default(s), s.help) for s in SETTINGS]


@pytest.mark.parametrize(
    ("quota", "affinity", "expected"),
    [
        ("max 100000", 4, 4),
        ("200000 100000", 4, 2),
        ("150000 100000", 4, 1),
        ("50000 100000", 4, 1),
        ("900000 100000", 4, 4),
        (None, 3, 3),
        ("nonsense", 2, 2),
    ],
)
def test_processors(
    quota: str | None, affinity: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The container's quota and the process' affinity count, not the machine's processors."""

    def read_text(path: machine.Path, *_: object) -> str:
        if str(path) == "/proc/self/cgroup":
            return "0::/box\n"
        assert str(path) in ("/sys/fs/cgroup/box/cpu.max", "/box/cpu.max")
        if quota is None:
            raise FileNotFoundError
        return quota

    monkeypatch.setattr(machine.Path, "read_text", read_text)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert machine.processors() == expected
