"""Calls are found in what a model writes, however it is cut into pieces; what only looks like one stays text."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from router.openai.answers import ChatAnswer, UsageShown
from router.openai.requests import ChatBody, read
from router.openai.tools import Forced, Free, Named, Reader, call_schema
from splitfire.core.errors import InvalidInput
from splitfire.v1 import inference_pb2 as pb

NAMES = {"weather", "time"}
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time"}},
]


def hermes(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def pieces(text: str, seed: int) -> list[str]:
    draw = Random(seed)
    cuts = sorted(draw.sample(range(len(text) + 1), k=min(len(text), draw.randrange(1, 12))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def read_all(reader: Reader, parts: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    text, calls = "", dict[int, list[str]]()
    for said in (*map(reader.push, parts), reader.end()):
        text += said.text
        for part in said.calls:
            if part.name is not None:
                assert part.index == len(calls)
                calls[part.index] = [part.name, ""]
            calls[part.index][1] += part.arguments
    return text, [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize(
    ("written", "text", "calls"),
    [
        ("Hello <b>there</b>", "Hello <b>there</b>", []),
        ("", "", []),
        (hermes("time"), "", [("time", {})]),
        ("I look.\n" + hermes("weather", city="Oslo"), "I look.", [("weather", {"city": "Oslo"})]),
        (hermes("time") + "\n" + hermes("weather", city="Rom"), "", [("time", {}), ("weather", {"city": "Rom"})]),
        (hermes("nobody"), hermes("nobody"), []),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("<tool_call>\n" + '{"name": "time", "arguments": {}}', "", [("time", {})]),  # cut before its end
        ("a <tool", "a <tool", []),
        ('{"name": "weather", "parameters": {"city": "Bern"}}', "", [("weather", {"city": "Bern"})]),
        ('\n[{"name": "time", "arguments": {}}, {"name": "time", "arguments": {}}]', "", [("time", {}), ("time", {})]),
        ('{"answer": 42}', '{"answer": 42}', []),
        ('[{"name": "time"}, 3]', '[{"name": "time"}, 3]', []),
        ('{"name": ["time"]}', '{"name": ["time"]}', []),
    ],
)
def test_free(written: str, text: str, calls: list[tuple[str, Any]]) -> None:
    for seed in range(30):
        assert read_all(Free(NAMES), pieces(written, seed)) == (text, calls)


def test_text_before_a_call_is_not_held_back() -> None:
    assert Free(NAMES).push("It is <b> and <tool").text == "It is <b> and "


def test_forced_and_named() -> None:
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert read_all(Forced(NAMES), pieces(call, 1)) == ("", [("weather", {"city": "Oslo"})])
    assert read_all(Forced(NAMES), ['{"name": "wea']) == ('{"name": "wea', [])
    assert read_all(Named("weather"), pieces('{"city": "Oslo"}', 2)) == ("", [("weather", {"city": "Oslo"})])


def chat(**given: Any) -> pb.GenerateRequest:
    return read(ChatBody, {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, **given}).request()


def test_tools_that_may_be_called_are_shown_and_one_that_must_be_is_a_form() -> None:
    free = chat()
    assert [(tool.name, tool.description) for tool in free.tools] == [("weather", "of a city"), ("time", "")]
    assert json.loads(free.tools[0].parameters) == WEATHER
    assert not free.HasField("response_format")
    assert not chat(tool_choice="none").tools
    named = chat(tool_choice={"type": "function", "function": {"name": "weather"}})
    assert not named.tools
    assert json.loads(named.response_format.json_schema) == WEATHER
    forced = json.loads(chat(tool_choice="required").response_format.json_schema)
    assert [one["properties"]["name"]["const"] for one in forced["anyOf"]] == ["weather", "time"]
    assert call_schema([("time", {})])["properties"]["name"] == {"const": "time"}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice.function.name"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0]"),
    ],
)
def test_what_cannot_be_chosen_is_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        chat(**given)
    assert caught.value.field.startswith(field)


def test_what_was_called_goes_back_to_the_model() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    _, called, answered = chat(messages=messages).messages
    assert called.tool_calls[0] == pb.ToolCall(id="c1", name="weather", arguments='{"city": "Oslo"}')
    assert (answered.role, answered.content, answered.tool_call_id) == ("tool", "rain", "c1")


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_of_calls_is_what_the_whole_answer_has(seed: int) -> None:
    written = "Wait.\n" + hermes("weather", city="Oslo") + "\n" + hermes("time")
    parts = pieces(written, seed)
    responses = [pb.GenerateResponse(text=part) for part in parts]
    responses[-1].finish_reason = pb.FINISH_REASON_STOP
    streamed, whole = (
        ChatAnswer("chatcmpl-r", "m", 0, "f", lambda _: b"", lambda: Free(NAMES), UsageShown.NEVER, 0) for _ in range(2)
    )
    deltas = []
    for response in responses:
        events = streamed.chunk(response).decode().split("\n\n")
        deltas += [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event]
        whole.take(response)
    [choice] = json.loads(whole.whole(pb.Summary()))["choices"]
    assert "".join(d["delta"].get("content", "") for d in deltas) == choice["message"]["content"] == "Wait."
    calls = [call for d in deltas for call in d["delta"].get("tool_calls", [])]
    assert [{k: v for k, v in call.items() if k != "index"} for call in calls] == choice["message"]["tool_calls"]
    assert [call["index"] for call in calls] == [0, 1]
    assert deltas[-1]["finish_reason"] == choice["finish_reason"] == "tool_calls"
