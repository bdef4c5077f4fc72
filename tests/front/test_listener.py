"""The port: on both of the machine's own addresses, or on the one that is named; and how it is closed."""

import errno
import os
import socket
import sys
from contextlib import ExitStack, closing

import gevent.socket
import pytest
from fakes import FakeServer, Raw, has_ipv6, post, request, wait_until

from keras_server.front import listener
from keras_server.front.listener import bind, is_local, refuse_new, url_of
from keras_server.models.errors import StartupError

ELSEWHERE = "2001:db8::1"  # for documentation (RFC 3849): no machine has it

ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
ADDRESSES = ["127.0.0.1", pytest.param("::1", marks=ipv6)]


def ports_of(listeners: list[gevent.socket.socket]) -> list[tuple[str, int]]:
    """Return where sockets are bound, and close them."""
    with ExitStack() as stack:
        return [stack.enter_context(closing(each)).getsockname()[:2] for each in listeners]


@ipv6
def test_both_of_the_machine_s_own_addresses_are_answered() -> None:
    with FakeServer() as fake:
        for address in ("127.0.0.1", "::1"):
            with Raw(fake.port, address=address) as raw:
                answer = raw.send(post()).answer()
            assert answer
            assert answer.status == 200
        assert f"http://127.0.0.1:{fake.port}" in fake.url


@ipv6
@pytest.mark.parametrize(("host", "others"), [("127.0.0.1", ["::1"]), ("::1", ["127.0.0.1"]), ("0.0.0.0", ["::1"])])
def test_an_address_that_is_named_is_the_only_one(host: str, others: list[str]) -> None:
    ((address, _),) = ports_of(bind(host, 0))
    assert address == host
    with FakeServer("--host", host) as fake:
        for other in others:
            with pytest.raises(ConnectionRefusedError):
                Raw(fake.port, address=other)


@ipv6
def test_all_addresses_of_ipv6_are_those_of_ipv4_too() -> None:
    """As a pod in a cluster of both kinds listens."""
    with FakeServer("--host", "::", "--drain-seconds", "0") as fake:
        for address in ("127.0.0.1", "::1"):
            with Raw(fake.port, address=address) as raw:
                assert raw.send(request()).answer()
        assert "--api-key asks them for a key" in fake.log
        fake.signal()
        assert fake.end() == 0


@ipv6
def test_a_free_port_is_free_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    others = list[socket.socket]()

    def bind_one(host: str, port: int) -> gevent.socket.socket:
        if host == "::1" and len(others) < 2:  # somebody else is faster
            others.append(socket.create_server(("::1", port), family=socket.AF_INET6))
        return original(host, port)

    original = listener.bind_one
    monkeypatch.setattr(listener, "bind_one", bind_one)
    (first, port), (second, same) = ports_of(bind("localhost", 0))
    assert (first, second, same) == ("127.0.0.1", "::1", port)
    assert [other.getsockname()[1] for other in others] != [port, port]
    for other in others:
        other.close()


@pytest.mark.parametrize("own", [("127.0.0.1", ELSEWHERE), (ELSEWHERE, "127.0.0.1")])
def test_where_there_is_one_kind_of_ip_that_one_is_taken(own: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LOOPBACKS", own)
    ((address, _),) = ports_of(bind("localhost", 0))
    assert address == "127.0.0.1"


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL])
def test_ipv6_may_be_switched_off_in_several_ways(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind_one(host: str, port: int) -> gevent.socket.socket:
        if host == "::1":
            raise OSError(number, os.strerror(number))
        return original(host, port)

    original = listener.bind_one
    monkeypatch.setattr(listener, "bind_one", bind_one)
    ((address, _),) = ports_of(bind("localhost", 0))
    assert address == "127.0.0.1"


def test_where_there_is_neither_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LOOPBACKS", (ELSEWHERE, ELSEWHERE))
    with pytest.raises(StartupError, match=rf"Cannot listen on {ELSEWHERE} port 0 \(.*\): choose another --host\."):
        bind("localhost", 0)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_port_that_is_taken_on_one_of_them_is_said_and_the_other_given_back(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            StartupError, match=rf"Cannot listen on {address} port {port} \(.*\): choose another --port\."
        ):
            bind("localhost", port)
    assert {bound for _, bound in ports_of(bind("localhost", port))} == {port}


@pytest.mark.parametrize("host", ["256.0.0.1", ELSEWHERE, "no host"])
def test_an_address_that_is_none_is_said(host: str) -> None:
    with pytest.raises(StartupError, match=f"Cannot listen on {host} port 0 .*: choose another --host"):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.2", True), ("0.0.0.0", False), pytest.param("::", False, marks=ipv6)],
)
def test_who_reaches_an_address_is_known(host: str, local: bool) -> None:
    for each in bind(host, 0):
        assert is_local(each) is local
        each.close()


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "localhost"), ("127.0.0.2", "127.0.0.2"), pytest.param("::1", "[::1]", marks=ipv6),
     pytest.param("::", "localhost", marks=ipv6)],
)  # fmt: skip
def test_the_address_that_is_shown_is_one_to_call(host: str, shown: str) -> None:
    (each,) = bind(host, 0)
    with closing(each):
        assert url_of(each) == f"http://{shown}:{each.getsockname()[1]}"


def test_on_windows_two_servers_share_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """SO_REUSEADDR would let them there. Another option stands for the one that only Windows has."""
    with closing(listener.bind_one("127.0.0.1", 0)) as here:
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not here.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with closing(listener.bind_one("127.0.0.1", 0)) as there:
        assert not there.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# Closing


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is simply closed")
@pytest.mark.parametrize("address", ADDRESSES)
def test_before_the_port_closes_no_further_connection_is_made(address: str) -> None:
    """One that came after the last accept would be reset, though its client believes to be connected."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, 0), family=family) as server,
        socket.socket(family) as before,
        socket.socket(family) as after,
    ):
        before.connect(server.getsockname())
        refuse_new(server)
        before.sendall(b"still taken")  # and not dropped with those that come now
        after.settimeout(0.5)
        with pytest.raises(TimeoutError):
            after.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(100) == b"still taken"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is simply closed")
@ipv6
def test_before_they_close_neither_takes_further_connections() -> None:
    def is_dropped(address: str, port: int) -> bool:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
            client.settimeout(0.5)
            try:
                client.connect((address, port))
            except TimeoutError:
                return True
        return False

    with FakeServer("--drain-seconds", "0", SHAKE_SECONDS=60) as fake:
        fake.signal()
        for address in ("127.0.0.1", "::1"):
            wait_until(lambda address=address: is_dropped(address, fake.port))


@ipv6
def test_both_drain() -> None:
    with FakeServer("--drain-seconds", "1", "--queue-size", "8") as fake:
        waiting = fake.occupy(2)
        waiting.append(Raw(fake.port, address="::1").send(post()))
        idle = Raw(fake.port, address="::1")
        assert idle.send(request()).answer()
        fake.signal()
        wait_until(lambda: fake.ready() == 503)
        with Raw(fake.port, address="::1") as late:
            assert late.send(request()).answer()
        wait_until(lambda: not fake.ready("::1"))
        assert not fake.ready("127.0.0.1")
        assert idle.ended()
        fake.tell("go")
        for raw in waiting:
            raw.expect(200)
        for raw in (idle, *waiting):
            raw.close()
        assert fake.end() == 0
        assert "Traceback" not in fake.log


@ipv6
def test_both_share_the_room_for_connections() -> None:
    with FakeServer(files=200) as fake:  # which leaves 72
        silent = [Raw(fake.port, address=("127.0.0.1", "::1")[number % 2]) for number in range(150)]
        for address in ("127.0.0.1", "::1"):
            with Raw(fake.port, address=address) as raw:
                assert raw.send(request()).answer()
        assert silent[0].ended()
        for raw in silent:
            raw.close()
        fake.wait(connections=0)
        for address in ("127.0.0.1", "::1"):
            with Raw(fake.port, address=address) as raw:
                assert raw.send(request()).answer()
        assert "Traceback" not in fake.log


@pytest.mark.parametrize(("files", "room"), [(64, 32), (300, 172)])
def test_few_open_files_are_warned_of_and_half_of_them_are_connections(files: int, room: int) -> None:
    with FakeServer(files=files) as fake:
        (line,) = [line for line in fake.log.splitlines() if "WARNING" in line]
        assert line.endswith(f"There is room for {room} connections only: allow more open files (ulimit -n 4096).")
        silent = [fake.raw() for _ in range(room - 1)]  # one place is kept free
        assert all(raw.send(request()).answer() for raw in silent)
        assert fake.ask(request()).status == 200  # for which the one that is silent for longest gives way
        assert silent[0].ended()
        for raw in silent:
            raw.close()


def test_many_open_files_are_not_warned_of() -> None:
    with FakeServer(files=400) as fake:
        assert "open files" not in fake.log
