"""The site loads nothing from other servers. Skipped where the extra [docs] is not installed."""

import functools
import html.parser
import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ELSEWHERE = re.compile(r"\s*(https?:)?//")
# Attributes of what a browser fetches by itself, and the relations of a <link> of which it does.
SOURCES = ("src", "srcset", "poster", "data")
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}


class Loads(html.parser.HTMLParser):
    """What a page makes the browser load from another server."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        named = {name: value or "" for name, value in attributes}
        loaded = [named[name] for name in SOURCES if name in named]
        if tag == "link" and FETCHED & set(named.get("rel", "").split()):
            loaded.append(named.get("href", ""))
        self.found += [f"{tag} {address}" for address in loaded if ELSEWHERE.match(address)]
        if named.get("data-md-component") == "source":  # with it, the theme's script asks api.github.com
            self.found.append(f"{tag} data-md-component=source")


class Links(html.parser.HTMLParser):
    """What a page links to, and what a link to it may have behind its #."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        named = {name: value or "" for name, value in attributes}
        self.anchors |= {named[name] for name in ("id", "name") if name in named}
        if tag == "a" and "href" in named:
            self.targets.append(named["href"])


def wrong_links(site: Path) -> list[str]:
    """The links inside a site that lead to no file, or to no anchor of a page."""
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html") if page.name != "404.html"}
    wrong = []
    for page, links in pages.items():
        for target in links.targets:
            address = urllib.parse.urlsplit(target)
            if address.scheme or address.netloc:
                continue
            there = (page.parent / urllib.parse.unquote(address.path)).resolve() if address.path else page
            there = there / "index.html" if there.is_dir() else there
            anchor = urllib.parse.unquote(address.fragment)
            if not there.is_file() or (anchor and there in pages and anchor not in pages[there].anchors):
                wrong.append(f"{page.relative_to(site)}: {target}")
    return wrong


def loads(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    return parser.found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material"):
        pytest.importorskip(package, reason="needs the extra [docs]")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_what_is_loaded_from_elsewhere_is_found():
    for page, found in (
        ('<img src="https://a.b/c.png"><a href="https://a.b">x</a>', "img https://a.b/c.png"),
        ("<script src=//a.b/c.js></script>", "script //a.b/c.js"),
        ('<link rel="stylesheet" href="http://a.b/c"><link rel="canonical" href="//a.b">', "link http://a.b/c"),
        ('<div data-md-component="source"></div><img src="../a.png">', "div data-md-component=source"),
    ):
        assert loads(page) == [found]


@pytest.mark.slow  # what builds the site comes with the extra `check`
def test_pages_name_nothing_on_other_servers(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert loads(page.read_text(encoding="utf-8")) == [], page.relative_to(site)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_a_browser_asks_no_other_server_and_cuts_off_no_code(site, browser):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        elsewhere = []
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: elsewhere.append(request.url))
            for path in ("", "how-to/training/", "reference/valm_kernels/", "results/benchmarks/"):
                page.goto(address + path, wait_until="networkidle")
                assert page.evaluate("document.documentElement.scrollWidth") == width, path
                code = "[...document.querySelectorAll('pre > code')]"
                assert page.evaluate(f"{code}.filter(e => e.scrollWidth > e.clientWidth + 1).length") == 0, path
            page.close()
        server.shutdown()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    site = tmp_path.resolve()
    (site / "b").mkdir()
    (site / "index.html").write_text('<a href="b/#x"></a><a href="b/#y"></a><a href="c"></a><a href="https://a.b"></a>')
    (site / "b" / "index.html").write_text('<p id="x"><a href="..">up</a><a href="#x">here</a><a href="#z">z</a>')
    assert sorted(wrong_links(site)) == ["b/index.html: #z", "index.html: b/#y", "index.html: c"]


@pytest.mark.slow
def test_no_link_of_the_site_leads_nowhere(site):
    assert wrong_links(site.resolve()) == []
