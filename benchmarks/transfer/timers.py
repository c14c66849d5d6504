"""Where the io thread's time goes during a shipment: calls of the transport, of UCX and of the ops are timed from outside."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.transfer import ops
from kvtransfer.agent import TransferAgent
from kvtransfer.ucx import UcxTransport

_WORKER_CALLS = ("progress", "arm", "tag_probe", "tag_recv", "tag_recv_with_handle")


class Timers:
    """Replaces what is called by something that also counts; time inside of a call that is itself counted goes to the inner one."""

    def __init__(self, agent: TransferAgent) -> None:
        self._seconds: dict[str, float] = {}
        self._calls: dict[str, int] = {}
        self._inner = 0.0  # seconds already counted inside of the call that is running
        transport = agent.transport
        assert isinstance(transport, UcxTransport)
        transport._worker = _Counting(self, transport._worker, _WORKER_CALLS)
        for peer in agent._peers._peers.values():
            link: Any = peer.link
            link._endpoint = _Counting(self, link._endpoint, ("tag_send",))
        for name in ("pack", "unpack"):
            setattr(ops, name, self.counted(name, getattr(ops, name)))
        self._began = (time.perf_counter(), time.process_time())

    def counted(self, name: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner, began = self._inner, 0.0, time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                total = time.thread_time() - began
                self._seconds[name] = self._seconds.get(name, 0.0) + total - self._inner
                self._calls[name] = self._calls.get(name, 0) + 1
                self._inner = outer + total

        return timed

    def take(self) -> dict[str, Any]:
        """Seconds and calls by part, the processor time of all, and starts anew."""
        wall, cpu = self._began
        self._began = (time.perf_counter(), time.process_time())
        taken = {"seconds": self._seconds, "calls": self._calls, "cpu": self._began[1] - cpu, "wall": self._began[0] - wall}
        self._seconds, self._calls = {}, {}
        return taken


class _Counting:
    """Passes everything on."""

    def __init__(self, timers: Timers, behind: Any, calls: tuple[str, ...]) -> None:
        self._behind = behind
        for name in calls:
            setattr(self, name, timers.counted(name, getattr(behind, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)
