"""The client, against a small scripted server: as a function and as a program."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
from scripted_server import PATIENCE, Answer, Request, Server, as_json, lines_of_json, rows, see_text

import simple_request
from simple_request import PredictionError, ask, classify, main

SCRIPT = Path(simple_request.__file__)


pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of the seconds that the client would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(simple_request.time, "sleep", slept.append)
    return slept


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the client as a program."""
    if "input" not in options:
        options["stdin"] = subprocess.DEVNULL
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)


# ---------------------------------------------------------------------------------------------------------
# the function
# ---------------------------------------------------------------------------------------------------------


def test_classify_takes_a_path_bytes_or_a_file(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "dog"
    path.write_bytes(b"beagle")
    with path.open("rb") as file:
        for image in (path, str(path), b"beagle", io.BytesIO(b"beagle"), file):
            assert classify(image, server.url) == rows("beagle", "pot")
    assert [request.image for request in server.requests] == [b"beagle"] * 5


def test_classify_sends_top_only_when_it_is_given(server: Server) -> None:
    classify(b"beagle", server.url)
    classify(b"beagle", server.url, top=3)
    assert [request.path for request in server.requests] == ["/predict", "/predict?top=3"]


def test_classify_keeps_the_connection_of_a_session(server: Server) -> None:
    with requests.Session() as session:
        for _ in range(3):
            classify(b"beagle", server.url, session=session)
    assert len(server.connections) == 1


@pytest.mark.parametrize(
    ("end", "path"),
    [
        ("", "/predict"),
        ("/", "/predict"),
        ("/predict", "/predict"),
        ("/predict/", "/predict"),
        ("/vision", "/vision/predict"),
        ("/vision/", "/vision/predict"),
        ("/vision/predict?model=a", "/vision/predict?model=a"),
    ],
)
def test_an_address_gets_predict_appended(server: Server, end: str, path: str) -> None:
    assert classify(b"beagle", server.base + end)
    assert server.requests[0].path == path


def test_ask_returns_the_model_as_well(server: Server) -> None:
    assert ask(b"beagle", server.url) == {"model": "fake", "predictions": rows("beagle", "pot")}


@pytest.mark.parametrize("url", ["localhost:5000", "ftp://host/", "http://", "http://h:99999", "http://[::1"])
def test_classify_refuses_what_is_no_url(url: str) -> None:
    with pytest.raises(PredictionError, match="is not a URL") as caught:
        classify(b"beagle", url)
    assert caught.value.status is None


def test_classify_says_the_servers_own_sentence(server: Server) -> None:
    with pytest.raises(PredictionError, match=r"^This is not an image: bad\.$") as caught:
        classify(b"bad", server.url)
    assert caught.value.status == 400


def test_an_empty_file_is_the_servers_to_judge(server: Server) -> None:
    server.answer = lambda request: as_json(400, {"success": False, "error": "The file is empty."})
    with pytest.raises(PredictionError, match="The file is empty"):
        classify(b"", server.url)
    assert server.requests[0].image == b""


def test_classify_names_an_unreadable_file_as_the_cause(server: Server, tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="cannot be read: No such file"):
        classify(tmp_path / "missing.jpg", server.url)
    with pytest.raises(PredictionError, match="No image can be found in this folder"):
        classify(tmp_path, server.url)
    assert server.requests == []


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (413, "A proxy before the server refused the size: send a smaller image"),
        (502, "A proxy before the server got no answer from it: is the server still running"),
        (503, "A proxy before the server has none to ask just now: try again"),
        (504, "A proxy before the server did not wait for its answer"),
    ],
)
def test_classify_knows_the_pages_of_proxies(server: Server, sleeps: list[float], status: int, sentence: str) -> None:
    for kind, body in (("text/html", b"<html>nginx</html>"), ("application/json", b'{"message": "Too Long"}')):
        server.answer = lambda request, body=body, kind=kind: (status, {"Content-Type": kind}, body)
        with pytest.raises(PredictionError, match=sentence) as caught:
            classify(b"beagle", server.url)
        assert caught.value.status == status
    own = json.dumps({"success": False, "error": "The server's own."}).encode()
    server.answer = lambda request: (status, {"Content-Type": "application/json"}, own)
    with pytest.raises(PredictionError, match="The server's own"):
        classify(b"beagle", server.url)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (200, "answered 200 with something that is not JSON. Is it the Keras server"),
        (404, "answered 404 with something that is not JSON. Is it the Keras server"),
    ],
)
def test_classify_names_an_answer_that_is_not_json(
    server: Server, sleeps: list[float], status: int, sentence: str
) -> None:
    server.answer = lambda request: (status, {"Content-Type": "text/html"}, b"<h1>Hello</h1>")
    with pytest.raises(PredictionError, match=sentence) as caught:
        classify(b"beagle", server.url)
    assert (caught.value.status, caught.value.passing, sleeps) == (status, False, [])


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "", "{"], ids=["deep", "long", "empty", "cut"])
def test_json_that_cannot_be_read_is_a_sentence(server: Server, text: str) -> None:
    server.answer = lambda request: (200, {"Content-Type": "application/json"}, text.encode())
    with pytest.raises(PredictionError, match="answered 200 with something that is not JSON"):
        classify(b"beagle", server.url)


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, []),
        (200, "beagle"),
        (200, None),
        (200, {"success": True}),
        (200, {"success": True, "predictions": []}),
        (200, {"success": True, "predictions": "beagle"}),
        (200, {"success": True, "values": []}),
        (200, {"success": True, "values": ["29.7"]}),
        (200, {"success": True, "values": [True]}),
        (200, {"success": True, "predictions": ["beagle"]}),
        (200, {"success": True, "predictions": [{"label": "beagle"}]}),
        (200, {"success": True, "predictions": [{"label": "beagle", "probability": "high"}]}),
        (200, {"success": True, "predictions": [{"label": "beagle", "probability": True}]}),
        (200, {"success": True, "predictions": [{"label": "beagle", "probability": 10**400}]}),
        (200, {"success": True, "predictions": [{"label": "beagle", "probability": float("nan")}]}),
        (200, {"success": True, "predictions": [{"label": 7, "probability": 0.5}]}),
        (200, {"success": True, "values": [10**400]}),
        (200, {"success": True, "values": [float("inf")]}),
        (200, {"success": False}),
        (200, {"predictions": rows("beagle")}),
        (500, {"success": True, "predictions": rows("beagle")}),
        (500, {"success": False, "error": 7}),
    ],
)
def test_classify_names_json_of_an_unexpected_shape(server: Server, status: int, answer: object) -> None:
    server.answer = lambda request: as_json(status, answer)
    with pytest.raises(PredictionError, match=f"answered {status} with JSON of an unexpected shape") as caught:
        classify(b"beagle", server.url)
    assert caught.value.status == status


def test_classify_says_that_no_server_answers(nobody: str) -> None:
    with pytest.raises(PredictionError, match=f"No server answers at {nobody}. Start it with `make serve`") as caught:
        classify(b"beagle", nobody)
    assert caught.value.status is None


def test_classify_does_not_wait_longer_than_the_timeout(server: Server) -> None:
    def never(request: Request) -> None:
        server.release.wait(PATIENCE)

    server.answer = never
    with pytest.raises(PredictionError, match=r"did not answer within 0\.1 seconds"):
        classify(b"beagle", server.url, timeout=0.1)
    assert len(server.requests) == 1


def test_of_a_long_sentence_a_thousand_characters_are_shown(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda request: as_json(400, {"success": False, "error": "No, " * 500})
    assert main([str(SCRIPT.with_name("dog.jpg")), "--url", server.url]) == 1
    assert len(capsys.readouterr().err.removesuffix("\n")) == 1000


@pytest.mark.parametrize("key", ["schlüssel", "a\nb", "\x7f"])
def test_a_key_that_cannot_be_sent_is_wrong_for_all(server: Server, key: str) -> None:
    with pytest.raises(PredictionError, match="API key holds characters that cannot be sent") as caught:
        classify(b"beagle", server.url, api_key=key)
    assert caught.value.for_all
    assert server.requests == []


def test_a_minute_is_waited_unless_another_time_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    really = requests.Session.post

    def post(*arguments: Any, **options: Any) -> Any:
        waited.append(options["timeout"])
        return really(*arguments, **options)

    monkeypatch.setattr(requests.Session, "post", post)
    classify(b"beagle", server.url)
    classify(b"beagle", server.url, timeout=7)
    assert waited == [60, 7]


def test_the_command_waits_a_minute_for_each_of_four_pictures_at_a_time() -> None:
    """As its help and the README say."""
    plain, other = (simple_request.parse_arguments(words) for words in ([], ["--timeout", "7", "--workers", "2"]))
    assert (plain.timeout, plain.workers) == (60, 4)
    assert (other.timeout, other.workers) == (7, 2)


def test_a_broken_connection_is_not_taken_for_a_missing_server(server: Server, sleeps: list[float]) -> None:
    server.answer = lambda request: None
    with pytest.raises(PredictionError, match="gave no complete answer") as caught:
        classify(b"beagle", server.url)
    assert not caught.value.for_all
    assert sleeps == [1] * 4
    assert len(server.requests) == 5


def test_what_breaks_off_is_asked_again(server: Server, sleeps: list[float]) -> None:
    """A proxy closes the connection where the server behind it has died over the request."""

    def dying_at_first(request: Request) -> Answer | None:
        return see_text(request) if len(server.requests) > 2 else None

    server.answer = dying_at_first
    assert classify(b"beagle", server.url) == rows("beagle", "pot")
    assert [request.image for request in server.requests] == [b"beagle"] * 3
    assert sleeps == [1, 1]


# ---------------------------------------------------------------------------------------------------------
# a busy server
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0),
        ("3", 3),
        ("86400", 10),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 10),
        ("-1", 10),
        ("soon", 10),
        ("7" * 5000, 10),
    ],
)
def test_a_busy_server_is_asked_again(server: Server, sleeps: list[float], header: str, seconds: int) -> None:
    def busy_at_first(request: Request) -> Answer:
        if len(server.requests) <= 2:
            return as_json(503, {"success": False, "error": "Busy."}, Retry_After=header)
        return see_text(request)

    server.answer = busy_at_first
    assert classify(b"beagle", server.url) == rows("beagle", "pot")
    assert [request.image for request in server.requests] == [b"beagle"] * 3
    assert sleeps == [seconds] * 2


def test_a_server_that_stays_busy_is_given_up(server: Server, sleeps: list[float]) -> None:
    server.answer = lambda request: as_json(503, {"success": False, "error": "Busy."}, Retry_After="1")
    with pytest.raises(PredictionError, match="Busy") as caught:
        classify(b"beagle", server.url)
    assert caught.value.status == 503
    assert sleeps == [1] * 4
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_proxys_error_is_asked_again(server: Server, sleeps: list[float], status: int) -> None:
    """A proxy that does not reach the server says so in HTML."""

    def away_at_first(request: Request) -> Answer:
        return see_text(request) if len(server.requests) > 2 else (status, {}, b"<h1>No server is available</h1>")

    server.answer = away_at_first
    assert classify(b"beagle", server.url) == rows("beagle", "pot")
    assert sleeps == [1, 1]


def test_a_proxy_that_stays_alone_is_given_up(server: Server, sleeps: list[float]) -> None:
    server.answer = lambda request: (502, {"Retry-After": "2"}, b"<h1>Bad gateway</h1>")
    with pytest.raises(PredictionError, match="A proxy before the server got no answer from it") as caught:
        classify(b"beagle", server.url)
    assert (caught.value.status, caught.value.passing, caught.value.for_all) == (502, True, False)
    assert sleeps == [2] * 4


@pytest.mark.parametrize("status", [400, 413, 429, 500, 504])
def test_other_statuses_are_not_asked_again(server: Server, sleeps: list[float], status: int) -> None:
    server.answer = lambda request: as_json(status, {"success": False, "error": "No."}, Retry_After="1")
    with pytest.raises(PredictionError, match="No"):
        classify(b"beagle", server.url)
    assert len(server.requests) == 1
    assert sleeps == []


def test_503_without_retry_after_is_not_asked_again(server: Server, sleeps: list[float]) -> None:
    server.answer = lambda request: as_json(503, {"success": False, "error": "Down."})
    with pytest.raises(PredictionError, match="Down"):
        classify(b"beagle", server.url)
    assert (len(server.requests), sleeps) == (1, [])


def test_a_redirection_to_what_is_no_address_is_a_sentence(server: Server) -> None:
    server.answer = lambda request: (307, {"Location": "http://[::1"}, b"")
    with pytest.raises(PredictionError, match="gave no complete answer"):
        classify(b"beagle", server.url)
    assert len(server.requests) == 1


# ---------------------------------------------------------------------------------------------------------
# the API key, proxies
# ---------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_as_a_bearer_token(server: Server) -> None:
    classify(b"beagle", server.url)
    classify(b"beagle", server.url, api_key="s3cret")
    assert [request.headers["Authorization"] for request in server.requests] == [None, "Bearer s3cret"]


def test_the_key_wins_over_netrc(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    classify(b"beagle", server.url)
    classify(b"beagle", server.url, api_key="s3cret")
    first, second = (request.headers["Authorization"] for request in server.requests)
    assert first.startswith("Basic ")
    assert second == "Bearer s3cret"


def test_the_key_comes_from_the_environment_and_the_option_wins(server: Server, folder: Path) -> None:
    environment = os.environ | {"KERAS_SERVER_API_KEY": "from-env\n,the server's other key"}
    command = (folder / "a.jpg", "--url", server.url)
    assert run(*command, env=environment).returncode == 0
    assert run(*command, "--api-key", "from-option", env=environment).returncode == 0
    keys = [request.headers["Authorization"] for request in server.requests]
    assert keys == ["Bearer from-env", "Bearer from-option"]


@pytest.mark.parametrize("key", ["s3c\nret", "s3cr\u20act", "s3cr\x00et"])
def test_a_key_that_cannot_be_sent_is_not_shown(server: Server, key: str) -> None:
    with pytest.raises(PredictionError, match="API key holds characters") as caught:
        classify(b"beagle", server.url, api_key=key)
    assert "s3c" not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize("arguments", [["--help"], ["--top", "x"], ["--json"], []])
def test_the_key_is_never_printed(server: Server, folder: Path, arguments: list[str]) -> None:
    server.answer = lambda request: as_json(401, {"success": False, "error": "The API key is wrong."})
    environment = os.environ | {"KERAS_SERVER_API_KEY": "s3cret"}
    result = run(folder, "--url", server.url, *arguments, env=environment)
    assert "s3cret" not in result.stdout + result.stderr


def test_no_proxy_is_used_for_localhost(server: Server, nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, nobody)
    assert classify(b"beagle", server.url)
    assert classify(b"beagle", server.url.replace("127.0.0.1", "localhost"))


def test_a_proxy_is_used_for_other_hosts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.base)
    assert classify(b"beagle", "http://keras.invalid/predict")
    assert server.requests[0].path == "http://keras.invalid/predict"


def test_a_missing_proxy_is_named(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", nobody)
    with pytest.raises(PredictionError, match="proxy") as caught:
        classify(b"beagle", "http://keras.invalid/predict")
    assert caught.value.for_all


# ---------------------------------------------------------------------------------------------------------
# the program
# ---------------------------------------------------------------------------------------------------------


def test_one_image_prints_what_the_tutorial_prints(server: Server) -> None:
    server.answer = lambda request: as_json(
        200,
        {
            "success": True,
            "predictions": [{"label": "German_shepherd", "probability": 0.96614}, *rows("pot")],
        },
    )
    result = run("-", "--url", server.url, input="dog")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "1. German_shepherd: 0.9661\n2. pot: 1.0000\n"


def test_no_argument_posts_dog_jpg_to_the_local_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simple_request.KERAS_REST_API_URL == "http://localhost:5000/predict"
    monkeypatch.setattr(simple_request, "KERAS_REST_API_URL", server.url)  # port 5000 may be taken
    monkeypatch.chdir(tmp_path)
    server.answer = lambda request: as_json(200, {"success": True, "predictions": rows("German_shepherd")})
    assert main([]) == 0
    assert capsys.readouterr().out == "1. German_shepherd: 1.0000\n"
    assert server.requests[0].image == SCRIPT.with_name("dog.jpg").read_bytes()


def test_the_default_image_is_that_of_the_folder_or_else_that_beside_the_script(server: Server, tmp_path: Path) -> None:
    script, elsewhere = tmp_path / "script", tmp_path / "elsewhere"
    script.mkdir()
    elsewhere.mkdir()
    shutil.copy(SCRIPT, script)
    (script / "dog.jpg").write_text("beside")
    command = [sys.executable, str(script / SCRIPT.name), "--url", server.url]

    for label in ("beside", "here"):
        result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=PATIENCE, check=True)
        assert result.stdout == f"1. {label}: 1.0000\n2. pot: 0.5000\n"
        (elsewhere / "dog.jpg").write_text("here")


def test_several_images_are_headed_by_their_names(server: Server, folder: Path) -> None:
    result = run("a.jpg", "-", "--url", server.base, cwd=folder, input="pug")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "a.jpg:\n1. beagle: 1.0000\n2. pot: 0.5000\n-:\n1. pug: 1.0000\n2. pot: 0.5000\n"


def test_options_reach_the_server(server: Server, folder: Path) -> None:
    assert run(folder / "a.jpg", "--url", server.base, "--top", 2).returncode == 0
    assert server.requests[0].path == "/predict?top=2"


def test_folders_are_searched_for_images(server: Server, tmp_path: Path) -> None:
    wanted = ["B.JPG", "a.png", "f.heic", "g.jfif", "h.mpo", "i.avif", "j.HEIF", "k.jpe", "z.webp", "sub/c.jpeg",
              "sub/deep/d.gif", "sub2/e.bmp"]  # fmt: skip
    others = ["notes.txt", ".hidden.jpg", ".cache/f.jpg", "sub/.g.png", "sub/jpg"]
    for name in wanted + others:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pug")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    result = run("photos", "--json", "--url", server.url, cwd=tmp_path)
    assert result.returncode == 0
    assert [row["filename"] for row in lines_of_json(result.stdout)] == [f"photos/{name}" for name in wanted]
    # the four files, the hidden folder, and the link to another one
    assert result.stderr == "Left out of folders: 6 not called like images.\n"


def test_a_named_file_needs_no_extension_and_may_be_hidden(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".dog").write_text("pug")
    assert run(tmp_path / ".dog", "--url", server.url).stdout.startswith("1. pug: ")


def test_json_is_one_line_an_image(server: Server, folder: Path) -> None:
    result = run("a.jpg", "c.jpg", "none.jpg", "--json", "--url", server.url, cwd=folder)
    assert result.returncode == 1
    assert lines_of_json(result.stdout) == [
        {"filename": "a.jpg", "success": True, "model": "fake", "predictions": rows("beagle", "pot")},
        {"filename": "c.jpg", "success": False, "model": None, "error": "This is not an image: bad."},
        {
            "filename": "none.jpg",
            "success": False,
            "model": None,
            "error": "The file cannot be read: No such file or directory.",
        },
    ]
    assert result.stderr.splitlines() == [
        "c.jpg: This is not an image: bad.",
        "none.jpg: The file cannot be read: No such file or directory.",
    ]


def test_a_bad_file_does_not_stop_the_others(server: Server, folder: Path) -> None:
    result = run("a.jpg", "c.jpg", "none.jpg", "d.jpg", "--url", server.url, cwd=folder)
    assert result.returncode == 1
    assert result.stdout == "a.jpg:\n1. beagle: 1.0000\n2. pot: 0.5000\nd.jpg:\n1. pug: 1.0000\n2. pot: 0.5000\n"
    assert len(result.stderr.splitlines()) == 2


def test_a_broken_connection_does_not_stop_the_others(server: Server, folder: Path) -> None:
    server.answer = lambda request: None if request.image == b"beagle" else see_text(request)
    result = run("a.jpg", "d.jpg", "--url", server.url, cwd=folder)
    assert result.returncode == 1
    assert result.stdout == "d.jpg:\n1. pug: 1.0000\n2. pot: 0.5000\n"
    assert result.stderr.startswith("a.jpg: ")


def test_an_unknown_and_an_empty_folder_are_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run("unknown/", "empty", "--url", server.url, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "unknown/: The file cannot be read: No such file or directory.",
        "empty: No image can be found in this folder.",
    ]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may open every folder")
def test_a_locked_subfolder_is_named(server: Server, folder: Path) -> None:
    locked = folder / "locked"
    locked.mkdir(mode=0)
    result = run(folder, "--url", server.url)
    locked.chmod(0o700)  # or pytest cannot remove it
    assert f"{locked}: The file cannot be read: Permission denied." in result.stderr


def test_a_missing_server_is_said_once(nobody: str, folder: Path) -> None:
    result = run(folder, *[folder] * 100, "--url", nobody)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"No server answers at {nobody}. Start it with `make serve`, or name another with --url.",
        "Stopped: 403 more would have failed alike.",
    ]


def test_a_missing_server_is_a_line_of_json_too(nobody: str, folder: Path) -> None:
    (line,) = lines_of_json(run(folder, "--json", "--url", nobody).stdout)
    assert (line["filename"], line["success"]) == (str(folder / "a.jpg"), False)
    assert line["error"].startswith("No server answers")


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_an_error_about_every_image_is_said_once(server: Server, folder: Path, status: int) -> None:
    server.answer = lambda request: as_json(status, {"success": False, "error": "Not you."})
    result = run(folder, "--url", server.url)
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["Not you.", "Stopped: 3 more would have failed alike."]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "0"],
        ["--workers", "many"],
        ["--top", "0"],
        ["--top", "-1"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--timeout", "inf"],
        ["--url", "localhost:5000"],
        ["--unknown"],
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
def test_a_file_name_that_is_not_text_is_shown_somehow(server: Server, tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_text("pug")
    result = run(tmp_path, tmp_path, "--url", server.url)
    assert (result.returncode, result.stderr) == (0, "")
    assert "caf\\udce9.jpg:\n1. pug: 1.0000\n" in result.stdout


def test_main_can_be_called(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "a.jpg"), "--url", server.url]) == 0
    assert capsys.readouterr().out == "1. beagle: 1.0000\n2. pot: 0.5000\n"


# ---------------------------------------------------------------------------------------------------------
# several at a time
# ---------------------------------------------------------------------------------------------------------


def test_answers_are_printed_in_order_however_they_come(server: Server, tmp_path: Path) -> None:
    """The first image is answered only after the next three were."""
    answered = threading.Semaphore(0)

    def last_first(request: Request) -> Answer:
        if request.image == b"image0":
            for _ in range(3):
                assert answered.acquire(timeout=PATIENCE)
        else:
            answered.release()
        return see_text(request)

    server.answer = last_first
    for i in range(10):
        (tmp_path / f"{i}.jpg").write_text(f"image{i}")
    result = run(tmp_path, "--json", "--workers", 4, "--url", server.url)
    assert result.returncode == 0
    labels = [line["predictions"][0]["label"] for line in lines_of_json(result.stdout)]
    assert labels == [f"image{i}" for i in range(10)]


@pytest.mark.parametrize("workers", [1, 3])
def test_connections_are_kept_alive(server: Server, tmp_path: Path, workers: int) -> None:
    for i in range(30):
        (tmp_path / f"{i}.jpg").write_text("bad" if i % 10 == 5 else "pug")
    run(tmp_path, "--workers", workers, "--url", server.url)
    assert len(server.requests) == 30
    assert len(server.connections) <= workers


def test_each_image_is_printed_as_soon_as_it_is_known(server: Server, folder: Path) -> None:
    """The second image is answered only after the first line was read."""
    first_line_read = threading.Event()

    def second_waits(request: Request) -> Answer:
        assert request.image == b"beagle" or first_line_read.wait(PATIENCE)
        return see_text(request)

    server.answer = second_waits
    command = [sys.executable, str(SCRIPT), "a.jpg", "b.jpg", "--json", "--url", server.url]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["filename"] == "a.jpg"
        first_line_read.set()
        assert json.loads(process.stdout.readline())["filename"] == "b.jpg"
        assert process.wait(PATIENCE) == 0


# ---------------------------------------------------------------------------------------------------------
# leaving early, and the terminal
# ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_at_once(server: Server, folder: Path) -> None:
    arrived = threading.Event()

    def never(request: Request) -> None:
        arrived.set()
        server.release.wait(PATIENCE)

    server.answer = never
    command = [sys.executable, str(SCRIPT), str(folder), "--url", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert arrived.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE) == ("", "")
    assert process.returncode == 130


def test_a_closed_pipe_leaves_no_traceback(server: Server, folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(SCRIPT), str(folder), "--url", server.url]
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


HOSTILE = "pug\x1b[2J\x1b]0;owned\x07\n2. tabby: 1.0000\u202e"


def test_nothing_of_a_server_commands_the_terminal(server: Server, folder: Path) -> None:
    """Escape codes, line breaks and letters that turn the reading direction are shown, in labels and in sentences."""
    server.answer = lambda request: as_json(200, {"success": True, "predictions": rows(HOSTILE)})
    shown = "pug\\x1b[2J\\x1b]0;owned\\x07\\n2. tabby: 1.0000\\u202e"
    assert run("a.jpg", "--url", server.url, cwd=folder).stdout == f"1. {shown}: 1.0000\n"
    server.answer = lambda request: as_json(400, {"success": False, "error": HOSTILE})
    assert run("a.jpg", "--url", server.url, cwd=folder).stderr == f"a.jpg: {shown}\n"
    server.answer = lambda request: as_json(403, {"success": False, "error": HOSTILE + "x" * 10**6})
    assert len(run("a.jpg", "--url", server.url, cwd=folder).stderr) < 2000


@pytest.mark.skipif(sys.platform == "win32", reason="which has no such file names")
def test_nothing_of_a_file_name_commands_the_terminal(server: Server, tmp_path: Path) -> None:
    for name in ("a\x1b[2J.jpg", "b\n.jpg"):
        (tmp_path / name).write_text("bad" if name < "b" else "pug")
    result = run(tmp_path, "--url", server.url)
    assert result.stderr == f"{tmp_path}/a\\x1b[2J.jpg: This is not an image: bad.\n"
    assert result.stdout.startswith(f"{tmp_path}/b\\n.jpg:\n1. pug")


def test_it_works_alone_beside_requests(server: Server, folder: Path) -> None:
    """People copy the script: nothing of this package or of what it needs, requests aside, may be imported."""
    shutil.copy(SCRIPT, folder)
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("keras_server", "run_keras_server", "tqdm", "click", "flask", "numpy", "PIL"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import simple_request
sys.exit(simple_request.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "a.jpg", "--url", server.url]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.stdout, done.stderr) == ("1. beagle: 1.0000\n2. pot: 0.5000\n", "")


def test_the_numbers_of_a_regression(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda request: as_json(200, {"success": True, "model": "age", "values": [29.7, -3]})
    (tmp_path / "a.jpg").write_bytes(b"x")
    assert classify(tmp_path / "a.jpg", url=server.url) == [{"value": 29.7}, {"value": -3}]
    assert main([str(tmp_path / "a.jpg"), "--url", server.url]) == 0
    assert capsys.readouterr().out == "29.7\n-3\n"
    assert main([str(tmp_path / "a.jpg"), "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["values"] == [29.7, -3]
