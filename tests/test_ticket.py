"""Whether anybody still waits for a request's answer."""

import socket
import struct
from collections.abc import Iterator

import pytest

from keras_server.ticket import Ticket


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection's end at the server, and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    with client, server:
        yield server, client


def test_a_client_that_waits_or_sends_the_next_request_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    server, client = ends
    ticket = Ticket(60, server)
    assert not ticket.client_left()
    client.sendall(b"G")
    server.settimeout(10)
    assert server.recv(1, socket.MSG_PEEK) == b"G"
    assert not ticket.client_left()
    assert not ticket.over
    assert server.recv(10) == b"G"  # looking has taken nothing


@pytest.mark.parametrize("how", ["half", "whole", "reset"])
def test_a_client_that_has_closed_its_half_or_all_is_gone(ends: tuple[socket.socket, socket.socket], how: str) -> None:
    server, client = ends
    ticket = Ticket(60, server)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if how == "half":
        client.shutdown(socket.SHUT_WR)
    else:
        client.close()
    assert ticket.client_left()
    assert ticket.over


def test_who_has_left_is_looked_for_once_in_a_while(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = ends
    client.close()
    monkeypatch.setattr("keras_server.ticket.LOOK_SECONDS", 3600)
    ticket = Ticket(60, server)
    assert not ticket.over
    assert not ticket.gone
    monkeypatch.setattr("keras_server.ticket.LOOK_SECONDS", 0)
    assert ticket.over
    assert ticket.gone


def test_looking_again_has_to_wait(ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = ends
    ticket = Ticket(60, server)
    ticket.looked -= 3600
    assert not ticket.over  # it has looked
    client.close()
    monkeypatch.setattr("keras_server.ticket.LOOK_SECONDS", 1800)
    assert not ticket.over
    assert ticket.client_left()  # who asks for this wants to know it now


def test_a_released_socket_is_looked_at_no_more(ends: tuple[socket.socket, socket.socket]) -> None:
    server, client = ends
    ticket = Ticket(60, server)
    ticket.release()
    client.close()
    assert not ticket.client_left()
    assert not ticket.over


@pytest.mark.parametrize(("seconds", "over"), [(-0.001, True), (60, False)])
def test_a_ticket_is_over_once_its_time_is(seconds: float, over: bool) -> None:
    assert Ticket(seconds).over is over
