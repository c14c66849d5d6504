"""The inside of a process that may be killed: loads once, then answers questions on stdin and stdout, one at a time.

Length-prefixed JSON both ways. Memory is limited here; time is the parent's to limit (processes.py).
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from splitfire.core.errors import ModelError

Answer = dict[str, Any]


def serve(load: Callable[[Path], Callable[[Answer], Answer]], memory_bytes: int) -> None:
    """Until standard input ends. `load` takes the model's directory; ModelError when it is of no use."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    try:
        answer = load(Path(sys.argv[1]))
    except (ModelError, MemoryError, RecursionError) as exc:
        _write(stdout, {"refused": str(exc) or type(exc).__name__})
        return
    _write(stdout, {"ready": True})
    while (question := _read(stdin)) is not None:
        _write(stdout, answer(question))


def _read(stream: BinaryIO) -> Answer | None:
    prefix = stream.read(4)
    if len(prefix) < 4:
        return None
    return json.loads(stream.read(struct.unpack("<I", prefix)[0]))  # type: ignore[no-any-return]


def _write(stream: BinaryIO, message: Answer) -> None:
    body = json.dumps(message).encode()
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()
