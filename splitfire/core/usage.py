"""Lines of a usage file, their chain, and prices. Pure but for the file it is handed.

A line is a JSON object whose `hash` is SHA-256 over the hash of the line before it and the rest of the line, keys sorted. Who changes,
removes or reorders lines has to make all later ones anew; note the last hash elsewhere to find that too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from splitfire.core.errors import ConfigError

BEGINNING = "0" * 64  # before the first line
CONTINUED = "continued"  # outcome of the first line of a file that follows a full one
PLACES = Decimal("0.000000001")
MAX_LINE_BYTES = 4096
Amount = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Price(BaseModel):
    """Of one model, in one currency: for a million tokens of each kind, and for a second of a worker. Cached tokens are not charged as
    prompt tokens too."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Amount = 0.0
    cached: Amount = 0.0
    generated: Amount = 0.0
    prefill_second: Amount = 0.0
    decode_second: Amount = 0.0
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "EUR"


@dataclass(frozen=True, slots=True)
class UsageLine:
    """One request. Seconds are its share of workers' steps."""

    at: str
    tenant: str = ""
    key: str = ""
    model: str = ""
    request_id: str = ""
    outcome: str = "ok"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @classmethod
    def continued(cls, at: str) -> UsageLine:
        """What begins a file after another; it counts nothing."""
        return cls(at, outcome=CONTINUED)

    def cost(self, price: Price) -> Decimal:
        """Exact to a billionth."""
        million = Decimal(1_000_000)
        parts = (
            Decimal(str(price.prompt)) * (self.prompt_tokens - self.cached_tokens) / million,
            Decimal(str(price.cached)) * self.cached_tokens / million,
            Decimal(str(price.generated)) * self.generated_tokens / million,
            Decimal(str(price.prefill_second)) * Decimal(str(self.prefill_s)),
            Decimal(str(price.decode_second)) * Decimal(str(self.decode_s)),
        )
        return sum(parts, Decimal(0)).quantize(PLACES, ROUND_HALF_EVEN)


class BrokenChain(Exception):
    """A line is not what its hash says."""


def read_prices(path: Path) -> dict[str, Price]:
    """Of a TOML file of tables [model.NAME], `*` being every other model. ConfigError names table and field."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"prices_file {path}: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"prices_file {path}: is not TOML: {exc}") from exc
    tables = document.get("model")
    if set(document) != {"model"} or not isinstance(tables, dict):
        raise ConfigError(f'prices_file {path}: accepted: tables [model.NAME], or [model."*"] for all others')
    prices = {}
    for name, table in tables.items():
        try:
            prices[name] = Price.model_validate(table)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            where = ".".join(map(str, ("model", name, *first["loc"])))
            raise ConfigError(f"prices_file {path}: {where}: {first['msg']}") from exc
    return prices


def chained(line: UsageLine, previous: str, price: Price | None) -> tuple[str, str]:
    """The text of a line, with its end, and its hash."""
    row: dict[str, Any] = asdict(line)
    if price is not None and line.outcome != CONTINUED:
        row |= {"cost": str(line.cost(price)), "currency": price.currency}
    row["previous"] = previous
    row["hash"] = _hash(row)
    return json.dumps(row, separators=(",", ":")) + "\n", row["hash"]


def hash_of_last(file: IO[bytes]) -> tuple[str, int]:
    """The hash of the last whole line, and where that ends."""
    end = file.seek(0, os.SEEK_END)
    begin = max(0, end - 2 * MAX_LINE_BYTES)
    file.seek(begin)
    tail = file.read(end - begin)
    whole = tail.rfind(b"\n") + 1
    if not whole:
        return BEGINNING, begin
    last = tail[:whole].splitlines()[-1]
    return str(json.loads(last)["hash"]), begin + whole


@dataclass(frozen=True, slots=True)
class ReadLine:
    """A line as it was found in a file."""

    line: UsageLine
    hash: str
    cost: Decimal | None  # with the prices of the time when it was written, if there were any
    currency: str


def read_lines(text: Iterable[str], name: str, *, previous: str | None = None, may_be_cut: bool = False) -> Iterator[ReadLine]:
    """Every line; BrokenChain names the first that is not as it was written. `previous`: the hash before the first, if it is known.
    `may_be_cut`: the last one may have no end, because who wrote it was killed; whoever writes next takes it away."""
    known = {field.name for field in fields(UsageLine)}
    for number, written in enumerate(text, 1):
        if may_be_cut and not written.endswith("\n"):
            return
        try:
            row = json.loads(written)
            line = UsageLine(**{key: row[key] for key in known})
            told, before = row.pop("hash"), row["previous"]
            cost = Decimal(row["cost"]) if "cost" in row else None
        except (ValueError, KeyError, TypeError, ArithmeticError) as exc:
            raise BrokenChain(f"{name}, line {number}: is not a line of usage") from exc
        if previous is not None and before != previous:
            raise BrokenChain(f"{name}, line {number}: a line before it was removed, added or moved")
        if _hash(row) != told:
            raise BrokenChain(f"{name}, line {number}: was changed")
        previous = told
        yield ReadLine(line, told, cost, str(row.get("currency", "")))


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
