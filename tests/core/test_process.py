"""How a process ends, whatever still holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENDS_SOON = """
import ctypes, sys, threading, time
from splitfire.core import process
process.END_S = 0.5
process.end_soon()
{block}
"""


def run(program: str, **streams: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    return subprocess.run(command, text=True, timeout=60, check=False, env=environment, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    "block",
    [
        "time.sleep(60)",
        "ctypes.PyDLL(None).sleep(60)  # with the interpreter's lock",
        "threading.Thread(target=time.sleep, args=(60,)).start()  # waited for at the end",
    ],
)
def test_what_blocks_a_process_that_ends_is_told_and_ended(block: str) -> None:
    ended = run(ENDS_SOON.format(block=block), capture_output=True)
    assert ended.returncode == 1
    assert "Timeout (0:00:00.500000)!" in ended.stderr
    assert 'File "<string>", line 6' in ended.stderr or "in _shutdown" in ended.stderr


def test_nothing_is_waited_for_and_nothing_said_is_lost() -> None:
    program = """
import threading, time
from splitfire.core.process import end_now
class Blocking:
    def __del__(self): time.sleep(60)
kept = Blocking()
threading.Thread(target=time.sleep, args=(60,)).start()
print("said", end="")
end_now(3)
"""
    ended = run(program, capture_output=True)
    assert (ended.returncode, ended.stdout) == (3, "said")


def test_what_cannot_be_said_is_not_a_success() -> None:
    with Path("/dev/full").open("w") as full:
        ended = run('from splitfire.core.process import end_now\nprint("said")\nend_now(0)', stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (120, "")
