"""Answers like the format worker, and does on request what that must never be seen to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from router.answering import Answer, serve


def load(path: Path) -> Callable[[Answer], Answer]:
    def answer(question: Answer) -> Answer:
        source = question["source"]
        if source == "hang":
            time.sleep(1000)
        elif source == "eat":
            return {"text": "x" * (1 << 40)}
        elif source == "overflow":
            os.abort()
        elif source == "bad":
            return {"bad": "says nothing"}
        return {"text": f"{os.getpid()} {source}"}

    return answer


if __name__ == "__main__":
    serve(load, 512 << 20)
