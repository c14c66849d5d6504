"""What an answer must match, from flags to the request."""

from __future__ import annotations

from pathlib import Path

from splitfire.core.errors import ConfigError
from splitfire.v1 import inference_pb2 as pb


def response_format(json_schema: Path | None, regex: str | None, grammar: Path | None) -> pb.ResponseFormat | None:
    """What the flags ask for; ConfigError when they ask for two things."""
    if sum(flag is not None for flag in (json_schema, regex, grammar)) > 1:
        raise ConfigError("--json-schema, --regex, --grammar: give one of them")
    if json_schema is not None:
        return pb.ResponseFormat(type=pb.ResponseFormat.TYPE_JSON_SCHEMA, json_schema=read_text("--json-schema", json_schema))
    if grammar is not None:
        return pb.ResponseFormat(type=pb.ResponseFormat.TYPE_GRAMMAR, grammar=read_text("--grammar", grammar))
    return pb.ResponseFormat(type=pb.ResponseFormat.TYPE_REGEX, regex=regex) if regex is not None else None


def read_text(flag: str, path: Path) -> str:
    """The file that a flag names."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{flag} {path}: {getattr(exc, 'strerror', None) or 'is not UTF-8 text'}") from exc
