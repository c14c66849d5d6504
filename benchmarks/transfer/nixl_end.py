"""One end of NIXL. Runs in NIXL's own environment, alone: it imports nothing of ours. Orders and answers are JSON lines.

    python nixl_end.py NAME CORE ERROR_HANDLING HAS_PROGRESS_THREAD

Memory is as ours: one mapping with huge pages, all of it resident. A READ is initiated by the receiver, a WRITE by the sender; both
lists of pieces are prepared once. What is timed is posting the request of an existing handle until NIXL says DONE, and,
apart, making the handle for a request's pieces, which a server does for every request.
"""

import base64
import ctypes
import json
import logging
import mmap
import os
import signal
import sys
import time
from typing import Any

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config


class Shape:
    """Pieces of one size in a pool of twice as many."""

    def __init__(self, piece_bytes: int, num_pieces: int) -> None:
        self.piece_bytes = piece_bytes
        self.pool_bytes = 2 * num_pieces * piece_bytes
        self.memory = mmap.mmap(-1, self.pool_bytes)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.bytes[:] = 0
        self.address = self.bytes.ctypes.data

    def pieces(self, address: int) -> np.ndarray:
        starts = np.arange(address, address + self.pool_bytes, self.piece_bytes, dtype=np.uint64)
        return np.stack([starts, np.full_like(starts, self.piece_bytes), np.zeros_like(starts)], axis=1)


class End:
    """The agent, its pools by shape, and the handles that were made."""

    def __init__(self, name: str, error_handling: str, has_thread: bool) -> None:
        self.agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=has_thread, backends=[]))
        self.agent.create_backend("UCX", {"ucx_error_handling_mode": error_handling})
        self.shapes: dict[str, Shape] = {}
        self.local: dict[str, Any] = {}
        self.remote: dict[str, Any] = {}
        self.handles: dict[tuple[str, str], Any] = {}

    def add(self, shape: str, piece_bytes: int, num_pieces: int, fill: bool) -> None:
        found = self.shapes[shape] = Shape(piece_bytes, num_pieces)
        if fill:
            found.bytes.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 63, found.pool_bytes // 8, dtype=np.uint64)
        self.agent.register_memory([(found.address, found.pool_bytes, 0, "")], "DRAM")

    def card(self) -> dict[str, Any]:
        addresses = {shape: found.address for shape, found in self.shapes.items()}
        return {"metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(), "addresses": addresses}

    def meet(self, card: dict[str, Any]) -> None:
        self.peer = self.agent.add_remote_agent(base64.b64decode(card["metadata"]))
        self.peer = self.peer.decode() if isinstance(self.peer, bytes) else self.peer
        for shape, found in self.shapes.items():
            self.local[shape] = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", found.pieces(found.address), "DRAM")
            self.remote[shape] = self.agent.prep_xfer_dlist(self.peer, found.pieces(card["addresses"][shape]), "DRAM")

    def make(self, operation: str, shape: str, here: list[int], there: list[int]) -> float:
        """Seconds to make the handle that `move` posts."""
        old = self.handles.pop((operation, shape), None)
        if old is not None:
            self.agent.release_xfer_handle(old)
        indices = [np.array(ids, dtype=np.int32) for ids in (here, there)]
        began = time.perf_counter()
        handle = self.agent.make_prepped_xfer(operation, self.local[shape], indices[0], self.remote[shape], indices[1])
        seconds = time.perf_counter() - began
        self.handles[(operation, shape)] = handle
        return seconds

    def move(self, operation: str, shape: str) -> float:
        handle = self.handles[(operation, shape)]
        began = time.perf_counter()
        state = self.agent.transfer(handle)
        while state == "PROC":
            state = self.agent.check_xfer_state(handle)
        assert state == "DONE", state
        return time.perf_counter() - began

    def forget(self, shape: str) -> None:
        self.shapes[shape].bytes[:] = 0

    def sums(self, shape: str, ids: list[int]) -> list[int]:
        """Of every piece: equal at both ends when everything is where it belongs."""
        found = self.shapes[shape]
        words = found.bytes.view(np.uint64).reshape(-1, found.piece_bytes // 8)
        return [int(words[i].sum()) for i in ids]


def main() -> None:
    name, core, error_handling, has_thread = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # not without the parent
    os.sched_setaffinity(0, {int(core)})
    logging.disable(logging.INFO)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    end = End(name, error_handling, has_thread == "1")
    for line in sys.stdin:
        order, *args = json.loads(line)
        print(json.dumps(getattr(end, order)(*args)), file=answers, flush=True)
    os._exit(0)


main()
