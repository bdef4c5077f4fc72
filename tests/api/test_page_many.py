"""The page with many photos: the grid, its order and filter, downloads, folders, stopping, and the webcam."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import PHONE, Visit, answer, axe, cards, choose, file, own_app, tiles
from conftest import FakeModel, encode, serve_with
from PIL import Image
from playwright.sync_api import Page, Route, expect
from scripted_server import lines_of_json

import run_keras_server as server
import simple_request
from keras_server.models.spec import Tensor

LABELS = ["tabby", "beagle", "Egyptian_cat"]


class Colours(FakeModel):
    """Tells a picture's class by its red, and how sure it is by its green."""

    def predict(self, batch: np.ndarray) -> np.ndarray:
        red, green = np.moveaxis(batch.mean((1, 2)), -1, 0)[:2].round()
        best = red.astype(int) % 3
        sure = green / 255
        return np.where(np.arange(3) == best[:, None], sure[:, None], (1 - sure[:, None]) / 2).astype(np.float32)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the model that knows three labels by the colours."""
    outputs = (Tensor("class", (3,), "float32"),)
    serve_with(monkeypatch, Colours(), name="colours", labels=tuple(LABELS), outputs=outputs, preprocess="none")


def picture(label: int, sure: float) -> bytes:
    """Return a picture that is said to be of this class, so surely."""
    return encode(Image.new("RGB", (30, 20), (label, round(255 * sure), 0)))


def numbered(count: int) -> list[Any]:
    """Return pictures whose labels take turns, each a little surer than the one before."""
    return [file(f"{i:03}.png", picture(i % 3, 0.5 + i / 2 / count), "image/png") for i in range(count)]


def names(page: Page) -> list[str]:
    return page.locator(".tile .name").all_text_contents()


def test_many_photos_stand_in_a_grid(visit: Visit, colours: None) -> None:
    with own_app() as url:
        page = visit(url, errors=True)
        choose(page, *numbered(49), file("bad.png", b"none", "image/png"))
        expect(tiles(page)).to_have_count(49)
        expect(tiles(page, "failed")).to_have_count(1)
        expect(page.locator("#count")).to_have_text("49 of 50 photos answered, 1 failed")
        expect(page.locator(".card")).to_have_count(0)
        expect(page.get_by_role("log")).to_contain_text("49 of 50 photos answered, 1 failed")
        first = page.get_by_role("button", name="tabby 50.2% 000.png")
        expect(first).to_be_visible()
        expect(first.locator("img")).to_have_js_property("naturalHeight", 240)
        assert names(page) == [f"{i:03}.png" for i in range(49)] + ["bad.png"]
        # what came last stands on top, those that came together in their order
        choose(page, *[file(name, picture(0, 0.9), "image/png") for name in ("new.png", "newer.png")])
        expect(tiles(page)).to_have_count(51)
        assert names(page)[:3] == ["new.png", "newer.png", "000.png"]
        page.click("#clear")
        expect(page.locator(".tile")).to_have_count(0)
        expect(page.locator("#tools")).to_be_hidden()
        choose(page, *numbered(2))
        expect(cards(page)).to_have_count(2)


def test_order_and_filter(visit: Visit, colours: None) -> None:
    with own_app() as url:
        page = visit(url, errors=True)
        choose(page, file("bad.png", b"none", "image/png"), *numbered(12))
        expect(tiles(page)).to_have_count(12)
        expect(tiles(page, "failed")).to_have_count(1)
        page.select_option("#sort", "most")
        assert names(page) == [f"{i:03}.png" for i in reversed(range(12))] + ["bad.png"]
        page.select_option("#sort", "least")
        assert names(page) == [f"{i:03}.png" for i in range(12)] + ["bad.png"]
        page.select_option("#sort", "label")
        order = [f"{i:03}.png" for label in (1, 2, 0) for i in reversed(range(label, 12, 3))]
        assert names(page) == [*order, "bad.png"], "beagle, Egyptian cat, tabby; the surest of each first"
        options = page.locator("#filter option").all_text_contents()
        assert options[0] == "all (13)"
        assert sorted(options[1:]) == ["Egyptian cat (4)", "beagle (4)", "failed (1)", "tabby (4)"]
        page.select_option("#filter", label="Egyptian cat (4)")
        assert names(page) == [f"{i:03}.png" for i in (11, 8, 5, 2)]
        page.select_option("#filter", label="failed (1)")
        assert names(page) == ["bad.png"]
        page.select_option("#filter", "")
        page.select_option("#sort", "order")
        assert names(page) == ["bad.png", *(f"{i:03}.png" for i in range(12))]


def test_answers_find_their_place_and_the_focus_stays(visit: Visit, colours: None) -> None:
    with own_app() as url:
        page = visit(url)
        held: list[Route] = []
        page.route("**/predict", lambda route: held.append(route))
        choose(page, *numbered(8))
        page.select_option("#sort", "most")
        page.locator(".tile button").nth(7).focus()
        for done in range(1, 9):
            while not held:
                page.wait_for_timeout(20)
            held.pop(0).continue_()
            expect(tiles(page)).to_have_count(done)
        expect(page.locator(".tile .name").first).to_have_text("007.png")
        expect(page.get_by_role("button", name=re.compile("007.png"))).to_be_focused()


def test_a_tile_opens_in_large(visit: Visit, colours: None) -> None:
    with own_app() as url:
        page = visit(url)
        choose(page, *numbered(9))
        expect(tiles(page)).to_have_count(9)
        page.select_option("#sort", "most")
        page.get_by_role("button", name=re.compile("007.png")).focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="Photo")
        expect(dialog.get_by_role("heading")).to_have_text("007.png")
        expect(dialog.locator(".rows li")).to_have_count(3)
        page.keyboard.press("ArrowLeft")
        expect(dialog.get_by_role("heading")).to_have_text("008.png")
        expect(dialog.get_by_role("button", name="Previous")).to_be_disabled()
        page.keyboard.press("ArrowLeft")
        dialog.get_by_role("button", name="Next").click()
        page.keyboard.press("ArrowRight")
        expect(dialog.get_by_role("heading")).to_have_text("006.png")
        expect(page.get_by_role("log")).to_contain_text("006.png: tabby, ")
        dialog.locator("summary").click()
        expect(dialog.locator("code").first).to_have_text(f"curl -X POST -F image=@006.png {url}/predict")
        page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(page.get_by_role("button", name=re.compile("006.png"))).to_be_focused()
        assert page.locator(".card").count() == 0


def test_what_is_not_seen_is_neither_laid_out_nor_decoded(visit: Visit, colours: None) -> None:
    with own_app() as url:
        page = visit(url, viewport={"width": 1000, "height": 700})
        choose(page, *numbered(150))
        expect(tiles(page)).to_have_count(150)
        seen = "(all) => all.filter((tile) => tile.firstChild.checkVisibility({ contentVisibilityAuto: true })).length"
        assert page.locator(".tile").evaluate_all(seen) < 60
        expect(page.locator(".tile img[src]").first).to_be_visible()
        assert page.locator(".tile img[src]").count() < 60
        page.locator(".tile").last.scroll_into_view_if_needed()
        expect(page.locator(".tile").last.locator("img")).to_have_js_property("naturalHeight", 240)
        page.select_option("#sort", "most")
        sure = [float(text.rstrip("%")) for text in page.locator(".tile .percent").all_text_contents()]
        assert sure == sorted(sure, reverse=True)
        assert (names(page)[0], len(sure)) == ("149.png", 150)
        assert page.locator(".tile").evaluate_all(seen) < 60


def drop(page: Page, path: Path) -> None:
    """Drop a file or folder of the disk on the page, as a person does."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 200, "data": data})


def folder(path: Path) -> Path:
    """Fill a folder with 40 pictures in four folders, one that is none, and what is to be left out."""
    for i in range(40):
        part = path / ["", "b/deep", "b", "a"][i % 4]
        part.mkdir(parents=True, exist_ok=True)
        (part / f"{i:03}.png").write_bytes(picture(i % 3, 0.4 + i / 70))
    (path / "bad, not good.jpg").write_text("none")
    (path / "notes.txt").touch()
    (path / ".hidden.png").touch()
    (path / ".git").mkdir()
    return path


def test_a_dropped_folder_is_walked_and_downloads_equal_the_clients(
    visit: Visit, colours: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holiday = folder(tmp_path / "holiday")
    monkeypatch.chdir(tmp_path)
    with own_app() as url:
        page = visit(url, errors=True)
        drop(page, holiday)
        expect(tiles(page)).to_have_count(40)
        expect(tiles(page, "failed")).to_have_count(1)
        expect(page.locator("#note")).to_have_text("Left out of folders: 3 not called like images.")
        page.select_option("#sort", "most")
        with page.expect_download() as table:
            page.get_by_role("button", name="CSV").click()
        with page.expect_download() as lines:
            page.get_by_role("button", name="JSON").click()
        assert server.main(["predict", "holiday", "--output", "out.csv", "--url", url]) == 1
        capsys.readouterr()
        assert simple_request.main(["holiday", "--json", "--url", url]) == 1
    assert table.value.suggested_filename == "labels.csv"
    assert table.value.path().read_bytes() == Path("out.csv").read_bytes()
    assert len([*csv.reader(io.StringIO(table.value.path().read_text()))]) == 42
    assert json.loads(lines.value.path().read_text()) == lines_of_json(capsys.readouterr().out)


def test_a_folder_can_be_chosen(visit: Visit, colours: None, tmp_path: Path) -> None:
    holiday = folder(tmp_path / "holiday")
    with own_app() as url:
        page = visit(url, errors=True)
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a folder").click()
        chooser.value.set_files(holiday)
        expect(tiles(page)).to_have_count(40)
        assert "holiday/b/deep/001.png" in names(page)
        expect(page.locator("#note")).to_contain_text("not called like images")


def test_stopping_and_going_on(visit: Visit, colours: None) -> None:
    with own_app() as url:
        page = visit(url)
        held: list[Route] = []
        page.route("**/predict", lambda route: held.append(route))
        choose(page, *numbered(10))
        while len(held) < 4:
            page.wait_for_timeout(20)
        held[0].continue_()
        expect(tiles(page)).to_have_count(1)
        progress = page.get_by_role("progressbar", name="Photos answered")
        expect(progress).to_have_js_property("value", 1)
        expect(progress).to_have_js_property("max", 10)
        page.get_by_role("button", name="Stop").focus()
        page.keyboard.press("Enter")
        expect(tiles(page, "stopped")).to_have_count(9)
        expect(page.locator("#count")).to_have_text("1 of 10 photos answered, 9 stopped")
        expect(progress).to_be_hidden()
        expect(page.get_by_role("button", name="Go on")).to_be_focused()
        page.unroute("**/predict")
        page.keyboard.press("Enter")
        expect(tiles(page)).to_have_count(10)
        expect(page.get_by_role("button", name="Go on")).to_be_hidden()
        expect(page.get_by_role("button", name="CSV")).to_be_focused()


def test_the_upload_of_a_large_photo_is_told(visit: Visit, site: str) -> None:
    page = visit(site)
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 150_000}
    session.send("Network.emulateNetworkConditions", slow)
    noise = np.random.default_rng(1).integers(0, 255, (400, 500, 3)).astype(np.uint8)
    choose(page, file("noise.png", encode(Image.fromarray(noise)), "image/png"))
    expect(page.locator(".state")).to_have_text(re.compile(r"^Sending… [1-9]\d?%$"))
    session.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    expect(cards(page)).to_have_count(1)


# What the model says, as it is


def test_the_numbers_of_a_regression_in_a_grid(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Red(FakeModel):
        def predict(self, batch: np.ndarray) -> np.ndarray:
            return batch.mean((1, 2))[:, :1] - 10

    outputs = (Tensor("red", (1,), "float32"),)
    serve_with(monkeypatch, Red(), name="red", kind="values", outputs=outputs, preprocess="none")
    with own_app() as url:
        page = visit(url)
        expect(page.locator(".lead")).to_contain_text("answers each with numbers")
        reds = [30, 5, 200, 80, 7, 9, 11]
        choose(page, *[file(f"{red}.png", encode(Image.new("RGB", (9, 9), (red, 0, 0))), "image/png") for red in reds])
        expect(tiles(page)).to_have_count(7)
        page.select_option("#sort", label="smallest first")
        assert page.locator(".tile .label").all_text_contents() == ["-5", "-3", "-1", "1", "20", "70", "190"]
        with page.expect_download() as table:
            page.get_by_role("button", name="CSV").click()
        rows = [*csv.DictReader(io.StringIO(table.value.path().read_text()))]
        assert [(row["label"], float(row["values"])) for row in rows] == [("", pytest.approx(red - 10)) for red in reds]


def test_classes_without_a_list_are_numbers(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = (Tensor("class", (3,), "float32"),)
    serve_with(monkeypatch, Colours(), name="own", labels=(), outputs=outputs, preprocess="none")
    with own_app() as url:
        page = visit(url)
        expect(page.locator("header")).to_have_text(re.compile("own knows 3 classes, without a list of their names"))
        choose(page, *numbered(1))
        expect(page.locator(".rows .label").first).to_have_text("Class 0")


# What goes wrong


def test_a_proxys_refusal_of_the_size_is_named(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site, errors=True)
    page.route("**/predict", answer(413, "<h1>Request Entity Too Large</h1>"))
    choose(page, file("a.jpg", dog))
    expect(cards(page, "failed").locator(".state")).to_contain_text("A proxy before the server refused the size")


def test_a_proxys_error_is_asked_again(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site, errors=True)
    asked: list[Route] = []

    def away(route: Route) -> None:
        asked.append(route)
        if len(asked) < 3:
            route.fulfill(status=502, body="<h1>Bad gateway</h1>", headers={"Retry-After": "0"})
        else:
            route.continue_()

    page.route("**/predict", away)
    choose(page, file("a.jpg", dog))
    expect(cards(page)).to_have_count(1)
    assert len(asked) == 3


def test_a_reload_keeps_nothing_and_says_so_once(visit: Visit, site: str, dog: bytes) -> None:
    page = visit(site)
    expect(page.locator("#note")).to_be_hidden()
    choose(page, file("a.jpg", dog), file("b.jpg", dog))
    expect(cards(page)).to_have_count(2)
    page.reload()
    expect(page.locator("#note")).to_have_text(
        "This page keeps nothing: what was here before the reload is gone (photos: 2)."
    )
    expect(page.locator(".card")).to_have_count(0)
    page.reload()
    expect(page.locator("#sample")).to_be_visible()
    expect(page.locator("#note")).to_be_hidden()


# For everybody


def test_the_focus_stays_when_the_sample_goes(visit: Visit, site: str) -> None:
    page = visit(site)
    page.locator("#sample").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#sample")).to_be_hidden()
    expect(page.get_by_role("heading", name="dog.jpg")).to_be_focused()
    expect(cards(page)).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.locator(".rows button").first).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("options", [{}, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing_among_many(visit: Visit, colours: None, scheme: str, options: Any) -> None:
    with own_app() as url:
        page = visit(url, errors=True, axe=True, color_scheme=scheme, **options)
        choose(page, *numbered(20), file("bad.png", b"none", "image/png"))
        expect(tiles(page)).to_have_count(20)
        expect(tiles(page, "failed")).to_have_count(1)
        expect(page.locator(".tile img[src]").first).to_be_visible()
        axe(page, "grid")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        page.locator(".tile button").first.click()
        expect(page.get_by_role("dialog", name="Photo")).to_be_visible()
        axe(page, "large")
        page.get_by_role("button", name="Close").click()
        if not options:
            page.get_by_role("button", name="Take a photo").click()
            expect(page.get_by_role("button", name="Take it")).to_be_enabled()
            axe(page, "webcam")


def test_the_webcam_of_a_desktop(visit: Visit, site: str) -> None:
    page = visit(site)
    page.get_by_role("button", name="Take a photo").click()
    dialog = page.get_by_role("dialog", name="Take a photo")
    shutter = dialog.get_by_role("button", name="Take it")
    expect(shutter).to_be_focused()
    stream = page.evaluate_handle("() => document.getElementById('video').srcObject")
    shutter.click()
    expect(dialog).to_be_hidden()
    expect(cards(page)).to_have_count(1)
    expect(page.locator(".card h2")).to_have_text("webcam-1.jpg")
    assert page.locator(".photo").evaluate("(image) => image.naturalWidth") > 300
    assert page.evaluate("() => document.getElementById('video').srcObject") is None
    states = stream.evaluate("(stream) => stream.getTracks().map((track) => track.readyState)")
    assert states == ["ended"], "its light is off"
    page.get_by_role("button", name="Take a photo").click()
    expect(shutter).to_be_enabled()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Take a photo")).to_be_focused()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("NotAllowedError", "The browser does not allow this page the camera"),
        ("NotFoundError", "No camera can be used"),
    ],
)
def test_a_webcam_that_cannot_be_used_says_why(visit: Visit, site: str, fault: str, sentence: str) -> None:
    page = visit(site)
    page.evaluate(
        "(name) => { MediaDevices.prototype.getUserMedia = async () => { throw new DOMException('', name); }; }", fault
    )
    page.get_by_role("button", name="Take a photo").click()
    dialog = page.get_by_role("dialog", name="Take a photo")
    expect(dialog.get_by_role("status")).to_contain_text(sentence)
    expect(dialog.get_by_role("button", name="Take it")).to_be_disabled()
    dialog.get_by_role("button", name="Close").click()
    expect(dialog).to_be_hidden()


def test_no_webcam_is_offered_where_browsers_allow_none(visit: Visit, site: str) -> None:
    """A page over plain HTTP from another machine has no navigator.mediaDevices."""
    page = visit("about:blank")
    page.add_init_script("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.goto(site)
    expect(page.get_by_role("button", name="Choose photos")).to_be_visible()
    expect(page.get_by_role("button", name="Take a photo")).to_be_hidden()
