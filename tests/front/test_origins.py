"""A page of another origin in a real browser: which answers, errors and headers it can read."""

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import PIXEL, FakeServer
from playwright.sync_api import Browser, Error, Page

# Headers for which a browser asks the server first.
SEND = """async ([url, bytes]) => {
    const headers = { Authorization: "Bearer secret", "X-Requested-With": "fetch", "Cache-Control": "no-cache" };
    const answer = await fetch(url, { method: "POST", body: new Uint8Array(bytes), headers });
    return [answer.status, await answer.json(), answer.headers.get("Retry-After"), answer.headers.get("X-Request-ID")];
}"""


class Empty(http.server.BaseHTTPRequestHandler):
    """Answers with a page of nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def origins() -> Iterator[list[str]]:
    """Three sites on this machine."""
    sites = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) for _ in range(3)]
    for site in sites:
        threading.Thread(target=site.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{site.server_port}" for site in sites]
    for site in sites:
        site.shutdown()
        site.server_close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context() as context:
        yield context.new_page()


def test_a_page_on_the_list_reads_what_went_wrong_and_another_reads_nothing(page: Page, origins: list[str]) -> None:
    options = ("--max-upload-mb", "0.1", "--queue-size", "1", "--max-batch", "1", "--decode-threads", "1")
    first, second, stranger = origins
    allowed = ("--cors-origin", first, "--cors-origin", second)
    with FakeServer(*options, *allowed) as fake, FakeServer(*allowed, "--timeout", "1") as hasty:
        hasty.tell("hold")

        def send(body: bytes = PIXEL, to: FakeServer = fake) -> list[Any]:
            found: list[Any] = page.evaluate(SEND, [f"{to.url}/predict", [*body]])
            return found

        for origin in (first, second):
            page.goto(origin)
            status, body, _, request_id = send()
            assert (status, body["success"]) == (200, True)
            assert request_id
            status, body, _, _ = send(bytes(200_000))
            assert (status, "larger than the 0.1 MiB" in body["error"]) == (413, True)
            waiting = fake.occupy(2)
            status, body, retry, _ = send()
            assert (status, "more to do than it can" in body["error"], retry) == (503, True, "1")
            fake.tell("go")
            for raw in waiting:
                assert raw.answer()
                raw.close()
            status, body, _, _ = send(to=hasty)
            assert (status, "not ready in time" in body["error"]) == (504, True)
        page.goto(stranger)
        with pytest.raises(Error, match="Failed to fetch"):
            send()
