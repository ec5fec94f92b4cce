"""Looks at the built site in headless Chromium: `make docs-check`.

    python docs/check.py SITE PICTURES

Serves SITE on localhost and opens some pages at the width of a desktop and of a phone.
It saves a picture of each, to be looked at, and fails if the browser's console has an
error, a page is wider than its window, or the site's search does not find `zclip`.
"""

from __future__ import annotations

import functools
import http.server
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

PAGES = {
    "home": "index.html",
    "gallery": "gallery/index.html",
    "gallery-zclip": "gallery/zclip.html",
    "api": "api/index.html",
    "api-zclip": "api/optclip.zclip.html",
    "api-redraw": "api/optclip.initializers.redraw.html",
    "benchmarks": "benchmarks.html",
    "choose": "choose.html",
}
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
)
TALLEST = 6000  # of a picture, in pixels


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that does not print every request."""

    def log_message(self, format: str, *args: object) -> None:
        pass


def browser(profile: str) -> webdriver.Chrome:
    """A new Chromium with an empty profile; ends the program where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "Chromium" if chromium is None else "Chromium's driver"
        sys.exit(
            f"docs-check: {missing} was not found. Install both, on Debian with "
            "`apt-get install chromium chromium-driver`."
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def sized(chrome: webdriver.Chrome, width: int, height: int) -> None:
    """A window's inside, which may be narrower than any window of a desktop."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", metrics | {"mobile": width < 600}
    )


def looked_at(
    chrome: webdriver.Chrome, address: str, pictures: pathlib.Path
) -> Iterator[str]:
    """What is wrong on each page at each width; saves the pictures."""
    for size, (width, height) in WIDTHS.items():
        for name, page in PAGES.items():
            sized(chrome, width, height)
            chrome.get(f"{address}/{page}")
            if "404" in chrome.title or "Error response" in chrome.title:
                yield f"{page}: not found"
                chrome.get_log("browser")  # says the same
                continue
            wide = chrome.execute_script("return document.documentElement.scrollWidth")
            if wide > width:
                yield f"{page}, {size}: {wide} pixels wide, more than {width}"
            chrome.save_screenshot(str(pictures / f"{name}-{size}.png"))
            tall = chrome.execute_script("return document.documentElement.scrollHeight")
            sized(chrome, width, min(max(tall, height), TALLEST))
            chrome.save_screenshot(str(pictures / f"{name}-{size}-whole.png"))
            yield from errors(chrome, f"{page}, {size}")


def errors(chrome: webdriver.Chrome, where: str) -> Iterator[str]:
    """Errors in the console since the last call."""
    for line in chrome.get_log("browser"):
        if line["level"] == "SEVERE":
            yield f"{where}: {line['message']}"


def searched(
    chrome: webdriver.Chrome, address: str, pictures: pathlib.Path
) -> Iterator[str]:
    """Whether the site's own search finds a rule's page."""
    sized(chrome, *WIDTHS["desktop"])
    chrome.get(f"{address}/search.html?q=zclip")
    wanted, links = "api/optclip.zclip.html", []
    for _ in range(100):
        found = chrome.find_elements(By.CSS_SELECTOR, "#search-results li a")
        links = [link.get_attribute("href") or "" for link in found]
        if any(wanted in link for link in links):
            break
        time.sleep(0.1)
    else:
        yield f"search for zclip: {wanted} is not among {len(links)} results"
    chrome.save_screenshot(str(pictures / "search.png"))
    yield from errors(chrome, "search")


def main(site: pathlib.Path, pictures: pathlib.Path) -> None:
    pictures.mkdir(parents=True, exist_ok=True)
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}"
    with tempfile.TemporaryDirectory() as profile:
        chrome = browser(profile)
        try:
            wrong = [
                *looked_at(chrome, address, pictures),
                *searched(chrome, address, pictures),
            ]
        finally:
            chrome.quit()
    for line in wrong:
        print(line)
    print(f"{len(wrong)} errors; pictures to look at are in {pictures}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
