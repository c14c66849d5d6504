"""Typed access to the JSON of a model directory; every complaint names file, field and what is accepted. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from splitfire.core.errors import ModelError

Scalar = TypeVar("Scalar", str, int)


class JsonFields:
    """One object of `file`, itself the file's or, with `at`, one inside it, such as `quantization_config.`."""

    def __init__(self, file: str, values: Mapping[str, object], at: str = "") -> None:
        self.file = file
        self.values = values
        self.at = at

    def fail(self, field: str, message: str) -> ModelError:
        return ModelError(f"{self.file}: {self.at}{field}: {message}")

    def inside(self, field: str) -> JsonFields | None:
        """The object that `field` holds; None when it is absent or null."""
        values = self.mapping(field)
        return None if values is None else JsonFields(self.file, values, f"{self.at}{field}.")

    def one_of(self, field: str, accepted: Sequence[Scalar], default: Scalar | None = None) -> Scalar:
        """The value, which is one of `accepted`; absent or null: the default."""
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        for one in accepted:
            if type(value) is type(one) and value == one:
                return one
        raise self.fail(field, f"is {value!r}, accepted: {', '.join(map(str, accepted))}")

    def integer(self, field: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(field, f"is {value!r}, accepted: an integer from {low} to {high}")
        return value

    def number(self, field: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(field)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high or not math.isfinite(value):
            raise self.fail(field, f"is {value!r}, accepted: a number from {low} to {high}")
        return float(value)

    def optional_number(self, field: str, low: float, high: float) -> float | None:
        return None if self.values.get(field) is None else self.number(field, low, high)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.values.get(field, default)
        if not isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, accepted: true or false")
        return value

    def string(self, field: str, default: str | None = None) -> str:
        value = self.values.get(field, default)
        if not isinstance(value, str):
            raise self.fail(field, f"is {value!r}, accepted: a string")
        return value

    def mapping(self, field: str) -> Mapping[str, object] | None:
        value = self.values.get(field)
        if value is not None and not isinstance(value, dict):
            raise self.fail(field, f"is {value!r}, accepted: an object or null")
        return value

    def token_ids(self, field: str, vocab_size: int) -> tuple[int, ...]:
        """An id, a list of ids, or null."""
        value = self.values.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for one in ids:
            if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < vocab_size:
                raise self.fail(field, f"has {one!r}, accepted: token ids from 0 to {vocab_size - 1}")
        return tuple(dict.fromkeys(ids))
