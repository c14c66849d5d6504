"""Chromium from the system, headless, and a visit to one page that notes whatever it should not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Locator, Page, Playwright, expect

WAIT_MS = 15_000
# As root it needs no sandbox, because it can have none; no name but this machine's is found.
ARGUMENTS = ["--no-sandbox"] if os.geteuid() == 0 else []
ARGUMENTS += [
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--force-color-profile=srgb",
]


@dataclass
class Visit:
    """One tab at the playground of one server."""

    page: Page
    origin: str
    foreign: list[str] = field(default_factory=list)  # addresses outside the server
    problems: list[str] = field(default_factory=list)  # errors and warnings of the console, exceptions of scripts

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("console", lambda message: self._said(message.type, message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def _asked(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "data" and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.foreign.append(url)

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(text)

    def expect_status(self, status: int) -> None:
        """The browser itself writes an error for each such answer; it is no problem here."""
        wanted = f"status of {status} "
        assert any(wanted in problem for problem in self.problems), self.problems
        self.problems = [problem for problem in self.problems if wanted not in problem]

    def open(self) -> None:
        self.page.goto(self.origin + "/")
        expect(self.page.locator("#model")).not_to_have_text("…")

    def set(self, **fields: str) -> None:
        """By the ids of the fields."""
        for name, value in fields.items():
            self.page.fill(f"#{name}", value)

    def choose(self, mode: str) -> None:
        self.page.get_by_label(mode, exact=True).check()

    def send(self, said: str) -> Locator:
        """The turn that it begins."""
        number = self.turns.count()
        self.page.fill("#said", said)
        self.page.click("#send")
        return self.turns.nth(number)

    def ask(self, said: str) -> Locator:
        """Until the answer has ended."""
        turn = self.send(said)
        self.has_ended(turn)
        return turn

    def has_ended(self, turn: Locator) -> None:
        expect(turn.locator(".answer")).not_to_have_class("answer running", timeout=60_000)

    @property
    def turns(self) -> Locator:
        return self.page.locator("article.turn")


def launch(playwright: Playwright) -> Browser:
    """The system's: `make test-browser` installs it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path is not None, "there is no Chromium; make test-browser installs Debian's"
    return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)


@contextmanager
def visit(browser: Browser, origin: str, width: int = 1280, height: int = 900, *, is_dark: bool = False) -> Iterator[Visit]:
    """A tab that shares nothing with any other; at its end nothing bad may have happened."""
    context: BrowserContext = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if is_dark else "light"
    )
    context.set_default_timeout(WAIT_MS)
    visited = Visit(context.new_page(), origin)
    visited.open()
    yield visited
    context.close()
    assert visited.foreign == []
    assert visited.problems == []


def text_of(locator: Locator) -> str:
    return str(locator.text_content() or "")
