"""What strangers send, changed at random: no answer but a sound one, and nothing is left behind. See fuzzing.py."""

import io
import re
import socket

import pytest
from fakes import FakeServer, post, request
from flask.testing import FlaskClient
from fuzzing import DICE, SEEDS, TARGETS, check_answers, faked, mutate, send_messages
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import run_keras_server as server
from keras_server.images import open_image

settings.load_profile("server")
EXAMPLES = {"pictures": 1200, "forms": 200, "json": 250, "models": 25}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_are_taken_or_refused(name: str) -> None:
    target = TARGETS[name]
    seeds = [*target.seeds.values()]

    @settings(max_examples=EXAMPLES[name])
    @given(st.integers(0, len(seeds) - 1), DICE)
    def holds(number: int, dice: int) -> None:
        target.check(mutate(seeds[number], dice))

    with faked():
        holds()


@pytest.mark.parametrize(("name", "file"), [(name, file) for name in TARGETS for file in TARGETS[name].corpus(name)])
def test_what_once_failed(name: str, file: str) -> None:
    with faked():
        TARGETS[name].check(TARGETS[name].corpus(name)[file])


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_taken_or_refused_too(name: str) -> None:
    with faked():
        for data in TARGETS[name].seeds.values():
            TARGETS[name].check(data)


def test_malformed_http_is_answered_soundly_and_leaves_nothing_behind() -> None:
    options = ("--timeout", "5", "--queue-size", "8", "--keep-alive", "2")
    with FakeServer(*options, HEAD_SECONDS=2, SILENT_SECONDS=1) as fake:
        for _ in range(30):  # so that all threads are there
            fake.ask(post())
        fake.wait(connections=0)
        before = fake.tell("forget")
        assert send_messages(fake, 400, None) > 250
        assert fake.ask(request("/readyz")).status == 200
        assert fake.ask(post()).status == 200
        fake.wait(connections=0, queued=0, running=0, held=0)
        after = fake.tell("forget")
        assert after["files"] == before["files"]
        assert after["threads"] <= before["threads"] + 36  # those of the pool
        assert after["resident"] - before["resident"] < 10e6
        assert not [line for line in fake.log.splitlines() if not re.match(r"\S+ INFO method=", line)]


ERROR = b'{"success": false, "error": "It is so."}\n'


@pytest.mark.parametrize(
    "got",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\n\r\nabc",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: %d\r\n\r\n%b" % (len(ERROR), ERROR),
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\nTraceback",
        b'HTTP/1.1 400 Bad Request\r\nContent-Length: 13\r\n\r\n{"error": ""}',
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%bmore" % (len(ERROR), ERROR),
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n1",
    ],
)
def test_unsound_answers_are_noticed(got: bytes) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_answers(got, heads=False)


def test_sound_answers_are_none(client: FlaskClient) -> None:
    sound = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(ERROR), ERROR)
    assert check_answers(b"HTTP/1.1 100 Continue\r\n\r\n" + sound, heads=False) == [100, 400]
    assert check_answers(sound.removesuffix(ERROR), heads=True) == [400]


def test_noise_is_refused() -> None:
    with FakeServer(SILENT_SECONDS=0.2) as fake:

        @settings(max_examples=300)
        @given(st.binary(min_size=1, max_size=300))
        def holds(data: bytes) -> None:
            with fake.raw() as raw:
                raw.send(data + b"\r\n\r\n").socket.shutdown(socket.SHUT_WR)
                assert raw.file.read(12) in (b"HTTP/1.1 400", b"")

        holds()
        assert "Traceback" not in fake.log


def test_the_seeds_are_all_read(client: FlaskClient) -> None:
    for name, data in SEEDS.items():
        image = open_image(data, 50)
        assert server.prepare_image(image, (8, 8)).shape == (1, 8, 8, 3), name
        assert Image.open(io.BytesIO(data)).format
