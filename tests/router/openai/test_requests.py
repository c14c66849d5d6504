"""OpenAI's parameters become fields of ours; what has the wrong shape, or is not known, is named."""

from __future__ import annotations

from typing import Any

import pytest

from router.openai.requests import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, read
from splitfire.core.errors import InvalidInput, SplitfireError
from splitfire.v1 import inference_pb2 as pb

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**given: Any) -> pb.GenerateRequest:
    return read(ChatBody, {"messages": HELLO, **given}).request()


def completion(**given: Any) -> pb.GenerateRequest:
    [request] = read(CompletionBody, {"prompt": "Hello", **given}).requests()
    return request


def test_every_parameter_reaches_its_field() -> None:
    request = chat(
        model="m", n=2, temperature=0.5, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.2, logit_bias={"5": -1.5}, seed=7,
        stop=["a", "b"], user="somebody", top_k=4, min_p=0.05, repetition_penalty=1.1, min_tokens=1, stop_token_ids=[9],
        ignore_eos=True, request_id="r", prompt_cache_key="s", service_tier="flex", metadata={"a": "b"}, max_completion_tokens=11,
        logprobs=True, top_logprobs=3, prediction={"type": "content", "content": "soon"},
    )  # fmt: skip
    assert request == pb.GenerateRequest(
        model="m", n=2, request_id="r", session_id="s", priority=pb.PRIORITY_BATCH, metadata={"a": "b"}, predicted_output="soon",
        messages=[pb.ChatMessage(role="user", content="Hello")],
        sampling=pb.SamplingParams(
            temperature=0.5, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.2, logit_bias={5: -1.5}, seed=7, top_k=4, min_p=0.05,
            repetition_penalty=1.1, logprobs=3,
        ),
        stopping=pb.StoppingParams(max_tokens=11, min_tokens=1, stop=["a", "b"], stop_token_ids=[9], ignore_eos=True),
    )  # fmt: skip


def test_what_is_not_said_is_not_set() -> None:
    assert chat() == pb.GenerateRequest(
        messages=[pb.ChatMessage(role="user", content="Hello")], sampling=pb.SamplingParams(), stopping=pb.StoppingParams()
    )
    assert completion().stopping.max_tokens == 16
    assert not chat(logprobs=False).sampling.HasField("logprobs")


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_a_prompt_may_be_ids(prompt: Any) -> None:
    request = completion(prompt=prompt)
    assert list(request.prompt_token_ids) == [1, 2]
    assert not request.HasField("text")


@pytest.mark.parametrize("prompts", [["a", "b", "a"], [[1, 2], [3], [4]]])
def test_several_prompts_are_a_request_each(prompts: Any) -> None:
    requests = read(CompletionBody, {"prompt": prompts, "temperature": 0.5, "n": 2, "logprobs": 1}).requests()
    assert [request.text or list(request.prompt_token_ids) for request in requests] == prompts
    assert {(request.sampling.temperature, request.n, request.sampling.logprobs) for request in requests} == {(0.5, 2, 1)}


def test_parts_of_a_message_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": "be short"}, {"role": "user", "content": parts}])
    assert [(m.role, m.content) for m in request.messages] == [("system", "be short"), ("user", "ab")]


@pytest.mark.parametrize(
    ("asked", "kind", "text"),
    [
        ({"type": "text"}, pb.ResponseFormat.TYPE_TEXT, ""),
        ({"type": "json_object"}, pb.ResponseFormat.TYPE_JSON_OBJECT, ""),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            pb.ResponseFormat.TYPE_JSON_SCHEMA,
            '{"type": "object"}',
        ),
        ({"type": "regex", "regex": "a+"}, pb.ResponseFormat.TYPE_REGEX, "a+"),
        ({"type": "grammar", "grammar": "root ::= 'a'"}, pb.ResponseFormat.TYPE_GRAMMAR, "root ::= 'a'"),
    ],
)  # fmt: skip
def test_formats(asked: dict[str, Any], kind: pb.ResponseFormat.Type.ValueType, text: str) -> None:
    made = chat(response_format=asked).response_format
    assert made.type == kind
    assert made.json_schema + made.regex + made.grammar == text


@pytest.mark.parametrize(
    ("given", "field", "error"),
    [
        ({"temperatur": 1.0}, "temperatur", InvalidInput),
        ({"temperature": "hot"}, "temperature", InvalidInput),
        ({"n": 1.5}, "n", InvalidInput),
        ({"n": 2**40}, "n", InvalidInput),
        ({"seed": 2**63}, "seed", InvalidInput),
        ({"logit_bias": {"x": 1}}, "logit_bias", InvalidInput),
        ({"logit_bias": {"1" * 400: 1}}, "logit_bias", InvalidInput),
        ({"messages": "hi"}, "messages", InvalidInput),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", InvalidInput),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content",
            InvalidInput,
        ),
        ({"stream_options": {"include_usages": True}}, "stream_options.include_usages", InvalidInput),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", InvalidInput),
        ({"top_logprobs": 2}, "top_logprobs", InvalidInput),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", InvalidInput),
        ({"response_format": {"type": "xml"}}, "response_format.type", InvalidInput),
        ({"tools": [{"type": "function"}]}, "tools[0].function", InvalidInput),
        ({"functions": []}, "functions", InvalidInput),
        ({"service_tier": "gold"}, "service_tier", InvalidInput),
        ({"store": True}, "store", InvalidInput),
    ],
)
def test_what_a_chat_may_not_say_is_named(given: dict[str, Any], field: str, error: type[SplitfireError]) -> None:
    with pytest.raises(error) as caught:
        chat(**given)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 4}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_a_completion_may_not_say_is_named(given: dict[str, Any], field: str) -> None:
    with pytest.raises(SplitfireError) as caught:
        completion(**given)
    assert caught.value.field.startswith(field)


def test_tokenize_and_detokenize() -> None:
    assert read(TokenizeBody, {"prompt": "a"}).request() == pb.TokenizeRequest(text="a")
    assert read(TokenizeBody, {"messages": HELLO}).request().messages[0].role == "user"
    assert read(DetokenizeBody, {"tokens": [1, 2]}).tokens == [1, 2]
    with pytest.raises(InvalidInput, match="tokens"):
        read(DetokenizeBody, {"tokens": [1.5]})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt": [1] * 20_000 + [1.5]}, "prompt"),
        ({"prompt": [[1.5]] * 20_000}, "prompt"),
        ({"prompt": "x", "logit_bias": {str(n): "a" for n in range(20_000)}}, "logit_bias"),
        ({"prompt": "x", "stop": [[["a"] * 100] * 100] * 2}, "stop"),
    ],
)
def test_a_body_of_many_mistakes_is_refused_before_they_are_counted(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match="holds too many values, accepted: at most 16384") as caught:
        read(CompletionBody, given)
    assert caught.value.field == field


def test_long_prompts_of_ids_are_not_many_values() -> None:
    [request] = read(CompletionBody, {"prompt": [7] * 100_000}).requests()
    assert len(request.prompt_token_ids) == 100_000
