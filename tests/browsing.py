"""Debian's Chromium for the page's tests, with servers to visit, and words for what stands on the page."""

import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Process, lacking
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect
from werkzeug.serving import make_server

import run_keras_server as server

AXE = ROOT / "build" / "node_modules" / "axe-core" / "axe.min.js"
REFUSED = "Failed to load resource"  # what Chromium itself logs of each answer that is an error
KEY = "correct-horse"
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
# Files as they hang on a mouse or lie in the clipboard.
CARRIED = """(files) => {
    const carried = new DataTransfer();
    for (const [name, type, data] of files) {
        const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
        carried.items.add(new File([bytes], name, { type }));
    }
    return carried;
}"""

Visit = Callable[..., Page]
expect.set_options(timeout=60_000)


@contextlib.contextmanager
def serving(*options: str) -> Iterator[str]:
    """Run a server with the bundled model, whose log is read all the time; gives its address."""
    process = Process("--model", "bundled", "--drain-seconds", "0", *options)
    try:
        url = process.wait_until_ready().url
        assert process.popen.stdout
        threading.Thread(target=process.popen.stdout.read, daemon=True).start()
        yield url
    finally:
        process.popen.terminate()
        process.popen.wait(timeout=60)


@pytest.fixture(scope="module")
def site(cache: str) -> Iterator[str]:
    """The address of a server."""
    with serving("--cache-dir", cache) as url:
        yield url


@pytest.fixture(scope="module")
def locked(cache: str) -> Iterator[str]:
    """The address of a server that asks for a key, and takes half a MiB."""
    with serving("--cache-dir", cache, "--api-key", KEY, "--max-upload-mb", "0.5") as url:
        yield url


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Open a server's page. At the end its console must be empty, but for the errors that the test is about."""
    contexts, messages, expected = [], [], []

    def visit(url: str, errors: bool = False, axe: bool = False, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        if axe:
            if not AXE.is_file():
                lacking("axe-core is not installed: npm install --prefix build axe-core.")
            context.add_init_script(path=AXE)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("filechooser", lambda _: None)  # or the first that is expected may come before it is caught
        expected.extend([REFUSED] if errors else [])
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert [text for text in messages if not text.startswith(tuple(expected))] == []


def file(name: str, data: bytes, kind: str = "image/jpeg") -> Any:
    return {"name": name, "mimeType": kind, "buffer": data}


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def choose(page: Page, *files: Any) -> None:
    page.set_input_files("#files", list(files))


def carried(page: Page, *files: Any) -> Any:
    packed = [[f["name"], f["mimeType"], base64.b64encode(f["buffer"]).decode()] for f in files]
    return page.evaluate_handle(CARRIED, packed)


def cards(page: Page, kind: str = "done") -> Locator:
    return page.locator(f".card[data-kind={kind}]")


def tiles(page: Page, kind: str = "done") -> Locator:
    return page.locator(f".tile[data-kind={kind}]")


def classified(page: Page) -> Locator:
    """Choose the sample photo, and return its card once it is answered."""
    page.click("#sample")
    expect(cards(page)).to_have_count(1)
    return page.locator(".card").first


def explained(page: Page, row: int = 0) -> Locator:
    """Return the card of the sample photo with a heat map."""
    card = classified(page)
    card.locator(".rows button").nth(row).click()
    expect(card.locator(".heat")).to_be_visible()
    return card


def answer(status: int, body: Any, **headers: str) -> Callable[[Route], None]:
    text = body if isinstance(body, str) else json.dumps(body)
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda route: route.fulfill(status=status, body=text, headers=fields)


def axe(page: Page, where: str) -> None:
    """Look for what keeps people with a screen reader out."""
    result = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")
    found = [(v["id"], [node["html"] for node in v["nodes"]]) for v in result["violations"]]
    assert found == [], where


@contextlib.contextmanager
def own_app() -> Iterator[str]:
    """Serve the app of this process, with whatever model the test has given it; gives its address."""
    http = make_server("127.0.0.1", 0, server.app, threaded=True)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
