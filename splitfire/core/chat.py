"""A conversation as a chat template sees it: messages, what was called in them, and the functions there are. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitfire.core import limits
from splitfire.core.errors import InvalidInput, Unsupported
from splitfire.core.ranges import require
from splitfire.v1 import inference_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What an assistant called before; `arguments` is a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def shown(self) -> dict[str, Any]:
        """As templates have it: what is not there has no name."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            made["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in self.tool_calls
            ]
        if self.tool_call_id:
            made["tool_call_id"] = self.tool_call_id
        if self.name:
            made["name"] = self.name
        return made


@dataclass(frozen=True, slots=True)
class Tool:
    """A function; `parameters` is the JSON Schema of an object, or empty."""

    name: str
    description: str
    parameters: str

    def shown(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name, "description": self.description}
        function["parameters"] = json.loads(self.parameters) if self.parameters else {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is made a prompt."""

    turns: tuple[ChatTurn, ...]
    tools: tuple[Tool, ...] = ()


def check_conversation(
    messages: Sequence[pb.ChatMessage], tools: Sequence[pb.Tool], *, model: str, has_template: bool, shows_tools: bool
) -> Conversation:
    """For a model that has a template, and one that shows tools where there are some."""
    if not has_template:
        raise InvalidInput("messages", f"{model} has no chat template; send text or prompt_token_ids")
    require(1 <= len(messages) <= limits.MAX_MESSAGES, "messages", len(messages), f"1 to {limits.MAX_MESSAGES} messages")
    if tools and not shows_tools:
        raise Unsupported(
            "tools", f"the chat template of {model} does not show any; ask for one call by its name, or leave them out"
        )
    require(len(tools) <= limits.MAX_TOOLS, "tools", len(tools), f"at most {limits.MAX_TOOLS}")
    turns = tuple(_turn(f"messages[{i}]", message) for i, message in enumerate(messages))
    checked = tuple(_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools))
    names = [tool.name for tool in checked]
    if len(set(names)) < len(names):
        raise InvalidInput("tools", "two have the same name")
    return Conversation(turns, checked)


def _turn(field: str, message: pb.ChatMessage) -> ChatTurn:
    if message.role not in ROLES:
        shown = ascii(message.role if len(message.role) <= 40 else message.role[:40] + "...")
        raise InvalidInput(f"{field}.role", f"is {shown}, accepted: {', '.join(ROLES)}")
    if message.tool_calls and message.role != "assistant":
        raise InvalidInput(f"{field}.tool_calls", "only an assistant calls tools")
    require(
        len(message.tool_calls) <= limits.MAX_TOOLS, f"{field}.tool_calls", len(message.tool_calls), f"at most {limits.MAX_TOOLS}"
    )
    calls = tuple(_call(f"{field}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls))
    for name, text in (("tool_call_id", message.tool_call_id), ("name", message.name)):
        _check_word(f"{field}.{name}", text)
    return ChatTurn(message.role, message.content, calls, message.tool_call_id, message.name)


def _call(field: str, call: pb.ToolCall) -> ToolCall:
    _check_word(f"{field}.id", call.id)
    _check_tool_name(f"{field}.name", call.name)
    _check_object(f"{field}.arguments", call.arguments)
    return ToolCall(call.id, call.name, call.arguments)


def _tool(field: str, tool: pb.Tool) -> Tool:
    _check_tool_name(f"{field}.name", tool.name)
    if tool.parameters:
        _check_object(f"{field}.parameters", tool.parameters)
    return Tool(tool.name, tool.description, tool.parameters)


def _check_tool_name(field: str, name: str) -> None:
    if not TOOL_NAME.match(name):
        raise InvalidInput(field, "accepted: 1 to 64 of A-Z a-z 0-9 _ -")


def _check_word(field: str, text: str) -> None:
    if len(text) > limits.MAX_SESSION_ID_CHARS or not text.isprintable():
        raise InvalidInput(field, f"accepted: at most {limits.MAX_SESSION_ID_CHARS} printable characters")


def _check_object(field: str, text: str) -> None:
    require(len(text) <= limits.MAX_FORMAT_CHARS, field, f"{len(text)} characters long", f"at most {limits.MAX_FORMAT_CHARS}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(field, "is not JSON") from exc
    if not isinstance(value, dict):
        raise InvalidInput(field, "must be a JSON object")
