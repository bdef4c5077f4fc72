"""Overload, slow clients, restarts and a long run against the real server; every promise with its figure.

    python benchmarks/soak.py [--quick] [--only overload,slow,restarts,systemd,memory]

Needs wrk. Writes the section between the soak markers of RESULTS.md, unless it is --quick, which only prints it; ends
with status 1 where a promise is broken. Load goes to the loopback; each generator of it is a process of its own, as a
share of the processors that it takes is missing to the server.
"""

import argparse
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any

import gevent
import gevent.socket
from bench import ROOT, command_of, describe_machine, make_weights
from PIL import Image
from report import MODEL_TITLES, put
from servers import HERE, Payload, free_port, load, used

sys.path.insert(0, str(ROOT / "tests"))
from supervisor import Supervisor

POOL = 600  # connections of the open loop: more than can wait for an answer


def picture() -> bytes:
    """Return the sample photo in the size of a web page's."""
    out = io.BytesIO()
    image = Image.open(ROOT / "dog.jpg")
    image.thumbnail((500, 500))
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def request(body: bytes, host: str = "soak") -> bytes:
    """Return the request that has it classified."""
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


# ----------------------------------------------------------------------------------------------------------
# The generators: each is this file again, called with its name, in a process of its own
# ----------------------------------------------------------------------------------------------------------


def ask(sock: Any, data: bytes) -> int:
    """Send a request on a gevent socket and read its answer. Returns the status, or OSError where none comes."""
    sock.sendall(data)
    answer = sock.recv(65536)
    while b"\r\n\r\n" not in answer:
        if not (more := sock.recv(65536)):
            raise ConnectionResetError
        answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    missing = int(length[1]) - len(body) if length else 0
    while missing > 0:
        if not (more := sock.recv(65536)):
            raise ConnectionResetError
        missing -= len(more)
    if re.search(rb"(?i)\r\nconnection: close", head):
        sock.close()
    return int(answer[9:12])


def connect(port: int) -> Any:
    """Return a gevent socket."""
    sock = gevent.socket.create_connection(("127.0.0.1", port), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def open_loop(port: int, rate: float, seconds: float) -> dict[str, Any]:
    """Send requests at random times that do not depend on the answers, on as many connections as it takes."""
    data, chance = request(picture()), random.Random(0)
    due, times = 0.0, []
    while due < seconds:
        times.append(due)
        due += chance.expovariate(rate)
    schedule, answers, latencies, late = iter(times), Counter[str](), [], []
    start = time.monotonic() + 1

    def client() -> None:
        sock = None
        for due in schedule:
            gevent.sleep(max(0, start + due - time.monotonic()))
            late.append(time.monotonic() - start - due)
            began = time.monotonic()
            try:
                if sock is None or sock.closed:
                    sock = connect(port)
                status = str(ask(sock, data))
            except OSError:
                status, sock = "failed", None
            answers[status] += 1
            if status == "200":
                latencies.append(time.monotonic() - began)

    gevent.joinall([gevent.spawn(client) for _ in range(POOL)])
    late.sort()
    return {"answers": answers, "sent": len(times), "late_p99": late[int(len(late) * 0.99)]} | percentiles(latencies)


def slow(port: int, count: int, seconds: float) -> dict[str, Any]:
    """Keep so many connections that send a byte a second: of a head, of a body, or nothing after an answer."""
    kinds = (b"GET /", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", b"")
    cut = 0
    stop = time.monotonic() + seconds

    def client(kind: bytes) -> None:
        nonlocal cut
        while time.monotonic() < stop:
            try:
                sock = connect(port)
                sock.sendall(kind)
                while time.monotonic() < stop:
                    gevent.sleep(1)
                    if kind:
                        sock.sendall(b"a")
                    sock.settimeout(0)
                    try:
                        sock.recv(4096)
                        break  # an answer, such as 408, or the end
                    except BlockingIOError:
                        sock.settimeout(60)
                sock.close()
            except OSError:
                gevent.sleep(0.1)
            cut += time.monotonic() < stop

    gevent.joinall([gevent.spawn(client, kinds[n % 3]) for n in range(count)])
    return {"cut": cut}


def persistent(port: int, clients: int) -> dict[str, Any]:
    """Ask over and over, on kept and on new connections, through restarts, until the standard input ends."""
    data, counts, running = request(picture()), Counter[str](), True

    def client(number: int) -> None:
        sock = None
        while running:
            try:
                if sock is None or sock.closed:
                    sock = connect(port)
            except OSError:  # the port is closed: nothing was accepted
                counts["refused"] += 1
                gevent.sleep(0.02)
                continue
            try:
                counts[str(ask(sock, data))] += 1
            except OSError as error:
                counts[f"lost: {type(error).__name__}"] += 1
                sock = None
            if sock and number % 2:
                sock.close()
            gevent.sleep(0.01)

    greenlets = [gevent.spawn(client, number) for number in range(clients)]
    gevent.get_hub().threadpool.apply(sys.stdin.read)
    running = False
    gevent.joinall(greenlets)
    return dict(counts)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p99 and the longest, in milliseconds."""
    found = sorted(seconds) or [0.0]
    return {f"p{n}": round(1000 * found[min(len(found) - 1, len(found) * n // 100)], 1) for n in (50, 99, 100)}


GENERATORS: dict[str, Callable[..., dict[str, Any]]] = {"open_loop": open_loop, "slow": slow, "persistent": persistent}


class Generator:
    """A generator's process."""

    def __init__(self, name: str, *arguments: float):
        command = [sys.executable, __file__, "--generate", json.dumps([name, *arguments])]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def used(self) -> float:
        """Return the seconds of a processor that it has taken."""
        return used(Path(f"/proc/{self.popen.pid}/stat").read_text())

    def end(self) -> dict[str, Any]:
        """Wait for its end and return what it found."""
        output, _ = self.popen.communicate()
        return json.loads(output)


# ----------------------------------------------------------------------------------------------------------
# The server, and looking at it
# ----------------------------------------------------------------------------------------------------------


class Server:
    """The real server."""

    def __init__(self, model: str = "bundled", port: int = 0):
        self.port = port or free_port()
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        command = command_of("ours-float32", model, self.port, Path())
        variables = {name: value for name, value in os.environ.items() if not name.startswith("KERAS_SERVER_")}
        self.popen = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log, env=variables)
        end = time.monotonic() + 120
        while self.get("/readyz")[0] != 200:
            if self.popen.poll() is not None or time.monotonic() > end:
                self.log.seek(0)
                raise SystemExit("The server did not start:\n" + self.log.read())
            time.sleep(0.05)

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and text of a page; status 0 where there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def images(self) -> int:
        """Return how many images it has answered."""
        found = re.search(r"^keras_server_images_total{.*} (\S+)", self.get("/metrics")[1], re.MULTILINE)
        assert found
        return int(float(found[1]))

    def figures(self) -> dict[str, int]:
        """Return its resident size in MB, its threads and its open files."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        size, threads = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads"))
        return {"MB": size // 1024, "threads": threads, "files": len(os.listdir(f"/proc/{self.popen.pid}/fd"))}

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it; returns the exit status."""
        self.popen.send_signal(number)
        status = self.popen.wait(timeout=120)
        self.log.close()
        return status


def closed_loop(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Have wrk keep so many clients asking; returns what load() does."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(picture())
        file.flush()
        jpeg = Payload(Path(file.name), "image/jpeg")
        return load(server.port, jpeg, clients, seconds)


class Probe:
    """Asks for health and metrics while something else goes on, and keeps the times."""

    def __init__(self, server: Server):
        self.server, self.times, self.bad, self.running = server, [0.0][:0], 0, True
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        """Ask ten times a second."""
        while self.running:
            for path in ("/healthz", "/metrics"):
                began = time.monotonic()
                self.bad += self.server.get(path)[0] != 200
                self.times.append(time.monotonic() - began)
                time.sleep(0.1)

    def end(self) -> dict[str, float]:
        """Return the percentiles of the answers' times, and how many were none."""
        self.running = False
        self.thread.join()
        return percentiles(self.times) | {"bad": self.bad, "probes": len(self.times)}


# ----------------------------------------------------------------------------------------------------------
# What is promised, and the figures for it
# ----------------------------------------------------------------------------------------------------------


class Report:
    """The lines of the section, and whether every promise has been kept."""

    def __init__(self) -> None:
        self.lines = ["| what | promised | measured | |", "| --- | --- | --- | --- |"]
        self.kept = True

    def add(self, what: str, promised: str, measured: str, kept: bool = True) -> None:
        """Add a line."""
        self.kept = self.kept and kept
        self.lines.append(f"| {what} | {promised} | {measured} | {'yes' if kept else '**no**'} |")
        print(self.lines[-1], flush=True)


def overload(report: Report, quick: bool) -> None:
    """Ten times the capacity, for a minute, with each model."""
    for model in ["bundled"] if quick else ["bundled", "resnet50"]:
        overload_of(model, report, 6 if quick else 10, 3 if quick else 9)


def overload_of(model: str, report: Report, seconds: int, rounds: int) -> None:
    """Ten times the capacity of one model, in turn with what it answers to 32 clients.

    The generator and the probe compute on the server's processors. What they take is taken off what can be asked for.
    """
    server, ratios, shares, late = Server(model=model), [0.0][:0], [0.0][:0], [0.0][:0]
    answers, times, health = Counter[str](), [0.0][:0], list[dict[str, float]]()
    closed_loop(server, 32, 5)
    best, goodput = [closed_loop(server, 32, seconds // 2)["rps"]], [0.0][:0]
    for _ in range(rounds):
        generator = Generator("open_loop", server.port, 10 * best[-1], seconds)
        time.sleep(4)  # until the queue is full
        taken, probe = generator.used() + time.process_time(), Probe(server)
        before, began = server.images(), time.monotonic()
        time.sleep(seconds - 3)
        passed = time.monotonic() - began
        goodput.append((server.images() - before) / passed)
        shares.append((generator.used() + time.process_time() - taken) / passed / (os.cpu_count() or 1))
        health.append(probe.end())
        found = generator.end()
        answers.update(found["answers"])
        late.append(found["late_p99"])
        times.append(found["p50"])
        best.append(closed_loop(server, 32, seconds // 2)["rps"])
        ratios.append(goodput[-1] / ((best[-2] + best[-1]) / 2 * (1 - shares[-1])))
    report.add(f"{MODEL_TITLES[model]}: goodput with 32 clients", "", f"{median(best):.1f} images/s")
    report.add("then requests at random times", "", f"{10 * median(best):.0f} a second, p99 {1000 * max(late):.0f} ms "
               f"behind plan; making them takes {100 * median(shares):.0f} % of the cores")  # fmt: skip
    kept, (low, *_, high) = median(ratios), sorted(ratios)
    report.add("goodput at ten times the capacity", "0.9 of what the generator leaves of it",
               f"{median(goodput):.1f} images/s, {kept:.2f} of what is left ({low:.2f} to {high:.2f}), "
               f"{median(goodput) / median(best):.2f} of all", kept >= 0.9)  # fmt: skip
    others = {status: count for status, count in answers.items() if status not in ("200", "503")}
    report.add("answers", "200 or 503", f"{answers.get('200', 0)} times 200, {answers.get('503', 0)} times 503, "
               f"others: {others or 'none'}", not others)  # fmt: skip
    report.add("those answered 200", "", f"p50 {median(times):.0f} ms")
    p50, p99, longest = (median(found[name] for found in health) for name in ("p50", "p99", "p100"))
    bad, probes = (sum(int(found[name]) for found in health) for name in ("bad", "probes"))
    report.add(f"health and metrics meanwhile ({probes} probes)", "p99 below 100 ms",
               f"p50 {p50} ms, p99 {p99} ms, longest {longest} ms, {bad} failed", p99 < 100 and not bad)  # fmt: skip
    server.end()


def slow_clients(report: Report, quick: bool) -> None:
    """A thousand connections that send a byte a second, and normal clients beside them, three times in turn."""
    count, seconds = (200, 6) if quick else (1000, 12)
    server, ratios, beside, cut = Server(), [0.0][:0], list[dict[str, Any]](), 0
    closed_loop(server, 64, 3)  # so many that every thread of the pool is there
    time.sleep(1)
    before = server.figures()
    alone = [closed_loop(server, 8, seconds)]
    for _ in range(1 if quick else 3):
        attack = Generator("slow", server.port, count, seconds + 8)
        time.sleep(6)
        during = server.figures()
        taken, began = attack.used(), time.monotonic()
        beside.append(closed_loop(server, 8, seconds))
        share = (attack.used() - taken) / (time.monotonic() - began) / (os.cpu_count() or 1)
        cut += attack.end()["cut"]
        alone.append(closed_loop(server, 8, seconds))
        usual = (alone[-2]["rps"] + alone[-1]["rps"]) / 2
        ratios.append(beside[-1]["rps"] / (usual * (1 - share)))
    time.sleep(5)
    after = server.figures()
    rate, p99 = ({name: median(found[key] for found in rows) for name, rows in (("alone", alone), ("beside", beside))}
                 for key in ("rps", "p99_ms"))  # fmt: skip
    report.add("8 clients alone", "", f"{rate['alone']:.1f} images/s, p99 {p99['alone']:.0f} ms")
    report.add(f"beside {count} slow connections", "0.9 of what their generator leaves",
               f"{rate['beside']:.1f} images/s, {median(ratios):.2f} of what is left ({min(ratios):.2f} to "
               f"{max(ratios):.2f}), p99 {p99['beside']:.0f} ms",
               median(ratios) >= 0.9 and not sum(found["errors"] for found in beside))  # fmt: skip
    report.add("slow connections cut", "after a time limit", f"{cut}", cut > 0)
    report.add("threads before, during, after", "none for them",
               f"{before['threads']}, {during['threads']}, {after['threads']}",
               max(during["threads"], after["threads"]) <= before["threads"] + 1)  # fmt: skip
    report.add("open files before, during, after", "none left",
               f"{before['files']}, {during['files']}, {after['files']}",
               after["files"] <= before["files"] + 1)  # fmt: skip
    server.end()


def restarts(report: Report, quick: bool) -> None:
    """Restarts under load."""
    number = 3 if quick else 50
    server = Server()
    load = Generator("persistent", server.port, 8)
    statuses = Counter[int]()
    for _ in range(number):
        time.sleep(0.5)
        statuses[server.end()] += 1
        server = Server(port=server.port)
    time.sleep(0.5)
    found = load.end()
    server.end()
    lost = {what: count for what, count in found.items() if what not in ("200", "503", "refused")}
    report.add(f"{number} restarts under the load of 8 clients", "none failed of those accepted",
               f"{found.get('200', 0)} answered, {found.get('503', 0)} times 503, failed: {lost or 'none'}, "
               f"{found.get('refused', 0)} connections refused while it was down", not lost)  # fmt: skip
    report.add("exit status", "0", ", ".join(f"{n} times {status}" for status, n in statuses.items()),
               [*statuses] == [0])  # fmt: skip


def restarts_by_systemd(report: Report, quick: bool) -> None:
    """Restarts under load on a port that systemd holds; the tests' supervisor stands in for it."""
    number, statuses = 3 if quick else 50, Counter[int]()
    command = command_of("ours-float32", "bundled", 0, Path())
    with Supervisor(*command, "--drain-seconds", "0", "--log-level", "warning") as systemd:
        load = Generator("persistent", systemd.port, 8)
        for _ in range(number):
            time.sleep(0.5)
            statuses[systemd.restart()] += 1
        time.sleep(0.5)
        found = load.end()
    others = {what: count for what, count in found.items() if what != "200"}
    report.add(f"{number} restarts on a port of systemd's under the load of 8 clients", "none refused, none failed",
               f"{found.get('200', 0)} answered, others: {others or 'none'}; "
               f"exit status {', '.join(f'{n} times {status}' for status, n in statuses.items())}",
               not others and [*statuses] == [0])  # fmt: skip


def memory(report: Report, quick: bool) -> None:
    """A long run."""
    first, last = (200, 1000) if quick else (1000, 20_000)
    server, sizes = Server(), []
    closed_loop(server, 64, 3)  # so many that every thread of the pool is there
    for goal in (first, last):
        while server.images() < goal:
            closed_loop(server, 32, 2)
        time.sleep(1)
        sizes.append(server.figures())
    grown = sizes[1]["MB"] / sizes[0]["MB"] - 1
    report.add(f"resident size after {first} and {last} requests", "within 5 %",
               f"{sizes[0]['MB']} and {sizes[1]['MB']} MB ({100 * grown:+.1f} %)", grown < 0.05)  # fmt: skip
    for what in ("threads", "files"):
        report.add(f"{what} after each", "no more", f"{sizes[0][what]} and {sizes[1][what]}",
                   sizes[1][what] <= sizes[0][what])  # fmt: skip
    server.end()


PARTS = {
    "overload": overload,
    "slow": slow_clients,
    "restarts": restarts,
    "systemd": restarts_by_systemd,
    "memory": memory,
}


def main() -> int:
    """Measure, and write the section. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure how the server bears overload, slow clients and restarts.")
    parser.add_argument("--quick", action="store_true", help="a minute in all, for trying; writes nothing")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: all)")
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.generate:
        name, *arguments = json.loads(options.generate)
        print(json.dumps(GENERATORS[name](*arguments)))
        return 0
    if not options.quick:
        make_weights()
    report = Report()
    for part in options.only.split(","):
        PARTS[part](report, options.quick)
    intro = (
        f"Bundled model where no other is named, float32, picture of {len(picture()) / 1000:.0f} kB, clients on the "
        f"same machine: {describe_machine()}."
    )
    if not options.quick and options.only == ",".join(PARTS):
        put(HERE / "RESULTS.md", "soak", "\n".join(["## Soak", "", intro, "", *report.lines]), new="last")
    return 0 if report.kept else 1


if __name__ == "__main__":
    sys.exit(main())
