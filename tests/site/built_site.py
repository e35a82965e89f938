"""The built site (``make site``): links lead somewhere, nothing comes from elsewhere, a browser has no complaint.

Not collected with the suite: it needs the site, and Chromium for what is looked at in it.
"""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import Chromium, found

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))
FETCHED = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src", "image": "href"}
"""Elements whose addresses a browser asks for by itself."""


class Reader(HTMLParser):
    """Addresses and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        address = given.get(FETCHED.get(tag, "href"))
        if address and (tag in FETCHED or tag == "a"):
            self.links.append((tag, address))


@functools.cache
def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def problem(page: Path, tag: str, address: str) -> str | None:
    """What is wrong with an address on a page; None if nothing is."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return "fetched from elsewhere" if tag in FETCHED and parts.scheme != "data" else None
    there = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if there.is_dir():
        there /= "index.html"
    if not there.is_file():
        return "leads nowhere"
    if parts.fragment and there.suffix == ".html" and unquote(parts.fragment) not in read(there).anchors:
        return "has no such place"
    return None


def test_links() -> None:
    assert len(PAGES) > 25, "make site builds the site"
    inside = [page for page in PAGES if page.name != "404.html"]  # whose addresses begin at the root of a server
    found = [(page.name, address, problem(page, tag, address)) for page in inside for tag, address in read(page).links]
    assert len(found) > 1000
    assert not [line for line in found if line[2]]


def test_bad_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text('<p id="here">', encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text("", encoding="utf-8")
    addresses = ["there.html#here", "there.html#nowhere", "gone.html", "https://example.org/x"]
    assert [problem(page, "a", address) for address in addresses] == [None, "has no such place", "leads nowhere", None]
    assert problem(page, "img", addresses[-1]) == "fetched from elsewhere"
    assert problem(page, "img", "data:image/png;base64,AA==") is None


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        browser.call("Network.setBlockedURLs", urls=[])
        yield browser


@pytest.mark.skipif(found() is None, reason="no device to look at it: there is no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_fetch_nothing_from_elsewhere_and_complain_of_nothing(
    browser: Chromium, address: str, width: int
) -> None:
    problems: list[object] = []
    for page in PAGES:
        name = page.relative_to(SITE).as_posix()
        browser.visit(address + name, width)
        shown = browser.run("[document.documentElement.scrollWidth, document.fonts.size, document.title]")
        elsewhere = [url for url in browser.requests if not url.startswith(address)]
        if elsewhere or browser.complaints or shown[0] > width or not shown[2]:
            problems.append((name, shown, elsewhere, browser.complaints))
    assert not problems


@pytest.mark.skipif(found() is None, reason="no device to look at it: there is no Chromium")
def test_the_search_finds(browser: Chromium, address: str) -> None:
    browser.visit(address + "index.html?q=demo", 1280)
    count = """new Promise(done => { const look = () => {
        const found = document.querySelectorAll('.md-search-result__item').length;
        found ? done(found) : setTimeout(look, 100) }; look() })"""
    assert browser.run(count) > 0
