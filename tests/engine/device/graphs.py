"""A stand-in for CUDA graphs that holds a function to what a graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from splitfire.engine.device.graphs import Recorded

T = TypeVar("T")


class Trace(TorchDispatchMode):
    """What is launched: each op or kernel, with all that a launch would freeze. Reading a tensor's value on the host is refused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        self.launches.append((str(func), *_frozen(args), *_frozen(tuple((kwargs or {}).values()))))
        return func(*args, **(kwargs or {}))


@dataclass
class Replayer:
    """Records by running, replays by running again, and compares what was launched: a graph would do the first again."""

    num_replays: int = 0
    num_recorded: int = 0
    replayed: list[list[str]] = field(default_factory=list)  # kernels and ops of each replay

    def record(self, run: Callable[[], T]) -> Recorded[T]:
        first, result = traced(run)
        self.num_recorded += 1

        def replay() -> None:
            again, other = traced(run)
            self.num_replays += 1
            self.replayed.append([str(launch[0]) for launch in again])
            assert again == first, "the replay depends on what the host knew of a step"
            for mine, theirs in zip(_tensors(result), _tensors(other), strict=True):
                mine.copy_(theirs)

        return Recorded(result, replay)


def traced(run: Callable[[], T]) -> tuple[list[tuple[object, ...]], T]:
    trace = Trace()
    launch = interpreter.GridExecutor.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        trace.launches.append((self.fn.__name__, self.grid, *_frozen(args)))
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = noted
    try:
        with trace:
            result = run()
    finally:
        interpreter.GridExecutor.__call__ = launch
    return trace.launches, result


def _frozen(values: tuple[object, ...]) -> list[object]:
    """Of a tensor its shape, of anything else what it is."""
    return [
        (tuple(v.shape), str(v.dtype)) if isinstance(v, torch.Tensor) else repr(v) if not _holds_tensors(v) else "..."
        for v in values
    ]


def _holds_tensors(value: object) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, torch.Tensor) for v in value)


def _tensors(result: object) -> list[torch.Tensor]:
    found = [getattr(result, name) for name in result.__dataclass_fields__]  # type: ignore[attr-defined]
    return [v for v in found if isinstance(v, torch.Tensor)] + [
        t for v in found if hasattr(v, "__dataclass_fields__") for t in _tensors(v)
    ]
