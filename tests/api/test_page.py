"""The page in a real browser: Debian's Chromium, against a server process with the bundled model."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from browsing import (
    KEY,
    PHONE,
    Visit,
    answer,
    axe,
    cards,
    carried,
    choose,
    classified,
    explained,
    file,
    own_app,
    size_of,
    tiles,
)
from conftest import DOG, encode, serve_with
from PIL import Image
from playwright.sync_api import Browser, Locator, Route, expect

import run_keras_server as server
from keras_server.models.spec import Tensor

# What comes first


def test_the_page_is_small_and_comes_from_here(visit: Visit, browser: Browser, site: str) -> None:
    sizes: dict[str, int] = {}
    page = visit("about:blank")
    page.on("response", lambda response: sizes.update({response.url: len(response.body())}))
    response = page.goto(site, wait_until="networkidle")
    assert response
    assert response.ok
    policy = response.headers["content-security-policy"]
    assert "script-src 'self'; style-src 'self'" in policy
    assert "unsafe" not in policy
    assert len(sizes) <= 14
    assert all(url.startswith(site) for url in sizes)
    assert sum(sizes.values()) < 60_000
    expect(page.get_by_role("heading", name="What does the model see?")).to_be_visible()
    expect(page.locator("header")).to_have_text(re.compile("efficientnet_lite0 knows 1000 labels"))
    expect(page.locator(".small")).to_have_text(re.compile(r"up to\s+16 MiB"))


def test_a_model_that_takes_no_pictures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, name="prices", inputs=(Tensor("size", (3,), "float32"),), kind="none")
    text = server.app.test_client().get("/").text
    assert "This model takes no pictures" in text
    assert "/v2/models/prices/infer" in text
    assert 'id="sample"' not in text


def test_a_model_whose_output_is_no_class_list_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_with(monkeypatch, name="unet", kind="none", reason="unet's output is no class list.")
    text = server.app.test_client().get("/").text
    assert "This model gives no labels" in text
    assert "unet&#39;s output is no class list." in text
    assert 'id="sample"' not in text


def test_the_number_of_a_regression_is_shown(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Age:
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return np.full((len(batch), 1), 29.7, np.float32)

    serve_with(monkeypatch, Age(), name="age", kind="values", outputs=(Tensor("age", (1,), "float32"),))
    with own_app() as url:
        page = visit(url)
        expect(page.locator("header")).to_have_text(re.compile("age answers with numbers"))
        page.get_by_role("button", name="Try this dog").click()
        expect(page.locator(".values")).to_have_text("29.7")
        expect(page.locator(".rows li")).to_have_count(0)
        expect(page.locator(".hint")).to_be_hidden()
        expect(page.locator("#log")).to_contain_text("29.7")


# Photos in, labels out


def test_the_sample_photo(visit: Visit, site: str) -> None:
    page = visit(site)
    card = classified(page)
    expect(card.get_by_role("heading")).to_have_text("dog.jpg")
    rows = card.locator(".rows button")
    expect(rows).to_have_count(5)
    expect(rows.first).to_have_text(re.compile(r"German shepherd\s+9\d\.\d%"))
    expect(card.locator(".times")).to_have_text(re.compile(r"^efficientnet_lite0 · [\d.]+ ms there and back"))
    widths = [bar.bounding_box() for bar in card.locator(".bar > span").all()]
    assert [box and box["width"] for box in widths] == sorted([box["width"] for box in widths if box], reverse=True)
    photo = card.get_by_role("img", name="dog.jpg")
    assert photo.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [1024, 768]
    expect(page.get_by_role("log")).to_contain_text(re.compile(r"dog.jpg: German shepherd, 9\d\.\d%"))


def test_several_files_of_which_one_is_bad(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site, errors=True)
    half = encode(Image.open(DOG).resize((100, 80)))
    choose(page, file("a.jpg", dog), file("notes.jpg", b"no picture"), file("ä b.png", half, "image/png"))
    expect(cards(page)).to_have_count(2)
    expect(cards(page, "failed")).to_have_count(1)
    assert page.locator(".card h2").all_inner_texts() == ["a.jpg", "notes.jpg", "ä b.png"]
    bad = page.locator(".card").nth(1)
    expect(bad.locator(".state")).to_have_text(re.compile("This is not an image that the server reads"))
    expect(bad.locator(".again")).to_be_hidden()
    expect(page.locator("#count")).to_have_text("2 of 3 photos answered, 1 failed")
    expect(page.get_by_role("log")).to_contain_text("notes.jpg: This is not an image")
    choose(page, file("later.jpg", dog))
    expect(cards(page)).to_have_count(3)
    assert page.locator(".card h2").first.inner_text() == "later.jpg"
    page.click("#clear")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#sample")).to_be_visible()


def test_dropped_files(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site)
    files = carried(page, file("one.jpg", dog), file("two.jpg", dog))
    page.dispatch_event("#title", "dragenter", {"dataTransfer": files})
    expect(page.locator("body")).to_have_class("dragging")
    page.dispatch_event("#title", "drop", {"dataTransfer": files})
    expect(cards(page)).to_have_count(2)
    expect(page.locator("body")).to_have_class("busy")


def test_text_that_is_dropped_or_pasted_is_left_alone(visit: Visit, site: str) -> None:
    page = visit(site)
    page.evaluate(
        """() => {
            const text = new DataTransfer();
            text.setData("text/plain", "hello");
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: text, ...options }));
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: text, ...options }));
        }"""
    )
    expect(page.locator(".card")).to_have_count(0)


def test_a_pasted_picture(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site)
    files = carried(page, file("image.png", dog, "image/png"))
    page.evaluate(
        """(clipboardData) => {
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
        }""",
        files,
    )
    expect(cards(page)).to_have_count(1)


def test_few_requests_are_under_way_at_once(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site)
    waiting: list[Route] = []
    most = []

    def hold(route: Route) -> None:
        waiting.append(route)
        most.append(len(waiting))

    page.route("**/predict", hold)
    choose(page, *(file(f"{i}.jpg", dog) for i in range(10)))
    done = 0
    while done < 10:
        page.wait_for_timeout(50)
        if len(waiting) == min(4, 10 - done):  # as many as there may be: answer one
            waiting.pop(0).continue_()
            done += 1
            expect(tiles(page)).to_have_count(done)
    assert max(most) == 4


# Why this label?


def test_the_heat_map(visit: Visit, site: str) -> None:
    page = visit(site)
    with page.expect_response("**/explain*") as caught:
        card = explained(page)
    assert caught.value.url == f"{site}/explain?label=German_shepherd"
    heat = np.array(caught.value.json()["map"])
    rows = card.locator(".rows button")
    expect(rows.nth(0)).to_have_attribute("aria-pressed", "true")
    expect(card.locator(".why")).to_have_text(re.compile("What speaks for “German shepherd” is strongest"))
    expect(card.get_by_role("img", name=re.compile("^Heat map"))).to_be_visible()
    # It lies exactly on the photo.
    boxes = [card.locator(part).bounding_box() for part in (".heat", ".photo")]
    assert boxes[0] == pytest.approx(boxes[1], abs=0.1)
    # And it is drawn as the server's overlay is: transparent where the map is cold, to the pixel.
    canvas = card.locator(".heat")
    size = canvas.evaluate("(canvas) => [canvas.width, canvas.height]")
    pixels = canvas.evaluate(
        "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3)"
    )
    drawn = np.array(pixels).reshape(size[1], size[0])
    stretched = Image.fromarray(heat.astype(np.float32)).resize(tuple(size), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(drawn, 255 * np.asarray(stretched).clip(0, 1), atol=1)
    # Another row takes its place, and the same row again takes it away.
    rows.nth(1).click()
    expect(card.locator(".why")).to_have_text(re.compile("“malinois”"))
    expect(rows.nth(0)).to_have_attribute("aria-pressed", "false")
    rows.nth(1).click()
    expect(canvas).to_be_hidden()
    expect(card.locator("figcaption")).to_be_hidden()


def test_the_heat_map_of_a_cropped_photo_covers_what_the_model_saw(visit: Visit, site: str) -> None:
    page = visit(site)
    seen = {"success": True, "map": [[1, 1], [1, 1]], "width": 400, "height": 300, "seen": [50, 0, 350, 300]}
    page.route("**/explain*", answer(200, seen))
    canvas = explained(page).locator(".heat")
    columns = canvas.evaluate(
        "(c) => [...c.getContext('2d').getImageData(0, 0, c.width, 1).data].filter((_, i) => i % 4 === 3)"
    )
    assert columns == [0] * 48 + [255] * 288 + [0] * 48


def test_the_strength_of_the_heat_map(visit: Visit, site: str) -> None:
    card = explained(visit(site))
    expect(card.locator(".heat")).to_have_css("opacity", "0.75")
    card.get_by_role("slider", name="Strength").fill("20")
    expect(card.locator(".heat")).to_have_css("opacity", "0.2")


def test_what_cannot_be_explained_says_so(visit: Visit, site: str) -> None:
    page = visit(site, errors=True)
    page.route("**/explain*", answer(422, {"success": False, "error": "It has no convolutional features."}))
    card = classified(page)
    card.locator(".rows button").first.click()
    expect(card.locator(".why")).to_have_text("It has no convolutional features.")
    expect(card.locator(".heat")).to_be_hidden()
    expect(card.locator(".scale")).to_be_hidden()


def test_a_map_of_nothing_says_so(visit: Visit, site: str) -> None:
    page = visit(site)
    page.route(
        "**/explain*",
        answer(200, {"success": True, "map": [[0, 0], [0, 0]], "width": 4, "height": 3, "seen": [0, 0, 4, 3]}),
    )
    card = explained(page)
    expect(card.locator(".why")).to_have_text("Nothing in this picture speaks for “German shepherd”.")


# The key


def test_the_key_is_asked_and_kept_in_memory_only(visit: Visit, locked: str, dog: bytes) -> None:
    page = visit(locked, errors=True)
    choose(page, file("one.jpg", dog), file("two.jpg", dog))
    door = page.get_by_role("dialog", name="This server asks for a key")
    expect(door).to_be_visible()
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(door).to_contain_text("did not take that key")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(2)
    expect(door).to_be_hidden()
    card = page.locator(".card").first
    card.locator(".rows button").first.click()
    expect(card.locator(".heat")).to_be_visible()
    card.locator("summary").click()
    expect(card.locator("code").first).to_contain_text('-H "Authorization: Bearer $KERAS_SERVER_API_KEY"')
    assert KEY not in page.content()
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.reload()
    choose(page, file("one.jpg", dog))
    expect(door).to_be_visible()


def test_without_a_key_the_card_says_why(visit: Visit, locked: str, dog: bytes) -> None:
    page = visit(locked, errors=True)
    choose(page, file("one.jpg", dog))
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(cards(page, "failed").locator(".state")).to_have_text(re.compile("This server asks for a key"))
    page.click(".again")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type("schlüssel 🔑")
    page.keyboard.press("Enter")
    expect(cards(page, "failed").locator(".state")).to_have_text(re.compile("characters that cannot be sent"))
    page.click(".again")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(1)


# Large photos


def camera(orientation: int = 1) -> bytes:
    """Return the dog as a camera of twelve megapixels has it, with its grain."""
    stored = Image.open(DOG).resize((4000, 3000), Image.Resampling.BICUBIC)
    stored = stored.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else stored
    grain = np.random.default_rng(5).normal(0, 8, (stored.height, stored.width, 1)).astype(np.float32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray((np.asarray(stored) + grain).clip(0, 255).astype(np.uint8))
    return encode(picture, "JPEG", quality=90, exif=exif)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_photo_is_shrunk_upright_and_answered_alike(visit: Visit, site: str, orientation: int) -> None:
    page = visit(site)
    data = camera(orientation)
    with page.expect_response("**/predict") as caught:
        choose(page, file("IMG_1.JPG", data))
    expect(cards(page)).to_have_count(1)
    expect(page.locator(".sent")).to_have_text(re.compile(r"^Sent at 1792 . 1344 pixels, \d+ kB instead of \d\.\d MB"))
    photo = page.locator(".photo")
    assert photo.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [1792, 1344]
    whole = requests.post(f"{site}/predict", files={"image": data}, timeout=60).json()["predictions"]
    found = {row["label"]: row["probability"] for row in caught.value.json()["predictions"]}
    for row in whole[:2]:
        assert found[row["label"]] == pytest.approx(row["probability"], abs=0.02)
    page.click("summary")
    expect(page.locator("code").first).to_contain_text("image=@IMG_1-1792x1344.jpg")
    with page.expect_download() as download:
        page.click("details a")
    assert download.value.suggested_filename == "IMG_1-1792x1344.jpg"
    assert size_of(download.value.path()) == (1792, 1344)


def test_what_jpeg_would_change_goes_as_it_is(visit: Visit, site: str) -> None:
    """Drawings, transparency and printers' colours."""
    page = visit(site)
    noise = np.random.default_rng(1).integers(0, 255, (700, 2000, 3)).astype(np.uint8)
    printed = encode(Image.fromarray(noise).convert("CMYK"), "JPEG", quality=95)
    assert len(printed) > 2**20
    choose(page, file("drawing.png", encode(Image.fromarray(noise)), "image/png"), file("printed.jpg", printed))
    expect(cards(page)).to_have_count(2)
    expect(page.locator(".sent")).to_have_count(2)
    for line in page.locator(".sent").all():
        expect(line).to_be_hidden()


def test_past_the_servers_limit(visit: Visit, locked: str) -> None:
    page = visit(locked, errors=True)
    picture = Image.open(DOG).resize((1200, 900))
    clear = picture.convert("RGBA")
    clear.putalpha(128)
    expect(page.locator(".small")).to_have_text(re.compile(r"up to\s+0\.5 MiB"))
    choose(
        page,
        file("shrunk.png", encode(picture), "image/png"),
        file("clear.png", encode(clear), "image/png"),
        file("film.gif", bytes(600_000), "image/gif"),
    )
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(1)
    expect(cards(page).locator("h2")).to_have_text("shrunk.png")
    expect(cards(page, "failed")).to_have_count(2)
    told = requests.post(
        f"{locked}/predict",
        headers={"Authorization": f"Bearer {KEY}"},
        files={"image": bytes(600_000)},
        timeout=60,
    )
    assert told.status_code == 413
    for state in cards(page, "failed").locator(".state").all():
        expect(state).to_have_text(told.json()["error"])


# The same request elsewhere


@pytest.mark.parametrize("name", ["dog.jpg", 'it\'s; a "dog", №1.jpg'])
def test_the_copied_commands_repeat_the_request(visit: Visit, site: str, dog: bytes, tmp_path: Path, name: str) -> None:
    page = visit(site)
    with page.expect_response("**/predict") as caught:
        choose(page, file(name, dog))
    expect(cards(page)).to_have_count(1)
    page.locator(".rows button").first.click()
    expect(page.locator(".heat")).to_be_visible()
    page.click("summary")
    curl, python, heat = page.locator("code").all_inner_texts()
    (tmp_path / name).write_bytes(dog)

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout

    expected = caught.value.json()["predictions"]
    for found in (json.loads(run("bash", "-c", curl)), eval(run(sys.executable, "-c", python))):
        assert [row["label"] for row in found["predictions"]] == [row["label"] for row in expected]
        assert found["predictions"][0]["probability"] == pytest.approx(expected[0]["probability"], abs=1e-5)
    run("bash", "-c", heat)
    assert size_of(tmp_path / "German_shepherd.png") == (512, 384)


def test_the_copy_button(visit: Visit, site: str) -> None:
    page = visit(site, permissions=["clipboard-read", "clipboard-write"])
    card = classified(page)
    card.locator("summary").click()
    card.get_by_role("button", name="Copy: As curl").click()
    expect(card.locator(".code button").first).to_have_text("Copied")
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == f"curl -X POST -F image=@dog.jpg {site}/predict"


# What goes wrong


def test_a_busy_server_is_asked_again(visit: Visit, site: str) -> None:
    page = visit(site, errors=True)
    refused: list[Route] = []

    def busy(route: Route) -> None:
        if len(refused) < 2:
            refused.append(route)
            body = json.dumps({"success": False, "error": "Too much to do."})
            route.fulfill(status=503, body=body, headers={"Retry-After": "0"})
        else:
            route.continue_()

    page.route("**/predict", busy)
    classified(page)
    assert len(refused) == 2


@pytest.mark.parametrize(
    ("fault", "sentence", "again"),
    [
        (lambda route: route.abort(), "The server cannot be reached", True),
        (answer(413, "<h1>413</h1>"), "A proxy before the server refused the size: send a smaller picture", False),
        (answer(502, "<h1>Bad gateway</h1>", Retry_After="0"), "A proxy before the server got no answer from it", True),
        (
            answer(503, "<h1>503</h1>", Retry_After="0"),
            "A proxy before the server has none to ask just now: try again",
            True,
        ),
        (answer(504, "<h1>504</h1>", Retry_After="0"), "A proxy before the server did not wait for its answer", True),
        (answer(520, "<h1>520</h1>", Retry_After="0"), "The answer 520 is no JSON", True),
        (answer(413, {"success": False, "error": "Too large."}), "Too large.", False),
        (answer(504, {"success": False, "error": "Too late."}), "Too late.", True),
        (answer(500, {"success": False, "error": "It failed."}), "It failed.", False),
    ],
)
def test_an_error_stands_beside_its_picture(
    visit: Visit, site: str, fault: Callable[[Route], None], sentence: str, again: bool
) -> None:
    page = visit(site, errors=True)
    page.route("**/predict", fault)
    page.click("#sample")
    expect(cards(page, "failed").locator(".state")).to_contain_text(sentence)
    button = page.get_by_role("button", name="Try again")
    assert button.is_visible() == again
    if again:
        page.unroute("**/predict")
        button.click()
        expect(cards(page)).to_have_count(1)


def test_the_servers_time_is_told_apart(visit: Visit, site: str) -> None:
    page = visit(site)
    body = {"success": True, "model": "m", "predictions": [{"label": "a", "probability": 0.00004}]}
    page.route("**/predict", answer(200, body, Server_Timing="app;dur=12.4"))
    card = classified(page)
    expect(card.locator(".times")).to_have_text(
        re.compile(r"^m · [\d.]+ ms there and back, 12 ms of them in the server$")
    )
    expect(card.locator(".percent")).to_have_text("< 0.1%")


def test_a_picture_that_only_the_server_can_show(visit: Visit, site: str) -> None:
    page = visit(site)
    choose(page, file("scan.tif", encode(Image.open(DOG).resize((300, 200)), "TIFF"), "image/tiff"))
    expect(cards(page)).to_have_count(1)
    expect(page.locator(".card")).to_have_class(re.compile("blind"))
    page.locator(".rows button").first.click()
    expect(page.locator(".heat")).to_be_visible()


# For everybody


def test_with_the_keyboard_alone(visit: Visit, site: str) -> None:
    page = visit(site)

    def tab_to(target: Locator) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if target.evaluate("(element) => element === document.activeElement"):
                return
        raise AssertionError(f"The keyboard does not reach {target}")

    tab_to(page.locator("#choose"))
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    tab_to(page.locator("#sample"))
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(1)
    tab_to(page.locator(".rows button").nth(1))
    page.keyboard.press("Space")
    expect(page.locator(".heat")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    expect(page.get_by_role("slider")).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator(".heat")).to_have_css("opacity", "0")
    tab_to(page.locator("summary"))
    page.keyboard.press("Enter")
    expect(page.locator("code").first).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Copy: As curl")).to_be_focused()


def test_on_a_phone(visit: Visit, site: str) -> None:
    page = visit(site, **PHONE)
    fits = "() => document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    expect(page.get_by_role("button", name="Take a photo")).to_be_visible()
    assert page.locator("#shot").get_attribute("capture") == "environment"
    with page.expect_file_chooser() as chooser:
        page.tap("#camera")
    chooser.value.set_files(DOG)
    expect(cards(page)).to_have_count(1)
    page.tap(".rows button")
    expect(page.locator(".heat")).to_be_visible()
    page.tap("summary")
    assert page.evaluate(fits)
    for button in page.locator(".rows button, .buttons button:visible").all():
        box = button.bounding_box()
        assert box
        assert box["height"] >= 40


def test_dark_mode(visit: Visit, site: str) -> None:
    for scheme, dark in [("light", False), ("dark", True)]:
        page = visit(site, color_scheme=scheme)
        paper, ink = page.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        brightness = [sum(int(n) for n in re.findall(r"\d+", colour)[:3]) for colour in (paper, ink)]
        assert (brightness[0] < brightness[1]) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing(visit: Visit, site: str, locked: str, dog: bytes, scheme: str, options: Any) -> None:
    page = visit(site, errors=True, axe=True, color_scheme=scheme, **options)
    axe(page, "empty")
    choose(page, file("a.jpg", dog), file("b.jpg", b"no picture"))
    expect(cards(page)).to_have_count(1)
    expect(cards(page, "failed")).to_have_count(1)
    page.locator(".rows button").first.click()
    expect(page.locator(".heat").first).to_be_visible()
    page.locator("summary").first.click()
    axe(page, "answered")
    page = visit(locked, errors=True, axe=True, color_scheme=scheme, **options)
    choose(page, file("a.jpg", dog))
    expect(page.get_by_role("dialog")).to_be_visible()
    axe(page, "asked for the key")
