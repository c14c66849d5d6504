"""A profile: what `splitfire advise` measured of a fleet, as a JSON file, and the engine that it describes. Pure but for reading it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from router.costs import PromptCost
from router.simulation.engine import Engine, StepCost
from splitfire.core.errors import ConfigError

MAX_PROFILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class MeasuredPrompt:
    """A prompt of so many tokens took so long."""

    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step with so many streams, each with so much context, took so long."""

    streams: float
    context: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured, and what of the fleet it was measured on the simulation has to know."""

    model: str
    prompts: Sequence[MeasuredPrompt]
    steps: Sequence[MeasuredStep]
    overhead_s: float  # of the first token, beside computing the prompt
    num_blocks: int
    block_size: int
    block_bytes: int
    bytes_per_s: float
    chunk_tokens: int
    prompt_beside: float = (
        1.0  # how much longer a prompt takes while another worker decodes, a step while another one computes prompts
    )
    step_beside: float = 1.0

    def engine(self) -> Engine:
        base_s, token_s, half_pair_s = fit([(1.0, p.tokens, p.tokens**2) for p in self.prompts], [p.seconds for p in self.prompts])
        rows = [(1.0, step.streams, step.streams * step.context) for step in self.steps]
        step_s, sequence_s, context_s = fit(rows, [step.seconds for step in self.steps])
        return Engine(
            prompt=PromptCost(base_s, max(token_s, 1e-9), 2 * half_pair_s),
            step=StepCost(step_s, sequence_s, context_s),
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            chunk_tokens=self.chunk_tokens,
            block_bytes=self.block_bytes,
            bytes_per_s=self.bytes_per_s,
            overhead_s=self.overhead_s,
            prompt_beside=self.prompt_beside,
            step_beside=self.step_beside,
        )


def read_profile(path: Path) -> Profile:
    """ConfigError, in one line, when it is not one."""
    try:
        with path.open("rb") as file:
            entry = json.loads(file.read(MAX_PROFILE_BYTES))
        if not isinstance(entry, dict):
            raise ValueError(f"expected an object, not {type(entry).__name__}")
        return Profile(
            str(entry.get("model", ""))[:256],
            [MeasuredPrompt(_number(p, "tokens", 1, 1e7), _seconds(p)) for p in _points(entry, "prompts")],
            [
                MeasuredStep(_number(p, "streams", 1, 1e5), _number(p, "context", 0, 1e7), _seconds(p))
                for p in _points(entry, "steps")
            ],
            _number(entry, "overhead_s", 0, 60),
            int(_number(entry, "num_blocks", 1, 1e9)),
            int(_number(entry, "block_size", 1, 4096)),
            int(_number(entry, "block_bytes", 1, 1e9)),
            _number(entry, "bytes_per_s", 1, 1e13),
            int(_number(entry, "chunk_tokens", 1, 1 << 20)),
            *(_number(entry, name, 1, 100) if name in entry else 1.0 for name in ("prompt_beside", "step_beside")),
        )
    except OSError as exc:
        raise ConfigError(f"{path.name}: {exc.strerror or exc}; `splitfire advise --profile FILE` writes one") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path.name} is no profile: {str(exc).splitlines()[0]}") from exc


def fit(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Least squares of the relative errors with no coefficient below zero: the best of all choices of which are zero."""
    scaled = [[x / value for x in row] for row, value in zip(rows, values, strict=True)]
    width = len(rows[0])
    best, least = [0.0] * width, float("inf")
    for used in product((True, False), repeat=width):
        columns = [i for i in range(width) if used[i]]
        found = _solve(
            [[sum(row[i] * row[j] for row in scaled) for j in columns] for i in columns],
            [sum(row[i] for row in scaled) for i in columns],
        )
        if found is None or min(found, default=0.0) < 0:
            continue
        theta = [0.0] * width
        for i, value in zip(columns, found, strict=True):
            theta[i] = value
        error = sum((sum(a * b for a, b in zip(theta, row, strict=True)) - 1.0) ** 2 for row in scaled)
        if error < least - 1e-12:
            best, least = theta, error
    return best


def _solve(matrix: list[list[float]], values: list[float]) -> list[float] | None:
    """Gauss-Jordan; None when it is singular."""
    size = len(values)
    rows = [[*row, value] for row, value in zip(matrix, values, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda j: abs(rows[j][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-300:
            return None
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return [row[-1] for row in rows]


def _seconds(point: dict[object, object]) -> float:
    return _number(point, "seconds", 1e-7, 1e5)


def _points(entry: dict[object, object], field: str) -> list[dict[object, object]]:
    value = entry.get(field)
    if not isinstance(value, list) or not 1 <= len(value) <= 64 or not all(isinstance(point, dict) for point in value):
        raise ValueError(f"{field}: expected a list of 1 to 64 objects")
    return value


def _number(entry: dict[object, object], field: str, least: float, most: float) -> float:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{field}: {json.dumps(value)[:40]}, expected a number from {least:g} to {most:g}")
    return float(value)
