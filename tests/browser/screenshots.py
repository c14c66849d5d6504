"""docs/images/playground*.png and top.png, of real fleets: `make screenshots`. They show what a reader would get, so look at them."""

from __future__ import annotations

import io
import threading
from pathlib import Path

from playwright.sync_api import Browser, expect, sync_playwright
from rich.console import Console

from splitfire.cli.client import Client
from splitfire.cli.supervisor import free_port
from splitfire.cli.top import look
from tests.browser.chromium import WAIT_MS, launch, visit
from tests.checkpoints import ROOT
from tests.e2e.fleets import RunningFleet, greedy, start_fleet

IMAGES = ROOT / "docs" / "images"
MAX_BYTES = 200_000
PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x"
LONG = (ROOT / "router" / "access.py").read_text()[:2400].rsplit("\n", 1)[0]


def take_top(browser: Browser, path: Path) -> None:
    """`splitfire top` beside eight clients that have been asking for a few seconds."""
    done = threading.Event()

    def ask(fleet: RunningFleet, number: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            prompt = [(7 * i + number) % 4000 for i in range(96)] + [(11 * i + turn) % 4000 for i in range(40 * number)]
            fleet.generate(greedy(prompt, 64))

    with start_fleet("pico", 2, 2) as fleet, Client(fleet.address) as client:
        threads = [threading.Thread(target=ask, args=(fleet, number)) for number in range(8)]
        for thread in threads:
            thread.start()
        done.wait(8)
        console = Console(record=True, width=112, file=io.StringIO(), force_terminal=True)
        console.print(look(client))
        done.set()
        for thread in threads:
            thread.join()
    page = browser.new_page(viewport={"width": 1200, "height": 900}, device_scale_factor=1.5, color_scheme="dark")
    page.set_content(console.export_html(inline_styles=True))
    page.add_style_tag(
        content="body {background: #14161b; color: #d8dce3} pre {padding: 12px; display: inline-block; font-size: 14px}"
    )
    page.locator("pre").screenshot(path=path)
    page.close()


def main() -> None:
    expect.set_options(timeout=WAIT_MS)
    port = free_port()
    origin = f"http://127.0.0.1:{port}"
    IMAGES.mkdir(exist_ok=True)
    page, waterfall, top = IMAGES / "playground.png", IMAGES / "playground-waterfall.png", IMAGES / "top.png"
    with sync_playwright() as playwright, start_fleet("pico", router=("--split=always", f"--http-port={port}")):
        browser = launch(playwright)
        with visit(browser, origin, 1360, 900) as tab:
            tab.choose("Completion")
            tab.set(temperature="0", max_tokens="64")
            tab.ask(PROMPT + " ")  # so that nothing is done for the first time
            tab.page.click("#clear")
            turn = tab.ask(PROMPT)
            turn.get_by_role("button", name="Tokens").click()
            tab.page.screenshot(path=page)
        with visit(browser, origin, 1360, 2000, is_dark=True) as tab:
            tab.choose("Completion")
            tab.set(temperature="0", max_tokens="64", more='{"ignore_eos": true}')
            tab.ask("x " * 1200)
            tab.page.click("#clear")
            turn = tab.ask(LONG)
            turn.locator(".answer").screenshot(path=waterfall)
        take_top(browser, top)
        browser.close()
    for path in (page, waterfall, top):
        num_bytes = Path(path).stat().st_size
        assert num_bytes < MAX_BYTES, f"{path.name} has {num_bytes} bytes, at most {MAX_BYTES} are wanted"


if __name__ == "__main__":
    main()
