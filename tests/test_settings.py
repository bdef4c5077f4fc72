"""Settings: one table, read from the command line and the environment, and listed in the README."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

import run_keras_server as server
from keras_server import __version__, machine
from keras_server.settings import SETTINGS, Setting, Settings, read_settings, unknown_variables

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
    ("--min-agreement", "1.1"),
    ("--min-agreement", "95%"),
    ("--max-batch", "0"),
    ("--max-upload-mb", "-3"),
    ("--log-format", "xml"),
    ("--log-level", "verbose"),
    ("--trusted-proxies", "10.0.0.0/33"),
    ("--unsafe-model", "perhaps"),
    ("--port", "65536"),
    ("--top", "100001"),
    ("--top", "9" * 5000),
    ("--timeout", "-inf"),
    ("--timeout", "86400.1"),
    ("--timeout", "9" * 500),
    ("--drain-seconds", "-0.1"),
    ("--keep-alive", "0"),
    ("--cors-origin", "there"),
    ("--cors-origin", "https://there/page"),
    ("--cors-origin", "https://"),
    ("--cors-origin", "//there"),
    ("--cors-origin", "https://a b"),
    ("--cors-origin", "https://hünd"),
    ("--activation", "soft"),
    ("--activation", "Softmax"),
    ("--port", "1\n2"),
    ("--port", ""),
    ("--unsafe-model", "2"),
    ("--nothing", "x"),
    ("--por", "1"),
    ("--max", "1"),
]


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """A sentence on standard error, no usage and no traceback, and nothing on standard output."""
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--port", "70000"), "'70000' is not a whole number from 0 to 65535."),
        (("--timeout", "nan"), "'nan' is not a number from 0.01 to 86400."),
        (("--engine", "cuda"), "'cuda' is none of auto, openvino, keras."),
        (("--unsafe-model", "perhaps"), "'perhaps' is neither on nor off."),
    ],
)
def test_what_a_setting_takes_is_said(
    option: tuple[str, str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read_settings(option)
    assert sentence in capsys.readouterr().err


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("KERAS_SERVER_"):
            monkeypatch.delenv(name)


def test_defaults() -> None:
    found = read_settings()
    assert (found.host, found.port, found.top, found.timeout) == ("localhost", 5000, 5, 30)
    assert found == Settings()
    assert [setting.default for setting in SETTINGS] == [getattr(Settings(), setting.name) for setting in SETTINGS]


def test_what_is_read_stays() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_settings().port = 1  # type: ignore[misc]


def test_command_line_before_environment_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_SERVER_PORT", "6000")
    monkeypatch.setenv("KERAS_SERVER_TOP", "7")
    found = read_settings(["--port", "7000"])
    assert (found.port, found.top, found.host) == (7000, 7, "localhost")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_can_stand_in_both(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {
        "engine": "keras",
        "precision": "bfloat16",
        "min_agreement": "0.7",
        "activation": "softmax",
        "log_format": "json",
        "log_level": "debug",
        "trusted_proxies": "10.0.0.0/8",
        "crop": "centre",
        "sha256": "0" * 64,
        "interpolation": "lanczos",
        "background": "black",
        "cors_origin": "https://there",
    }.get(setting.name, "on" if isinstance(setting.default, bool) else "7" if setting.default != () else "k")
    if setting.name == "api_key_file":
        text = str(ROOT / "requirements.txt")
    given = getattr(read_settings([setting.option, text]), setting.name)
    monkeypatch.setenv(setting.variable, text)
    assert getattr(read_settings(), setting.name) == given
    assert given not in ("", (), False)
    assert given != setting.default
    assert type(given) is type(setting.default)


@pytest.mark.parametrize(("option", "value"), BAD)
def test_mistakes_end_with_status_2_and_a_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings([f"{option}={value}"])
    assert stop.value.code == 2
    assert_one_line(capsys, option)
    variable = "KERAS_SERVER_" + option[2:].upper().replace("-", "_")
    if value and any(setting.variable == variable for setting in SETTINGS):
        monkeypatch.setenv(variable, value)
        with pytest.raises(SystemExit) as stop:
            read_settings()
        assert stop.value.code == 2
        assert_one_line(capsys, variable)


def test_keys_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n\nsecond\n")
    monkeypatch.setenv("KERAS_SERVER_API_KEY", "one, two")
    found = read_settings(["--api-key", "three", "--api-key", "four", "--api-key-file", str(file)])
    assert found.api_key == ("one", "two", "three", "four", "from-file", "second")


def test_origins_are_collected_as_browsers_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_SERVER_CORS_ORIGIN", "https://a, http://localhost:3000")
    assert read_settings().cors_origin == ("https://a", "http://localhost:3000")
    typed = ["HTTPS://B.example/", "https://c:443", "http://d:80", "https://e:80", "http://[::80]", "null", "*"]
    browsers = ("https://b.example", "https://c", "http://d", "https://e:80", "http://[::80]", "null", "*")
    assert read_settings([f"--cors-origin={origin}" for origin in typed]).cors_origin == browsers


def test_commas_do_not_divide_origins_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--cors-origin", "https://a,https://b"])
    assert_one_line(capsys, "--cors-origin: 'https://a,https://b' is no origin")


def test_a_sentence_is_one_line_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--api-key-file", "no/such\nfile"])
    assert_one_line(capsys, "no/such file cannot be read (No such file or directory)")


@pytest.mark.parametrize("content", [None, "", "\n \n", "# all\n #commented\n", "schlüssel\n"])
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


@pytest.mark.parametrize("keys", ["", " ", "one,", ",one", "one,,two", "schlüssel", "one\ttwo", "one\ntwo"])
def test_an_empty_key_opens_no_door(
    keys: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that no client could send; and no key is shown."""
    for key in (keys,) if "," in keys else (keys, f"one{keys}" if keys.strip() else keys):
        with pytest.raises(SystemExit) as stop:
            read_settings(["--api-key", key])
        assert stop.value.code == 2
        assert_one_line(capsys, "--api-key: a key ")
    monkeypatch.setenv("KERAS_SERVER_API_KEY", keys)
    for arguments in ([], ["--api-key", "good"]):
        with pytest.raises(SystemExit) as stop:
            read_settings(arguments)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: KERAS_SERVER_API_KEY: a key ")
        assert "schl" not in err


def test_an_empty_name_of_a_key_file_opens_no_door(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--api-key-file", ""])
    assert_one_line(capsys, "--api-key-file is empty")
    monkeypatch.setenv("KERAS_SERVER_API_KEY_FILE", "")
    with pytest.raises(SystemExit):
        read_settings()
    assert_one_line(capsys, "KERAS_SERVER_API_KEY_FILE is empty")


def test_a_line_of_the_key_file_is_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"# rotated in May\r\n correct horse battery staple \r\n\n  # another\nhash#inside, comma\n")
    keys = ("correct horse battery staple", "hash#inside, comma")
    assert read_settings(["--api-key-file", str(file)]).api_key == keys
    monkeypatch.setenv("KERAS_SERVER_API_KEY_FILE", str(file))
    assert read_settings().api_key == keys


def test_commas_divide_keys_in_the_environment_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_SERVER_API_KEY", "one two , three")
    assert read_settings().api_key == ("one two", "three")
    with pytest.raises(SystemExit):
        read_settings(["--api-key", "a,b"])
    assert_one_line(capsys, "--api-key: a key with a comma can only stand in an --api-key-file")


@pytest.mark.parametrize("name", ["CACHE_DIR", "MODEL", "PORT", "ENGINE", "UNSAFE_MODEL"])
def test_an_empty_variable_is_none_except_where_empty_means_something(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"KERAS_SERVER_{name}", "")
    assert read_settings() == Settings(**({"cache_dir": ""} if name == "CACHE_DIR" else {}))
    assert read_settings(["--cache-dir", "x"]).cache_dir == "x"


@pytest.mark.parametrize(
    ("text", "value"),
    [("on", True), ("true", True), ("1", True), ("YES", True), ("off", False), ("false", False), ("0", False),
     ("No", False)],
)  # fmt: skip
def test_switches(text: str, value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(["--unsafe-model", text]).unsafe_model is value
    assert read_settings([f"--unsafe-model={text}", "--port", "1"]).unsafe_model is value
    monkeypatch.setenv("KERAS_SERVER_UNSAFE_MODEL", text)
    assert read_settings().unsafe_model is value


@pytest.mark.parametrize("arguments", [["--unsafe-model"], ["--unsafe-model", "--port", "1"]])
def test_a_switch_alone_is_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_SERVER_UNSAFE_MODEL", "off")
    assert read_settings(arguments).unsafe_model is True


@pytest.mark.parametrize(
    ("option", "least", "most"),
    [
        ("--port", 0, 65_535),
        ("--max-batch", 1, 100_000),
        ("--decode-threads", 0, 1024),
        ("--timeout", 0.01, 86_400.0),
        ("--max-upload-mb", 0.001, 4096.0),
        ("--drain-seconds", 0.0, 3600.0),
        ("--keep-alive", 0.1, 86_400.0),
    ],
)
def test_ranges_include_their_ends(option: str, least: float, most: float) -> None:
    for value in (least, most):
        assert getattr(read_settings([option, str(value)]), option[2:].replace("-", "_")) == value
    for value in (least - 1, most + 1):
        with pytest.raises(SystemExit):
            read_settings([f"{option}={value}"])


@pytest.mark.parametrize("arguments", [["photo.jpg"], ["--port"], ["--", "--port"], ["-p", "1"], ["--port=1", "x"]])
def test_what_else_cannot_be_read(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(arguments)
    assert stop.value.code == 2
    assert_one_line(capsys, "error: ")


def test_variables_that_nobody_reads() -> None:
    environment = {
        "KERAS_SERVER_TIMEOUTS": "3",
        "KERAS_SERVER_PORT": "5000",
        "KERAS_SERVER_SERVICE_HOST": "10.0.0.1",  # of Kubernetes
        "KERAS_SERVER_SERVICE_PORT_HTTP": "80",
        "KERAS_SERVER_PORT_80_TCP_ADDR": "10.0.0.1",
        "KERAS_SERVER": "x",
        "PATH": "/bin",
        "KERAS_SERVER_": "x",
    }
    first, second = unknown_variables(environment)
    assert first.startswith("KERAS_SERVER_ in the environment is no setting")
    assert second == "KERAS_SERVER_TIMEOUTS in the environment is no setting: did you mean KERAS_SERVER_TIMEOUT?"


def test_they_are_warned_of_at_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(server, "settings", server.settings)
    monkeypatch.setenv("KERAS_SERVER_TIMEOUTS", "3")
    server.configure(["--top", "3"])
    assert server.settings == Settings(top=3)
    assert "WARNING KERAS_SERVER_TIMEOUTS in the environment is no setting" in capsys.readouterr().err


def test_another_process_reads_the_same_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the replicas on a Ray cluster do."""
    assert Settings().environment() == {}
    file = tmp_path / "keys"
    file.write_text("a comma, inside\nthird\n")
    options = ["--port=7", "--timeout=0.25", "--cache-dir=", "--unsafe-model", "--api-key=one two", "--labels=l.txt"]
    options += ["--cors-origin=https://a", "--cors-origin=https://b:8443"]
    for arguments in (options, [*options, "--api-key-file", str(file)], ["--api-key-file", str(file)]):
        found = read_settings(arguments)
        with monkeypatch.context() as patch:
            for name, value in found.environment().items():
                patch.setenv(name, value)
            again = read_settings()
        assert dataclasses.replace(again, api_key=()) == dataclasses.replace(found, api_key=())
        assert {*again.api_key} == {*found.api_key}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"keras-server {__version__}\n"


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_settings(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for setting in SETTINGS:
        assert re.search(rf"^  {setting.option}\b", text, re.M)
        assert setting.variable in text
        assert f"default: {setting.shown_default}]" in re.sub(r"\s+", " ", text) or setting.default in ("", ())


def test_readme_lists_the_table() -> None:
    """The README's table of options is the settings', row by row."""
    rows = re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*?) \| (.*?) \|$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [(s.option, s.shown_default, s.help) for s in SETTINGS]


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


def test_the_memory_that_this_process_has_is_what_the_system_says() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's list of what a process has")
    ballast = bytearray(200_000_000)  # much beside what other threads take and give back meanwhile
    (kilobytes,) = re.findall(r"(?m)^VmRSS:\s+(\d+) kB", status.read_text())
    assert machine.resident() == pytest.approx(1024 * int(kilobytes), abs=50e6)
    assert machine.resident() > len(ballast)
