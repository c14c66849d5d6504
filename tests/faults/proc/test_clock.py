"""Clocks that jump: nothing that serves a request reads one that can."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.checkpoints import ROOT

SERVING = ("router", "splitfire/worker", "splitfire/engine", "kvtransfer", "prefill_svc", "decode_svc")
# When a certificate or a key expires is told by the calendar; when an answer was made, or something used, by the clock on the wall.
# A batch has a day, over restarts too, and files have the dates that OpenAI's API tells.
CALENDAR = {
    *("router/doors.py", "router/http_api.py", "router/completions.py", "router/usage.py", "splitfire/worker/channels.py"),
    *("router/batches/api.py", "router/batches/run.py", "router/batches/store.py"),
}
CAN_JUMP = {"time", "time_ns", "now", "utcnow", "today"}


def reads_of_a_wall_clock(path: Path) -> list[int]:
    """Lines that call `time.time()`, `datetime.now()` and the like."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in CAN_JUMP
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id in ("time", "datetime", "date")
    ]


def test_wall_clock_jump_ignored() -> None:
    """F45: deadlines, ages and waits are of the monotonic clock, and only durations go from process to process."""
    files = [path for folder in SERVING for path in (ROOT / folder).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := reads_of_a_wall_clock(path))}
    assert set(found) == CALENDAR
