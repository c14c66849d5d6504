"""Group A of bad inputs at the validator: every row gets its typed error, naming the field and what is accepted.

Rows that need a server (B06, B07, B28, B32, B38-B50) are in tests/e2e/test_bad_requests.py and tests/router/test_text.py.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from splitfire.core import limits
from splitfire.core.errors import Code, InvalidInput, SplitfireError
from splitfire.core.model_config import GenerationDefaults
from splitfire.core.ranges import check_sampling, check_stopping
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.validation import ModelLimits, ValidRequest, check_predicted, check_request, resolve_stopping
from splitfire.v1 import inference_pb2 as pb

MODEL = ModelLimits("pico", vocab_size=4096, context_length=2048, eos_token_ids=(0,), has_chat_template=True)
NAN, INF = math.nan, math.inf


def request(text: str | None = "hello", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, **fields)


def sampled(**fields: Any) -> pb.GenerateRequest:
    return request(sampling=pb.SamplingParams(**fields))


def stopped(**fields: Any) -> pb.GenerateRequest:
    return request(stopping=pb.StoppingParams(**fields))


def formatted(kind: str = "TEXT", **fields: Any) -> pb.GenerateRequest:
    return request(response_format=pb.ResponseFormat(type=pb.ResponseFormat.Type.Value(f"TYPE_{kind}"), **fields))


def refusal(message: pb.GenerateRequest, model: ModelLimits = MODEL) -> SplitfireError:
    with pytest.raises(SplitfireError) as caught:
        check_request(message, model)
    assert "\n" not in str(caught.value)
    return caught.value


def accepted(message: pb.GenerateRequest, model: ModelLimits = MODEL) -> ValidRequest:
    return check_request(message, model)


BAD: list[tuple[str, pb.GenerateRequest, str]] = [
    ("B01 nothing", pb.GenerateRequest(), "prompt"),
    ("B01 empty text", request(""), "prompt"),
    ("B02 text and ids", request(prompt_token_ids=[1]), "prompt"),
    ("B02 text and messages", request(messages=[pb.ChatMessage(role="user", content="x")]), "prompt"),
    ("B10 id = vocabulary", pb.GenerateRequest(prompt_token_ids=[1, 4096]), "prompt_token_ids[1]"),
    ("B10 id -1", pb.GenerateRequest(prompt_token_ids=[-1]), "prompt_token_ids[0]"),
    ("B10 id 2^31-1", pb.GenerateRequest(prompt_token_ids=[2**31 - 1]), "prompt_token_ids[0]"),
    ("B10 id 2^63-1", pb.GenerateRequest(prompt_token_ids=[2**63 - 1]), "prompt_token_ids[0]"),
    ("B12 max_tokens 0", stopped(max_tokens=0), "stopping.max_tokens"),
    ("B12 max_tokens -1", stopped(max_tokens=-1), "stopping.max_tokens"),
    ("B12 max_tokens 2^31", stopped(max_tokens=2**31), "stopping.max_tokens"),
    ("B12 max_tokens 2^63-1", stopped(max_tokens=2**63 - 1), "stopping.max_tokens"),
    ("B13 min_tokens alone", stopped(min_tokens=10**9), "stopping.min_tokens"),
    ("B13 min_tokens -1", stopped(min_tokens=-1), "stopping.min_tokens"),
    ("B14 min over max", stopped(min_tokens=5, max_tokens=4), "stopping.min_tokens"),
    ("B15 temperature -1", sampled(temperature=-1), "sampling.temperature"),
    ("B15 temperature NaN", sampled(temperature=NAN), "sampling.temperature"),
    ("B15 temperature Inf", sampled(temperature=INF), "sampling.temperature"),
    ("B15 temperature 1e308", sampled(temperature=1e308), "sampling.temperature"),
    ("B16 top_p 0", sampled(top_p=0), "sampling.top_p"),
    ("B16 top_p -0.1", sampled(top_p=-0.1), "sampling.top_p"),
    ("B16 top_p 1.0001", sampled(top_p=1.0001), "sampling.top_p"),
    ("B16 top_p NaN", sampled(top_p=NAN), "sampling.top_p"),
    ("B17 top_k -2", sampled(top_k=-2), "sampling.top_k"),
    ("min_p 1.5", sampled(min_p=1.5), "sampling.min_p"),
    ("B18 repetition NaN", sampled(repetition_penalty=NAN), "sampling.repetition_penalty"),
    ("B18 repetition 0", sampled(repetition_penalty=0), "sampling.repetition_penalty"),
    ("B18 repetition 1e30", sampled(repetition_penalty=1e30), "sampling.repetition_penalty"),
    ("B18 presence 1e30", sampled(presence_penalty=1e30), "sampling.presence_penalty"),
    ("B28 schema without its type", formatted(json_schema="{}"), "response_format.json_schema"),
    ("B28 regex beside a schema", formatted("JSON_SCHEMA", json_schema="{}", regex="a"), "response_format.regex"),
    ("B28 grammar beside an object", formatted("JSON_OBJECT", grammar="a"), "response_format.grammar"),
    ("B28 no schema", formatted("JSON_SCHEMA"), "response_format.json_schema"),
    ("B28 no regex", formatted("REGEX"), "response_format.regex"),
    ("B28 no grammar", formatted("GRAMMAR"), "response_format.grammar"),
    ("B28 unknown type", request(response_format=pb.ResponseFormat(type=9)), "response_format.type"),  # type: ignore[arg-type]
    ("B28 one over", formatted("REGEX", regex="a" * (limits.MAX_FORMAT_CHARS + 1)), "response_format.regex"),
    ("B28 3 MB", formatted("GRAMMAR", grammar="a" * 3_000_000), "response_format.grammar"),
    ("B28 not JSON", formatted("JSON_SCHEMA", json_schema="{'a': 1}"), "response_format.json_schema"),
    ("B28 NaN", formatted("JSON_SCHEMA", json_schema='{"minimum": NaN}'), "response_format.json_schema"),
    ("B28 no object", formatted("JSON_SCHEMA", json_schema="[]"), "response_format.json_schema"),
    ("B28 bomb", formatted("JSON_SCHEMA", json_schema='{"a":' * 9000 + "1" + "}" * 9000), "response_format.json_schema"),
    (
        "B28 wide bomb",
        formatted("JSON_SCHEMA", json_schema='{"a":' + "[" * 30_000 + "]" * 30_000 + "}"),
        "response_format.json_schema",
    ),
    ("B18 presence NaN", sampled(presence_penalty=NAN), "sampling.presence_penalty"),
    ("B18 frequency 1e30", sampled(frequency_penalty=1e30), "sampling.frequency_penalty"),
    ("B18 frequency NaN", sampled(frequency_penalty=NAN), "sampling.frequency_penalty"),
    ("B19 seed -1", sampled(seed=-1), "sampling.seed"),
    ("B20 n 0", request(n=0), "n"),
    ("B20 n -1", request(n=-1), "n"),
    ("B20 n 10^6", request(n=10**6), "n"),
    ("B20 n 9", request(n=limits.MAX_N + 1), "n"),
    ("B21 logprobs 10^6", sampled(logprobs=10**6), "sampling.logprobs"),
    ("B21 logprobs 21", sampled(logprobs=limits.MAX_LOGPROBS + 1), "sampling.logprobs"),
    ("B21 logprobs -1", sampled(logprobs=-1), "sampling.logprobs"),
    ("B22 bias id", sampled(logit_bias={4096: 1.0}), "sampling.logit_bias"),
    ("B22 bias id -1", sampled(logit_bias={-1: 1.0}), "sampling.logit_bias"),
    ("B22 bias NaN", sampled(logit_bias={1: NAN}), "sampling.logit_bias"),
    ("B22 bias Inf", sampled(logit_bias={1: INF}), "sampling.logit_bias"),
    ("B22 bias -Inf", sampled(logit_bias={1: -INF}), "sampling.logit_bias"),
    ("B22 too many", sampled(logit_bias=dict.fromkeys(range(limits.MAX_LOGIT_BIAS + 1), 1.0)), "sampling.logit_bias"),
    ("B25 stop id", stopped(stop_token_ids=[4096]), "stopping.stop_token_ids[0]"),
    ("B25 stop id 2^31-1", stopped(stop_token_ids=[2**31 - 1]), "stopping.stop_token_ids[0]"),
    ("B25 stop id -1", stopped(stop_token_ids=[5, -1]), "stopping.stop_token_ids[1]"),
    ("stop ids", stopped(stop_token_ids=[1] * (limits.MAX_STOP_TOKEN_IDS + 1)), "stopping.stop_token_ids"),
    ("stop strings", stopped(stop=["x"] * (limits.MAX_STOP_STRINGS + 1)), "stopping.stop"),
    ("stop string long", stopped(stop=["x" * (limits.MAX_STOP_CHARS + 1)]), "stopping.stop[0]"),
    ("stop string empty", stopped(stop=["a", ""]), "stopping.stop[1]"),
    ("B26 model name 10 KB", request(model="m" * 10_000), "model"),
    ("B26 model NUL", request(model="pico\0"), "model"),
    ("B29 unknown role", pb.GenerateRequest(messages=[pb.ChatMessage(role="root\n", content="x")]), "messages[0].role"),
    ("B29 10^5 messages", pb.GenerateRequest(messages=[pb.ChatMessage(role="user", content="x")] * 100_000), "messages"),
    ("B33 request id 1 MB", request(request_id="r" * 2**20), "request_id"),
    ("B33 request id newline", request(request_id="a\nb"), "request_id"),
    ("B33 request id ANSI", request(request_id="\x1b[31m"), "request_id"),
    ("B33 request id CRLF", request(request_id="a\r\n"), "request_id"),
    ("priority unknown", request(priority=99), "priority"),
    ("metadata", request(metadata={str(i): "x" for i in range(limits.MAX_METADATA_ENTRIES + 1)}), "metadata"),
    ("metadata value", request(metadata={"a": "x" * (limits.MAX_METADATA_CHARS + 1)}), "metadata"),
    ("session id", request(session_id="s" * (limits.MAX_SESSION_ID_CHARS + 1)), "session_id"),
]


@pytest.mark.parametrize(("message", "field"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_field_is_named(message: pb.GenerateRequest, field: str) -> None:
    error = refusal(message)
    assert error.code is Code.INVALID_ARGUMENT
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert error.reason == "invalid_" + field.split("[")[0].rsplit(".", 1)[-1]
    assert len(str(error)) < 300, "a client's own bytes do not come back"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (pb.GenerateRequest(), "prompt: must not be empty"),
        (pb.GenerateRequest(prompt_token_ids=[1, 4096]), "prompt_token_ids[1]: is 4096, outside 0..4095"),
        (stopped(max_tokens=0), f"stopping.max_tokens: is 0, accepted: 1 to {limits.MAX_POSITIONS}"),
        (stopped(min_tokens=5, max_tokens=4), "stopping.min_tokens: is 5, more than max_tokens = 4"),
        (sampled(temperature=-1), "sampling.temperature: is -1.0, accepted: 0 to 100"),
        (sampled(temperature=NAN), "sampling.temperature: is nan, accepted: 0 to 100"),
        (sampled(top_p=1.0000001), "sampling.top_p: is 1.0000001, accepted: over 0 to 1"),
        (sampled(top_k=-2), "sampling.top_k: is -2, accepted: -1 and 0 (off), or 1 and more"),
        (sampled(repetition_penalty=0), "sampling.repetition_penalty: is 0.0, accepted: over 0 to 100"),
        (sampled(presence_penalty=3), "sampling.presence_penalty: is 3.0, accepted: -2 to 2"),
        (sampled(seed=-1), f"sampling.seed: is -1, accepted: 0 to {2**63 - 1}"),
        (request(n=9), "n: is 9, accepted: 1 to 8"),
        (sampled(logprobs=21), "sampling.logprobs: is 21, accepted: 0 to 20"),
        (sampled(logit_bias={4096: 1.0}), "sampling.logit_bias: has token id 4096, outside 0..4095"),
        (sampled(logit_bias={1: 101.0}), "sampling.logit_bias: is 101.0, accepted: -100 to 100"),
        (sampled(logit_bias=dict.fromkeys(range(301), 1.0)), "sampling.logit_bias: is 301, accepted: at most 300 entries"),
        (stopped(stop_token_ids=[5, -1]), "stopping.stop_token_ids[1]: is -1, outside 0..4095"),
        (stopped(stop=["x"] * 17), "stopping.stop: is 17, accepted: at most 16 strings"),
        (request(request_id="a\nb"), "request_id: accepted: 1 to 128 of A-Z a-z 0-9 . _ -"),
        (pb.GenerateRequest(messages=[pb.ChatMessage(role="root", content="x")]), "accepted: system, user, assistant, tool"),
    ],
)
def test_the_message_says_what_was_asked_and_what_is_accepted(message: pb.GenerateRequest, says: str) -> None:
    assert says in str(refusal(message))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.GenerateRequest(prompt_token_ids=[1] * 1_000_000), "exceeds_context"),
        (pb.GenerateRequest(messages=[pb.ChatMessage()] * 500_000), "invalid_messages"),
        (sampled(logit_bias=dict.fromkeys(range(200_000), 1.0)), "invalid_logit_bias"),
        (stopped(stop=["x"] * 500_000), "invalid_stop"),
    ],
)
def test_a_million_small_things_are_refused_by_their_number(message: pb.GenerateRequest, reason: str) -> None:
    """Nobody's stream waits while they are looked at one by one."""
    began = time.thread_time()
    assert refusal(message).reason == reason
    assert time.thread_time() - began < 0.02


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_a_typed_error(data: bytes) -> None:
    try:
        message = pb.GenerateRequest.FromString(data)
    except (DecodeError, RecursionError):
        return
    try:
        check_request(message, MODEL)
    except SplitfireError as exc:
        assert "\n" not in str(exc)
        assert len(str(exc)) < 400


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (request(model="gpt-5"), Code.NOT_FOUND, "model_not_found"),  # B26
        (request(model="../../etc/passwd"), Code.NOT_FOUND, "model_not_found"),
        (request(adapter="x"), Code.UNIMPLEMENTED, "unsupported_adapter"),  # B27
        (request(metadata={"chat_template": "{{ 1 }}"}), Code.PERMISSION_DENIED, "forbidden_metadata"),  # B30
        (request(metadata={"Chat-Template-Kwargs": "{}"}), Code.PERMISSION_DENIED, "forbidden_metadata"),
    ],
)
def test_what_is_not_to_be_had_says_why(message: pb.GenerateRequest, code: Code, reason: str) -> None:
    error = refusal(message)
    assert (error.code, error.reason) == (code, reason)


def test_predicted_output_is_taken_as_it_is_and_bounded_by_the_context() -> None:
    assert accepted(request(predicted_output="a\0b\n")).predicted_output == "a\0b\n"
    assert accepted(request()).predicted_output == ""
    check_predicted(2048, 2048)
    with pytest.raises(InvalidInput, match=r"predicted_output: is 2049 tokens long, accepted: at most 2048") as caught:
        check_predicted(2049, 2048)
    assert caught.value.reason == "invalid_predicted_output"


def test_messages_need_a_template() -> None:
    error = refusal(pb.GenerateRequest(messages=[pb.ChatMessage(role="user", content="x")]), ModelLimits("m", 10, 10))
    assert error.field == "messages"


@pytest.mark.parametrize("path", ["", "sampling", "stopping"])
def test_unknown_fields_are_refused_wherever_they_are(path: str) -> None:
    """B21 best_of, B23 bad_words, B37 kv_transfer_params, B27 tools: nothing that is not in the proto is skipped over."""
    message = request(sampling=pb.SamplingParams(seed=1), stopping=pb.StoppingParams(max_tokens=5))
    part = getattr(message, path) if path else message
    part.MergeFromString(bytes([0xF8, 0x06, 0x01]))  # field 111, a varint
    assert refusal(message).reason == "invalid_unknown_field"


def test_the_public_api_names_nothing_inside_the_fleet() -> None:
    """S4: no host, port, block, transfer, rank, hash or salt in any message a client sends."""
    forbidden = re.compile(r"host|port\b|block|transfer|rank|hash|salt|peer|tenant|template")
    for message in (pb.GenerateRequest, pb.TokenizeRequest, pb.SamplingParams, pb.StoppingParams, pb.ChatMessage):
        for field in message.DESCRIPTOR.fields:
            assert not forbidden.search(field.name), field.full_name


def test_edges_that_are_accepted() -> None:
    assert accepted(sampled(temperature=0.0)).sampling.is_greedy
    assert accepted(sampled(temperature=-0.0)).sampling.is_greedy
    assert accepted(sampled(temperature=5e-324)).sampling.is_greedy  # B15: tiny is greedy
    assert accepted(sampled(top_k=-1)).sampling.top_k == accepted(sampled(top_k=0)).sampling.top_k == 0
    assert accepted(sampled(top_k=10**9)).sampling.top_k == MODEL.vocab_size  # B17: clamped
    assert accepted(sampled(seed=limits.MAX_SEED)).sampling.seed == limits.MAX_SEED
    assert accepted(request(n=limits.MAX_N)).n == limits.MAX_N
    assert accepted(sampled(logprobs=limits.MAX_LOGPROBS)).sampling.logprobs == limits.MAX_LOGPROBS
    assert accepted(sampled(logit_bias=dict.fromkeys(range(limits.MAX_LOGIT_BIAS), 1.0))).sampling.logit_bias
    assert accepted(stopped(stop=["x" * limits.MAX_STOP_CHARS] * limits.MAX_STOP_STRINGS)).stopping.stop_strings
    assert accepted(request(request_id="A-z.0_9")).request_id
    assert accepted(request("  \n\ufeff")).text == "  \n\ufeff"  # B03: white space and a BOM are text like any other
    assert accepted(request("\0\u202e\x1b[0m")).text == "\0\u202e\x1b[0m"  # B08: verbatim


def test_response_formats_at_the_edges_are_accepted() -> None:
    deepest = '{"a":' * (limits.MAX_FORMAT_NESTING - 1) + "{}" + "}" * (limits.MAX_FORMAT_NESTING - 1)
    for message, source in (
        (formatted(), None),
        (pb.GenerateRequest(text="x"), None),
        (formatted("JSON_OBJECT"), '{"type": "object"}'),
        (formatted("JSON_SCHEMA", json_schema=deepest), deepest),
        (formatted("REGEX", regex="a" * limits.MAX_FORMAT_CHARS), "a" * limits.MAX_FORMAT_CHARS),
        (formatted("GRAMMAR", grammar="root ::= x"), "root ::= x"),
    ):
        asked = accepted(message).response_format
        assert (asked.source if asked else None) == source
        assert asked is None or asked.kind == message.response_format.type
    one_more = formatted("JSON_SCHEMA", json_schema='{"a":' + deepest + "}")
    assert f"deeper than {limits.MAX_FORMAT_NESTING}" in str(refusal(one_more))


def test_a_client_cannot_raise_its_class() -> None:
    """B34."""
    assert accepted(request(priority=pb.PRIORITY_SYSTEM)).priority == pb.PRIORITY_INTERACTIVE
    assert accepted(request()).priority == pb.PRIORITY_STANDARD


def test_end_of_sequence_ids_stop_unless_ignored() -> None:
    assert accepted(stopped(stop_token_ids=[7])).stopping.stop_token_ids == {0, 7}
    assert accepted(stopped(stop_token_ids=[7], ignore_eos=True)).stopping.stop_token_ids == {7}


def test_what_is_not_set_comes_from_the_model() -> None:
    model = ModelLimits("pico", 4096, 2048, defaults=GenerationDefaults(0.6, 0.9, 40, 0.05, 1.1))
    given = accepted(sampled(temperature=1.0, top_k=0), model).sampling
    assert (given.temperature, given.top_k) == (1.0, 0)
    assert (given.top_p, given.min_p, given.repetition_penalty) == (0.9, 0.05, 1.1)


def test_lengths_are_checked_against_context_and_pool() -> None:
    """B04, B05, F27."""
    plain = accepted(request()).stopping
    assert resolve_stopping(plain, 48, MODEL) == StopParams(2000, 0, frozenset({0}))
    with pytest.raises(SplitfireError, match="has 2048 tokens, limit 2047") as caught:
        resolve_stopping(plain, 2048, MODEL)
    assert caught.value.reason == "exceeds_context"
    with pytest.raises(SplitfireError, match="is 100, the context of 2048 has room for 48 after a prompt of 2000 tokens"):
        resolve_stopping(accepted(stopped(max_tokens=100)).stopping, 2000, MODEL)
    with pytest.raises(SplitfireError, match="min_tokens"):
        resolve_stopping(accepted(stopped(min_tokens=100)).stopping, 2000, MODEL)
    small = ModelLimits("pico", 4096, 2048, pool_tokens=100)
    with pytest.raises(SplitfireError, match="the largest pool here holds 100") as caught:
        resolve_stopping(accepted(stopped(max_tokens=80)).stopping, 30, small)
    assert caught.value.reason == "exceeds_pool"
    with pytest.raises(SplitfireError, match="must not be empty"):
        resolve_stopping(plain, 0, MODEL)


@settings(max_examples=300, deadline=None)
@given(
    temperature=st.floats(), top_p=st.floats(), min_p=st.floats(), penalty=st.floats(), presence=st.floats(),
    top_k=st.integers(-(2**63), 2**63 - 1), seed=st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
def test_whatever_passes_is_in_range(
    temperature: float, top_p: float, min_p: float, penalty: float, presence: float, top_k: int, seed: int
) -> None:
    message = sampled(
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        presence_penalty=presence,
        top_k=top_k,
        seed=seed,
    )
    try:
        valid = check_request(message, MODEL)
    except SplitfireError as exc:
        assert exc.field.startswith("sampling.")
        return
    params = valid.sampling
    assert all(
        math.isfinite(x)
        for x in (params.temperature, params.top_p, params.min_p, params.repetition_penalty, params.presence_penalty)
    )
    assert 0 < params.top_p <= 1
    assert 0 <= params.top_k <= MODEL.vocab_size


def test_a_worker_checks_again() -> None:
    """R2: what a router sends goes through the same bounds."""
    with pytest.raises(SplitfireError):
        check_sampling(SamplingParams(temperature=NAN), 100)
    with pytest.raises(SplitfireError):
        check_stopping(StopParams(0), 100)
    with pytest.raises(SplitfireError):
        check_stopping(StopParams(5, 0, frozenset({100})), 100)
