"""How settings are written: sizes, processors, addresses; each is parsed where it is read, and refused with what is accepted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def parse_bytes(value: object) -> object:
    """`256MiB` as a number of bytes. Plain integers are bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+)(KiB|MiB|GiB)?", value.strip())
    if match is None:
        raise ValueError("accepted: a number of bytes with KiB, MiB or GiB, such as 512MiB")
    return int(match[1]) * _UNITS.get(match[2] or "", 1)


def parse_cpus(value: str) -> tuple[int, ...]:
    """`0,2-3` as (0, 2, 3); empty: ()."""
    cpus: list[int] = []
    for part in filter(None, value.split(",")):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None:
            raise ValueError("accepted: processor numbers such as 0 or 0,2-3")
        cpus += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(cpus))


def parse_addresses(value: str) -> tuple[str, ...]:
    """`a:1,b:2` as ("a:1", "b:2")."""
    addresses = tuple(part.strip() for part in value.split(",") if part.strip())
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError("accepted: host:port, several with commas")
    return addresses


def checked_by(parse: Callable[[str], object]) -> AfterValidator:
    """The text stays as it was given; what cannot be parsed is refused."""

    def check(value: str) -> str:
        parse(value)
        return value

    return AfterValidator(check)


def power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("accepted: a power of two")
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Port = Annotated[int, Field(ge=0, le=65535)]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
KvDtype = Literal["auto", "bf16", "fp16", "fp32", "int8", "fp8_e4m3"]
