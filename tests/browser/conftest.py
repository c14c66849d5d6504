"""One Chromium for all tests, a tab for each; a router with a script, and real fleets. Run by `make test-browser`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.browser.chromium import WAIT_MS, Visit, launch, visit
from tests.browser.fake import FakeRouter, fake_router


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def fake() -> Iterator[FakeRouter]:
    with fake_router() as made:
        yield made


@pytest.fixture
def tab(browser: Browser, fake: FakeRouter) -> Iterator[Visit]:
    """At the router with a script."""
    with visit(browser, fake.origin) as visited:
        yield visited
