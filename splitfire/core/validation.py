"""The one validator. Every front sends requests through `check_request`; every worker checks the numbers again (`ranges.py`).

A front that does not speak protobuf builds the same message first, so no range is written down twice. What is not built
yet is Unsupported by name, and unknown fields are refused, so nothing a client asks for is ever silently ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from splitfire.core import limits
from splitfire.core.chat import Conversation, check_conversation
from splitfire.core.errors import ExceedsContext, ExceedsPool, Forbidden, InvalidInput, NotFound, Unsupported
from splitfire.core.model_config import GenerationDefaults
from splitfire.core.ranges import check_sampling, check_token_ids, require
from splitfire.core.response_format import ResponseFormat, read_response_format
from splitfire.core.sampling import SamplingParams, StopParams, TokenBias
from splitfire.v1 import inference_pb2 as pb

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}\Z")
PRIORITIES = frozenset(pb.Priority.values())
OPERATOR_METADATA = ("chat_template", "chat_template_kwargs", "chat-template", "chat-template-kwargs")


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model accepts and what it answers with when a field is not set."""

    name: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    has_chat_template: bool = False
    shows_tools: bool = False  # the template has a place for them
    pool_tokens: int | None = None  # KV room of the largest decode pool; None: not known


@dataclass(frozen=True, slots=True)
class StopRequest:
    """Stopping as asked for; `resolve_stopping` makes it complete once the prompt's length is known."""

    max_tokens: int | None
    min_tokens: int
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]  # end-of-sequence ids among them unless ignored


@dataclass(frozen=True, slots=True)
class ValidRequest:
    """A request in range. Exactly one of `text`, `token_ids` and `messages` is not None."""

    request_id: str  # empty: to be drawn
    text: str | None
    token_ids: tuple[int, ...] | None
    messages: Conversation | None
    sampling: SamplingParams
    has_seed: bool
    stopping: StopRequest
    response_format: ResponseFormat | None
    n: int
    priority: int
    session_id: str
    predicted_output: str


def check_request(request: pb.GenerateRequest, model: ModelLimits) -> ValidRequest:
    """The request with defaults filled in, or the error that names its first bad field."""
    _check_counts(request, model)
    refuse_unknown_fields(request)
    check_request_id(request.request_id)
    check_model(request.model, model)
    _refuse_unsupported(request)
    text, token_ids, messages = _check_prompt(request, model)
    n = request.n if request.HasField("n") else 1
    require(1 <= n <= limits.MAX_N, "n", n, f"1 to {limits.MAX_N}")
    _check_metadata(request.metadata)
    _check_name("session_id", request.session_id, limits.MAX_SESSION_ID_CHARS)
    return ValidRequest(
        request_id=request.request_id,
        text=text,
        token_ids=token_ids,
        messages=messages,
        sampling=_read_sampling(request.sampling, model),
        has_seed=request.sampling.HasField("seed"),
        stopping=_read_stopping(request.stopping, model),
        response_format=read_response_format(request.response_format),
        n=n,
        priority=_priority(request.priority),
        session_id=request.session_id,
        predicted_output=request.predicted_output,
    )


def check_tokenize_request(request: pb.TokenizeRequest, model: ModelLimits) -> None:
    """Exactly one of `text` and `messages`, neither empty."""
    require(len(request.messages) <= limits.MAX_MESSAGES, "messages", len(request.messages), f"1 to {limits.MAX_MESSAGES} messages")
    refuse_unknown_fields(request)
    check_model(request.model, model)
    if request.HasField("text") and (request.messages or request.tools):
        raise InvalidInput("prompt", "set exactly one of text and messages, not both; tools go with messages")
    if not request.text and not request.messages:
        raise InvalidInput("prompt", "must not be empty")


def check_request_id(request_id: str) -> None:
    """Empty, or safe to write into a log line."""
    if request_id and not REQUEST_ID.match(request_id):
        raise InvalidInput("request_id", "accepted: 1 to 128 of A-Z a-z 0-9 . _ -")


def check_model(name: str, model: ModelLimits) -> None:
    """Empty, or the name of the model that is served. The name never touches the file system."""
    _check_name("model", name, limits.MAX_MODEL_NAME_CHARS)
    if name and name != model.name:
        raise NotFound(f"model: {name!r} is not served here; ListModels names what is", reason="model_not_found", field="model")


def check_chat(messages: Sequence[pb.ChatMessage], tools: Sequence[pb.Tool], model: ModelLimits) -> Conversation:
    """Chat messages, and tools, for a model that has a template for them."""
    return check_conversation(
        messages, tools, model=model.name, has_template=model.has_chat_template, shows_tools=model.shows_tools
    )


def resolve_stopping(stopping: StopRequest, num_prompt: int, model: ModelLimits) -> StopParams:
    """Checks the lengths against context and pool; `max_tokens` defaults to what is left of the context."""
    if num_prompt == 0:
        raise InvalidInput("prompt", "must not be empty")
    room = model.context_length - num_prompt
    if room < 1:
        raise _too_long(num_prompt, model)
    max_tokens = room if stopping.max_tokens is None else stopping.max_tokens
    if max_tokens > room:
        raise ExceedsContext(
            "stopping.max_tokens",
            f"is {max_tokens}, the context of {model.context_length} has room for {room} after a prompt of {num_prompt} tokens",
        )
    if stopping.min_tokens > max_tokens:
        raise InvalidInput("stopping.min_tokens", f"is {stopping.min_tokens}, more than max_tokens = {max_tokens}")
    if model.pool_tokens is not None and num_prompt + max_tokens > model.pool_tokens:
        raise ExceedsPool(
            "stopping.max_tokens",
            f"prompt and output need KV for {num_prompt + max_tokens} tokens, the largest pool here holds {model.pool_tokens}",
        )
    return StopParams(max_tokens, stopping.min_tokens, stopping.stop_token_ids)


def check_predicted(num_tokens: int, context_length: int) -> None:
    """A text longer than any answer predicts none."""
    require(num_tokens <= context_length, "predicted_output", f"{num_tokens} tokens long", f"at most {context_length}, the context")


def _check_counts(request: pb.GenerateRequest, model: ModelLimits) -> None:
    """Before anything is looked at one by one: 4 MiB hold a million of the small things."""
    num_ids, num_biases = len(request.prompt_token_ids), len(request.sampling.logit_bias)
    if num_ids >= model.context_length:
        raise _too_long(num_ids, model)
    require(len(request.messages) <= limits.MAX_MESSAGES, "messages", len(request.messages), f"1 to {limits.MAX_MESSAGES} messages")
    require(num_biases <= limits.MAX_LOGIT_BIAS, "sampling.logit_bias", num_biases, f"at most {limits.MAX_LOGIT_BIAS} entries")
    num_stops = len(request.stopping.stop)
    require(num_stops <= limits.MAX_STOP_STRINGS, "stopping.stop", num_stops, f"at most {limits.MAX_STOP_STRINGS} strings")


def _too_long(num_prompt: int, model: ModelLimits) -> ExceedsContext:
    return ExceedsContext("prompt", f"has {num_prompt} tokens, limit {model.context_length - 1} (context {model.context_length})")


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """A field this version does not know is an error, not something to skip."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidInput(path or "request", f"unknown field number {unknown[0].field_number}", reason="invalid_unknown_field")
    for part, value in message.ListFields():
        if part.message_type is None or part.message_type.GetOptions().map_entry:
            continue
        for one in value if part.is_repeated else (value,):
            refuse_unknown_fields(one, f"{path}.{part.name}" if path else part.name)


def _refuse_unsupported(request: pb.GenerateRequest) -> None:
    if request.adapter:
        raise Unsupported("adapter", "adapters are not supported by this version; leave it empty")


def _check_prompt(
    request: pb.GenerateRequest, model: ModelLimits
) -> tuple[str | None, tuple[int, ...] | None, Conversation | None]:
    given = [
        name
        for name, is_set in (
            ("text", request.HasField("text")),
            ("prompt_token_ids", bool(request.prompt_token_ids)),
            ("messages", bool(request.messages)),
        )
        if is_set
    ]
    if len(given) > 1:
        raise InvalidInput("prompt", f"set exactly one of text, prompt_token_ids and messages, not {' and '.join(given)}")
    if not given or (given == ["text"] and not request.text):
        raise InvalidInput("prompt", "must not be empty")
    if request.tools and given != ["messages"]:
        raise InvalidInput("tools", "need messages: it is their template that shows them")
    if given == ["text"]:
        return request.text, None, None
    if given == ["messages"]:
        return None, None, check_chat(request.messages, request.tools, model)
    check_token_ids("prompt_token_ids", request.prompt_token_ids, model.vocab_size)
    return None, tuple(request.prompt_token_ids), None


def _read_sampling(asked: pb.SamplingParams, model: ModelLimits) -> SamplingParams:
    defaults = model.defaults
    top_k = asked.top_k if asked.HasField("top_k") else defaults.top_k
    if top_k < -1:
        raise InvalidInput("sampling.top_k", f"is {top_k}, accepted: -1 and 0 (off), or 1 and more")
    params = SamplingParams(
        temperature=asked.temperature if asked.HasField("temperature") else defaults.temperature,
        top_p=asked.top_p if asked.HasField("top_p") else defaults.top_p,
        top_k=min(max(top_k, 0), model.vocab_size),
        min_p=asked.min_p if asked.HasField("min_p") else defaults.min_p,
        repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else defaults.repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        seed=asked.seed,
        logit_bias=tuple(TokenBias(token_id, bias) for token_id, bias in sorted(asked.logit_bias.items())),
        logprobs=asked.logprobs if asked.HasField("logprobs") else None,
    )
    check_sampling(params, model.vocab_size)
    return params


def _read_stopping(asked: pb.StoppingParams, model: ModelLimits) -> StopRequest:
    max_tokens = asked.max_tokens if asked.HasField("max_tokens") else None
    if max_tokens is not None:
        require(1 <= max_tokens <= limits.MAX_POSITIONS, "stopping.max_tokens", max_tokens, f"1 to {limits.MAX_POSITIONS}")
    min_tokens = asked.min_tokens
    require(0 <= min_tokens <= model.context_length, "stopping.min_tokens", min_tokens, f"0 to {model.context_length}")
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidInput("stopping.min_tokens", f"is {min_tokens}, more than max_tokens = {max_tokens}")
    stops = tuple(asked.stop)
    for i, stop in enumerate(stops):
        require(
            1 <= len(stop) <= limits.MAX_STOP_CHARS,
            f"stopping.stop[{i}]",
            f"{len(stop)} characters long",
            f"1 to {limits.MAX_STOP_CHARS}",
        )
    ids = tuple(asked.stop_token_ids)
    require(len(ids) <= limits.MAX_STOP_TOKEN_IDS, "stopping.stop_token_ids", len(ids), f"at most {limits.MAX_STOP_TOKEN_IDS} ids")
    check_token_ids("stopping.stop_token_ids", ids, model.vocab_size)
    eos = () if asked.ignore_eos else model.eos_token_ids
    return StopRequest(max_tokens, min_tokens, stops, frozenset((*ids, *eos)))


def _priority(asked: int) -> int:
    """A client's class; one above it is lowered (B34)."""
    if asked not in PRIORITIES:
        raise InvalidInput("priority", f"is {asked}, accepted: {', '.join(pb.Priority.keys()[1:])}")
    return min(asked or pb.PRIORITY_STANDARD, pb.PRIORITY_INTERACTIVE)


def _check_metadata(metadata: Mapping[str, str]) -> None:
    for name in metadata:
        if name.lower() in OPERATOR_METADATA:
            raise Forbidden(f"metadata: {name}: templates are set by the operator", reason="forbidden_metadata", field="metadata")
    require(
        len(metadata) <= limits.MAX_METADATA_ENTRIES,
        "metadata",
        f"{len(metadata)} entries",
        f"at most {limits.MAX_METADATA_ENTRIES}",
    )
    for name, value in metadata.items():
        longest = max(len(name), len(value))
        require(longest <= limits.MAX_METADATA_CHARS, "metadata", f"{longest} characters", f"at most {limits.MAX_METADATA_CHARS}")


def _check_name(field: str, value: str, max_chars: int) -> None:
    if len(value) > max_chars or not value.isprintable():
        raise InvalidInput(field, f"accepted: at most {max_chars} printable characters")


def _shown(text: str) -> str:
    """A client's string inside a message: short, and with nothing that could break a log line."""
    return ascii(text if len(text) <= 40 else text[:40] + "...")
