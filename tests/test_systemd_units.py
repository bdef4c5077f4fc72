"""The units for systemd: sound by its own check, strict, and in agreement with the settings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, lacking

from keras_server.front import limits
from keras_server.settings import SETTINGS, Settings

UNITS = ROOT / "deploy" / "systemd"
SERVICE = (UNITS / "keras-server.service").read_text("utf-8")
SOCKET = (UNITS / "keras-server.socket").read_text("utf-8")
EXPOSURE = 20  # tenths of systemd's scale from 0, safe, to 10


def values(unit: str, name: str) -> list[str]:
    """Return what a unit gives a name, in order."""
    return re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)


def environment() -> dict[str, str]:
    """Return the variables that the service sets, those of commented lines too."""
    lines = re.findall(r"^(?:# )?Environment=(.*)$", SERVICE, re.MULTILINE)
    return dict(pair.split("=", 1) for line in lines for pair in line.split())


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, for a machine on which the server is installed: Python stands for it."""
    (command,) = values(SERVICE, "ExecStart")
    (tmp_path / "keras-server.service").write_text(SERVICE.replace(command, sys.executable))
    shutil.copy(UNITS / "keras-server.socket", tmp_path)
    return tmp_path


def analyze(*arguments: str, folder: Path) -> str:
    """Return what systemd-analyze prints, which it does for faults; fails where its exit status is not 0."""
    program = shutil.which("systemd-analyze")
    if not program:
        lacking("systemd-analyze is not installed: apt-get install systemd.")
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def test_systemd_finds_no_fault(units: Path) -> None:
    assert analyze("verify", "./keras-server.service", "./keras-server.socket", folder=units) == ""


def test_the_service_may_little(units: Path) -> None:
    analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", "./keras-server.service", folder=units)


def test_its_variables_are_settings_and_its_port_is_theirs() -> None:
    ours = {name for name in environment() if name.startswith("KERAS_SERVER_")}
    assert ours <= {setting.variable for setting in SETTINGS}
    assert values(SOCKET, "ListenStream") == [f"127.0.0.1:{Settings().port}"]
    assert not values(SOCKET, "Accept"), "a process for each connection"


def test_it_is_ready_by_its_own_word_and_ends_by_itself() -> None:
    """The last answer may be due after the deadline, and take as long as a client may stall."""
    assert values(SERVICE, "Type") == ["notify"]
    grace = float(environment()["KERAS_SERVER_DRAIN_SECONDS"])
    (seconds,) = values(SERVICE, "TimeoutStopSec")
    assert float(seconds) > grace + Settings().timeout + limits.STALL_SECONDS


def test_what_the_server_writes_is_what_it_may_write() -> None:
    assert values(SERVICE, "CacheDirectory") == ["keras-server"]
    assert environment()["KERAS_SERVER_CACHE_DIR"] == "%C/keras-server"
