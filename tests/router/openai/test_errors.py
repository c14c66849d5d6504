"""What fails is told as OpenAI's clients understand it."""

from __future__ import annotations

import json

import pytest

from router.openai.errors import http_error, param_of
from splitfire.core.errors import (
    Code,
    ExceedsContext,
    Exhausted,
    Internal,
    InvalidInput,
    NotFound,
    SplitfireError,
    Unauthenticated,
    Unavailable,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (InvalidInput("sampling.temperature", "is 9"), 400, "invalid_request_error", "invalid_temperature", "temperature"),
        (InvalidInput("stopping.stop[3]", "is empty"), 400, "invalid_request_error", "invalid_stop", "stop[3]"),
        (ExceedsContext("prompt", "is long"), 400, "invalid_request_error", "context_length_exceeded", "prompt"),
        (InvalidInput("body", "late", reason="body_timeout"), 408, "invalid_request_error", "body_timeout", None),
        (NotFound("model", reason="model_not_found", field="model"), 404, "invalid_request_error", "model_not_found", "model"),
        (Unauthenticated("no", reason="unknown_api_key"), 401, "authentication_error", "invalid_api_key", None),
        (Exhausted("full", reason="queue_full", retry_after_s=2.2), 429, "rate_limit_error", "queue_full", None),
        (Unavailable("none", reason="no_decode"), 503, "server_error", "no_decode", None),
        (Internal("bug"), 500, "server_error", "internal", None),
    ],
)
def test_an_error_keeps_its_reason(error: SplitfireError, status: int, kind: str, code: str, param: str | None) -> None:
    made = http_error(error, "r1")
    told = json.loads(made.body)["error"]
    assert (made.status, told["type"], told["code"], told["param"]) == (status, kind, code, param)
    assert told["message"] == str(error)
    assert told["request_id"] == "r1"


def test_who_may_come_back_is_told_when() -> None:
    assert dict(http_error(Exhausted("full", reason="queue_full", retry_after_s=2.2)).headers) == {b"retry-after": b"3"}
    assert b"retry-after" not in dict(http_error(InvalidInput("n", "is 9")).headers)


@pytest.mark.parametrize("code", list(Code))
def test_every_code_has_a_status(code: Code) -> None:
    error = SplitfireError("x", reason="x")
    error.code = code
    assert 400 <= http_error(error).status < 600


def test_fields_have_the_names_that_clients_gave() -> None:
    assert param_of("prompt_token_ids[3]") == "prompt[3]"
    assert param_of("session_id") == "prompt_cache_key"
    assert param_of("messages[0].role") == "messages[0].role"
    assert param_of("") is None
