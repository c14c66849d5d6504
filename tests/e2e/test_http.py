"""OpenAI's API over real HTTP, with OpenAI's own client: the same answers as over gRPC, and errors that its users know."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from splitfire.cli.supervisor import free_port
from splitfire.v1 import inference_pb2 as pb
from tests.e2e.fleets import RunningFleet, start_fleet, until
from tests.e2e.test_tenants import key, table

HELLO: Any = [{"role": "user", "content": "def fibonacci(n):"}]
TEXT = "def fibonacci(n):\n"
DEFAULTS: Any = {"model": "pico", "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


class Door:
    """A fleet and a client of its HTTP port."""

    def __init__(self, fleet: RunningFleet, port: int) -> None:
        self.fleet = fleet
        self.port = port
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)

    def chat(self, **given: Any) -> Any:
        return self.client.chat.completions.create(**{**DEFAULTS, "messages": HELLO, **given})

    def complete(self, **given: Any) -> Any:
        return self.client.completions.create(**{**DEFAULTS, "prompt": TEXT, **given})

    def by_grpc(self, **given: Any) -> str:
        stopping = pb.StoppingParams(max_tokens=24, ignore_eos=True)
        return self.fleet.generate(pb.GenerateRequest(sampling=pb.SamplingParams(temperature=0), stopping=stopping, **given))[
            0
        ].text

    def raw(self, request: bytes) -> bytes:
        """All that is answered."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            told = b""
            with contextlib.suppress(TimeoutError):
                connection.settimeout(2)
                while chunk := connection.recv(1 << 16):
                    told += chunk
        return told

    def post(self, path: str, body: bytes, *lines: str) -> tuple[int, dict[str, Any]]:
        head = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}", *lines, "", ""]
        told = self.raw("\r\n".join(head).encode() + body)
        return int(told.split()[1]), json.loads(told.partition(b"\r\n\r\n")[2] or b"{}")


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    port = free_port()
    with start_fleet("pico", router=("--split=always", f"--http-port={port}")) as fleet:
        yield Door(fleet, port)


# -- answers


def test_a_chat_says_what_grpc_says(door: Door) -> None:
    expected = door.by_grpc(messages=[pb.ChatMessage(**message) for message in HELLO])
    whole = door.chat()
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.model == "pico"
    assert whole.usage.completion_tokens == 24
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 24


def test_a_chat_streams(door: Door) -> None:
    chunks = list(door.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == door.chat().choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len(chunks) > 3, "as it comes"
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == 24
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])


def test_a_completion_says_what_grpc_says(door: Door) -> None:
    expected = door.by_grpc(text=TEXT)
    ids = list(door.fleet.stub.Tokenize(pb.TokenizeRequest(text=TEXT)).token_ids)
    assert door.complete().choices[0].text == door.complete(prompt=ids).choices[0].text == expected
    assert "".join(c.choices[0].text for c in door.complete(stream=True)) == expected


def test_choices_seeds_and_stops(door: Door) -> None:
    both = [door.chat(n=2, temperature=1.0, seed=5) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in both]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    streamed = ["", ""]
    for chunk in door.chat(n=2, temperature=1.0, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts[0]
    whole = door.complete().choices[0].text
    stop = whole[8:11]
    cut = door.complete(stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_log_probabilities(door: Door) -> None:
    [choice] = door.chat(logprobs=True, top_logprobs=2, max_tokens=8).choices
    assert len(choice.logprobs.content) == 8
    for token in choice.logprobs.content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs), "greedy takes the likeliest"
        assert len(token.top_logprobs) == 2
        assert bytes(token.bytes).decode(errors="replace") == token.token
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == choice.message.content
    [choice] = door.complete(logprobs=2, max_tokens=8).choices
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [sum(map(len, choice.logprobs.tokens[:i])) for i in range(8)]
    streamed = [c.choices[0].logprobs for c in door.complete(logprobs=2, max_tokens=8, stream=True)]
    assert [offset for part in streamed if part for offset in part.text_offset] == choice.logprobs.text_offset


def test_a_schema_is_kept_to(door: Door) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    [choice] = door.chat(response_format=form, max_tokens=200, temperature=1.0, seed=3, extra_body={}).choices
    made = json.loads(choice.message.content)
    assert isinstance(made["n"], int)
    assert choice.finish_reason == "stop"


def test_models_and_tokens(door: Door) -> None:
    assert [model.id for model in door.client.models.list()] == ["pico"]
    assert door.client.models.retrieve("pico").owned_by == "splitfire"
    status, made = door.post("/tokenize", json.dumps({"prompt": TEXT}).encode(), "Content-Type: application/json")
    assert status == 200 and made["count"] == len(made["tokens"])
    assert made["tokens"] == list(door.fleet.stub.Tokenize(pb.TokenizeRequest(text=TEXT)).token_ids)
    body = json.dumps({"tokens": made["tokens"]}).encode()
    assert door.post("/detokenize", body, "Content-Type: application/json") == (200, {"prompt": TEXT})


def test_who_goes_away_costs_nothing_more(door: Door) -> None:
    stream = door.complete(max_tokens=1900, temperature=1.5, stream=True)
    next(iter(stream))
    stream.close()
    door.fleet.assert_no_leaks()


# -- refusals


@pytest.mark.parametrize(
    ("given", "error", "code", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "invalid_temperature", "temperature"),
        ({"model": "gpt-5"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, openai.BadRequestError, "context_length_exceeded", "prompt"),
        ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        ({"extra_body": {"temperatur": 1}}, openai.BadRequestError, "invalid_temperatur", "temperatur"),
        ({"n": 99}, openai.BadRequestError, "invalid_n", "n"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "invalid_stop", "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_names_parameter_and_code(
    door: Door, given: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str, stream: bool
) -> None:
    with pytest.raises(error) as caught:
        door.chat(**given, stream=stream)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 10**5, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 10**6 + b"}", 400, "invalid_json"),
        (b"x" * (5 << 20), 413, "body_too_large"),
    ],
)
def test_bodies_that_are_none(door: Door, body: bytes, status: int, code: str) -> None:
    """B47."""
    told, answer = door.post("/v1/completions", body, "Content-Type: application/json")
    assert (told, answer["error"]["code"]) == (status, code)
    assert door.post("/v1/completions", b'{"prompt": "a"}', "Content-Type: text/plain")[0] == 415
    assert door.complete(max_tokens=2).choices[0].text, "and others are served"


@pytest.mark.parametrize(
    "path", ["/v1//completions", "/v1/completions;x", "/V1/completions", "/%2e%2e/", "/v1/completions/", "/admin"]
)
def test_paths_are_these_and_no_others(door: Door, path: str) -> None:
    """B48."""
    assert door.post(path, b"{}", "Content-Type: application/json")[0] == 404


def test_another_method_is_told_which(door: Door) -> None:
    told = door.raw(b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 405") and b"POST" in told


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("Origin: http://evil.example", 403),
        ("Origin: null", 403),
        ("Origin: http://[", 403),
        ("Origin: http://localhost", 400),
        ("Origin: http://localhost:1", 403),
    ],
)
def test_pages_from_elsewhere_are_refused(door: Door, line: str, status: int) -> None:
    """B49; those of this server may ask."""
    assert door.post("/v1/completions", b"{}", "Content-Type: application/json", line)[0] == status


def test_a_name_that_was_rebound_is_refused(door: Door) -> None:
    """B49."""
    told = door.raw(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 403")


def test_health_is_that_of_the_fleet(door: Door) -> None:
    def status() -> bytes:
        return door.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[:12]

    until(lambda: status() == b"HTTP/1.1 200")


def test_with_keys_every_path_wants_one(tmp_path: Path) -> None:
    """B40, B48: OpenAI's clients send theirs as they always do."""
    keys, port = tmp_path / "keys.toml", free_port()
    keys.touch(mode=0o600)
    keys.write_text(table("alice") + table("ops", "admin = true"))
    with start_fleet("pico", router=("--split=always", f"--http-port={port}", f"--keys-file={keys}")) as fleet:
        for name, status in (("nobody", 401), ("alice", 200), ("alice", 403), ("ops", 404)):
            door = Door(fleet, port)
            path = "/v1/secret" if status in (403, 404) else "/tokenize"
            lines = ("Content-Type: application/json", f"Authorization: Bearer {key(name)}")
            assert door.post(path, b'{"prompt": "a"}', *lines)[0] == status
        assert door.post("/tokenize", b'{"prompt": "a"}', "Content-Type: application/json")[0] == 401
        assert door.post("/nothing", b"{}", "Content-Type: application/json")[0] == 401, "nobody is told what there is"
        assert door.client.with_options(api_key=key("alice")).completions.create(model="pico", prompt="a", max_tokens=1).usage
        with pytest.raises(openai.AuthenticationError):
            door.client.models.list()


# -- tools


def weather(**more: Any) -> Any:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return [{"type": "function", "function": {"name": "weather", "parameters": schema, **more}}]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made(door: Door, choice: Any) -> None:
    given = {"tools": weather(), "tool_choice": choice, "max_tokens": 300, "temperature": 1.0, "seed": 4, "extra_body": {}}
    [whole] = door.chat(**given).choices
    [call] = whole.message.tool_calls
    assert whole.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert list(json.loads(call.function.arguments)) == ["city"]
    assert whole.message.content is None
    name, arguments = "", ""
    for chunk in door.chat(**given, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            name += part.function.name or ""
            arguments += part.function.arguments or ""
    assert (name, arguments) == ("weather", call.function.arguments)


def test_tools_that_the_model_could_not_see_are_refused(door: Door) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        door.chat(tools=weather())
    assert (caught.value.code, caught.value.param) == ("unsupported_tools", "tools")


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_a_stream_that_asks_for_it_says_where_its_time_went(door: Door, kind: str) -> None:
    ask = door.chat if kind == "chat" else door.complete
    chunks = list(ask(stream=True, extra_body={"ignore_eos": True, "include_trace": True}))
    told = [chunk.model_extra["splitfire"] for chunk in chunks if "splitfire" in chunk.model_extra]
    *pieces, trace = told
    text = "".join(piece for one in pieces for piece in one["pieces"])
    parts = [(c.delta.content if kind == "chat" else c.text) or "" for chunk in chunks for c in chunk.choices]
    assert text.replace("<|endoftext|>", "") == "".join(parts), "special tokens are tokens, and no text"
    assert sum(len(one["pieces"]) for one in pieces) == 24
    accepted = sum(len(one["accepted_drafts"]) for one in pieces)
    assert accepted == trace["drafts"]["accepted"] <= trace["drafts"]["proposed"]
    for leg in ("first_token", "second_token", "rest"):
        phases = [phase for phase in trace["phases"] if phase["leg"] == leg]
        assert sum(phase["duration_s"] for phase in phases) == pytest.approx(trace[f"{leg}_s"], abs=1e-9)
    assert trace["kv_transfer"]["bytes"] > 0
    assert chunks[-1].usage is None, "that is asked for by itself"


def test_whole_answers_say_it_too_and_nobody_else_is_told(door: Door) -> None:
    whole = door.chat(extra_body={"include_trace": True})
    assert whole.model_extra["splitfire"]["first_token_s"] > 0
    assert "splitfire" not in door.chat().model_extra
