"""The file of tenants (TOML), read strictly: what is misspelt, doubled or out of range is refused by name. Pure.

[tenant.research]             # letters, digits, dot, underscore, hyphen
keys = ["sha256:..."]         # `splitfire key` prints a key and this line
class = "interactive"         # the highest its requests get: batch, standard or interactive
tokens_per_minute = 200_000   # TenantTable has the rest, and what holds where a line is left out
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from router.tenants import RESERVED, Credential, Tenant, cache_salt
from splitfire.core import limits
from splitfire.core.errors import ConfigError
from splitfire.v1 import inference_pb2 as pb

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLASSES = {"batch": pb.PRIORITY_BATCH, "standard": pb.PRIORITY_STANDARD, "interactive": pb.PRIORITY_INTERACTIVE}
Hash = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


def _day(value: object) -> object:
    return date.fromisoformat(value) if isinstance(value, str) else value


class TenantTable(BaseModel):
    """One `[tenant.NAME]`, as it is written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    keys: list[Hash] = Field(min_length=1, max_length=limits.MAX_KEYS_PER_TENANT)
    top_class: Literal["batch", "standard", "interactive"] = Field("standard", alias="class")
    weight: float = Field(1.0, ge=limits.MIN_WEIGHT, le=limits.MAX_WEIGHT)  # share beside other tenants
    max_running: int | None = Field(None, ge=1, le=limits.MAX_RUNNING_REQUESTS)  # choices
    max_queued: int | None = Field(None, ge=0, le=limits.MAX_QUEUED_REQUESTS)  # requests beyond max_running, which it needs
    tokens_per_minute: int | None = Field(None, ge=1, le=limits.MAX_TOKENS_PER_MINUTE)  # prompt and output
    allow_special: bool = False  # special tokens written out in `text` count as such; in messages never
    admin: bool = False  # may see the fleet, and change roles
    expires: Annotated[date, BeforeValidator(_day)] | None = None  # the last day its keys are good for, UTC

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.max_queued is not None and self.max_running is None:
            raise ValueError("max_queued counts requests beyond max_running: give both")
        return self


def read_keys(content: bytes, fleet_secret: bytes) -> tuple[Credential, ...]:
    """Every credential of the file. ConfigError names the table, the field and what is accepted."""
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"is not TOML: {exc}") from exc
    if unknown := [name for name in document if name != "tenant"]:
        raise ConfigError(f"{unknown[0][:64]}: is unknown{_nearest(unknown[0], ('tenant',))}")
    tables = document.get("tenant")
    if not isinstance(tables, dict) or not 1 <= len(tables) <= limits.MAX_TENANTS:
        raise ConfigError(f"accepted: 1 to {limits.MAX_TENANTS} tables [tenant.NAME]")
    found: dict[bytes, Credential] = {}
    for name, table in tables.items():
        for credential in _read_tenant(name, table, fleet_secret):
            if credential.digest in found:
                other = found[credential.digest].tenant.name
                raise ConfigError(f"tenant.{name}.keys: one of them is tenant.{other}'s already; make another with `splitfire key`")
            found[credential.digest] = credential
    return tuple(found.values())


def _read_tenant(name: str, table: object, fleet_secret: bytes) -> Iterable[Credential]:
    if NAME.fullmatch(name) is None or name in RESERVED:
        raise ConfigError(f"tenant.{name[:64]}: accepted: 1 to 64 of A-Z a-z 0-9 . _ -, and neither {' nor '.join(RESERVED)}")
    try:
        read = TenantTable.model_validate(table)
    except ValidationError as exc:
        raise ConfigError(f"tenant.{name}{_one_line(exc)}") from exc
    tenant = Tenant(
        name=name,
        priority=CLASSES[read.top_class],
        weight=read.weight,
        max_running=read.max_running,
        max_queued=read.max_queued,
        tokens_per_minute=read.tokens_per_minute,
        allow_special=read.allow_special,
        is_admin=read.admin,
        cache_salt=cache_salt(fleet_secret, name),
    )
    for key in read.keys:
        yield Credential(bytes.fromhex(key.removeprefix("sha256:")), tenant, read.expires)


def _one_line(exc: ValidationError) -> str:
    """The first thing that is wrong; a value only where it is no key."""
    first = exc.errors(include_url=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = [info.alias or name for name, info in TenantTable.model_fields.items()]
        return f"{where[:64]}: is unknown{_nearest(str(first['loc'][0]), fields)}"
    if first["type"] == "missing":
        return f"{where}: is missing; `splitfire key` prints a key and its line"
    shown = f"is {str(first['input'])[:40]!r}: " if where and not where.startswith(".keys") else ""
    return f"{where}: {shown}{first['msg'].removeprefix('Value error, ')}"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]}?" if close else f", accepted: {', '.join(known)}"
