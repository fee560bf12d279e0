"""Take pictures of the page from a running server: docs/images/page.png, the README's.

python -m scripts.screenshots                      # starts the server with its default model
python -m scripts.screenshots --url http://127.0.0.1:5000
python -m scripts.screenshots --all build/shots    # every view, in both schemes, and as on a phone
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "page.png"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
STARTER = "What is the capital of France?"
WINDOW, PHONE = (1280, 800), (390, 844)
MOST_BYTES = 300_000
START_S = 300.0
PORT = 5077


@contextmanager
def server(url: str | None) -> Iterator[str]:
    """The address of the server: the one at ``url``, or one that is started for this."""
    if url is not None:
        yield url.rstrip("/")
        return
    environ = os.environ | {"HOST": "127.0.0.1", "PORT": str(PORT), "RESIDENCY_LOCK": "false"}
    command = [sys.executable, "-m", "transformers_api", "serve"]
    with subprocess.Popen(command, env=environ) as process:
        try:
            _wait_until_ready(process)
            yield f"http://127.0.0.1:{PORT}"
        finally:
            process.terminate()


def _wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"The server has ended with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.2)
    raise SystemExit(f"The server was not ready within {START_S:g} s")


def opened(browser: Browser, url: str, scheme: str, size: tuple[int, int]) -> Page:
    """The page, with an answer to the first starter."""
    context = browser.new_context(
        base_url=url,
        color_scheme="dark" if scheme == "dark" else "light",
        viewport={"width": size[0], "height": size[1]},
        device_scale_factor=1 if size == WINDOW else 2,
        reduced_motion="reduce",
        locale="en-GB",
    )
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto("/ui")
    page.get_by_role("button", name=STARTER).first.click()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible(timeout=60_000)
    expect(page.get_by_role("button", name="Look inside").first).to_be_visible(timeout=60_000)
    return page


def look_inside(page: Page) -> None:
    """Open Inside at the word that answers the question, with what it read and nearly was."""
    page.get_by_role("tab", name="Inside").click()
    page.get_by_role("button", name=re.compile(r"^Token \d+: Paris$")).first.click()
    panel = page.get_by_role("complementary", name="Selected token")
    expect(
        panel.get_by_role("list", name="Candidates").get_by_role("listitem").first
    ).to_be_visible()
    expect(
        panel.get_by_role("list", name="Read from").get_by_role("listitem").first
    ).to_be_visible()
    page.mouse.move(1, 1)
    page.wait_for_load_state("networkidle")


def every_view(browser: Browser, url: str, folder: Path) -> None:
    """Write a picture of each view in both schemes, of a window and of a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        for name, size in (("window", WINDOW), ("phone", PHONE)):
            page = opened(browser, url, scheme, size)
            page.screenshot(path=folder / f"chat-{scheme}-{name}.png")
            look_inside(page)
            page.screenshot(path=folder / f"inside-{scheme}-{name}.png")
            page.get_by_role("tab", name="Models").click()
            expect(page.get_by_role("region", name="In memory")).to_be_visible()
            page.wait_for_load_state("networkidle")
            page.screenshot(path=folder / f"models-{scheme}-{name}.png")
            page.context.close()


def main() -> int:
    """Start the server where none is named, open the page, photograph it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="pictures of every view")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    with server(options.url) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        if options.all is not None:
            every_view(browser, url, options.all)
            return 0
        page = opened(browser, url, "light", WINDOW)
        look_inside(page)
        PICTURE.parent.mkdir(exist_ok=True)
        page.screenshot(path=PICTURE)
        browser.close()
    size = PICTURE.stat().st_size
    sys.stdout.write(f"{PICTURE}: {size} bytes\n")
    return int(size > MOST_BYTES)


if __name__ == "__main__":
    raise SystemExit(main())
