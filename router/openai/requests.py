"""JSON of OpenAI's API as messages of inference.proto. Pure.

pydantic says what has the wrong shape; every range is the one validator's. A name that is not known here is refused, and so is a known
one that asks for what this server does not do: nothing is silently ignored but what is listed as having no effect.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.openai.answers import UsageShown
from router.openai.tools import Forced, Free, Named, Plain, Reader, call_schema
from splitfire.core import limits
from splitfire.core.errors import InvalidInput, Unsupported
from splitfire.v1 import inference_pb2 as pb

COMPLETION_TOKENS = 16  # of a completion that does not say how many
TIERS = {
    "auto": pb.PRIORITY_UNSPECIFIED, "default": pb.PRIORITY_STANDARD, "flex": pb.PRIORITY_BATCH, "priority": pb.PRIORITY_INTERACTIVE,
}  # fmt: skip
INT64 = (-(1 << 63), (1 << 63) - 1)
Int = Annotated[int, Field(strict=True, ge=INT64[0], le=INT64[1])]
Int32 = Annotated[int, Field(strict=True, ge=-(1 << 31), le=(1 << 31) - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Body = TypeVar("Body", bound="Json")


class Json(BaseModel):
    """An object with these names and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(Json):
    """What a stream has beside its answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage so far in every chunk, as vLLM has it: load tools ask for it
    include_obfuscation: bool = False  # no effect: nothing is padded


SCHEMAS = ("tools", "response_format")  # of any depth
IDS = ("prompt", "tokens")


class TextPart(Json):
    """A part of a message; others than text are not known."""

    type: Literal["text"]
    text: str


class FunctionCall(Json):
    """What the model called; `arguments` is JSON."""

    name: str
    arguments: str


class ToolCall(Json):
    """One call of an answer, as a client sends it back."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(Json):
    """A tool's inside."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = (
        None  # a call that is forced always keeps to the schema, one that the model chooses to make as well as it can
    )


class ToolBody(Json):
    """A function that may be called."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Json):
    """By its name."""

    name: str


class ChosenTool(Json):
    """The one that has to be called."""

    type: Literal["function"]
    function: ChosenFunction


class Message(Json):
    """One of a conversation. `developer` is what `system` was."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Sequence[TextPart] | None = None
    name: str | None = None
    tool_calls: Sequence[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None


class JsonSchema(Json):
    """A schema by its name; it is always kept to, `strict` or not."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Json):
    """What the answer matches. `regex` and `grammar` are this server's own."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchema | None = None
    regex: str | None = None
    grammar: str | None = None


class Prediction(Json):
    """Text that the answer will resemble."""

    type: Literal["content"]
    content: str | Sequence[TextPart]


class Sampled(Json):
    """What both kinds of completion have."""

    model: str = ""
    n: Int32 | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None
    seed: Int | None = None
    stop: str | Sequence[str] | None = None
    user: str | None = None  # no effect
    # Beyond OpenAI's, as other servers have them.
    top_k: Int | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: Int | None = None
    stop_token_ids: Sequence[Int] | None = None
    ignore_eos: bool | None = None
    request_id: str = ""
    prompt_cache_key: str = ""
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    metadata: dict[str, str] | None = None
    include_trace: bool = False

    def begin(self, max_tokens: int | None) -> pb.GenerateRequest:
        """Everything but the prompt."""
        sampling = pb.SamplingParams(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=self.seed, logit_bias=_biases(self.logit_bias or {}),
        )  # fmt: skip
        stopping = pb.StoppingParams(
            max_tokens=max_tokens, min_tokens=self.min_tokens, stop_token_ids=self.stop_token_ids, ignore_eos=self.ignore_eos,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop,
        )  # fmt: skip
        return pb.GenerateRequest(
            request_id=self.request_id, model=self.model, n=self.n, sampling=sampling, stopping=stopping, metadata=self.metadata,
            session_id=self.prompt_cache_key, priority=TIERS[self.service_tier or "auto"],
        )  # fmt: skip

    @property
    def usage(self) -> UsageShown:
        options = self.stream_options or StreamOptions()
        if options.continuous_usage_stats and not options.include_usage:
            raise InvalidInput("stream_options.continuous_usage_stats", "needs include_usage: true")
        if options.continuous_usage_stats:
            return UsageShown.SO_FAR
        return UsageShown.AT_END if options.include_usage else UsageShown.NEVER


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: Sequence[Message]
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    tools: Sequence[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    modalities: Sequence[Literal["text"]] | None = None

    def request(self) -> pb.GenerateRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidInput("max_tokens", "and max_completion_tokens are the same thing: set one")
        request = self.begin(self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens)
        request.messages.extend(chat_messages(self.messages))
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput("top_logprobs", "needs logprobs: true")
        if self.logprobs:
            request.sampling.logprobs = self.top_logprobs or 0
        if self.response_format is not None:
            request.response_format.CopyFrom(_format(self.response_format))
        if self.prediction is not None:
            request.predicted_output = _text(self.prediction.content)
        self._add_tools(request)
        return request

    def reader(self) -> Reader:
        """Of an answer: where the calls are in it."""
        names = {tool.function.name for tool in self.tools or ()}
        if not names or self.tool_choice == "none":
            return Plain()
        if isinstance(self.tool_choice, ChosenTool):
            return Named(self.tool_choice.function.name)
        return Forced(names) if self.tool_choice == "required" else Free(names)

    def _add_tools(self, request: pb.GenerateRequest) -> None:
        """Tools that the model may choose are shown to it; a call that is demanded is what the answer is held to."""
        tools = {tool.function.name: tool.function.parameters or {} for tool in self.tools or ()}
        choice = self.tool_choice
        if not tools or choice == "none":
            if choice not in (None, "none", "auto"):
                raise InvalidInput("tool_choice", "there are no tools to choose from")
            return
        if choice in (None, "auto"):
            request.tools.extend(
                pb.Tool(
                    name=t.function.name, description=t.function.description, parameters=json.dumps(t.function.parameters or {})
                )
                for t in self.tools or ()
            )
            return
        if self.response_format is not None and self.response_format.type != "text":
            raise InvalidInput("response_format", "the answer is a call of a tool, which has a form of its own")
        schema = call_schema(list(tools.items()))
        if isinstance(choice, ChosenTool):
            if choice.function.name not in tools:
                raise InvalidInput("tool_choice.function.name", "is none of tools")
            schema = tools[choice.function.name] or {"type": "object"}
        kind = pb.ResponseFormat.TYPE_JSON_SCHEMA
        request.response_format.CopyFrom(pb.ResponseFormat(type=kind, json_schema=json.dumps(schema, ensure_ascii=False)))


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: str | Sequence[str] | Sequence[Int] | Sequence[Sequence[Int]]
    max_tokens: Int | None = None
    logprobs: Int32 | None = None
    best_of: Int32 | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def requests(self) -> list[pb.GenerateRequest]:
        """One for each prompt."""
        if self.best_of not in (None, 1, self.n):
            raise Unsupported("best_of", "answers are not ranked here; leave it out")
        return [self._of(prompt) for prompt in self._prompts()]

    def _prompts(self) -> Sequence[str | Sequence[int]]:
        given: Any = self.prompt
        if isinstance(given, str) or not given or isinstance(given[0], int):
            return [given]
        if len(given) > limits.MAX_PROMPTS:
            raise InvalidInput("prompt", f"has {len(given)} prompts, accepted: at most {limits.MAX_PROMPTS}; send several requests")
        return list(given)

    def _of(self, prompt: str | Sequence[int]) -> pb.GenerateRequest:
        request = self.begin(COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens)
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.prompt_token_ids.extend(prompt)
        if self.logprobs is not None:
            request.sampling.logprobs = self.logprobs
        return request


class TokenizeBody(Json):
    """POST /tokenize: one of `prompt` and `messages`."""

    model: str = ""
    prompt: str | None = None
    messages: Sequence[Message] | None = None

    def request(self) -> pb.TokenizeRequest:
        return pb.TokenizeRequest(model=self.model, text=self.prompt, messages=chat_messages(self.messages or ()))


class DetokenizeBody(Json):
    """POST /detokenize."""

    model: str = ""
    tokens: Sequence[Int]


def read(kind: type[Body], given: dict[str, Any]) -> Body:
    """InvalidInput that names the first parameter with a wrong shape."""
    _require_bounded(given)
    try:
        return kind.model_validate(given)
    except ValidationError as exc:
        raise _complaint(exc) from exc


def _require_bounded(given: dict[str, Any]) -> None:
    """Before every value is looked at, and each that is wrong is remembered with a complaint a thousand times its size. Ids are cheap, and
    schemas are bounded elsewhere."""
    left = limits.MAX_JSON_VALUES
    todo = [(name, value) for name, value in given.items() if name not in SCHEMAS]
    while todo:
        name, value = todo.pop()
        values: Sequence[Any] = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        kinds = set(map(type, values))
        if kinds != {int} or name not in IDS:
            left -= len(values)
        if left < 0:
            raise InvalidInput(
                name[:80], f"holds too many values, accepted: at most {limits.MAX_JSON_VALUES} in all lists of a request"
            )
        if kinds & {list, dict}:
            todo += [(name, one) for one in values if isinstance(one, (list, dict))]


def chat_messages(messages: Sequence[Message]) -> list[pb.ChatMessage]:
    made = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        calls = [pb.ToolCall(id=c.id, name=c.function.name, arguments=c.function.arguments) for c in message.tool_calls or ()]
        made.append(
            pb.ChatMessage(
                role=role,
                content=_text(message.content or ""),
                tool_calls=calls,
                tool_call_id=message.tool_call_id or "",
                name=message.name or "",
            )
        )
    return made


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _format(asked: ResponseFormat) -> pb.ResponseFormat:
    kinds = pb.ResponseFormat
    if asked.type == "json_schema":
        if asked.json_schema is None:
            raise InvalidInput("response_format.json_schema", "is missing")
        return kinds(type=kinds.TYPE_JSON_SCHEMA, json_schema=json.dumps(asked.json_schema.schema_, ensure_ascii=False))
    if asked.type == "regex":
        return kinds(type=kinds.TYPE_REGEX, regex=asked.regex or "")
    if asked.type == "grammar":
        return kinds(type=kinds.TYPE_GRAMMAR, grammar=asked.grammar or "")
    return kinds(type=kinds.TYPE_JSON_OBJECT if asked.type == "json_object" else kinds.TYPE_TEXT)


def _biases(given: dict[str, float]) -> dict[int, float]:
    made = {}
    for name, bias in given.items():
        if not name.isascii() or not name.isdigit() or len(name) > 10:
            raise InvalidInput("logit_bias", f"{name[:40]!a} is no token id")
        made[int(name)] = bias
    return made


def _complaint(error: ValidationError) -> InvalidInput:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ""
    for part in first["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif not any(c in part for c in "[]( "):  # else: which of several shapes was tried
            field += f".{part}" if field else part
    message = "is not a parameter of this API" if first["type"] == "extra_forbidden" else first["msg"]
    return InvalidInput(field[:80] or "body", message)
