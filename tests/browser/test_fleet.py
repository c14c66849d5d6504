"""The playground in a browser, at real fleets: what it shows of real answers, and what it does to the server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, expect

from splitfire.cli.supervisor import free_port
from tests.browser.chromium import Visit, text_of, visit
from tests.e2e.fleets import RunningFleet, start_fleet, until
from tests.e2e.test_tenants import key, table

FUNCTION = "def fibonacci(n):\n"
MARKUP = "<img src=x onerror=window.owned=1>"
# How long the answer was, whenever it changed before its end.
NOTE_LENGTHS = """() => {
    window.lengths = [];
    new MutationObserver(() => {
        const output = document.querySelector(".running .output");
        const length = output ? output.textContent.length : 0;
        if (length && length !== window.lengths.at(-1)) window.lengths.push(length);
    }).observe(document.getElementById("turns"), { childList: true, subtree: true, characterData: true });
}"""
EXACT_MS = 0.011  # what is printed has two decimals


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def fleet(port: int) -> Iterator[RunningFleet]:
    with start_fleet("pico", router=("--split=always", f"--http-port={port}")) as fleet:
        yield fleet


@pytest.fixture
def tab(browser: Browser, fleet: RunningFleet, port: int) -> Iterator[Visit]:
    """Each test leaves the fleet with nothing to do."""
    with visit(browser, f"http://127.0.0.1:{port}") as visited:
        visited.set(temperature="0", max_tokens="64", more='{"ignore_eos": true}')
        yield visited
    fleet.assert_no_leaks()


def grows(turn: Locator) -> None:
    """Its text becomes longer while more of it is to come."""
    output = turn.locator(".running .output").first
    expect(output).not_to_be_empty()
    first = len(text_of(output))
    until(lambda: len(text_of(output)) > first)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def fact(turn: Locator, term: str) -> str:
    return text_of(turn.locator(".facts > div", has=turn.page.locator("dt", has_text=term)).locator("dd"))


def test_a_chat_streams_and_its_times_add_up(tab: Visit) -> None:
    expect(tab.page.locator("#model")).to_have_text("pico")
    tab.set(max_tokens="600", temperature="1.5")
    tab.page.evaluate(NOTE_LENGTHS)
    turn = tab.ask(FUNCTION * 20)
    lengths = tab.page.evaluate("window.lengths")
    assert len(lengths) > 3 and lengths == sorted(set(lengths)), "ever longer, as it comes"
    assert fact(turn, "Generated").startswith("600 tokens")
    first, *others = turn.locator("tr.sum").all()
    assert 1 <= len(others) <= 2, "tokens 1 and 2 leave the router in one message where both came while it waited for a processor"
    for each in (first, *others):
        summed, [own] = numbers(text_of(each.locator(".ms")))[0], numbers(text_of(each.locator(".track")))
        assert summed == pytest.approx(own, abs=EXACT_MS) and own > 0
    expect(turn.locator("tr.sum.off")).to_have_count(0)
    where = set(turn.locator(".waterfall .where").all_inner_texts())
    assert where == {"router", "prefill-0", "decode-0"}
    [here], [at_router] = re.findall(r"([\d.]+) ms here", fact(turn, "First token")), numbers(text_of(first.locator(".track")))
    assert float(here) > at_router - 0.5, "the browser cannot have it sooner"
    assert re.match(r"[\d.]+ [kM]B\d+ blocks over ucx in [\d.]+ ms", fact(turn, "KV moved"))
    turn.get_by_role("button", name="Tokens").click()
    assert turn.locator(".tokens .piece").count() == 600


def test_a_conversation_goes_on_from_what_was_computed(tab: Visit) -> None:
    tab.ask(FUNCTION * 20)
    second = tab.ask("and again")
    assert numbers(fact(second, "Prompt"))[1] >= 64, "the first turn was found in the cache"


def test_predicted_output_is_drafted_and_coloured(tab: Visit) -> None:
    turn = tab.ask(FUNCTION)
    turn.get_by_role("button", name="Predict this").click()
    turn.get_by_role("button", name="Again").click()
    again = tab.turns.nth(1)
    tab.has_ended(again)
    assert text_of(again.locator(".output").first) == text_of(turn.locator(".output").first), "guesses change no token"
    again.get_by_role("button", name="Tokens").click()
    num_drafted = again.locator(".tokens .drafted").count()
    accepted, proposed = numbers(fact(again, "Drafts accepted"))[:2]
    assert 32 < num_drafted == accepted <= proposed
    expect(again.locator(".legend").first).to_contain_text(f"{num_drafted} tokens proposed by a drafter and accepted")


@pytest.mark.parametrize("way", ["button", "Escape", "leaving"])
def test_stop_ends_the_request_at_the_server(tab: Visit, fleet: RunningFleet, way: str) -> None:
    tab.set(temperature="1.5", max_tokens="1900", more='{"ignore_eos": true, "n": 4}')  # seconds, on any machine
    turn = tab.send(FUNCTION)
    grows(turn)
    assert fleet.status().running_requests, "that is what is to end"
    if way == "button":
        tab.page.get_by_role("button", name="Stop").click()
    elif way == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.goto("about:blank")
        tab.foreign.clear()
    until(lambda: not fleet.status().running_requests, 5.0)
    if way != "leaving":
        tab.has_ended(turn)
        expect(turn.locator(".state")).to_have_text("· stopped by you")
        assert len(text_of(turn.locator(".output").first)) > 0


def test_a_completion_and_a_schema(tab: Visit) -> None:
    tab.choose("Completion")
    turn = tab.ask(FUNCTION)
    assert fact(turn, "Generated").startswith("64 tokens")
    tab.choose("Chat")
    tab.page.select_option("#format", "json_schema")
    tab.set(more="", temperature="1", seed="3", max_tokens="200")
    said = json.loads(text_of(tab.ask("a person").locator(".output").first))
    assert set(said) == {"name", "age"} and isinstance(said["age"], int)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("temperature", "-1", "invalid_temperature"),
        ("max_tokens", "many", "invalid_max_tokens"),
        ("more", '{"temperatur": 1}', "invalid_temperatur"),
    ],
)
def test_what_the_server_refuses_is_shown_as_it_says_it(tab: Visit, field: str, value: str, code: str) -> None:
    tab.set(**{field: value})
    alert = tab.ask("x").get_by_role("alert")
    param = code.removeprefix("invalid_")
    for said in ("400 invalid_request_error", f"param{param}", f"code{code}", f"{param}:"):
        expect(alert).to_contain_text(said)
    tab.expect_status(400)


def test_markup_that_the_model_writes_stays_text(tab: Visit) -> None:
    """Held to it by a grammar."""
    tab.set(more=json.dumps({"response_format": {"type": "regex", "regex": re.escape(MARKUP)}}))
    turn = tab.ask(MARKUP)
    assert text_of(turn.locator(".output").first) == MARKUP
    turn.get_by_role("button", name="Tokens").click()
    assert "".join(turn.locator(".tokens .piece").all_inner_texts()) == MARKUP
    expect(tab.page.locator("#turns img")).to_have_count(0)
    assert tab.page.evaluate("window.owned") is None


def test_a_fleet_with_keys_wants_one(browser: Browser, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(table("alice"))
    port = free_port()
    router = ("--split=always", f"--http-port={port}", f"--keys-file={keys}")
    with start_fleet("pico", router=router), visit(browser, f"http://127.0.0.1:{port}") as tab:
        expect(tab.page.locator("#model")).to_contain_text("401 no_api_key")
        field = tab.page.get_by_label("API key")
        field.fill(key("mallory"))
        alert = tab.ask("x").get_by_role("alert")
        for said in ("401 authentication_error", "codeinvalid_api_key", "the API key is not known here"):
            expect(alert).to_contain_text(said)
        expect(field).to_be_focused()
        tab.expect_status(401)
        field.fill(key("alice"))
        field.press("Enter")
        expect(tab.page.locator("#model")).to_have_text("pico")
        tab.set(max_tokens="8", more='{"ignore_eos": true}')
        assert fact(tab.ask("y"), "Generated").startswith("8 tokens")
