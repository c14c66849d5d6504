"""From flags and environment to settings, and the page that lists them. What is wrong is told in one line that names the flag."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsError

from splitfire.core.errors import ConfigError
from splitfire.core.settings import ENV_PREFIX, RouterSettings, ServiceSettings, WorkerSettings

Settings = TypeVar("Settings", bound=BaseSettings)


def parse_settings(kind: type[Settings], argv: Sequence[str], *, prog: str) -> Settings:
    """Flags over environment over defaults. ConfigError with one line naming the setting, its value and what is accepted."""
    _refuse_unknown_environment(os.environ)
    try:
        return kind(_cli_parse_args=list(argv), _cli_prog_name=prog)
    except ValidationError as exc:
        raise ConfigError(_one_line(exc)) from exc
    except SettingsError as exc:
        raise ConfigError(_explain_flags(kind, str(exc))) from exc


def exit_with(error: ConfigError) -> int:
    """Prints the one line; the exit code."""
    print(f"splitfire: {error}", file=sys.stderr)  # noqa: T201
    return 2


def _one_line(exc: ValidationError) -> str:
    first = exc.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    if not name:
        return message
    return f"{name} (--{name.replace('_', '-')}, {ENV_PREFIX}{name.upper()}): is {first['input']!r}: {message}"


def _explain_flags(kind: type[BaseSettings], message: str) -> str:
    unknown = re.search(r"unrecognized arguments: (\S+)", message)
    if unknown is None:
        return message.removeprefix("error parsing CLI: ").splitlines()[0]
    flags = [f"--{name.replace('_', '-')}" for name in kind.model_fields]
    return f"unknown flag {unknown[1]}{_nearest(unknown[1].split('=')[0], flags)}; --help lists them"


def _refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    known = known_variables()
    for name in environment:
        if name.startswith(ENV_PREFIX) and name not in known:
            raise ConfigError(f"unknown environment variable {name}{_nearest(name, sorted(known))}")


# Set by `splitfire up` for its children: the process whose end they must not outlive.
PARENT_VARIABLE = ENV_PREFIX + "PARENT"

# What only the command line tool reads (splitfire/cli): the twins of its own flags.
_CLI_FLAGS = (
    *("PREFILL", "DECODE", "AGGREGATED", "PREFILL_CPUS", "DECODE_CPUS", "SERVER", "TIMEOUT", "DEMO_PROMPT", "DEMO_TOKENS"),
    *("ROUTERS", "MAX_TOKENS", "TEMPERATURE", "TOP_P", "TOP_K", "SEED", "STOP", "TRACE", "JSON", "PREDICTED"),
    *("API_KEY_FILE", "TLS_CA", "JSON_SCHEMA", "REGEX", "GRAMMAR"),
    *(f"ADVISE_{name}" for name in ("PROFILE", "WORKERS", "PROMPT", "OUTPUT", "RATE", "TTFT", "ITL")),
    *(
        f"BENCH_{name}"
        for name in ("COMPARE", "PREFILL", "DECODE", "RATES", "DURATION", "WARMUP", "ROUNDS", "PROMPT_TOKENS", "OUTPUT_TOKENS")
    ),
    *(f"BENCH_{name}" for name in ("SHARED_PREFIX", "TRACE", "SLO_TTFT", "SLO_ITL", "TIMEOUT", "SEED", "REPORT", "JSON", "NOTE")),
)


def known_variables() -> set[str]:
    """Every variable of the environment that some part of Splitfire reads."""
    settings = {name.upper() for kind in (RouterSettings, WorkerSettings) for name in kind.model_fields}
    return {PARENT_VARIABLE, *(ENV_PREFIX + name for name in (*settings, *_CLI_FLAGS))}


def describe() -> str:
    """Every setting of every service as a page of tables."""
    lines = [
        "# Settings",
        "",
        "Printed by `splitfire/core/flags.py` from `splitfire/core/settings.py`; do not edit (`make docs`).",
        "",
        "A flag wins over its variable, a variable over the default; an empty variable counts as unset.",
    ]
    pages = (
        ("What router and workers share", ServiceSettings),
        ("`splitfire router`", RouterSettings),
        ("`splitfire prefill`, `splitfire decode`", WorkerSettings),
    )
    for title, kind in pages:
        lines += ["", f"## {title}", "", "| flag | variable | default | what it is |", "|---|---|---|---|"]
        for name, info in kind.model_fields.items():
            if kind is ServiceSettings or name not in ServiceSettings.model_fields:
                default = "" if info.default is None or info.default == "" else f"`{info.default}`"
                lines.append(f"| `--{name.replace('_', '-')}` | `{ENV_PREFIX}{name.upper()}` | {default} | {info.description} |")
    return "\n".join([*lines, ""])


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


if __name__ == "__main__":
    print(describe(), end="")  # noqa: T201
