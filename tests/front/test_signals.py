"""Signals: the first one lets the server drain, the second one ends it whatever is stuck."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from fakes import FakeServer, request, wait_until

STOPPING = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("second", STOPPING)
@pytest.mark.parametrize("first", STOPPING)
def test_a_second_signal_ends_at_once(first: int, second: int) -> None:
    with FakeServer("--drain-seconds", "3600") as fake:
        raws = fake.occupy(1)
        fake.signal(first)
        wait_until(lambda: "Stopping" in fake.log)
        fake.signal(second)
        assert fake.end() == -second  # a shell shows it as 128 and its number
        raws[0].close()


@pytest.mark.parametrize("number", STOPPING)
def test_a_second_signal_ends_a_server_whose_loop_is_stuck(number: int) -> None:
    with FakeServer() as fake:
        fake.tell("stick")
        fake.signal(number)
        time.sleep(0.5)
        assert fake.popen.poll() is None  # a first one leaves it to the loop
        fake.signal(number)
        assert fake.end() == -number


@pytest.mark.usefixtures("without_nohup")
def test_a_hangup_drains_however_often_it_comes() -> None:
    with FakeServer("--drain-seconds", "1") as fake:
        (raw,) = fake.occupy(1)
        for _ in range(3):
            fake.signal(signal.SIGHUP)
            wait_until(lambda: fake.ready() == 503)
        assert fake.log.count("Stopping") == 1
        fake.tell("go")
        raw.expect(200)
        raw.close()
        assert fake.end() == 0


@pytest.mark.usefixtures("without_nohup")
def test_a_hangup_after_a_signal_to_stop_does_not_end_at_once() -> None:
    """As systemd sends it with SendSIGHUP, and a terminal that is closed."""
    with FakeServer() as fake:
        (raw,) = fake.occupy(1)
        fake.signal()
        wait_until(lambda: "Stopping" in fake.log)
        fake.signal(signal.SIGHUP)
        time.sleep(0.2)
        fake.tell("go")
        assert raw.answer()
        raw.close()
        assert fake.end() == 0


def test_under_nohup_a_hangup_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a child inherits
    try:
        fake = FakeServer()
    finally:
        signal.signal(signal.SIGHUP, before)
    with fake:
        fake.signal(signal.SIGHUP)
        time.sleep(0.5)
        assert fake.ask(request("/readyz")).status == 200
        fake.signal()
        assert fake.end() == 0


FIRST_PROCESS = """
import os, sys, time
from unittest.mock import patch
from keras_server.front.signals import end_at_once
with patch("os.getpid", lambda: 1):  # as a container's first process, for which the system's own way is to ignore it
    end_at_once()
os.kill(os.getpid(), int(sys.argv[1]))
time.sleep(60)
"""


@pytest.mark.parametrize("number", STOPPING)
def test_the_first_process_of_a_container_ends_at_once_too(number: int) -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_PROCESS, str(number)], cwd=ROOT, env=os.environ, timeout=60)
    assert done.returncode == 128 + number
