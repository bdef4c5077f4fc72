"""Send pictures to the Keras REST server and print what it sees in them. All that this needs is `requests`.

python simple_request.py                        dog.jpg of this folder, or else the one beside this script
python simple_request.py photos/ cat.png        files, and folders with all that is below them
curl -s https://example.org/x.jpg | python simple_request.py -
"""

# import the necessary packages
import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests
from requests.exceptions import ChunkedEncodingError
from urllib3.exceptions import MaxRetryError  # requests stands on urllib3

# initialize the Keras REST API endpoint URL along with the input image path
KERAS_REST_API_URL = "http://localhost:5000/predict"
IMAGE_PATH = "dog.jpg"

# looked for in folders
IMAGE_NAME = re.compile(r"[^.].*\.(avif|bmp|gif|hei[cf]|jfif|jpe|jpe?g|mpo|png|tiff?|webp)", re.IGNORECASE | re.DOTALL)
TRIES = 5  # of an image, while the server is busy, a proxy before it does not reach it, or connections break off
LONGEST_WAIT = 10  # seconds before the next try, whatever Retry-After asks for
SAME_FOR_ALL = (401, 403, 404, 405)  # statuses about the key or the address, not about one image
# what it means where the answer is not the server's own
FROM_PROXIES = {
    413: "A proxy before the server refused the size: send a smaller image, or raise the proxy's limit.",
    502: "A proxy before the server got no answer from it: is the server still running?",
    503: "A proxy before the server has none to ask just now: try again in a moment.",
    504: "A proxy before the server did not wait for its answer: try again, or have the proxy wait longer.",
}

Image = str | os.PathLike[str] | bytes | BinaryIO  # a path, the file's bytes, or the open file
Answer = dict[str, Any]  # "model", and "predictions": [{"label": ..., "probability": ...}, ...] or "values": [29.7]


class PredictionError(RuntimeError):
    """A sentence that says why there is no prediction; `status` is the HTTP status or None.

    `for_all` tells that every other image would fail alike, `passing` that this one may be answered later.
    """

    def __init__(self, sentence: str, status: int | None = None, for_all: bool = False, passing: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.for_all, self.passing = status, for_all or status in SAME_FOR_ALL, passing


class BrokenOff(PredictionError):
    """The connection ended before the answer did, as where a server behind a proxy dies."""


def classify(image: Image, url: str = KERAS_REST_API_URL, **options: Any) -> list[dict[str, Any]]:
    """Return [{"label": "beagle", "probability": 0.99}, ...], or of a regression [{"value": 29.7}, ...].

    Takes the options of ask(). Raises PredictionError.
    """
    answer = ask(image, url, **options)
    return answer["predictions"] if "predictions" in answer else [{"value": value} for value in answer["values"]]


def ask(
    image: Image,
    url: str = KERAS_REST_API_URL,
    top: int | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    session: requests.Session | None = None,
) -> Answer:
    """Return the server's answer for an image.

    Raises PredictionError for a file that cannot be read, a server that is not there, and any other answer.
    """
    url, files = predict_url(url), {"image": read_image(image)}
    with contextlib.nullcontext(session) if session else requests.Session() as http:
        for attempt in range(TRIES):
            # submit the request
            try:
                response = post(http, url, api_key, timeout=timeout, files=files, params={"top": top})
            except BrokenOff:
                if attempt == TRIES - 1:
                    raise
                time.sleep(1)
                continue
            try:
                answer, is_json = response.json(), True
            except (ValueError, RecursionError):  # the latter where lists stand in lists without an end
                answer, is_json = None, False
            foreign = response.status_code >= 500 and not is_json  # from a proxy before the server
            wait = response.headers.get("Retry-After", "1" if foreign else "")
            if not wait or not (foreign or response.status_code == 503) or attempt == TRIES - 1:
                break
            # a date is allowed as well, but this server sends none
            time.sleep(min(int(wait), LONGEST_WAIT) if wait.isdecimal() and len(wait) < 9 else LONGEST_WAIT)

    # ensure the request was successful
    match answer:
        case {"success": True, "predictions": [_, *_] as rows} if response.ok and all(map(is_row, rows)):
            return {"model": answer.get("model"), "predictions": rows}
        case {"success": True, "values": [_, *_] as values} if response.ok and all(map(is_number, values)):
            return {"model": answer.get("model"), "values": values}
        case {"success": False, "error": str(sentence)}:
            pass
        case _:
            sentence = foreign_answer(url, response.status_code, is_json)
    raise PredictionError(sentence, response.status_code, passing=foreign or response.status_code in (503, 504))


def is_row(row: Any) -> bool:
    """Tell whether this is one row of the predictions."""
    return isinstance(row, dict) and isinstance(row.get("label"), str) and is_number(row.get("probability"))


def is_number(value: Any) -> bool:
    """Tell whether this is a number, and one that a float can hold."""
    return type(value) in (int, float) and abs(value) < 1e308


def foreign_answer(url: str, status: int, is_json: bool) -> str:
    """Return a sentence for an answer that the server itself does not give."""
    if status in FROM_PROXIES:
        return FROM_PROXIES[status]
    flaw = "JSON of an unexpected shape" if is_json else "something that is not JSON"
    return f"{url} answered {status} with {flaw}. Is it the Keras server?"


def predict_url(url: str) -> str:
    """Return the URL with /predict at its end; raises PredictionError if it is none."""
    with contextlib.suppress(ValueError):  # e.g. a port above 65535
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts._replace(path=parts.path.rstrip("/").removesuffix("/predict") + "/predict").geturl()
    raise PredictionError(f"{url!r} is not a URL such as {KERAS_REST_API_URL}", for_all=True)


def read_image(image: Image) -> bytes:
    """Return the bytes of an image; raises PredictionError if they cannot be read."""
    if isinstance(image, bytes):
        return image
    try:
        if not isinstance(image, (str, os.PathLike)):
            return image.read()
        with open(image, "rb") as file:
            return file.read()
    except IsADirectoryError:
        raise PredictionError("No image can be found in this folder.") from None
    except OSError as error:
        raise PredictionError(f"The file cannot be read: {error.strerror or error}.") from None


def post(http: requests.Session, url: str, api_key: str | None, timeout: float, **form: Any) -> requests.Response:
    """Post a form; raises PredictionError when no answer comes."""
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):  # the libraries below would show the key in their error
        raise PredictionError("The API key holds characters that cannot be sent.", for_all=True)

    def add_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {key}"
        return request

    auth = add_key if key else None  # a plain header would lose against an entry in netrc
    # No proxy can reach this machine's localhost; for other hosts that of the environment stays.
    host = urlsplit(url).hostname or ""
    proxies = {"http": "", "https": ""} if host in ("localhost", "::1") or host.startswith("127.") else None
    try:
        return http.post(url, auth=auth, timeout=timeout, proxies=proxies, **form)
    except (requests.RequestException, ValueError) as error:  # the latter for a redirection to what is no address
        never_connected = any(isinstance(cause, MaxRetryError) for cause in error.args)
        if isinstance(error, requests.ReadTimeout):
            sentence = f"{url} did not answer within {timeout:g} seconds."
        elif never_connected and type(error) in (requests.ConnectionError, requests.ConnectTimeout):
            sentence = f"No server answers at {url}. Start it with `make serve`, or name another with --url."
        else:  # the reason matters: a proxy, a certificate, a connection that broke
            sentence = f"{url} gave no complete answer: {error}"
        broke = not never_connected and isinstance(error, (requests.ConnectionError, ChunkedEncodingError))
        kind = BrokenOff if broke else PredictionError
        raise kind(sentence, for_all=never_connected, passing=True) from None


def find_images(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the images that the paths mean, those of a folder in order, and what is left out of folders.

    That is what is hidden, links to folders, and files that are not called like images.
    """
    found: list[str] = []
    left_out: list[str] = []
    for path in paths:
        before = len(found)
        # a subfolder that may not be opened goes on the list too, and fails when its turn comes
        for root, folders, files in os.walk(path, onerror=lambda error: found.append(error.filename)):
            passed = {name for name in folders if name.startswith(".") or os.path.islink(os.path.join(root, name))}
            folders[:] = sorted({*folders} - passed)
            for name in sorted({*files} | passed):
                wanted = name not in passed and IMAGE_NAME.fullmatch(name)
                (found if wanted else left_out).append(os.path.join(root, name))
        if len(found) == before:  # an empty folder cannot be read as a file, and so fails as well
            found.append(path)
    return found, left_out


def printable(text: str) -> str:
    """Return a text with control characters escaped: neither a server's words nor a file's name command a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:1000])


def as_lines(answer: Answer) -> list[str]:
    """Return what is shown of an answer."""
    if "values" in answer:
        return [f"{value:.6g}" for value in answer["values"]]
    return [f"{i}. {row['label']}: {row['probability']:.4f}" for i, row in enumerate(answer["predictions"], start=1)]


def positive(text: str) -> int:
    """Read a number of the command line."""
    if not 0 < (number := int(text)) < 1_000_000:
        raise ValueError
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with status 2 when they are wrong."""
    parser = argparse.ArgumentParser(description="Classify images with the Keras REST server.")
    add = parser.add_argument
    add("paths", nargs="*", metavar="IMAGE", help=f"a file, a folder, or - for standard input ({IMAGE_PATH})")
    add("--url", default=KERAS_REST_API_URL, help="where to post to, or just http://host:port (%(default)s)")
    add("--top", type=positive, metavar="N", help="how many predictions an image (as the server decides)")
    add("--json", action="store_true", help="print one line of JSON an image")
    add("--workers", type=positive, default=4, metavar="N", help="how many images at a time (%(default)s)")
    add("--timeout", type=positive, default=60, metavar="S", help="seconds to wait for an answer (%(default)s)")
    key_help = "sent as a bearer token; better set KERAS_SERVER_API_KEY, which other users cannot see"
    key = os.environ.get("KERAS_SERVER_API_KEY", "").partition(",")[0]  # the server takes several, with commas
    add("--api-key", default=key, metavar="KEY", help=key_help)
    arguments = parser.parse_args(argv)
    try:
        arguments.url = predict_url(arguments.url)
    except PredictionError as error:
        parser.error(f"argument --url: {error}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Print the predictions of every image; return 0, or 1 if any image failed."""
    arguments = parse_arguments(argv)
    options = {name: getattr(arguments, name) for name in ("url", "top", "api_key", "timeout")}
    beside_script = os.path.join(os.path.dirname(os.path.abspath(__file__)), IMAGE_PATH)
    names, left_out = find_images(arguments.paths or [IMAGE_PATH if os.path.exists(IMAGE_PATH) else beside_script])
    local = threading.local()

    def work(name: str) -> tuple[Answer, bool]:
        """Return what is printed as JSON for an image, and whether all others would fail alike."""
        if not hasattr(local, "session"):  # one a thread: each keeps its own connection alive
            local.session = requests.Session()
        try:
            answer = ask(sys.stdin.buffer if name == "-" else name, session=local.session, **options)
            return {"filename": name, "success": True, **answer}, False
        except PredictionError as error:
            return {"filename": name, "success": False, "model": None, "error": str(error)}, error.for_all

    if isinstance(sys.stdout, io.TextIOWrapper):  # a label may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    done = failed = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        # loop over the answers and display them, in order; whoever reads a pipe sees each at once
        for answer, for_all in pool.map(work, names):
            done += 1
            heading = [f"{answer['filename']}:"] if len(names) > 1 else []
            if not answer["success"]:
                failed += 1
                print(
                    printable(answer["error"] if for_all else f"{answer['filename']}: {answer['error']}"),
                    file=sys.stderr,
                )
            if arguments.json:
                print(json.dumps(answer), flush=True)
            elif answer["success"]:
                print("\n".join(map(printable, heading + as_lines(answer))), flush=True)
            if for_all:
                pool.shutdown(cancel_futures=True)
                break
    if done < len(names):
        print(f"Stopped: {len(names) - done} more would have failed alike.", file=sys.stderr)
    if left_out:
        print(f"Left out of folders: {len(left_out)} not called like images.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    # Ctrl-C leaves at once: a plain KeyboardInterrupt would first wait for the answers under way.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        sys.exit(main())
    except BrokenPipeError:  # e.g. `| head`, which has seen enough; the status is a shell's for SIGPIPE
        os._exit(141)
