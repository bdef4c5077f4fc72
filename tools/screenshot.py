"""Take the README's screenshot: a server with the bundled model, Chromium, the sample photo and its heat map.

    python tools/screenshot.py [docs/page.png]

Needs Chromium (apt-get install chromium) and requirements-dev.txt.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync")


def start() -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port, and return it with its address once it answers."""
    command = [sys.executable, str(ROOT / "run_keras_server.py"), "--model", "bundled", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout or ():
        if found := re.search(r"Try: curl .* (http://\S+)/predict", line):
            return process, found[1]
    sys.exit("The server did not start.")


def arrange(page: Page, url: str) -> None:
    """Bring the page to where the picture is taken: the sample photo, and what speaks for its first label."""
    page.goto(url)
    for _ in range(3):  # the first requests after a start take longer than those that follow
        page.click("#sample")
        expect(page.locator(".times")).to_be_visible(timeout=60_000)
        page.click("#clear")
    page.click("#sample")
    page.locator(".rows button").first.click(timeout=60_000)
    expect(page.locator(".heat")).to_be_visible(timeout=60_000)
    page.mouse.move(0, 0)
    page.locator(":focus").blur()


def main(path: str = "docs/page.png") -> None:
    """Take the picture."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("No browser is installed: apt-get install chromium.")
    process, url = start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
            page = browser.new_page(viewport={"width": 1180, "height": 790}, color_scheme="light")
            arrange(page, url)
            Path(path).parent.mkdir(exist_ok=True)
            page.screenshot(path=path)
            browser.close()
    finally:
        process.terminate()
        process.wait()
    with Image.open(path) as picture:
        picture.convert("RGB").save(path, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
