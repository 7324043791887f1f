"""The site that ``make docs`` has built, in a browser: links lead somewhere, and all is drawn."""

import functools
import http.server
import os
import pathlib
import shutil
import threading
import zlib
from urllib.parse import unquote, urldefrag

import pytest

import pyro_iaf

SITE = pathlib.Path(__file__).parent.parent / "docs" / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# What a page knows of itself once its formulas are drawn and its pictures are there. What leaves
# the window on the right sticks out, unless a part around it scrolls.
LOOK = """
const done = arguments[0];
const window_width = document.documentElement.clientWidth;
const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
const sticks_out = (element) => {
  if (element.getBoundingClientRect().right <= window_width + 1) return false;
  for (let part = element; part.id !== "furo-main-content"; part = part.parentElement)
    if (scrolls(part)) return false;
  return true;
};
const formulas = window.MathJax?.startup?.promise ?? Promise.resolve();
const pictures = Array.from(document.images, (image) => image.decode().catch(() => null));
Promise.all([formulas, ...pictures]).then(() => done({
  links: Array.from(document.querySelectorAll("a[href]"), (link) => link.href),
  anchors: Array.from(document.querySelectorAll("[id]"), (element) => element.id),
  pictures: Array.from(document.images, (image) => [image.src, image.naturalWidth]),
  formulas: document.querySelectorAll(".math").length,
  drawn: document.querySelectorAll(".math mjx-container svg").length,
  loaded: performance.getEntriesByType("resource").map((entry) => entry.name),
  width: document.documentElement.scrollWidth,
  out: Array.from(document.querySelectorAll("#furo-main-content *")).filter(sticks_out)
    .map((element) => element.outerHTML.slice(0, 200)),
}));
"""


@pytest.fixture(scope="module")
def built():
    """The folder of the site."""
    if not (SITE / "index.html").exists():
        give_up("there is no site; make docs builds it")
    return SITE


def give_up(reason):
    """Skips; but fails in CI, which has to see to it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def address(built):
    """Where the site is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=built)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(built, tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("there is no Chromium with its chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        give_up("there is no selenium; make docs installs it")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(browser, address):
    """What each page knows of itself, for both widths: those that links lead to from the first."""
    found = {}
    for title, (width, height) in WIDTHS.items():
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        metrics["mobile"] = title == "phone"
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        left, found[title] = [f"{address}index.html"], {}
        while left:
            page = left.pop()
            browser.get(page)
            found[title][page] = look = browser.execute_async_script(LOOK)
            links = {urldefrag(link).url for link in look["links"]}
            inner = (link for link in links if link.startswith(address) and link.endswith(".html"))
            left += [link for link in inner if link not in found[title] and link not in left]
    return found


def test_every_public_name_is_in_the_inventory(built):
    listed = zlib.decompress((built / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    names = {line.split()[0] for line in listed.splitlines()}
    missing = {name for name in pyro_iaf.__all__ if f"pyro_iaf.{name}" not in names}
    assert not missing, "docs/api has no place for these, or the site is old"


def test_every_tutorial_has_a_page(built):
    scripts = (SITE.parents[2] / "tutorials").glob("*.py")
    pages = {page.stem for page in (built / "tutorials").glob("*.html")}
    assert {script.stem for script in scripts} == pages, "the site is old: make docs"


def test_every_page_is_reached(pages, built, address):
    reached = {page.removeprefix(address) for page in pages["desk"]}
    there = {str(page.relative_to(built)) for page in built.rglob("*.html")}
    assert there - {"search.html"} == reached


@pytest.mark.parametrize("width", WIDTHS)
def test_links_lead_somewhere(pages, built, address, width):
    dead = []
    for page, look in pages[width].items():
        for link in filter(lambda link: link.startswith(address), look["links"]):
            target, anchor = urldefrag(link)
            there = pages[width].get(target)
            if there is None:
                alive = (built / unquote(target.removeprefix(address))).is_file()
            else:
                alive = not anchor or unquote(anchor) in there["anchors"]
            if not alive:
                dead.append((page, link))
    assert not dead


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_and_formulas_are_drawn(pages, width):
    pictures = [picture for look in pages[width].values() for picture in look["pictures"]]
    assert len(pictures) >= 8
    assert all(natural_width > 0 for _, natural_width in pictures)
    for page, look in pages[width].items():
        assert look["drawn"] == look["formulas"], page
    assert sum(look["drawn"] for look in pages[width].values()) > 10


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out(pages, width):
    for page, look in pages[width].items():
        assert look["width"] <= WIDTHS[width][0], page
        assert look["out"] == [], page


def test_pages_need_nothing_from_elsewhere(pages, address):
    loaded = {name for look in pages["desk"].values() for name in look["loaded"]}
    assert all(name.startswith((address, "data:")) for name in loaded)


def test_the_console_is_quiet(pages, browser):
    log = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in log if "favicon.ico" not in entry["message"]] == []
