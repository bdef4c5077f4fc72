"""`keras-server predict`: thousands of photos into a file that can be gone on with, by a server or by the own model."""

import base64
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import DOG, ROOT, FakeModel, encode
from PIL import Image
from scripted_server import PATIENCE, Answer, Request, Server, as_json, lines_of_json, on_terminal, rows, see_text

import run_keras_server
import simple_request
from keras_server.commands import answering, sheet
from keras_server.commands.results import COLUMNS, Csv, Results, ResultsError, key

pytestmark = pytest.mark.usefixtures("bare_environment")
SERVICE = ROOT / "run_keras_server.py"
HEAD = ",".join(COLUMNS) + "\r\n"
NASTY = ['a "dog", or\ntwo.jpg', "b\r.jpg", "c,d.jpg", "ä.jpg", '"', os.fsdecode(b"caf\xe9.jpg"), "\n\n"]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command takes Ctrl-C and the settings for itself: it is a process of its own."""
    for name in ("settings", "model"):
        monkeypatch.setattr(run_keras_server, name, getattr(run_keras_server, name))
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of twelve photos, of which 03 is bad."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.jpg").write_text("bad" if i == 3 else f"label{i % 3}")
    return folder


def predict(*arguments: object) -> int:
    """Run the command in this process."""
    return run_keras_server.main(["predict", *map(str, arguments)])


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, str(SERVICE), "predict", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def names_in(path: Path) -> list[str]:
    """Return the names of the photos in a file of results."""
    if path.suffix == ".jsonl":
        return [line["filename"] for line in lines_of_json(path.read_text())]
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [row["filename"] for row in csv.DictReader(file)]


# What is written


def test_the_rows_of_a_csv(server: Server, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "notes.txt").touch()
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", server.base) == 1
    expected = [
        f"{photos}/{i:02}.jpg," + (",,,,This is not an image: bad." if i == 3 else f"label{i % 3},1.000000,,fake,")
        for i in range(12)
    ]
    assert out.read_bytes().decode() == HEAD + "".join(f"{row}\r\n" for row in expected)
    told = capsys.readouterr()
    assert told.err == ""
    first, *lines = told.out.splitlines()
    assert re.fullmatch(re.escape(f"{out}: 12 photos, 12 of them now, ") + r"[\d.]+ a second\.", first)
    assert [" ".join(line.split()) for line in lines] == [
        "4 label1",
        "4 label2",
        "3 label0",
        "1 failed: This is not an image: bad.",
        "1 skipped: not called like images (.txt)",
    ]


def test_the_lines_of_json_are_the_clients(server: Server, photos: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.JSONL"
    assert predict(photos, "--output", out, "--url", server.base, "--top", 2) == 1
    assert {request.path for request in server.requests} == {"/predict?top=2"}
    capsys.readouterr()
    assert simple_request.main([str(photos), "--json", "--url", server.base]) == 1
    assert out.read_text() == capsys.readouterr().out


def test_the_server_decides_how_many_labels_and_the_key_is_sent(
    server: Server, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_SERVER_API_KEY", "s3cret,other")
    predict(photos / "00.jpg", "--output", tmp_path / "out.csv", "--url", server.base)
    (request,) = server.requests
    assert (request.path, request.headers["Authorization"]) == ("/predict", "Bearer s3cret")


def test_the_values_of_a_regression(server: Server, photos: Path, tmp_path: Path, capsys: Any) -> None:
    server.answer = lambda request: as_json(200, {"success": True, "model": "age", "values": [29.7, -3]})
    out = tmp_path / "out.csv"
    assert predict(photos / "00.jpg", "--output", out, "--url", server.base) == 0
    assert out.read_text().splitlines()[1] == f"{photos}/00.jpg,,,29.7 -3,age,"
    assert "1  with values" in capsys.readouterr().out


def test_answers_are_written_in_order_and_few_are_ahead(server: Server, photos: Path, tmp_path: Path) -> None:
    """The first photo is answered only after the next seven were."""
    answered = threading.Semaphore(0)
    begun: list[int] = []

    def first_last(request: Request) -> Answer:
        if request.image == b"first":
            for _ in range(7):
                assert answered.acquire(timeout=PATIENCE)
            time.sleep(0.2)  # in which more would come, if there were more under way
            begun.append(len(server.requests))
        else:
            answered.release()
        return see_text(request)

    server.answer = first_last
    (photos / "00.jpg").write_text("first")
    out = tmp_path / "out.csv"
    predict(photos, "--output", out, "--url", server.base, "--workers", 4)
    assert names_in(out) == [f"{photos}/{i:02}.jpg" for i in range(12)]
    assert begun == [8], "two a worker are under way"


# Going on


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_resume_skips_what_the_file_has(
    server: Server, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / f"out.{ending}"
    command = ("--output", out, "--url", server.base, "--resume")
    assert predict("photos/00.jpg", "photos/03.jpg", *command) == 1
    assert len(server.requests) == 2
    # However the path is written, each photo is there once; one that is no image is not asked for again.
    assert predict("./photos", photos, "photos/00.jpg", *command) == 1
    assert [request.image for request in server.requests].count(b"bad") == 1
    assert len(server.requests) == 12
    assert "2  skipped: the file has them already" in capsys.readouterr().out
    assert sorted(map(key, names_in(out))) == [f"{photos}/{i:02}.jpg" for i in range(12)]
    assert predict(photos, *command) == 1
    assert len(server.requests) == 12


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_that_was_cut_anywhere_is_mended(tmp_path: Path, ending: str) -> None:
    """At each byte: what is whole stays, what is not is written anew, and nothing stands there twice."""
    path = tmp_path / f"out.{ending}"
    results = [
        {"filename": name, "success": True, "model": 'm"x', "predictions": rows('a "b", c\nd')} for name in NASTY
    ]
    results[2] = {"filename": NASTY[2], "success": False, "model": None, "error": 'It said:\n"no", and went.'}
    results[3] = {"filename": NASTY[3], "success": True, "model": "m", "values": [1.5, -2e-7]}

    def write(resume: bool) -> None:
        file = Results(path, resume)
        for result in results:
            if key(result["filename"]) not in file.done:
                file.add(result)
        file.close()

    write(resume=False)
    whole = path.read_bytes()
    reader = Results(path, resume=True)
    assert [*reader.read()] == results
    reader.close()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        write(resume=True)
        assert path.read_bytes() == whole, cut


def test_the_certainty_in_a_csv_has_six_digits_and_surrogates_are_replaced() -> None:
    result = {
        "filename": "a",
        "success": True,
        "model": "m",
        "predictions": [{"label": "\ud800", "probability": 2 / 3}],
    }
    assert Csv().line(result) == b"a,?,0.666667,,m,\r\n"
    assert Csv().line({"filename": "a", "success": False, "model": None, "error": ""}) == b"a,,,,,no reason given\r\n"


@pytest.mark.parametrize("content", ["hello\n", "[1]\n", '{"filename": 7}\n', "filename,label\n", "[" * 100_000 + "\n"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_another_file_is_not_touched(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, ending: str
) -> None:
    out = tmp_path / f"out.{ending}"
    out.write_text(content)
    for arguments, sentence in (([], "is there already"), (["--resume"], "is no file that this command wrote")):
        assert predict(photos, "--output", out, "--url", "http://127.0.0.1:1", *arguments) == 1
        told = capsys.readouterr()
        assert (told.out, told.err.count("\n")) == ("", 1)
        assert sentence in told.err
        assert out.read_text() == content


def test_a_file_cannot_have_two_writers(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = Results(tmp_path / "out.csv", resume=True)
    with pytest.raises(ResultsError, match="is being written by another process"):
        Results(tmp_path / "out.csv", resume=True)
    first.close()
    Results(tmp_path / "out.csv", resume=True).close()


@pytest.mark.skipif(sys.platform == "win32", reason="which has no such limit")
def test_a_full_disk_is_a_sentence_and_the_line_is_mended(server: Server, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, str(SERVICE), "predict", str(photos), "--output", str(out), "--url", server.base]
    limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "-", *command]  # one KiB
    done = subprocess.run(limited, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: {out} cannot be written: No space left on device.\n")
    assert out.stat().st_size == 1024
    assert predict(photos, "--output", out, "--url", server.base, "--resume") == 1
    assert names_in(out) == [f"{photos}/{i:02}.jpg" for i in range(12)]


def test_what_is_no_file_is_a_sentence(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("out.csv", "out.jsonl"):
        (tmp_path / name).mkdir()
        assert predict(photos, "--output", tmp_path / name, "--url", "http://127.0.0.1:1", "--resume") == 1
        assert "is no file that can be written" in capsys.readouterr().err


def test_ctrl_c_leaves_a_file_that_can_be_gone_on_with(server: Server, photos: Path, tmp_path: Path) -> None:
    """Interrupted twice; what is under way is still written, and at the end each photo is there once."""
    out = tmp_path / "out.csv"
    arrived = threading.Event()
    may_go = threading.Event()
    most = 0

    def wait_at_fourth(request: Request) -> Answer:
        if len(server.requests) > most + 3:
            arrived.set()
            assert may_go.wait(PATIENCE)
        return see_text(request)

    server.answer = wait_at_fourth
    for _ in range(2):
        most = len(server.requests)
        arrived.clear()
        may_go.clear()
        with process(photos, "--output", out, "--url", server.base, "--workers", 1, "--resume") as running:
            assert arrived.wait(PATIENCE)
            running.send_signal(signal.SIGINT)
            assert running.stderr is not None
            assert running.stderr.readline().startswith("Stopping: what is under way is still written.")
            may_go.set()
            _, err = running.communicate(timeout=PATIENCE)
        assert running.returncode == 130
        assert re.fullmatch(r"\d+ are left: give the same command with --resume\.\n", err)
        assert len(names_in(out)) == most + 4
    assert predict(photos, "--output", out, "--url", server.base, "--resume") == 1
    assert names_in(out) == [f"{photos}/{i:02}.jpg" for i in range(12)]
    assert len(server.requests) == 12


def test_the_second_ctrl_c_ends_at_once(server: Server, photos: Path, tmp_path: Path) -> None:
    arrived = threading.Event()

    def never(request: Request) -> None:
        arrived.set()
        server.release.wait(PATIENCE)

    server.answer = never
    with process(photos, "--output", tmp_path / "out.csv", "--url", server.base) as running:
        assert arrived.wait(PATIENCE)
        running.send_signal(signal.SIGINT)
        assert running.stderr is not None
        running.stderr.readline()
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=PATIENCE)
    assert running.returncode == -signal.SIGINT  # a shell says 130


# A server that is away


def test_a_server_that_is_restarted_is_waited_for(
    server: Server, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections break, then a proxy answers in its place, and then it is back."""
    monkeypatch.setattr(simple_request.time, "sleep", lambda seconds: None)  # between the client's own tries
    broken = simple_request.TRIES + 1  # which the client itself makes

    def restart(request: Request) -> Answer | None:
        nonlocal broken
        if len(server.requests) > 4 and broken:
            broken -= 1
            return None
        return see_text(request)

    server.answer = restart
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", server.base, "--workers", 1) == 1
    assert names_in(out) == [f"{photos}/{i:02}.jpg" for i in range(12)]
    assert capsys.readouterr().err.count("Waiting up to 120 s for the server: ") == 1


def test_ctrl_c_ends_the_waiting(server: Server, photos: Path, tmp_path: Path) -> None:
    proxys: Answer = (503, {"Retry-After": "0"}, b"<h1>503</h1>")  # which the client itself asks again at once
    server.answer = lambda request: see_text(request) if len(server.requests) < 3 else proxys
    with process(photos, "--output", tmp_path / "out.csv", "--url", server.base, "--workers", 1) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("Waiting up to 120 s for the server: ")
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130
    assert "1  without an answer: " in out
    assert err.endswith("10 are left: give the same command with --resume.\n")
    assert len(names_in(tmp_path / "out.csv")) == 2


def test_a_server_that_never_was_there_is_not_waited_for(
    nobody: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", nobody) == 1
    told = capsys.readouterr()
    assert f"without an answer: No server answers at {nobody}." in told.out
    assert told.err == "12 are left: give the same command with --resume.\n"
    assert out.read_text().splitlines() == [HEAD.strip()]


def test_what_may_be_answered_later_is_not_written(
    server: Server, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(answering, "PATIENCE", 0)

    def late(request: Request) -> Answer:
        if request.image == b"label1":
            return as_json(504, {"success": False, "error": "Too late."})
        return see_text(request)

    server.answer = late
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", server.base) == 1
    assert len(names_in(out)) == 8
    told = capsys.readouterr()
    assert "4  without an answer: Too late." in told.out
    assert told.err.endswith("4 are left: give the same command with --resume.\n")
    server.answer = see_text
    predict(photos, "--output", out, "--url", server.base, "--resume")
    assert sorted(names_in(out)) == [f"{photos}/{i:02}.jpg" for i in range(12)]


def test_a_photo_on_which_the_server_fails_is_a_line_at_once(server: Server, photos: Path, tmp_path: Path) -> None:
    def fail(request: Request) -> Answer:
        if request.image == b"bad":
            return as_json(500, {"success": False, "error": "The server failed."})
        return see_text(request)

    server.answer = fail
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", server.base, "--workers", 1) == 1
    assert f"{photos}/03.jpg,,,,,The server failed." in out.read_text()
    assert len(server.requests) == 12


def test_what_is_wrong_with_all_is_said_once(server: Server, photos: Path, tmp_path: Path, capsys: Any) -> None:
    server.answer = lambda request: as_json(401, {"success": False, "error": "No key."})
    assert predict(photos, "--output", tmp_path / "out.csv", "--url", server.base, "--workers", 2) == 1
    assert capsys.readouterr().out.count("No key.") == 1
    assert len(server.requests) <= 5, "two were answered, and few were under way"


# Only the unsure ones


def test_unsure_writes_those_below_and_resume_knows_the_others(server: Server, photos: Path, tmp_path: Path) -> None:
    def see(request: Request) -> Answer:
        certainty = {b"label0": 0.2, b"label1": 0.5, b"label2": 0.9}.get(request.image)
        if certainty is None:
            return see_text(request)
        row = {"label": request.image.decode(), "probability": certainty}
        return as_json(200, {"success": True, "model": "m", "predictions": [row]})

    server.answer = see
    out = tmp_path / "out.csv"
    command = ("--output", out, "--url", server.base, "--unsure", "0.5", "--resume")
    predict(photos / "00.jpg", photos / "01.jpg", *command)
    predict(photos, *command)
    assert [Path(name).name for name in names_in(out)] == ["00.jpg", "03.jpg", "06.jpg", "09.jpg"]
    sure = names_in(tmp_path / "out.csv.sure.jsonl")
    assert sorted(sure + names_in(out)) == [f"{photos}/{i:02}.jpg" for i in range(12)]
    assert len(server.requests) == 12


def test_values_are_neither_sure_nor_unsure(server: Server, photos: Path, tmp_path: Path, capsys: Any) -> None:
    server.answer = lambda request: as_json(200, {"success": True, "model": "age", "values": [29.7]})
    assert predict(photos, "--output", tmp_path / "out.csv", "--url", server.base, "--unsure", "0.5") == 1
    assert capsys.readouterr().err == "error: --unsure needs labels: this model answers with values.\n"


# Heat maps

PNG = b"\x89PNG\r\n"


def see_and_explain(request: Request) -> Answer:
    """Answer /predict as see_text does, and /explain with what stands for a picture."""
    if "/explain" not in request.path:
        return see_text(request)
    return 200, {"Content-Type": "image/png"}, PNG + request.image


def test_heat_maps_are_saved_under_names_of_their_own(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.answer = see_and_explain
    names = ["p/a.jpg", "p/a.png", "p/b.jpg", "p/sub/a.jpg"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"beagle {number}")
    out = tmp_path / "out.jsonl"
    command = ("--output", out, "--url", f"{server.base}/", "--explain", "out/maps", "--resume")
    assert predict("p/a.jpg", "p/a.png", *command) == 0
    assert predict("p", *command) == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "out" / "maps").iterdir()}
    expected = ["a", "a-2", "b", "a-3"]
    assert found == {f"{name}.explained.png": PNG + f"beagle {i}".encode() for i, name in enumerate(expected)}
    lines = {line["filename"]: line["explanation"] for line in lines_of_json(out.read_text())}
    assert lines == {name: f"out/maps/{stem}.explained.png" for name, stem in zip(names, expected, strict=True)}
    assert {request.path for request in server.requests} == {"/predict", "/explain"}


def test_a_heat_map_follows_a_path_and_a_query(server: Server, photos: Path, tmp_path: Path) -> None:
    server.answer = see_and_explain
    url = f"{server.base}/vision?model=a"
    assert predict(photos / "00.jpg", "--output", tmp_path / "o.csv", "--url", url, "--explain", tmp_path / "maps") == 0
    assert [request.path for request in server.requests] == ["/vision/predict?model=a", "/vision/explain?model=a"]


def test_a_missing_heat_map_fails_its_photo_only(
    server: Server, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request) -> Answer:
        if request.image == b"label1" and request.path == "/explain":
            return as_json(400, {"success": False, "error": "This cannot be explained."})
        return see_and_explain(request)

    server.answer = answer
    (tmp_path / "maps" / "00.explained.png").mkdir(parents=True)
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", server.base, "--explain", tmp_path / "maps") == 1
    told = capsys.readouterr().out
    assert "4  failed: This cannot be explained." in told
    assert f"1  failed: The heat map cannot be saved as {tmp_path}/maps/00.explained.png: " in told
    assert (tmp_path / "maps" / "02.explained.png").read_bytes() == PNG + b"label2"


def test_a_model_without_heat_maps_is_said_once(
    server: Server, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: Request) -> Answer:
        if request.path == "/explain":
            return as_json(422, {"success": False, "error": "It has no features."})
        return see_text(request)

    server.answer = answer
    command = ("--output", tmp_path / "out.csv", "--url", server.base, "--explain", tmp_path / "maps")
    assert predict(photos, *command) == 1
    assert capsys.readouterr().out.count("It has no features.") == 1
    server.answer = lambda request: see_text(request) if request.path == "/predict" else (200, {}, b"<h1>Hello</h1>")
    predict(photos / "00.jpg", *command, "--resume")
    assert "/explain answered 200 with something that is no heat map" in capsys.readouterr().out


# The contact sheet


class Sheet(HTMLParser):
    """What stands in a sheet: its headings, links, pictures and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("href", "src"):
                self.found.append((name, value or ""))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.found.append(("text", data.strip()))


def test_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    names = ["p/a.png", "p/<b> & #1%.png", "p/c.png", "p/d.png", "p/gone.png"]
    for i, name in enumerate(names[:4]):
        (tmp_path / name).write_bytes(encode(Image.new("RGB", (400, 200), (50 * i, 0, 0))))
    (tmp_path / "p/e.png").write_text("none")

    def labelled(name: str, label: str, probability: float) -> dict[str, Any]:
        row = {"label": label, "probability": probability}
        return {"filename": name, "success": True, "model": "m", "predictions": [row]}

    results = [
        labelled(names[0], "tabby", 0.5),
        labelled(names[1], "beagle<script>", 0.25),
        labelled(names[2], "tabby", 0.75),
        labelled(names[4], "tabby", 0.1),
        {"filename": names[3], "success": True, "model": "m", "values": [29.7]},
        {"filename": "p/e.png", "success": False, "model": None, "error": "This is no image."},
    ]
    (tmp_path / "sheets").mkdir()
    sheet.write_sheet(tmp_path / "sheets" / "s.html", results, 50)
    text = (tmp_path / "sheets" / "s.html").read_text()
    page = Sheet(text)
    assert "script" not in page.tags
    assert "http" not in text.replace("http-equiv", "")
    headings = [value for kind, value in page.found if kind == "text" and re.search(r" \(\d+\)$", value)]
    assert headings == ["beagle<script> (1)", "tabby (3)", "Values (1)", "Failed (1)"]
    links = [value for kind, value in page.found if kind == "href" and not value.startswith("#")]
    assert [unquote(link) for link in links] == [
        f"../{name}" for name in (names[1], names[2], names[0], names[4], names[3], "p/e.png")
    ]
    assert "p/%3Cb%3E%20%26%20%231%25.png" in links[0]
    pictures = [value for kind, value in page.found if kind == "src"]
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in pictures)
    thumbs = [Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))) for picture in pictures]
    assert [thumb.size for thumb in thumbs] == [(160, 80)] * 4
    reds = [np.asarray(thumb)[40, 80, 0] for thumb in thumbs]
    assert np.allclose(np.array(reds, int), [50, 100, 0, 150], atol=4)
    texts = [value for kind, value in page.found if kind == "text"]
    assert [word for word in texts if word in ("25.0%", "75.0%", "50.0%", "10.0%", "29.7", "This is no image.")] == [
        "25.0%",
        "75.0%",
        "50.0%",
        "10.0%",
        "29.7",
        "This is no image.",
    ]


def test_the_sheet_shows_what_earlier_runs_found_too(server: Server, photos: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out.csv", tmp_path / "sheet.html"
    predict(photos / "00.jpg", "--output", out, "--url", server.base)
    predict(photos, "--output", out, "--url", server.base, "--resume", "--sheet", page)
    links = [value for kind, value in Sheet(page.read_text()).found if kind == "href" and not value.startswith("#")]
    assert sorted(links) == [f"photos/{i:02}.jpg" for i in range(12)]


def test_a_sheet_that_cannot_be_written_is_a_sentence(
    server: Server, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--url", server.base, "--sheet", tmp_path / "no" / "s.html") == 1
    assert re.search(r"^error: .*s\.html cannot be written: No such file or directory\.$", capsys.readouterr().err)
    assert len(names_in(out)) == 12


# The model in this process


def test_the_own_model_answers_as_the_server_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what is changed in load_model() and prepare_image()."""

    class Red(FakeModel):
        """Says class 1 the more surely the redder a picture is."""

        def predict(self, batch: np.ndarray) -> np.ndarray:
            self.batches.append(batch)
            red = batch.mean((1, 2))[:, 0] / 255
            return np.stack([1 - red, red, *[np.zeros_like(red)] * 998], axis=-1).astype(np.float32)

    model = Red()
    monkeypatch.setattr(run_keras_server, "load_model", lambda: setattr(run_keras_server, "model", model))
    monkeypatch.setattr(
        run_keras_server,
        "prepare_image",
        lambda image, target: np.asarray(image.convert("RGB").resize((224, 224)), np.float32)[np.newaxis],
    )
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_bytes(encode(Image.new("RGB", (40, 30), (8 * i, 0, 0))))
    (tmp_path / "30.png").write_text("none")
    out = tmp_path / "out.jsonl"
    assert predict(tmp_path, "--output", out, "--top", 2) == 1
    *lines, last = lines_of_json(out.read_text())
    client = run_keras_server.app.test_client()
    for line in lines:
        path = Path(line["filename"])
        answer = client.post("/predict?top=2", data=path.read_bytes(), content_type="image/png").json
        assert line == {"filename": str(path)} | answer
        red = int(path.stem) * 8 / 255
        assert line["predictions"][0]["probability"] == pytest.approx(max(red, 1 - red), abs=1e-4)
    assert len(lines) == 30
    assert last["error"].startswith("This is not an image that the server reads")
    assert capsys.readouterr().out.startswith(f"{out}: 31 photos, 31 of them now")


@pytest.mark.slow
def test_the_bundled_model_from_the_command_line(tmp_path: Path, cache: str) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(5):
        shutil.copy(DOG, tmp_path / "photos" / f"{i}.jpg")
    command = ["--model", "bundled", "--cache-dir", cache, "--output", "out.csv", "--sheet", "s.html"]
    with process("photos", *command, cwd=tmp_path) as running:
        out, err = running.communicate()
    assert (running.returncode, "Traceback" in err) == (0, False)
    rows = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert len(rows) == 5
    for i, row in enumerate(rows):
        assert re.fullmatch(rf"photos/{i}\.jpg,German_shepherd,0\.96\d{{4}},,efficientnet_lite0,", row)
    assert re.search(r"^ +5  German_shepherd$", out, re.M)
    assert (tmp_path / "s.html").stat().st_size > 10_000


def edited(folder: Path, functions: str) -> tuple[list[str], dict[str, str]]:
    """Write a copy of the file with more functions; returns the command that labels a picture with it, and its
    environment.
    """
    start = 'if __name__ == "__main__":'
    (folder / "edited.py").write_text(SERVICE.read_text("utf-8").replace(start, functions + start), "utf-8")
    (folder / "a.png").write_bytes(encode(Image.new("RGB", (9, 9))))
    command = [sys.executable, "edited.py", "predict", "a.png", "--output", "out.csv"]
    return command, os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_copy_of_the_file_under_another_name_uses_its_own_functions(tmp_path: Path) -> None:
    command, environment = edited(
        tmp_path,
        "class Always:\n    def predict(self, batch):\n        return np.eye(1000)[[7] * len(batch)]\n\n\n"
        "def load_model():\n    global model\n    model = Always()\n\n\n",
    )
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=PATIENCE, capture_output=True)
    assert ",cock,1.000000,," in (tmp_path / "out.csv").read_text()


def test_ctrl_c_while_the_model_loads_ends_at_once(tmp_path: Path) -> None:
    command, environment = edited(
        tmp_path, 'def load_model():\n    import time\n\n    print("Loading", flush=True)\n    time.sleep(600)\n\n\n'
    )
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert running.stderr
        assert running.stdout.readline() == "Loading\n"
        running.send_signal(signal.SIGINT)
        assert (running.wait(), running.stderr.read()) == (130, "")


def test_a_model_that_fails_on_a_photo_is_a_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dog: bytes
) -> None:
    class Broken:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            raise ArithmeticError("as the test wished")

    monkeypatch.setattr(run_keras_server, "load_model", lambda: setattr(run_keras_server, "model", Broken()))
    (tmp_path / "dog.jpg").write_bytes(dog)
    assert predict(tmp_path / "dog.jpg", "--output", tmp_path / "out.csv") == 1
    assert "The model failed on this photo: as the test wished" in (tmp_path / "out.csv").read_text()


# The command line


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ([], 2, "Missing argument 'PHOTOS...'"),
        (["a.jpg"], 2, "Missing option '--output'"),
        (["a.jpg", "--output", "out.txt"], 2, "ends neither in .csv nor in .jsonl"),
        (["a.jpg", "--output", "out.csv", "--url", "localhost:5000"], 2, "is not a URL such as"),
        (["a.jpg", "--output", "out.csv", "--unsure", "1.5"], 2, "is not a number from 0 to 1"),
        (["a.jpg", "--output", "out.csv", "--workers", "0"], 2, "is not a whole number from 1 to 1024"),
        (["a.jpg", "--output", "out.csv", "--top", "0"], 2, "--top: "),
        (["a.jpg", "--output", "out.csv", "--port", "5000"], 2, "No such option"),
        (["a.jpg", "--output", "out.csv", "--url", "http://h", "--model", "m"], 2, "leave it out with --url"),
        (["a.jpg", "--output", "out.csv", "--explain", "maps"], 2, "give its --url"),
        (["a.jpg", "--output", "out.csv", "--url", "http://h", "--explain", "/dev/null"], 1, "cannot be a folder"),
        (["a.jpg", "--output", "no/out.csv", "--url", "http://h"], 1, "cannot be written: No such file"),
        (["a.jpg", "--output", "out.csv", "--model", "no.keras"], 1, "There is no file no.keras."),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    status: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = predict(*arguments)
    except SystemExit as end:
        found = end.code  # type: ignore[assignment]
    told = capsys.readouterr()
    assert (found, told.out, told.err.count("\n")) == (status, "", 1)
    assert sentence in told.err


def test_a_start_that_failed_does_not_stand_in_the_way(
    server: Server, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    assert predict(photos, "--output", out, "--model", "no.keras") == 1
    assert predict(photos / "00.jpg", "--output", out, "--url", server.base) == 0


def test_help_lists_the_models_settings_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        predict("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--output FILE", "--resume", "--model MODEL", "--model-output NAME", "--preprocess MODE", "--top N"):
        assert option in text
    assert "--port" not in text
    assert "--queue-size" not in text


def test_progress_is_shown_on_a_terminal_only(server: Server, photos: Path, tmp_path: Path) -> None:
    shown = on_terminal(SERVICE, "predict", photos, "--output", tmp_path / "out.csv", "--url", server.base)
    assert "12/12" in shown
    assert f"{tmp_path / 'out.csv'}: 12 photos" in shown.replace("\r\n", "")
    with process(photos, "--output", tmp_path / "b.csv", "--url", server.base) as running:
        assert running.communicate(timeout=PATIENCE)[1] == ""


def test_nothing_of_a_server_or_a_name_commands_the_terminal(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.\x1b[2J").touch()
    (tmp_path / "a.jpg").write_text("pug")
    answers: list[Callable[[Request], Answer]] = [
        lambda request: as_json(200, {"success": True, "model": "m", "predictions": rows("pug\x1b[2J\n")}),
        lambda request: as_json(400, {"success": False, "error": "no\x1b[2J\n"}),
        lambda request: as_json(401, {"success": False, "error": "no\x1b[2J\n"}),
    ]
    for i, server.answer in enumerate(answers):
        predict(tmp_path, "--output", tmp_path / f"{i}.csv", "--url", server.base)
        told = capsys.readouterr()
        assert "\x1b" not in told.out + told.err
        assert told.out.lower().count("\\x1b[2j") == 2
    assert json.dumps("pug\x1b[2J\n")[1:-1] not in (tmp_path / "0.csv").read_text()
