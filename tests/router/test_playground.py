"""The page at `/`, without a browser: who may have it, its headers, and that it is whole and alone. tests/browser has the rest."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import tomllib
from collections import Counter
from datetime import date
from html.parser import HTMLParser
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest

from router.access import Access
from router.http_api import HttpApi
from router.http_server import HttpServer
from router.playground import FILE
from router.tenants import KeyRing
from tests.checkpoints import ROOT

PAGE = FILE.read_text()
# Elements that have no end tag.
VOID = {"br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
Answer = tuple[int, dict[str, str], bytes]


def ask(*requests: tuple[str, str], keys: KeyRing | None = None, host: str = "localhost") -> list[Answer]:
    """What a server with nothing behind it answers to each method and path, on one connection."""

    def over_http(port: int) -> list[Answer]:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        answers = []
        for method, path in requests:
            connection.request(method, path, headers={"Host": host})
            response = connection.getresponse()
            body = response.read()
            answers.append((response.status, {name.lower(): value for name, value in response.getheaders()}, body))
        connection.close()
        return answers

    async def scene() -> list[Answer]:
        inference = SimpleNamespace(access=Access(keys, None, date.today, is_loopback=True))
        server = HttpServer(HttpApi(inference, lambda: "f", lambda: True, is_loopback=True), None, None)  # type: ignore[arg-type]
        async with asyncio.timeout(20):
            port = await server.start("127.0.0.1", 0, is_shared=False)
            answers = await asyncio.to_thread(over_http, port)
            await server.stop()
        return answers

    return asyncio.run(scene())


def test_everybody_gets_the_page_and_nothing_else() -> None:
    """It holds nothing; with keys, all it can ask for still wants one."""
    page, models, elsewhere = ask(("GET", "/"), ("GET", "/v1/models"), ("GET", "/index.html"), keys=KeyRing(()))
    assert (page[0], page[2]) == (200, FILE.read_bytes())
    assert page[1]["content-type"] == "text/html; charset=utf-8"
    assert [models[0], elsewhere[0]] == [401, 401]


def test_a_head_is_a_get_without_the_page() -> None:
    got, head, again = ask(("GET", "/"), ("HEAD", "/"), ("GET", "/"))
    assert head == (200, got[1], b"")
    assert again == got, "the connection is where it should be"


def test_other_methods_and_other_names_of_this_host_are_refused() -> None:
    [posted] = ask(("POST", "/"))
    assert (posted[0], json.loads(posted[2])["error"]["code"]) == (405, "method_not_allowed")
    [foreign] = ask(("GET", "/"), host="rebound.example")
    assert foreign[0] == 403


def test_the_page_may_run_only_itself_and_talk_only_to_its_server() -> None:
    [(_, headers, body)] = ask(("GET", "/"))
    policy = dict(directive.partition(" ")[::2] for directive in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["trusted-types"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    for element in ("script", "style"):
        [inside] = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>".encode(), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside).digest()).decode()
        assert policy[f"{element}-src"] == f"'sha256-{digest}'"
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"


class Outline(HTMLParser):
    """Tags and their attributes; notes what a strict reader would not accept."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        twice = [name for name, count in Counter(name for name, _ in attrs).items() if count > 1]
        self.wrong += [f"line {self.getpos()[0]}: {name} twice" for name in twice]
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.wrong.append(f"line {self.getpos()[0]}: </{tag}> ends nothing")

    def close(self) -> None:
        super().close()
        self.wrong += [f"<{tag}> is open at the end" for tag in self._open]

    def values(self, *attributes: str) -> list[str]:
        return [value for _, given in self.tags for name, value in given.items() if name in attributes and value]


@pytest.fixture(scope="module")
def outline() -> Outline:
    made = Outline()
    made.feed(PAGE)
    made.close()
    return made


def test_the_page_is_html_that_a_strict_reader_accepts(outline: Outline) -> None:
    assert PAGE.startswith("<!doctype html>\n<html lang=")
    assert not outline.wrong
    ids = Counter(outline.values("id"))
    assert max(ids.values()) == 1, ids
    assert {*outline.values("for"), *" ".join(outline.values("aria-describedby", "aria-labelledby")).split()} <= ids.keys()


def test_every_field_of_the_page_has_a_label(outline: Outline) -> None:
    labelled = set(outline.values("for"))
    fields = [given for tag, given in outline.tags if tag in ("input", "select", "textarea")]
    assert len(fields) > 10
    for given in fields:
        by_wrapping = given.get("type") in ("radio", "checkbox")
        assert given.get("id") in labelled or by_wrapping or given.get("aria-label"), given


def test_the_page_names_nothing_outside_itself(outline: Outline) -> None:
    """No address but the name of SVG's language inside the icon; no element that loads something."""
    assert re.findall(r"\b(?:https?|wss?|ftp):|//\w+\.\w", PAGE.replace("xmlns='http://www.w3.org/2000/svg'", "")) == []
    assert not {tag for tag, _ in outline.tags} & {"img", "iframe", "object", "embed", "audio", "video", "base", "source"}
    assert "@import" not in PAGE and "url(" not in PAGE
    [icon] = [given for tag, given in outline.tags if tag == "link"]
    assert (icon["href"] or "").startswith("data:image/svg+xml,")
    assert [given for tag, given in outline.tags if tag == "script"] == [{"type": "module"}], "one script, and no src"


def test_the_page_never_makes_markup_or_code_of_text(outline: Outline) -> None:
    """What a model writes is not trusted."""
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "DOMParser",
        "setHTML",
        "eval(",
        "new Function",
        "srcdoc",
    ):
        assert way not in PAGE, way
    assert not [name for _, given in outline.tags for name in given if name.startswith("on") or name == "style"]
    assert "localStorage" not in PAGE and "cookie" not in PAGE, "the key is in sessionStorage, for the tab"


def test_the_page_is_in_the_package() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "router.playground" in built["packages"]
    assert FILE.name in built["package-data"]["router.playground"]
