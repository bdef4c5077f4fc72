"""A port that systemd holds: taken over by the protocol, given to no child, kept for the next server at a restart."""

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DOG, ROOT
from fakes import FakeServer, Raw, post, request, wait_until
from supervisor import Supervisor, handing, holds

from keras_server.front import systemd
from keras_server.front.systemd import VARIABLES, taken_over
from keras_server.models.errors import StartupError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="systemd runs on Linux")

NOWHERE = ("--host", "256.0.0.1", "--port", "1")  # what cannot be had, so that it cannot have been taken


@pytest.fixture
def held() -> Iterator[socket.socket]:
    """A port of this process's, which answers nobody."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener


def port_of(listener: socket.socket) -> int:
    """Return the port that a socket has."""
    port: int = listener.getsockname()[1]
    return port


def status(raw: Raw) -> int:
    """Return the status of the answer, or 0 where the connection ends without one."""
    answer = raw.answer()
    return answer.status if answer else 0


# The protocol


def test_the_port_that_is_handed_over_is_served_and_no_other(held: socket.socket) -> None:
    with FakeServer(*NOWHERE, handed=[held]) as fake:
        assert fake.port == port_of(held)
        assert fake.ask(post()).status == 200


def test_several_ports_are_served(held: socket.socket) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other, FakeServer(*NOWHERE, handed=[held, other]) as fake:
        for listener in (held, other):
            with Raw(port_of(listener)) as raw:
                assert status(raw.send(post())) == 200
        assert "Whoever reaches 0.0.0.0 can use the model" in fake.log


def test_what_is_meant_for_another_process_is_not_taken(held: socket.socket) -> None:
    with FakeServer(environment={"LISTEN_PID": "1", "LISTEN_FDS": "1"}, handed=[held]) as fake:
        assert fake.port != port_of(held)


def test_nothing_of_it_is_left_for_a_child(monkeypatch: pytest.MonkeyPatch, held: socket.socket) -> None:
    """Neither a variable nor the socket itself, which a child would keep open for as long as it lives."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setattr(systemd, "FIRST", os.dup(held.fileno()))
    os.set_inheritable(systemd.FIRST, True)
    found = taken_over()
    assert found.told == "/run/systemd/notify"
    assert not {*VARIABLES, "NOTIFY_SOCKET"} & {*os.environ}
    (listener,) = found.listeners
    with listener:
        assert not listener.get_inheritable()
        assert listener.getsockname() == held.getsockname()


def test_without_systemd_there_is_nothing() -> None:
    found = taken_over()
    assert (found.listeners, found.told) == ([], "")
    found.ready()


@pytest.mark.parametrize("name", ["{folder}/notify", "@keras-server-test-{pid}"])
def test_systemd_is_told_at_its_socket(name: str, tmp_path: Path) -> None:
    name = name.format(folder=tmp_path, pid=os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(name.replace("@", "\0"))
        systemd.Systemd(told=name).ready()
        assert there.recv(100) == b"READY=1"


def test_where_nobody_listens_any_more_nothing_happens(tmp_path: Path) -> None:
    systemd.Systemd(told=str(tmp_path / "notify")).ready()


def datagrams() -> socket.socket:
    """Return a socket of UDP."""
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def local() -> socket.socket:
    """Return a listening socket that has no port."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")  # to a name that Linux chooses
    sock.listen()
    return sock


def connected() -> socket.socket:
    """Return one connection, as with Accept=yes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return socket.create_connection(listener.getsockname())


@pytest.mark.parametrize(
    ("make", "what"),
    [(datagrams, "is no socket of TCP"), (local, "is no socket of TCP"), (connected, "does not listen")],
)
def test_another_kind_of_socket_is_said(make: object, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(make)
    with make() as sock:
        monkeypatch.setattr(systemd, "FIRST", os.dup(sock.fileno()))
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        with pytest.raises(StartupError, match=rf"File descriptor \d+, .* {what}: have ListenStream= name a port"):
            taken_over()


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        ("one", "LISTEN_FDS is 'one', which is no number"),
        ("", "LISTEN_FDS is '', which is no number"),
        ("1", r"File descriptor 100000, which systemd hands over, is no socket \(Bad file descriptor\)"),
    ],
)
def test_an_environment_that_is_wrong_is_said(count: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "FIRST", 100_000)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    with pytest.raises(StartupError, match=sentence):
        taken_over()


def test_what_is_no_socket_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        command = handing([file.fileno()], [sys.executable, str(ROOT / "run_keras_server.py"), "--model", "bundled"])
        done = subprocess.run(command, pass_fds=[file.fileno()], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: File descriptor 3, which systemd hands over, is no socket (")
    assert done.stderr.count("\n") == 1


# Restarts


def test_who_connects_between_two_servers_waits_for_the_next_one(held: socket.socket) -> None:
    with Raw(port_of(held)) as first, FakeServer(handed=[held]) as fake:
        assert status(first.send(post())) == 200
        first.close()
        fake.signal()
        assert fake.end() == 0
        with Raw(port_of(held)) as second, FakeServer(handed=[held]):
            assert status(second.send(post())) == 200


def test_who_connects_while_a_server_stops_is_left_to_the_next_one(held: socket.socket) -> None:
    """It still waits for its last answers; neither is what the kernel has closed, nor is anybody told to come later."""
    with FakeServer(handed=[held]) as old:
        (accepted,) = old.occupy(1)
        old.signal()
        wait_until(lambda: not holds(old.popen.pid, held))
        with Raw(port_of(held)) as early, Raw(port_of(held)) as silent:
            early.send(post())
            old.tell("go")
            assert status(accepted) == 200
            accepted.close()
            assert old.end() == 0
            with FakeServer(handed=[held]), Raw(port_of(held)) as late:
                for raw in (early, silent.send(request("/healthz")), late.send(post())):
                    assert status(raw) == 200


def test_restarts_of_the_real_server_under_load_refuse_and_lose_nothing(cache: str) -> None:
    """Each client has a new connection for each request."""
    options = ["--model", "bundled", "--cache-dir", cache, "--drain-seconds", "0", "--timeout", "240"]
    options += ["--allowed-hosts", "*"]
    photo, found, stopped = post(DOG.read_bytes()), Counter[object](), threading.Event()
    with Supervisor(sys.executable, str(ROOT / "run_keras_server.py"), *options) as systemd:

        def client() -> None:
            while not stopped.is_set():
                try:
                    with Raw(systemd.port) as raw:
                        raw.socket.settimeout(240)  # OpenVINO's threads give way to whatever else the machine does
                        found[status(raw.send(photo))] += 1
                except OSError as error:
                    found[type(error)] += 1

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        try:
            for _ in range(2):
                answered = found[200]
                wait_until(lambda answered=answered: found[200] > answered + 3, 240)
                assert systemd.restart() == 0
            answered = found[200]
            wait_until(lambda: found[200] > answered + 3, 240)
        finally:
            stopped.set()
            for thread in clients:
                thread.join()
    assert [*found] == [200]
