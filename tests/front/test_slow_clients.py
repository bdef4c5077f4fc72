"""The front over real sockets: slow clients, clients that leave, and how the server stops."""

import contextlib
import json
import random
import re
import select
import signal
import socket
import struct
import threading
import time
from typing import Any

import pytest
from fakes import PIXEL, PREDICT, Answer, FakeServer, Raw, has_ipv6, post, request, wait_until

# Every time is either far beyond the tests' patience or short because a test waits for it to be up.
SHORT: dict[str, Any] = {"HEAD_SECONDS": 0.5, "SILENT_SECONDS": 0.2, "LINGER_SECONDS": 1}


def test_slow_clients_take_no_thread_no_place_and_are_cut() -> None:
    options = ("--queue-size", "1", "--max-batch", "1", "--timeout", "5")
    with FakeServer(*options, HEAD_SECONDS=3, SILENT_SECONDS=0.2) as fake:
        before = fake.tell()
        slow = [fake.raw() for _ in range(300)]
        done = threading.Event()

        def dribble() -> None:
            """Send a byte of a head on one half of them and of a body on the other half, over and over."""
            heads, bodies = slow[::2], slow[1::2]
            for raw in bodies:
                raw.send(PREDICT + b"Content-Length: 10000\r\n\r\n")
            while not done.wait(0.3):
                for raw in heads + bodies:
                    with contextlib.suppress(OSError):
                        raw.send(b"G" if raw in heads else b"b")

        thread = threading.Thread(target=dribble)
        thread.start()
        try:
            wait_until(lambda: fake.tell()["connections"] == 300)
            for _ in range(20):
                assert fake.ask(post()).status == 200
            during = fake.tell()
            assert during["running"] == during["queued"] == 0
            assert during["threads"] <= before["threads"] + 4  # those of the pool that the 20 have made
            for raw in slow:
                answer = raw.answer()
                assert answer is None or answer.status == 408
        finally:
            done.set()
            thread.join()
        fake.wait(connections=0, held=0, files=before["files"])
        for raw in slow:
            raw.close()
        assert fake.log.count("status=408") == 300
        assert "Traceback" not in fake.log


def test_a_body_slower_than_the_least_rate_is_cut_and_a_faster_one_is_read() -> None:
    # A second, and then as long as what has come is worth, at 5,000 bytes a second.
    with FakeServer(STALL_SECONDS=1, LEAST_RATE=5000, LINGER_SECONDS=1) as fake, fake.raw() as slow, fake.raw() as fast:
        started = time.monotonic()
        slow.send(PREDICT + b"Content-Length: 1000000\r\n\r\n" + bytes(2500))
        fast.send(PREDICT + b"Content-Length: %d\r\n\r\n" % (len(PIXEL) + 300_000) + PIXEL + bytes(200_000))
        answer = slow.expect(408)
        assert "faster" in answer.json["error"]
        assert time.monotonic() - started > 1.4  # and far from the 30 s of --timeout
        fast.send(bytes(100_000)).expect(200)


def test_silent_connections_are_closed() -> None:
    with FakeServer("--keep-alive", "0.5", **SHORT) as fake, fake.raw() as new, fake.raw() as kept:
        assert kept.send(request()).answer()
        assert new.ended()
        assert kept.ended()
        fake.wait(connections=0)


def test_a_connection_is_kept_for_as_long_as_its_answers_say() -> None:
    with FakeServer("--keep-alive", "3") as fake, fake.raw() as raw:
        for pause in (0.3, 0.3, 0):
            answer = raw.send(request()).answer()
            assert answer
            assert answer.headers["Keep-Alive"] == "timeout=3"
            time.sleep(pause)
        assert raw.ended()  # and not after the half minute for which the test would wait


def test_a_client_that_does_not_read_its_answer_is_cut_and_the_log_says_so() -> None:
    with FakeServer(STALL_SECONDS=0.5, SILENT_SECONDS=0.2) as fake:
        raw = Raw(fake.port, window=4096)
        raw.socket.settimeout(0.2)
        with contextlib.suppress(OSError):  # the last of them stay in the kernel's buffers, on either side
            raw.send(request("/metrics") * 20_000)
        wait_until(lambda: "Not sent whole" in fake.log)
        fake.wait(connections=0)
        raw.close()
        assert "Traceback" not in fake.log
        (line,) = re.findall(
            r"WARNING Not sent whole: (\d+) of (\d+) bytes, id=(\w+); the client takes no more", fake.log
        )
        assert int(line[0]) < int(line[1])
        assert re.search(rf"status=200 .* id={line[2]}", fake.log)
        assert "keras_server_unsent_total 1.0" in fake.ask(request("/metrics")).body.decode()


def test_a_client_that_sends_without_end_is_cut_and_others_are_served() -> None:
    with FakeServer("--max-upload-mb", "0.1", LINGER_SECONDS=1) as fake, fake.raw() as endless:
        stopped = threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError):
                while True:
                    endless.send(bytes(1_000_000))
            stopped.set()

        endless.send(PREDICT + b"Content-Length: 999999999\r\n\r\n")
        threading.Thread(target=flood, daemon=True).start()
        assert fake.ask(request()).status == 200
        endless.expect(413)
        assert stopped.wait(20)


def test_who_goes_on_sending_after_the_answer_does_not_keep_a_server_that_stops() -> None:
    options = ("--timeout", "200")  # which is the last that a server waits for
    with FakeServer(*options, SILENT_SECONDS=1, LINGER_SECONDS=200, KEPT_SECONDS=0.1) as fake, fake.raw() as raw:
        raw.send(post(Connection="close")).expect(200)
        stopped = threading.Event()

        def dribble() -> None:
            with contextlib.suppress(OSError):
                while not stopped.wait(0.1):
                    raw.send(b"a")

        thread = threading.Thread(target=dribble)
        thread.start()
        time.sleep(1.5)  # longer than one that says nothing is listened to
        assert fake.tell()["connections"] == 1
        fake.signal(signal.SIGTERM)
        assert fake.popen.wait(60) == 0
        stopped.set()
        thread.join()


def test_where_there_is_no_room_the_longest_silent_connection_gives_way() -> None:
    with FakeServer(files=200) as fake:  # which leaves 72 for connections
        silent = []
        for _ in range(150):
            silent.append(fake.raw())
        assert fake.ask(request()).status == 200
        assert silent[0].ended()
        assert not select.select([silent[-1].socket], [], [], 0)[0]
        for raw in silent:
            raw.close()
        assert "Traceback" not in fake.log


@pytest.mark.parametrize("constants", [{}, {"LAG_SECONDS": 0, "LOOK_SECONDS": 1000}])
def test_where_there_is_no_room_a_slow_body_gives_way(constants: dict[str, float]) -> None:
    """Soon, and not when it is late; what came faster is read to its end."""
    with FakeServer("--timeout", "200", files=200, STALL_SECONDS=200, **constants) as fake, fake.raw() as faster:
        faster.send(PREDICT + b"Content-Length: %d\r\n\r\n" % (len(PIXEL) + 50_000) + PIXEL + bytes(49_000))
        fake.wait(bodies=1)
        slow = [fake.raw().send(PREDICT + b"Content-Length: 1000\r\n\r\n") for _ in range(150)]
        for _ in range(10):
            assert fake.ask(request()).status == 200
        answer = slow[0].expect(503)
        assert answer.headers["Retry-After"] == "1"
        faster.send(bytes(1000)).expect(200)
        for raw in slow:
            raw.close()
        assert "Traceback" not in fake.log


def test_where_there_is_no_room_bodies_that_come_well_are_read_to_their_end() -> None:
    with FakeServer(files=64) as fake:  # which leaves 32 for connections
        head = PREDICT + b"Content-Length: %d\r\n\r\n" % (len(PIXEL) + 50_000)
        raws = [fake.raw().send(head + PIXEL + bytes(49_000)) for _ in range(32)]
        fake.wait(connections=32)
        time.sleep(1)  # in which the clients are looked at
        for raw in raws:
            raw.send(bytes(1000)).expect(200)
            raw.close()


def test_where_bodies_take_too_much_memory_the_largest_unfinished_one_gives_way() -> None:
    with FakeServer("--memory", "1", SILENT_SECONDS=0.2) as fake:  # bodies have a quarter of 256 MiB at least
        hogs = []
        for _ in range(4):
            hogs.append(fake.raw().send(PREDICT + b"Content-Length: 16000001\r\n\r\n" + bytes(16_000_000)))
            wait_until(lambda: fake.tell()["held"] > len(hogs) * 15_900_000)
        large = post(PIXEL + bytes(5_000_000))
        with fake.raw() as raw:
            raw.send(large[:3_000_000])
            wait_until(lambda: fake.tell()["held"] > 66_900_000)
            fake.signal(signal.SIGSTOP)  # so that it reads several pieces before the one that gives way can leave
            raw.send(large[3_000_000:4_000_000])
            fake.signal(signal.SIGCONT)
            raw.send(large[4_000_000:]).expect(200)
        answers = [raw.answer() for raw in hogs if select.select([raw.socket], [], [], 0)[0]]
        assert [answer.status for answer in answers if answer] == [503]
        for raw in hogs:
            raw.close()
        fake.wait(held=0)


def test_a_request_without_a_thread_leaves_nothing_behind_when_its_client_leaves() -> None:
    with FakeServer("--max-batch", "1", "--decode-threads", "1", "--queue-size", "50", "--max-upload-mb", "2") as fake:
        waiting = fake.occupy(10)
        assert fake.tell()["queued"] == 5  # of five threads
        size = fake.tell("forget")["resident"]
        body = post(PIXEL + bytes(1_500_000))
        for _ in range(15):
            with fake.raw() as raw:
                raw.send(body)
                wait_until(lambda: fake.tell()["queued"] == 6)
            fake.wait(queued=5)
        assert fake.tell("forget")["resident"] - size < 10e6
        fake.tell("go")
        for raw in waiting:
            raw.expect(200)
            raw.close()


def test_places_of_clients_that_have_left_are_had_by_the_next_at_once() -> None:
    with FakeServer("--max-batch", "1", "--queue-size", "4", LOOK_SECONDS=1000) as fake:
        waiting = fake.occupy(5)
        assert fake.ask(post()).status == 503
        for raw in waiting[3:]:
            raw.close()
        time.sleep(0.1)  # after which it is looked again
        others = []
        for places in 4, 5:
            others.append(fake.raw().send(post()))
            fake.wait(held=places * len(PIXEL))
        assert fake.ask(post()).status == 503
        fake.tell("go")
        for raw in waiting[:3] + others:
            raw.expect(200)
        for raw in waiting + others:
            raw.close()


def test_clients_that_hang_up_at_any_moment_leave_nothing_behind() -> None:
    """By FIN and by RST, in the middle of a request, while it is computed, after a part of the answer, pipelined."""
    with FakeServer(SILENT_SECONDS=0.2) as fake:
        for _ in range(30):  # so that all threads are there
            fake.ask(post())
        before = fake.wait(connections=0)
        end = time.monotonic() + 3

        def hang_up(seed: int) -> None:
            chance = random.Random(seed)
            while time.monotonic() < end:
                with contextlib.suppress(OSError), fake.raw() as raw:
                    if chance.random() < 0.5:
                        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    for _ in range(chance.choice([1, 1, 2])):
                        whole = post() * chance.choice([1, 1, 2])
                        raw.send(whole[: chance.randrange(len(whole))] if chance.random() < 0.1 else whole)
                        match chance.randrange(4):
                            case 0:
                                time.sleep(chance.random() * 0.004)
                            case 1:
                                raw.socket.recv(100)
                            case 2:
                                raw.socket.shutdown(socket.SHUT_WR)

        threads = [threading.Thread(target=hang_up, args=[seed]) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert fake.ask(post()).status == 200
        after = fake.wait(connections=0, queued=0, running=0, held=0)
        assert after["files"] == before["files"]
        assert after["threads"] <= before["threads"] + 36  # those of the pool
        assert "Traceback" not in fake.log


def test_a_large_answer_reaches_a_slow_reader_byte_for_byte() -> None:
    with FakeServer("--max-batch", "8", STALL_SECONDS=3) as fake, Raw(fake.port, window=4096) as raw:
        whole = fake.ask(request("/openapi.json")).body
        count = 200
        sender = threading.Thread(target=raw.send, args=(request("/openapi.json") * count,))
        sender.start()
        started, bodies = time.monotonic(), []
        for number in range(count):
            answer = raw.answer()
            assert answer
            bodies.append(answer.body)
            if number % 10 == 0:  # longer in all than a client may take nothing
                time.sleep(0.17)
        sender.join()
        assert time.monotonic() - started > 3
        assert bodies == [whole] * count


def sixty_pictures() -> bytes:
    """Return a request whose answer has over 2 MB, far more than the kernel keeps."""
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%b\r\n' % PIXEL
    form = part * 60 + b"--b--\r\n"
    return request("/predict?top=1000", "POST", form, Content_Type="multipart/form-data; boundary=b")


def test_a_single_answer_may_take_longer_than_a_stall() -> None:
    with FakeServer("--max-batch", "64", "--max-upload-mb", "64", STALL_SECONDS=3) as fake:
        single = fake.ask(post(target="/predict?top=1000")).json["predictions"]
        raw = Raw(fake.port, window=4096)
        raw.send(sixty_pictures())
        raw.socket.settimeout(None)
        got = b""
        started = time.monotonic()
        while b"\r\n\r\n" not in got:
            got += raw.file.read1(1000)
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.lower().count(b"content-length:") == 1
        (length,) = re.findall(rb"content-length: (\d+)", head.lower())
        assert int(length) > 2_000_000
        while len(body) < int(length):
            piece = raw.file.read1(200_000)
            assert piece, "cut"
            body += piece
            if time.monotonic() - started < 3.5:  # longer in all than a client may take nothing
                time.sleep(0.3)
        assert time.monotonic() - started > 3
        raw.close()
        assert [result["predictions"] for result in json.loads(body)["results"]] == [single] * 60


@pytest.mark.parametrize("leaves", [False, True])
def test_a_client_that_stops_in_the_midst_of_an_answer_is_cut(leaves: bool) -> None:
    """However much it has taken, and so much faster than it had to; the log says which of both it was."""
    options = ("--max-batch", "64", "--max-upload-mb", "64")
    stall = 60 if leaves else 0.5
    with FakeServer(*options, STALL_SECONDS=stall) as fake, Raw(fake.port, window=4096) as raw:
        raw.send(sixty_pictures())
        assert len(raw.file.read(1_000_000)) == 1_000_000  # worth 1,000 s at the least rate
        if leaves:
            raw.close()
        wait_until(lambda: f"the client {'has left' if leaves else 'takes no more'}" in fake.log)
        fake.wait(connections=0)


# Stopping


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains(number: int) -> None:
    with FakeServer("--drain-seconds", "1", "--queue-size", "8") as fake:
        idle = fake.raw()
        assert idle.send(request()).answer()
        waiting = fake.occupy(4)
        partial = fake.raw().send(post()[:-10])
        silent = fake.raw()
        fake.wait(connections=7)
        fake.signal(number)
        # First the probes are told, while connections are still taken,
        wait_until(lambda: fake.ready() == 503)
        assert fake.ask(request()).status == 200
        late = fake.raw().send(post())
        # then the port is closed,
        wait_until(lambda: not fake.ready())
        assert idle.ended()
        # and what was accepted is answered.
        fake.tell("go")
        partial.send(post()[-10:])
        silent.send(post())  # a first request may have been on its way
        for raw in (*waiting, partial, late, silent):
            answer = raw.expect(200)
            assert answer.headers["Connection"] == "close"
        for raw in (idle, *waiting, partial, late, silent):
            raw.close()
        assert fake.end() == 0
        assert "Traceback" not in fake.log


def test_what_was_accepted_is_answered_however_long_it_takes() -> None:
    with FakeServer(SILENT_SECONDS=0.1, KEPT_SECONDS=0.1) as fake:
        waiting = fake.occupy(2)
        fake.signal()
        wait_until(lambda: not fake.ready())
        time.sleep(0.5)  # in which connections that are silent are given up
        fake.tell("go")
        for raw in waiting:
            raw.expect(200)
            raw.close()
        assert fake.end() == 0


def test_a_slow_client_does_not_keep_the_server_from_stopping() -> None:
    with FakeServer("--timeout", "1", **SHORT | {"STALL_SECONDS": 1}) as fake:
        raw = fake.raw().send(post()[:-10])
        fake.wait(connections=1)
        fake.signal()
        raw.expect(408)
        assert fake.end() == 0
        raw.close()


def test_who_waits_in_the_kernel_as_the_port_closes_is_answered() -> None:
    """Its client believes to be connected; there was no room for it yet."""

    def is_closed() -> bool:
        try:
            socket.create_connection(("127.0.0.1", fake.port), timeout=0.5).close()
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
        return False

    with FakeServer(files=64) as fake:  # which leaves 32 for connections
        head = PREDICT + b"Content-Length: %d\r\n\r\n" % (len(PIXEL) + 50_000)
        raws = [fake.raw().send(head + PIXEL + bytes(49_000)) for _ in range(32)]
        fake.wait(connections=32)
        late = fake.raw().send(post())
        fake.signal()
        wait_until(is_closed)
        for raw in raws:
            raw.send(bytes(1000))
        for raw in (*raws, late):
            raw.expect(200)
            raw.close()
        assert fake.end() == 0


def test_the_model_thread_s_death_is_answered_and_ends_the_process() -> None:
    with FakeServer("--max-batch", "1", "--queue-size", "50", "--decode-threads", "1", DEATH_SECONDS=1) as fake:
        slow = fake.raw().send(post()[:-10])  # who would keep a drain waiting
        raws = fake.occupy(6)  # of which some wait for the model, others for a thread
        fake.tell("die")
        fake.tell("go")
        for raw in raws:
            raw.expect(500)
            raw.close()
        started = time.monotonic()
        assert fake.end() == 1
        assert time.monotonic() - started < 25  # and not the 30 s that the slow client has
        slow.close()
        assert "a supervisor should restart it" in fake.log


def test_nothing_accepted_is_lost_in_restarts_under_load() -> None:
    """In each of a few restarts; benchmarks/soak.py has fifty, with the real model."""
    lost: list[Answer | None] = []
    answered: list[Answer | None] = []

    def load(port: int, address: str) -> None:
        """Ask on new and on kept connections until the port is closed."""
        while True:
            try:
                raw = Raw(port, address=address)
            except OSError:
                return
            with raw:
                for _ in range(3):
                    try:
                        answer = raw.send(post()).answer()
                    except OSError:
                        answer = None
                    (answered if answer and answer.status == 200 else lost).append(answer)
                    if not answer or answer.headers["Connection"] == "close":
                        break

    for _ in range(3):
        with FakeServer("--drain-seconds", "0.3") as fake:
            addresses = ["127.0.0.1", "::1" if has_ipv6() else "127.0.0.1"]
            threads = [threading.Thread(target=load, args=(fake.port, address)) for address in addresses * 4]
            for thread in threads:
                thread.start()
            answered.clear()
            wait_until(lambda: len(answered) > 50)
            fake.signal()
            assert fake.end() == 0
            for thread in threads:
                thread.join()
    assert not lost
    assert answered


def test_threads_that_nobody_uses_any_more_end() -> None:
    """Those of a group of requests beside the model's own, such as what loads models."""
    with FakeServer("--timeout", "0.5", UNUSED_SECONDS=0) as fake:
        before = fake.tell()["threads"]
        assert fake.ask(request("/v2/repository/index", "POST", b"{}")).status == 200
        wait_until(lambda: fake.tell()["threads"] == before)
    with FakeServer("--timeout", "0.5", LOOK_SECONDS=0.01) as fake:
        before = fake.tell()["threads"]
        for _ in range(3):
            assert fake.ask(request("/v2/repository/index", "POST", b"{}")).status == 200
            time.sleep(0.6)
        assert fake.tell()["threads"] == before + 1  # ready for a next one
