"""Send images to the Keras REST server and print what it sees in them.

python simple_request.py                        dog.jpg of this folder, or else the one beside this script
python simple_request.py photos/ cat.png        files, and folders with all that is below them
python simple_request.py --explain why cat.png  also saves in the folder "why" where the model looked
curl -s https://example.org/x.jpg | python simple_request.py -
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import MaxRetryError  # requests stands on urllib3

# the endpoint, and the image that is sent when none is named
KERAS_REST_API_URL = "http://localhost:5000/predict"
IMAGE_PATH = "dog.jpg"

IMAGE_EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)  # looked for in folders
BUSY_RETRIES = 4  # how often an image is sent again to a server that answers 503 with Retry-After
LONGEST_WAIT = 10  # seconds, whatever Retry-After asks for
# what it means where the answer is not the server's own
FROM_PROXIES = {
    413: "A proxy before the server refused the size: send a smaller image, or raise the proxy's limit.",
    502: "A proxy before the server got no answer from it: is the server still running?",
    503: "A proxy before the server has none to ask just now: try again in a moment.",
    504: "A proxy before the server did not wait for its answer: try again, or have the proxy wait longer.",
}
SAME_FOR_ALL = {401, 403, 404, 405, 422}  # statuses about the key, the address or the model, not about one image

Rows = list[dict[str, Any]]  # [{"label": "beagle", "probability": 0.99}, ...], of a regression [{"value": 29.7}]


class PredictionError(RuntimeError):
    """A sentence that says why there is no prediction.

    `status` is the HTTP status or None; `for_all` tells that every other image would fail alike.
    """

    def __init__(self, sentence: str, status: int | None = None, for_all: bool = False) -> None:
        super().__init__(sentence)
        self.status = status
        self.for_all = for_all or status in SAME_FOR_ALL


def classify(
    image: str | os.PathLike[str] | bytes | BinaryIO,
    url: str = KERAS_REST_API_URL,
    top: int | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    session: requests.Session | None = None,
) -> Rows:
    """Return the predictions for an image, given as a path, its bytes or a binary file.

    Raises PredictionError for a file that cannot be read, a server that is not there, and any other answer.
    """
    url = predict_url(url)
    with contextlib.nullcontext(session) if session else requests.Session() as http:
        response = post(http, url, read_image(image), api_key, timeout, top=top)
    flaw = "something that is not JSON"
    with contextlib.suppress(ValueError):
        match response.json():
            case {"success": True, "predictions": [_, *_] as rows} if response.ok and all(map(is_row, rows)):
                return [*rows]
            case {"success": True, "values": [_, *_] as values} if response.ok and all(map(is_number, values)):
                return [{"value": value} for value in values]
        flaw = "JSON of an unexpected shape"
    raise refusal(url, response, flaw)


def explain(
    image: str | os.PathLike[str] | bytes | BinaryIO,
    url: str = KERAS_REST_API_URL,
    label: str | None = None,
    api_key: str | None = None,
    timeout: float = 60.0,
    session: requests.Session | None = None,
) -> bytes:
    """Return a PNG of the image under the heat map of a label, by default the most probable one.

    Takes the same image and URL as classify, and raises the same.
    """
    parts = urlsplit(predict_url(url))
    url = parts._replace(path=parts.path.rpartition("/")[0] + "/explain").geturl()
    with contextlib.nullcontext(session) if session else requests.Session() as http:
        response = post(http, url, read_image(image), api_key, timeout, label=label)
    if response.ok and response.content.startswith(b"\x89PNG"):
        return response.content
    raise refusal(url, response, "something that is no heat map")


def refusal(url: str, response: requests.Response, flaw: str) -> PredictionError:
    """Return the error for an answer that is not the expected one: the server's own sentence if it gives one."""
    with contextlib.suppress(ValueError):
        match response.json():
            case {"success": False, "error": str(sentence)}:
                return PredictionError(sentence, response.status_code)
    sentence = f"{url} answered {response.status_code} with {flaw}. Is it the Keras server?"
    return PredictionError(FROM_PROXIES.get(response.status_code, sentence), response.status_code)


def is_row(row: object) -> bool:
    """Tell whether this is one row of the predictions."""
    match row:
        case {"label": str(), "probability": int() | float()}:
            return True
    return False


def is_number(value: object) -> bool:
    """Tell whether this is one number of a regression's answer."""
    return type(value) in (int, float)


def predict_url(url: str) -> str:
    """Return the URL, with /predict after a bare http://host:port; raises PredictionError if it is none."""
    with contextlib.suppress(ValueError):  # e.g. a port above 65535
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts._replace(path="/predict").geturl() if parts.path in ("", "/") else url
    raise PredictionError(f"{url!r} is not a URL such as {KERAS_REST_API_URL}", for_all=True)


def read_image(image: str | os.PathLike[str] | bytes | BinaryIO) -> bytes:
    """Return the bytes of a path, bytes or a binary file; raises PredictionError if they cannot be read."""
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


def post(
    http: requests.Session, url: str, image: bytes, api_key: str | None, timeout: float, **params: Any
) -> requests.Response:
    """Post an image, again while the server is busy; raises PredictionError when no answer comes."""
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):  # the libraries below would show the key in their error
        raise PredictionError("The API key holds characters that cannot be sent.", for_all=True)

    def add_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {key}"
        return request

    auth = add_key if key else None  # a plain header would lose against an entry in netrc
    # An empty proxy means none: no proxy can reach this machine's localhost. For other hosts that of the
    # environment stays, as do netrc and the CA bundle, all of which `trust_env = False` would take away.
    host = urlsplit(url).hostname or ""
    local = host in ("localhost", "::1") or host.startswith("127.")
    proxies = {"http": "", "https": ""} if local else None
    try:
        for attempt in itertools.count():
            files = {"image": image}
            response = http.post(url, params=params, files=files, auth=auth, timeout=timeout, proxies=proxies)
            wait = response.headers.get("Retry-After")
            if response.status_code != 503 or wait is None or attempt == BUSY_RETRIES:
                break
            # a date is allowed as well, but this server sends none
            time.sleep(min(int(wait), LONGEST_WAIT) if wait.isdecimal() else LONGEST_WAIT)
    except requests.RequestException as error:
        never_connected = any(isinstance(cause, MaxRetryError) for cause in error.args)
        if isinstance(error, requests.ReadTimeout):
            sentence = f"{url} did not answer within {timeout:g} seconds."
        elif never_connected and type(error) in (requests.ConnectionError, requests.ConnectTimeout):
            sentence = f"No server answers at {url}. Start it with `make serve`, or name another with --url."
        else:  # the reason matters: a proxy, a certificate, a connection that broke
            sentence = f"{url} gave no complete answer: {error}"
        raise PredictionError(sentence, for_all=never_connected) from None
    return response


def find_images(path: str) -> list[str]:
    """Return the images below a folder, sorted, without hidden ones; a path that is no folder as it is."""
    if not os.path.isdir(path):
        return [path]
    found: list[str] = []
    # a subfolder that may not be opened goes on the list too, and fails when its turn comes
    for root, folders, files in os.walk(path, onerror=lambda error: found.append(error.filename)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                found.append(os.path.join(root, name))
    return found or [path]  # a folder cannot be read as a file, so an empty one fails as well


def overlay_paths(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Yield a file in the folder for each image's heat map, none of them twice, and none called like a photo."""
    taken: set[str] = set()
    for name in names:
        stem = "stdin" if name == "-" else os.path.splitext(os.path.basename(name))[0]
        numbered = (f"{stem}-{i}" for i in itertools.count(2))
        free = next(each for each in itertools.chain([stem], numbered) if each not in taken)
        taken.add(free)
        yield os.path.join(folder, f"{free}.explained.png")


def save(path: str, data: bytes) -> None:
    """Write a file; raises PredictionError where that cannot be done."""
    try:
        with open(path, "wb") as file:
            file.write(data)
    except OSError as error:
        raise PredictionError(f"The heat map cannot be saved as {path}: {error.strerror or error}.") from None


def classify_all(
    names: Iterable[str], workers: int, overlays: Iterable[str] = (), **options: Any
) -> Iterator[tuple[str, Future[Rows]]]:
    """Yield each name with its finished future, in order; ends early when all the others would fail alike.

    Takes at most two names a worker ahead of those yielded. `overlays` are the files for the images' heat maps.
    """
    local = threading.local()
    sessions: list[requests.Session] = []
    pending: deque[tuple[str, Future[Rows]]] = deque()
    upcoming = zip(names, itertools.chain(overlays, itertools.repeat(None)), strict=False)

    def open_session() -> None:  # one a thread: each keeps its own connection alive
        local.session = requests.Session()
        sessions.append(local.session)

    def work(name: str, overlay: str | None) -> Rows:
        image = sys.stdin.buffer if name == "-" else name
        if overlay is None:
            return classify(image, session=local.session, **options)
        data = read_image(image)  # once, for two requests
        rows = classify(data, session=local.session, **options)
        others = {key: value for key, value in options.items() if key != "top"}
        save(overlay, explain(data, session=local.session, **others))
        return rows

    pool = ThreadPoolExecutor(workers, initializer=open_session)
    try:
        while True:
            for name, overlay in itertools.islice(upcoming, 2 * workers - len(pending)):
                pending.append((name, pool.submit(work, name, overlay)))
            if not pending:
                return
            name, future = pending.popleft()
            error = future.exception()  # waits for the answer
            yield name, future
            if isinstance(error, PredictionError) and error.for_all:
                return
    finally:
        pool.shutdown(cancel_futures=True)
        for session in sessions:
            session.close()


def progress_bar(total: int) -> contextlib.AbstractContextManager[Any]:
    """Return a bar for several images on an interactive terminal, otherwise a context of None."""
    if total < 2 or not sys.stderr.isatty():
        return contextlib.nullcontext()
    from tqdm import tqdm  # only here, for a quick start without it

    return tqdm(total=total, unit="image")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exits with status 2 when they are wrong."""
    parser = argparse.ArgumentParser(description="Classify images with the Keras REST server.")
    add = parser.add_argument
    add("paths", nargs="*", metavar="IMAGE", help=f"a file, a folder, or - for standard input ({IMAGE_PATH})")
    add("--url", default=KERAS_REST_API_URL, help="where to post to, or just http://host:port (%(default)s)")
    add("--top", type=int, metavar="N", help="how many predictions an image (as the server decides)")
    add("--json", action="store_true", help="print one line of JSON an image")
    add("--explain", metavar="OUT", help="also save in the folder OUT where each image speaks for its best label")
    add("--workers", type=int, default=4, metavar="N", help="how many images at a time (%(default)s)")
    key_help = "sent as a bearer token; better set KERAS_SERVER_API_KEY, which other users cannot see"
    key = os.environ.get("KERAS_SERVER_API_KEY", "").partition(",")[0]  # the server takes several, with commas
    add("--api-key", default=key, metavar="KEY", help=key_help)
    add("--timeout", type=float, default=60.0, metavar="S", help="seconds to wait (%(default)g)")
    arguments = parser.parse_args(argv)
    numbers = (arguments.workers, arguments.timeout, 1 if arguments.top is None else arguments.top)
    if not all(0 < number < 1_000_000 for number in numbers):
        parser.error("--workers, --timeout and --top must be above 0 and below a million")
    try:
        arguments.url = predict_url(arguments.url)
    except PredictionError as error:
        parser.error(f"argument --url: {error}")
    try:
        if arguments.explain is not None:
            os.makedirs(arguments.explain, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --explain: {arguments.explain!r} cannot be a folder: {error.strerror}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Print the predictions of every image; return 0, or 1 if any image failed."""
    arguments = parse_arguments(argv)
    beside_script = os.path.join(os.path.dirname(os.path.abspath(__file__)), IMAGE_PATH)
    paths = arguments.paths or [IMAGE_PATH if os.path.exists(IMAGE_PATH) else beside_script]
    names = [name for path in paths for name in find_images(path)]
    options = {name: getattr(arguments, name) for name in ("workers", "url", "top", "api_key", "timeout")}
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")

    overlays = [] if arguments.explain is None else [*overlay_paths(arguments.explain, names)]

    done = failed = 0
    with progress_bar(len(names)) as bar:
        write = bar.write if bar else print  # the bar steps aside for what it writes
        for name, future in classify_all(names, overlays=overlays, **options):
            done += 1
            answer: dict[str, Any] = {"filename": name, "success": True}
            try:
                rows = future.result()
                is_list = "label" in rows[0]
                answer |= {"predictions": rows} if is_list else {"values": [row["value"] for row in rows]}
                if overlays:
                    answer["explanation"] = overlays[done - 1]
            except PredictionError as error:
                failed += 1
                answer |= {"success": False, "error": str(error)}
                write(str(error) if error.for_all else f"{name}: {error}", file=sys.stderr)
            if arguments.json:
                write(json.dumps(answer), file=sys.stdout)
            elif answer["success"]:
                lines = [f"{name}:"] if len(names) > 1 else []
                for i, row in enumerate(rows, start=1):
                    lines.append(f"{i}. {row['label']}: {row['probability']:.4f}" if is_list else f"{row['value']:.6g}")
                lines += [f"Heat map: {answer['explanation']}"] if overlays else []
                write("\n".join(lines), file=sys.stdout)
            sys.stdout.flush()  # whoever reads a pipe sees each image at once
            if bar:
                bar.update()
    if done < len(names):
        print(f"Stopped: {len(names) - done} more would have failed alike.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    # Ctrl-C leaves at once: a plain KeyboardInterrupt would first wait for the answers under way.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        sys.exit(main())
    except BrokenPipeError:  # e.g. `| head`, which has seen enough; the status is a shell's for SIGPIPE
        os._exit(141)
