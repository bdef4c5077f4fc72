"""How many connections, or requests by way of proxies, one address may have."""

import signal
import socket

import pytest
from conftest import lacking
from fakes import PIXEL, PREDICT, FakeServer, Raw, post, request, wait_until

from keras_server.clients import owner_of

HEAD = PREDICT + b"Content-Length: %d\r\n\r\n" % len(PIXEL)


def own_address() -> str:
    """Return an address of this machine that is not its loopback's; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(("192.0.2.1", 9))  # for documentation (RFC 5737)
        except OSError:
            lacking("This machine has no address but its loopback's.")
        return str(asking.getsockname()[0])


def test_an_address_has_so_many_connections_and_this_machine_as_many_as_it_likes() -> None:
    with FakeServer("--connections-per-address", "1") as fake:
        raws = [fake.raw() for _ in range(5)]
        for raw in raws:
            assert raw.send(request()).answer()
            raw.close()


@pytest.mark.parametrize(
    ("address", "owner"),
    [
        ("127.0.0.1", ""),
        ("::1", ""),
        ("::ffff:127.0.0.1", ""),
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:0:1:2:3:4:5", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("198.51.100.9", ""),  # proxies
        ("::ffff:198.51.100.9", ""),
        ("2001:db8:f::1", ""),
        ("", ""),
    ],
)
def test_who_an_address_belongs_to(address: str, owner: str) -> None:
    assert owner_of(address, ("198.51.100.0/24", "2001:db8:f::/48")) == owner


def test_an_address_with_too_many_connections_is_told_so() -> None:
    own = own_address()
    with FakeServer("--host", "0.0.0.0", "--connections-per-address", "3") as fake:
        raws = [Raw(fake.port, address=own).send(HEAD) for _ in range(3)]
        fake.wait(connections=3)
        wait_until(lambda: fake.tell()["bodies"] == 3)
        with Raw(fake.port, address=own) as fourth:
            answer = fourth.expect(429)
            assert answer.json["error"].startswith("This address has 3 connections")
            assert fourth.ended()
        assert fake.ask(request()).status == 200  # others
        answer = raws[0].send(PIXEL).answer()  # and now waits for a next request, and gives way
        assert answer
        assert answer.status == 200
        with Raw(fake.port, address=own) as fourth:
            assert fourth.send(request()).answer()
            assert raws[0].ended()
        for raw in raws:
            raw.close()
        fake.wait(connections=0)


def test_zero_is_any_number_of_connections() -> None:
    own = own_address()
    with FakeServer("--host", "0.0.0.0", "--connections-per-address", "0") as fake:
        raws = [Raw(fake.port, address=own) for _ in range(3)]
        for raw in raws:
            raw.send(request()).expect(200)
            raw.close()


def test_what_is_told_to_one_too_many_reaches_it_though_it_has_sent_a_request_already() -> None:
    """What was not read when the socket closes would have the kernel reset the connection, and lose the answer."""
    own = own_address()
    options = ("--host", "0.0.0.0", "--connections-per-address", "1")
    with FakeServer(*options) as fake, Raw(fake.port, address=own).send(HEAD):
        wait_until(lambda: fake.tell()["bodies"] == 1)
        fake.signal(signal.SIGSTOP)  # so that the request is there when its connection is taken
        with Raw(fake.port, address=own).send(post()) as second:
            fake.signal(signal.SIGCONT)
            second.expect(429)
            assert second.ended()
            assert not second.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # of a reset


def test_the_connections_of_a_proxy_are_those_of_many() -> None:
    own = own_address()
    with FakeServer("--host", "0.0.0.0", "--connections-per-address", "2", "--trusted-proxies", own) as fake:
        raws = [Raw(fake.port, address=own) for _ in range(5)]
        for number, raw in enumerate(raws):
            raw.send(request(X_Forwarded_For=f"203.0.113.{number}"))
        for raw in raws:
            raw.expect(200)
            raw.close()


def test_a_client_behind_a_proxy_has_so_many_requests_under_way() -> None:
    """Of any connections of the proxy's, which is this machine; whoever has no such proxy is not asked."""
    with FakeServer("--connections-per-address", "2", "--trusted-proxies", "127.0.0.1") as fake:
        fake.tell("hold")
        computing = fake.raw().send(post(X_Forwarded_For="203.0.113.7"))
        sending = fake.raw().send(HEAD.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 192.0.2.5, 203.0.113.7\r\n\r\n"))
        fake.wait(busy=True)
        wait_until(lambda: fake.tell()["bodies"] == 1)
        for target in ("/healthz", "/metrics", "/predict"):
            answer = fake.ask(request(target, X_Forwarded_For="203.0.113.7"))
            assert answer.status == 429
            assert answer.json["error"].startswith("This address has 2 requests under way")
        for forwarded in ("203.0.113.8", "127.0.0.1", "unknown", ""):
            for _ in range(3):
                assert fake.ask(request(X_Forwarded_For=forwarded)).status == 200
        fake.tell("go")
        for raw, rest in ((computing, b""), (sending, PIXEL)):
            raw.send(rest).expect(200)
        for _ in range(5):  # on a connection that is kept, one after the other
            computing.send(request(X_Forwarded_For="203.0.113.7")).expect(200)
        computing.close()
        sending.close()


def test_a_request_that_breaks_off_is_no_longer_under_way() -> None:
    with FakeServer("--connections-per-address", "1", "--trusted-proxies", "127.0.0.1") as fake:
        for _ in range(3):
            with fake.raw() as raw:
                raw.send(HEAD.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n"))
                wait_until(lambda: fake.tell()["bodies"] == 1)
            fake.wait(connections=0)
        assert fake.ask(request(X_Forwarded_For="203.0.113.7")).status == 200


def test_a_stranger_s_word_on_who_asks_counts_for_nothing() -> None:
    with FakeServer("--connections-per-address", "1") as fake:
        raws = [fake.raw().send(HEAD.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 192.0.2.5\r\n\r\n")) for _ in range(3)]
        wait_until(lambda: fake.tell()["bodies"] == 3)
        for raw in raws:
            raw.close()
