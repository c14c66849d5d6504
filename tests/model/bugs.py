"""Twelve bugs that hand-offs have had elsewhere, planted one at a time. Each must be caught by a check that passes without it.

    python -m tests.model.bugs      plants all of them and prints the table of docs/handoff.md

A bug changes a line of one function, or wraps it; the check is a search of the model (explore.py), a run of the simulator, or a
test. All of it happens in this process: nothing on disk changes.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType

from kvtransfer import frames
from kvtransfer.outgoing import Outgoing
from kvtransfer.peers import Peers
from kvtransfer.receiver import Receiver
from prefill_svc.ship import BlockShipment
from router import dispatch
from splitfire.engine.lending import Lending
from tests.faults import test_handoff
from tests.kvtransfer import test_agent, test_receiver
from tests.model.explore import SCENARIOS, explore


@dataclass(frozen=True)
class Check:
    """Something that fails by an exception."""

    name: str
    run: Callable[[], object]


def search(name: str) -> Check:
    return Check(f"search `{name}`", lambda: explore(SCENARIOS[name]))


def simulated(test: Callable[..., object], *arguments: object) -> Check:
    values = "".join(f"[{value}]" for value in arguments if isinstance(value, str | int))
    return Check(f"`{getattr(test, '__name__', '')}{values}`", lambda: test(*arguments))


@dataclass(frozen=True)
class Bug:
    """In `function`, `old` becomes `new`: once, in each of `changes`."""

    name: str
    what: str
    function: Callable[..., object]
    changes: tuple[tuple[str, str], ...]
    check: Check

    @contextmanager
    def planted(self) -> Iterator[None]:
        assert isinstance(self.function, FunctionType)
        source = textwrap.dedent(inspect.getsource(self.function))
        for old, new in self.changes:
            assert source.count(old) == 1, f"{self.name}: {old!r} is not there once"
            source = source.replace(old, new)
        namespace: dict[str, FunctionType] = {}
        exec(compile(source, f"<{self.name}>", "exec"), self.function.__globals__, namespace)
        before = self.function.__code__
        self.function.__code__ = namespace[self.function.__name__].__code__  # also where it was imported by name
        try:
            yield
        finally:
            self.function.__code__ = before


def is_caught(bug: Bug) -> str:
    """How, in a line; empty when nothing noticed."""
    with bug.planted():
        try:
            bug.check.run()
        except (Exception, asyncio.CancelledError) as exc:
            return f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
    return ""


_WRITE = "sums = self._sink.write(blocks.start, len(blocks), payload.blocks)"
_PUBLISH = "self._sink.publish(blocks.start, len(blocks))"
_GIVE_BACK = "[self._port._incoming.ring.segment(self._port.peer.address.incarnation).give_back(s) for s in self.lent.values()]"
BUGS = (
    Bug(
        "skip the generation check", "a payload for another lending of the slot is taken", Receiver._take,
        (("(header.slot, header.generation) != (slot.index, slot.generation)", "False"),),
        simulated(test_receiver.test_a_payload_that_is_not_what_was_lent_for_is_refused, *test_receiver.OLDER_GENERATION),
    ),
    Bug(
        "reuse a slot on abort", "its receive is still posted", Receiver.close,
        (("self._end(reason, is_retryable)", f"{_GIVE_BACK}; self._end(reason, is_retryable)"),), search("one slot for two"),
    ),
    Bug(
        "acknowledge before verified", "`received` goes out with the commit", Receiver._complete,
        (("len(self._verified) < self.expectation.num_blocks - self._first_block", "False"),), search("one"),
    ),
    Bug(
        "reuse a transfer id", "every hand-off has the same", dispatch.handoff_ends,
        (("secrets.token_bytes(16), secrets", "b'x' * 16, secrets"),), Check("`three_requests`", test_handoff.play_three_requests),
    ),
    Bug(
        "no digest", "zeros are sent, and compared with zeros", frames.bind, (("header.digest_algorithm == DIGEST_OFF", "True"),),
        simulated(test_handoff.test_kv_bitflip_detected, "last byte"),
    ),
    Bug(
        "commit counted before data", "the sender's word is taken for the blocks", Receiver._on_commit,
        (("    self._complete()", "    self._verified.update(range(self._first_block, commit.num_blocks)); self._complete()"),),
        search("one"),
    ),
    Bug(
        "off-by-one block", "the next block's KV is sent", BlockShipment.pack,
        (("first_block : first_block + num_blocks", "first_block + 1 : first_block + num_blocks + 1"),),
        Check("`three_requests`", test_handoff.play_three_requests),
    ),
    Bug(
        "hold never expires", "a sender waits for ever for a receiver that says nothing", Outgoing.tick,
        (("now - sender.last_progress > DEADLINES[sender.state]", "False"),), search("lossy"),
    ),
    Bug(
        "double free", "a reservation's blocks are given back twice", Lending.forfeit,
        (("self._blocks.release(reservation.block_ids)", "[self._blocks.release(reservation.block_ids) for _ in range(2)]"),),
        simulated(test_handoff.test_kill_prefill_at_block_k, 2),
    ),
    Bug(
        "drop the terminal event", "nobody is told of a transfer that failed", Receiver._end,
        (("self._sink.closed(reason, is_retryable)", "pass"),), search("one"),
    ),
    Bug(
        "accept a stale incarnation", "a dead worker is listened to", Peers.is_gone, (("incarnation in self._gone", "False"),),
        simulated(test_agent.test_messages_of_a_stale_incarnation_are_dropped),
    ),
    Bug(
        "publish before verify", "blocks are shared before their digest was looked at", Receiver._take,
        ((_PUBLISH, "pass"), (_WRITE, f"{_WRITE}; {_PUBLISH}")), simulated(test_handoff.test_a_corrupt_block_is_never_shared),
    ),
)  # fmt: skip


def table() -> list[str]:
    rows = [f"| {bug.name} | {bug.what} | {bug.check.name} |" for bug in BUGS]
    return ["| planted | what it does | caught by |", "|---|---|---|", *rows]


def main() -> int:
    missed = 0
    for bug in BUGS:
        bug.check.run()  # passes without it
        caught = is_caught(bug)
        missed += not caught
        print(f"{bug.name:28} {bug.check.name}: {caught[:100] or 'NOT CAUGHT'}")
    print(f"{len(BUGS) - missed} of {len(BUGS)} caught")
    return missed


if __name__ == "__main__":
    sys.exit(main())
