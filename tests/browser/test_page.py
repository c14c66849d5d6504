"""The playground in a browser, at a router that says what a test wants: streams, waterfalls, tokens, errors, keys, windows."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.browser.chromium import Visit, text_of, visit
from tests.browser.fake import DONE, HOLD, SPLIT, FakeRouter, Plot, chat_chunk, last_chunk, phase, trace_of

PIECES = ("def", " f", "()", "\n")
MARKUP = "<img src=x onerror=window.owned=1><script>window.owned=1</script><b id=bold>&amp;"


def plain(text: str = "hello", trace: dict[str, Any] | None = None) -> Plot:
    return Plot([chat_chunk(text, [text], finish="stop"), last_chunk(trace or trace_of(SPLIT)), DONE])


def rows(turn: Locator) -> list[list[str]]:
    """Phase, where and milliseconds of each phase."""
    return [row.locator("th, td").all_inner_texts()[:3] for row in turn.locator(".waterfall tr:has(.bar)").all()]


# -- a stream


def test_text_is_there_as_it_comes(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = Plot(
        [chat_chunk("one", ["one"]), HOLD, chat_chunk(" two", [" two"], finish="stop"), last_chunk(trace_of(SPLIT)), DONE]
    )
    turn = tab.send("count")
    expect(turn.locator(".output").first).to_have_text("one")
    expect(tab.page.locator("#send")).to_be_disabled()
    expect(tab.page.locator("#status")).to_have_text("Asked")
    fake.go_on()
    expect(turn.locator(".output").first).to_have_text("one two")
    tab.has_ended(turn)
    expect(tab.page.locator("#status")).to_have_text("The answer ended: stop")
    expect(tab.page.locator("#send")).to_be_enabled()


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_may_be_cut_anywhere(tab: Visit, size: int) -> None:
    """Between bytes of a character, inside of an event, between the two ends of a line."""
    said = "".join(
        (
            ": a comment\r\n\r\n",
            'data: {"choices": [{"index": 0, "delta": {"content": "na\u00efve \U0001f600"}}]}\r\n\r\n',
            'event: x\ndata: {"choices": [{"index": 0,\ndata: "delta": {"content": " end"}}]}\n\n',
            "data: [DONE]\n\n",
        )
    ).encode()
    # What the network would put together again is handed to the page piece by piece.
    tab.page.evaluate(
        """(pieces) => {
            const pull = (stream) => {
                if (pieces.length) stream.enqueue(Uint8Array.from(pieces.shift()));
                else stream.close();
            };
            window.fetch = async () => new Response(new ReadableStream({ pull }, { highWaterMark: 0 }));
        }""",
        [list(said[at : at + size]) for at in range(0, len(said), size)],
    )
    turn = tab.ask("x")
    assert text_of(turn.locator(".output").first) == "na\u00efve \U0001f600 end"


def test_a_conversation_is_sent_whole_and_clear_forgets_it(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = plain("first answer")
    tab.set(system="be brief")
    tab.ask("first")
    fake.plot = plain("second answer")
    tab.ask("second")
    assert fake.asked[-1]["body"]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": "second"},
    ]
    tab.turns.first.get_by_role("button", name="Again").click()
    tab.has_ended(tab.turns.nth(2))
    assert [message["content"] for message in fake.asked[-1]["body"]["messages"]] == ["be brief", "first"]
    tab.page.click("#clear")
    expect(tab.turns).to_have_count(0)
    tab.ask("third")
    assert [message["content"] for message in fake.asked[-1]["body"]["messages"]] == ["be brief", "third"]


def test_what_is_cleared_while_it_comes_is_forgotten_too(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = Plot([chat_chunk("half"), HOLD])
    expect(tab.send("x").locator(".output").first).to_have_text("half")
    tab.page.click("#clear")
    assert fake.has_lost_client.wait(10)
    expect(tab.page.locator("#send")).to_be_enabled()
    fake.plot = plain()
    tab.ask("y")
    assert [message["content"] for message in fake.asked[-1]["body"]["messages"]] == ["y"]


def test_every_parameter_travels_and_an_empty_field_does_not(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = plain()
    tab.ask("x")
    assert fake.asked[-1]["body"] == {
        "model": "fake",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 256,
        "include_trace": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tab.page.select_option("#format", "json_schema")
    tab.set(
        temperature="0.5", top_p="0.9", top_k="40", max_tokens="64", seed="9007199254740993", stop_texts="END\n\\n\\n",
        schema='{"type": "object"}', predicted="so it goes\n", more='{"min_tokens": 2, "stream": false}',
    )  # fmt: skip
    tab.page.uncheck("#trace")
    tab.page.click("#clear")
    tab.ask("y")
    assert fake.asked[-1]["body"] == {
        "model": "fake",
        "messages": [{"role": "user", "content": "y"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 64,
        "seed": 9007199254740993,
        "stop": ["END", "\n\n"],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
        "prediction": {"type": "content", "content": "so it goes\n"},
        "min_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    }, "and what the page depends on stays"


def test_a_completion_goes_on_with_a_text(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = Plot([{"choices": [{"index": 0, "text": " there"}]}, last_chunk(None), DONE])
    tab.set(predicted="only for chats")
    tab.choose("Completion")
    expect(tab.page.get_by_label("Predicted output")).to_be_hidden()
    turn = tab.ask("hello")
    assert text_of(turn.locator(".output").first) == " there"
    assert fake.asked[-1]["path"] == "/v1/completions"
    body = fake.asked[-1]["body"]
    assert body["prompt"] == "hello" and not body.keys() & {"messages", "prediction", "response_format"}


def test_stop_closes_the_connection_and_keeps_what_came(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = Plot([chat_chunk("half an"), HOLD])
    turn = tab.send("x")
    expect(turn.locator(".output").first).to_have_text("half an")
    tab.page.click("#stop")
    assert fake.has_lost_client.wait(10)
    tab.has_ended(turn)
    expect(turn.locator(".state")).to_have_text("· stopped by you")
    expect(turn.locator(".error")).to_have_count(0)
    expect(tab.page.locator("#said")).to_be_focused()
    fake.plot = plain()
    tab.ask("y")
    assert fake.asked[-1]["body"]["messages"][1] == {"role": "assistant", "content": "half an"}


# -- where the time went


def test_the_waterfall_is_to_scale_and_adds_up(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = plain(trace=trace_of(SPLIT))
    turn = tab.ask("x")
    shown = [[re.sub(r"\s*(\d+ × .*)?$", "", name), where, took] for name, where, took in rows(turn)]
    assert shown == [[p["name"], p["worker"], f"{p['duration_s'] * 1e3:.2f}"] for p in SPLIT]
    expect(turn.locator(".waterfall small")).to_have_text(["94 × 0.64 ms", "94 × 0.16 ms"])
    legs = {"first_token": (0.0, 12.0), "second_token": (12.0, 4.0), "rest": (16.0, 100.0)}
    for bar, each in zip(turn.locator(".bar i").all(), SPLIT, strict=True):
        began, length = legs[each["leg"]]
        drawn, track = bar.bounding_box(), bar.locator("..").bounding_box()
        assert drawn is not None and track is not None
        wanted = track["x"] + (each["start_s"] * 1e3 - began) / length * track["width"]
        assert drawn["x"] == pytest.approx(wanted, abs=2.1)
        assert drawn["width"] == pytest.approx(max(2.0, each["duration_s"] * 1e3 / length * track["width"]), abs=0.6)
    for leg, (_, length) in legs.items():
        expect(turn.locator(f"tr.sum[data-leg={leg}] .ms")).to_have_text(f"{length:.2f}")
        expect(turn.locator(f"tr.sum[data-leg={leg}] .track")).to_have_text(f"the router's own: {length:.2f} ms")
    widths = [box["width"] for part in turn.locator(".legs span").all() if (box := part.bounding_box())]
    assert [width / sum(widths) for width in widths] == pytest.approx([12 / 116, 4 / 116, 100 / 116], abs=0.01)


def test_a_sum_that_is_not_the_routers_time_says_so(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = plain(trace=trace_of(SPLIT, second_token_s=0.005))
    turn = tab.ask("x")
    expect(turn.locator("tr.sum.off")).to_have_count(1)
    expect(turn.locator("tr.sum.off .track")).to_have_text("the router's own: 5.00 ms, which is not the sum")


def test_an_answer_of_one_token_has_one_part(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = plain(trace=trace_of(SPLIT[:4], kv_transfer=None))
    turn = tab.ask("x")
    assert len(rows(turn)) == 4
    expect(turn.locator("tr.sum")).to_have_count(1)
    expect(turn.locator(".facts")).to_contain_text("prompt and answer on one worker")


def test_phases_nobody_foresaw_are_drawn(tab: Visit, fake: FakeRouter) -> None:
    """More workers than colours, starts outside of the leg, a leg of no time."""
    odd = [phase("first_token", f"p{i}", 100.0 * i, 1.0, f"w{i}") for i in range(8)] + [phase("rest", "none", 0.0, 0.0)]
    fake.plot = plain(trace=trace_of(odd, second_token_s=0.0))
    turn = tab.ask("x")
    assert len(rows(turn)) == 9
    for bar in turn.locator(".bar i").all():
        drawn, track = bar.bounding_box(), bar.locator("..").bounding_box()
        assert drawn is not None and track is not None
        assert track["x"] - 0.1 <= drawn["x"] and drawn["x"] + drawn["width"] <= track["x"] + track["width"] + 0.1


def test_numbers_of_an_answer(tab: Visit, fake: FakeRouter) -> None:
    usage = last_chunk(trace_of(SPLIT, trace_id="4bf92f"), prompt=120, cached=64, generated=96)
    fake.plot = Plot([chat_chunk("x", ["x"], finish="length"), usage, DONE])
    turn = tab.ask("x")
    facts = turn.locator(".facts")
    for said in (
        "120 tokens", "64 cached", "96 tokens", "7 of 10", "70 % were right", "1.23 MB", "4 blocks over ucx in 2.10 ms",
        "12.00 ms at the router", "r-1, trace 4bf92f",
    ):  # fmt: skip
        expect(facts).to_contain_text(said)
    shown = re.search(r"First token([\d.]+) ms here", text_of(facts))
    assert shown is not None and 0 < float(shown[1]) < 10_000
    expect(turn.locator(".state")).to_have_text("· length")


def test_without_a_trace_there_are_text_and_usage(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = Plot([chat_chunk("hello"), last_chunk(None), DONE])
    turn = tab.ask("x")
    expect(turn.locator(".facts")).to_contain_text("12 tokens")
    expect(turn.locator(".waterfall")).to_have_count(0)
    expect(turn.get_by_role("button", name="Tokens")).to_be_disabled()


# -- tokens


def test_accepted_drafts_are_coloured(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = Plot(
        [
            chat_chunk("def f()", PIECES[:3], [1, 2]),
            chat_chunk("\n", finish="stop"),
            {"choices": [], "splitfire": {"choice": 0, "pieces": PIECES[3:], "accepted_drafts": []}},  # or by themselves
            {"choices": [], "splitfire": {"choice": 1, "pieces": ["other"], "accepted_drafts": [0]}},
            {"choices": [{"index": 1, "delta": {"content": "other"}}]},
            last_chunk(trace_of(SPLIT)),
            DONE,
        ]
    )
    turn = tab.ask("x")
    assert text_of(turn.locator(".output").first) == "def f()\n", "of several answers the first"
    expect(turn.locator(".tokens")).to_be_hidden()
    turn.get_by_role("button", name="Tokens").click()
    expect(turn.locator(".piece:not(.swatch)")).to_have_text(["def", " f", "()", "⏎\n"], use_inner_text=False)
    drafted = turn.locator(".tokens .drafted")
    assert drafted.all_inner_texts() == [" f", "()"]
    colours = {
        each.evaluate("e => getComputedStyle(e).backgroundColor") for each in turn.locator(".tokens .piece:not(.drafted)").all()
    }
    assert drafted.first.evaluate("e => getComputedStyle(e).backgroundColor") not in colours
    expect(turn.locator(".legend").first).to_contain_text("2 tokens proposed by a drafter and accepted")
    turn.get_by_role("button", name="Text").click()
    expect(turn.locator(".tokens")).to_be_hidden()


def test_an_answer_becomes_the_predicted_output(tab: Visit, fake: FakeRouter) -> None:
    fake.plot = plain("def f():\n    pass\n")
    turn = tab.ask("x")
    turn.get_by_role("button", name="Predict this").click()
    expect(tab.page.get_by_label("Predicted output")).to_have_value("def f():\n    pass\n")


# -- what goes wrong


def test_a_refusal_is_shown_in_full(tab: Visit, fake: FakeRouter) -> None:
    error = {
        "message": "temperature: is 9.0, accepted: 0 to 2", "type": "invalid_request_error", "param": "temperature",
        "code": "invalid_temperature", "request_id": "r-7",
    }  # fmt: skip
    fake.plot = Plot(status=400, error=error)
    turn = tab.ask("what I said")
    for said in ("400 invalid_request_error", *list(error.values())[:1], "paramtemperature", "codeinvalid_temperature", "r-7"):
        expect(turn.get_by_role("alert")).to_contain_text(said)
    expect(tab.page.locator("#said")).to_have_value("what I said")
    tab.expect_status(400)
    fake.plot = plain()
    tab.page.click("#send")
    tab.has_ended(tab.turns.nth(1))
    assert len(fake.asked[-1]["body"]["messages"]) == 1, "what was refused is not part of the conversation"


def test_an_error_in_the_middle_keeps_what_came(tab: Visit, fake: FakeRouter) -> None:
    error = {
        "message": "no worker is left", "type": "server_error", "param": None, "code": "no_worker", "incomplete": "true",
        "generated_tokens": "2",
    }  # fmt: skip
    fake.plot = Plot([chat_chunk("half", ["half"]), {"error": error}])
    turn = tab.ask("x")
    expect(turn.locator(".output").first).to_have_text("half")
    alert = turn.get_by_role("alert")
    for said in ("server_error", "no worker is left", "codeno_worker", "generated_tokens2"):
        expect(alert).to_contain_text(said)
    assert "param" not in text_of(alert)


@pytest.mark.parametrize("events", [[chat_chunk("half")], [chat_chunk("half"), b"data: {not json\n\n"]])
def test_a_stream_that_breaks_off_is_not_taken_for_an_answer(tab: Visit, fake: FakeRouter, events: list[Any]) -> None:
    fake.plot = Plot(events)
    turn = tab.ask("x")
    expect(turn.locator(".state")).to_have_text("· failed")
    expect(turn.get_by_role("alert")).to_be_visible()


def test_json_that_is_none_is_said_at_its_field(tab: Visit, fake: FakeRouter) -> None:
    num_asked = len(fake.asked)
    for wrong in ('{"a": ', "[1]"):
        tab.set(more=wrong)
        tab.page.fill("#said", "x")
        tab.page.click("#send")
        expect(tab.page.get_by_role("alert")).to_contain_text("Other parameters")
        expect(tab.page.get_by_label("Other parameters, as JSON")).to_be_focused()
        expect(tab.page.get_by_label("Other parameters, as JSON")).to_have_attribute("aria-invalid", "true")
    assert len(fake.asked) == num_asked
    expect(tab.page.locator("#said")).to_have_value("x")


# -- trust


def test_markup_of_the_server_is_text(browser: Browser, fake: FakeRouter) -> None:
    """Model, answer, tokens, phases, errors: a browser that ran any of it would set `owned`."""
    fake.model = MARKUP
    trace = trace_of([phase("first_token", MARKUP, 0.0, 1.0, MARKUP)], request_id=MARKUP, trace_id=MARKUP)
    with visit(browser, fake.origin) as tab:
        fake.plot = Plot([chat_chunk(MARKUP, [MARKUP], [0], finish=MARKUP), last_chunk(trace), DONE])
        turn = tab.ask(MARKUP)
        assert text_of(turn.locator(".output").first) == MARKUP
        turn.get_by_role("button", name="Tokens").click()
        expect(turn.locator(".piece.drafted").first).to_have_text(MARKUP)
        assert rows(turn)[0][:2] == [MARKUP, MARKUP]
        error = {"message": MARKUP, "type": MARKUP, "param": MARKUP, "code": MARKUP, MARKUP: {MARKUP: 1}}
        fake.plot = Plot(status=400, error=error)
        expect(tab.ask(MARKUP).get_by_role("alert")).to_contain_text(MARKUP)
        tab.expect_status(400)
        assert tab.page.evaluate("window.owned") is None
        expect(tab.page.locator("#turns img, #turns script, #turns b, header b")).to_have_count(0)
        assert text_of(tab.page.locator("#model")) == MARKUP


def test_the_policy_would_stop_what_got_in(tab: Visit) -> None:
    """Markup of a string, a script, code of a string, a style, a picture, another host: each is refused by the browser."""
    refused = tab.page.evaluate(
        """async () => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            const image = document.createElement("img");
            const script = document.createElement("script");
            const tries = [
                () => { document.body.innerHTML = "<b>x</b>"; },
                () => { script.textContent = "window.owned = 1"; document.body.append(script); },
                () => { setTimeout("window.owned = 1", 0); },
                () => { document.body.setAttribute("style", "color: red"); },
                () => { image.src = "/health"; },
                () => fetch("http://127.0.0.2:9/"),
            ];
            for (const attempt of tries) {
                try { await attempt(); } catch { /* some are also thrown */ }
                await new Promise((resolve) => requestAnimationFrame(resolve));
            }
            return refused;
        }"""
    )
    markup = "require-trusted-types-for"
    assert refused == [markup, markup, markup, "style-src-attr", "img-src", "connect-src"]
    assert tab.page.evaluate("window.owned") is None
    tab.problems.clear()  # the browser reports each
    tab.foreign.clear()


def test_the_key_is_kept_for_the_tab_only(browser: Browser, fake: FakeRouter) -> None:
    fake.plot = plain()
    with visit(browser, fake.origin) as tab:
        tab.ask("x")
        assert fake.asked[-1]["authorization"] == ""
        tab.page.get_by_label("API key").fill("sf-secret")
        tab.page.get_by_label("API key").press("Tab")
        tab.page.reload()
        tab.ask("y")
        assert {asked["authorization"] for asked in fake.asked[-2:]} == {"Bearer sf-secret"}, "for the model's name too"
        kept = tab.page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]")
        assert kept == [{"splitfire-api-key": "sf-secret"}, {}, ""]
        assert "sf-secret" not in text_of(tab.page.locator("body"))
        assert "sf-secret" not in tab.page.url
    with visit(browser, fake.origin) as other:
        expect(other.page.get_by_label("API key")).to_have_value("")


# -- hands and eyes


def test_everything_can_be_done_by_keyboard(tab: Visit, fake: FakeRouter) -> None:
    keyboard = tab.page.keyboard
    expect(tab.page.locator("#said")).to_be_focused()
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    fake.plot = Plot([chat_chunk("half", ["half"]), HOLD])
    keyboard.press("Enter")
    turn = tab.turns.first
    expect(turn.locator(".output").first).to_have_text("half")
    assert fake.asked[-1]["body"]["messages"][0]["content"] == "one\ntwo"
    keyboard.press("Escape")
    assert fake.has_lost_client.wait(10)
    expect(turn.locator(".state")).to_have_text("· stopped by you")
    seen = []
    for _ in range(40):  # backwards, to the buttons of the answer
        keyboard.press("Shift+Tab")
        seen.append(tab.page.evaluate("document.activeElement.textContent"))
        if seen[-1] == "Tokens":
            break
    assert seen[-1] == "Tokens", seen
    keyboard.press("Space")
    expect(turn.locator(".tokens")).to_be_visible()
    tab.page.get_by_label("Chat", exact=True).focus()
    keyboard.press("ArrowRight")
    expect(tab.page.get_by_label("Completion", exact=True)).to_be_checked()
    expect(tab.page.get_by_label("Prompt", exact=True)).to_be_visible()


def test_focus_goes_through_the_page_in_order(tab: Visit) -> None:
    order = []
    tab.page.locator("#api-key").focus()
    for _ in range(30):
        tab.page.keyboard.press("Tab")
        order.append(tab.page.evaluate("document.activeElement.id"))
    wanted = ["turns", "said", "clear", "send", "system", "temperature", "top_p", "top_k", "max_tokens", "seed"]
    wanted += ["stop_texts", "format", "predicted", "more", "trace"]
    assert [each for each in order if each in wanted][: len(wanted)] == wanted, "then it begins again"


@pytest.mark.parametrize(("width", "height"), [(320, 640), (768, 900), (1920, 1080)])
def test_no_window_is_too_narrow(browser: Browser, fake: FakeRouter, width: int, height: int) -> None:
    fake.plot = Plot([chat_chunk("x" * 500 + " word" * 50, ["x" * 500]), last_chunk(trace_of(SPLIT)), DONE])
    with visit(browser, fake.origin, width, height) as tab:
        is_open = tab.page.locator("#drawer").evaluate("e => e.open")
        assert is_open == (width > 960), "folded where there is no room"
        turn = tab.ask("y" * 300)
        assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for box in (turn.locator(".waterfall"), turn.locator(".facts")):
            bounds = box.bounding_box()
            assert bounds is not None and bounds["x"] >= 0 and bounds["x"] + bounds["width"] <= width
        track = turn.locator(".track").last.bounding_box()
        assert track is not None and track["width"] > 50
        expect(tab.page.locator("#said")).to_be_in_viewport()
        if not is_open:
            tab.page.get_by_text("Parameters", exact=True).press("Enter")
            expect(tab.page.get_by_label("Temperature")).to_be_visible()


def test_it_is_dark_where_that_is_wanted(browser: Browser, fake: FakeRouter) -> None:
    fake.plot = plain()
    shades = []
    for is_dark in (False, True):
        with visit(browser, fake.origin, is_dark=is_dark) as tab:
            turn = tab.ask("x")
            shades.append(
                [
                    box.evaluate("(e, name) => getComputedStyle(e)[name]", name)
                    for box, name in ((tab.page.locator("body"), "backgroundColor"), (turn.locator(".text").last, "color"))
                ]
            )
    luminance = [[sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in each] for each in shades]
    assert luminance[0][0] > 600 > 200 > luminance[0][1], "dark on light"
    assert luminance[1][0] < 200 < 600 < luminance[1][1], "light on dark"
