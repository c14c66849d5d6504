"""Two workers' insides in one process: real engines, real services, real agents, joined by the memory transport.

What a router would do (submit both parts, collect outputs) is done by `Rig.ask`. No sockets, no processes.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from decode_svc.service import DecodeService
from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.frames import slot_bytes_for
from kvtransfer.memory import Hub
from kvtransfer.peers import PeerAddress
from prefill_svc.service import PrefillService
from splitfire.core.hashing import hash_blocks
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.telemetry import Telemetry
from splitfire.engine.constraint import Grammar
from splitfire.engine.engine import Engine
from splitfire.engine.sequence import Fork, Purpose, SeqId, SequenceSpec
from splitfire.engine.updates import StepResult
from splitfire.v1 import fleet_pb2
from splitfire.worker.context import RoleService, WorkerContext
from splitfire.worker.host import EngineHost
from splitfire.worker.job import Handoff, Job
from tests.engines import GREEDY, ROOT_HASH, assert_no_leaks

_attempts = itertools.count(1)
FINGERPRINT = b"rig-" * 8


class Node:
    """One worker without its links."""

    def __init__(self, name: str, engine: Engine, hub: Hub, receive_slots: int = 4) -> None:
        layout = engine.runner.pool.layout
        self.engine = engine
        self.host = EngineHost(engine, asyncio.get_running_loop(), self._on_started, self._on_step, self._on_crash)
        options = AgentOptions(2, receive_slots, slot_bytes_for(replace(layout, dtype="fp32").block_bytes) * 3)
        self.agent = TransferAgent(hub.create(), secrets.token_bytes(16), FINGERPRINT, options)
        context = WorkerContext(name, self.host, self.agent, layout, Telemetry(name, None))
        self.prefill, self.decode = PrefillService(context), DecodeService(context)
        self.crash: BaseException | None = None
        self.agent.start()
        self.host.start()

    @property
    def address(self) -> PeerAddress:
        return PeerAddress("node", self.agent.incarnation, self.agent.transport.address)

    @property
    def services(self) -> tuple[RoleService, RoleService]:
        return (self.prefill, self.decode)

    def close(self) -> None:
        self.host.stop()
        self.agent.close()

    def assert_no_leaks(self) -> None:
        assert self.crash is None
        assert_no_leaks(self.engine)
        assert self.agent.num_open == 0
        assert self.agent.num_held_slots == 0
        assert self.prefill.num_jobs == self.decode.num_jobs == 0

    def _on_started(self, ids: tuple[SeqId, ...]) -> None:
        for seq_id in ids:
            for service in self.services:
                if service.owns(seq_id):
                    service.on_started(seq_id)

    def _on_step(self, result: StepResult) -> None:
        for row in result.plain:
            self.decode.on_token(*row)
        for update in result.events:
            for service in self.services:
                if service.owns(update.seq_id):
                    service.on_update(update)

    def _on_crash(self, exc: BaseException) -> None:
        self.crash = exc


@dataclass(eq=False)
class Answer:
    """Replies of one attempt: ordered like a router orders them. Ends are kept with the part that sent them."""

    attempt: int
    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, Any] = field(default_factory=dict)
    finished: list[fleet_pb2.Finished] = field(default_factory=list)
    refusals: list[fleet_pb2.Refused] = field(default_factory=list)
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0

    def output(self, output: fleet_pb2.SequenceOutput) -> None:
        for i, token in enumerate(output.token_ids):
            assert self.tokens.setdefault(output.offset + i, token) == token, "two tokens for one place"
            if output.logprobs:
                self.logprobs[output.offset + i] = output.logprobs[i]
        self.draft_tokens += output.draft_tokens
        self.accepted_draft_tokens += len(output.accepted_offsets)

    def refused(self, refused: fleet_pb2.Refused) -> None:
        self.refusals.append(refused)

    @property
    def end(self) -> fleet_pb2.Finished | None:
        return next((f for f in self.finished if f.reason), None)

    def ids(self) -> list[int]:
        assert sorted(self.tokens) == list(range(min(self.tokens), min(self.tokens) + len(self.tokens)))
        return [self.tokens[i] for i in sorted(self.tokens)]


class _Replies:
    """Each choice's to its own answer; what is said of all of them to each."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        self.answers = answers

    def output(self, output: fleet_pb2.SequenceOutput) -> None:
        self.answers[output.choice].output(output)

    def finished(self, finished: fleet_pb2.Finished) -> None:
        for answer in [self.answers[finished.choice]] if finished.reason else self.answers.values():
            answer.finished.append(finished)

    def refused(self, refused: fleet_pb2.Refused) -> None:
        for answer in [self.answers[refused.choice]] if refused.HasField("choice") else self.answers.values():
            answer.refusals.append(refused)


class Rig:
    """A prefill node and a decode node."""

    def __init__(self, prefill: Engine, decode: Engine, receive_slots: int = 4) -> None:
        self.hub = Hub()
        self.prefill = Node("prefill", prefill, self.hub, receive_slots)
        self.decode = Node("decode", decode, self.hub, receive_slots)
        self.replies: dict[int, _Replies] = {}

    def ask(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        part: int | None = None,
        sampling: SamplingParams = GREEDY,
        output: Sequence[int] = (),
        stop: frozenset[int] = frozenset(),
        choice: int = 0,
        predicted: Sequence[int] = (),
        grammar: Callable[[], Grammar] | None = None,
    ) -> Answer:
        """Submits to both nodes (or, with PART_WHOLE, to the decode node alone); returns at once."""
        stopping = StopParams(max_tokens, 0, stop)
        [answer] = self._ask((choice,), tuple(prompt), stopping, part, sampling, tuple(output), tuple(predicted), grammar)
        return answer

    def ask_together(
        self,
        n: int,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        part: int | None = None,
        sampling: SamplingParams = GREEDY,
        stop: frozenset[int] = frozenset(),
    ) -> list[Answer]:
        """The same for `n` choices in one attempt."""
        return self._ask(tuple(range(n)), tuple(prompt), StopParams(max_tokens, 0, stop), part, sampling)

    def _ask(
        self,
        choices: tuple[int, ...],
        prompt: tuple[int, ...],
        stopping: StopParams,
        part: int | None,
        sampling: SamplingParams,
        output: tuple[int, ...] = (),
        predicted: tuple[int, ...] = (),
        grammar: Callable[[], Grammar] | None = None,
    ) -> list[Answer]:
        attempt = next(_attempts)
        answers = {choice: Answer(attempt) for choice in choices}
        replies = self.replies[attempt] = _Replies(answers)
        transfer_id, token = secrets.token_bytes(16), secrets.token_bytes(16)

        def job(kind: int, peer: Node | None) -> Job:
            layout = self.decode.engine.runner.pool.layout
            ids = [SeqId(10_000_000 + 100 * attempt + 10 * i + kind) for i in range(1 + len(choices))]
            forks = tuple(Fork(seq_id, choice) for seq_id, choice in zip(ids[1:], choices, strict=True))
            spec = SequenceSpec(
                seq_id=ids[0], prompt=prompt, output=output, choice=choices[0], sampling=sampling, stopping=stopping,
                purpose=Purpose.PREFILL if kind == fleet_pb2.PART_PREFILL else Purpose.GENERATE,
                hash_root=ROOT_HASH, block_hashes=hash_blocks(ROOT_HASH, (*prompt, *output), layout.block_size), predicted=predicted,
                grammar=grammar() if grammar is not None else None,
                forks=forks if len(choices) > 1 else (),
            )  # fmt: skip
            handoff = Handoff(transfer_id, token, peer.address) if peer is not None else None
            return Job(replies, attempt, kind, spec, handoff, "", f"r{attempt}", time.monotonic())

        if part == fleet_pb2.PART_WHOLE:
            self.decode.decode.submit(job(fleet_pb2.PART_WHOLE, None))
        elif stopping.max_tokens - len(output) == 1:
            self.prefill.prefill.submit(job(fleet_pb2.PART_PREFILL, None))
        else:
            self.prefill.prefill.submit(job(fleet_pb2.PART_PREFILL, self.decode))
            self.decode.decode.submit(job(fleet_pb2.PART_DECODE, self.prefill))
        return [*answers.values()]

    def cancel(self, answer: Answer, choice: int | None = None) -> None:
        """What the router's Cancel does, at both workers."""
        for node in (self.prefill, self.decode):
            for service in node.services:
                service.cancel(self.replies[answer.attempt], answer.attempt, choice)

    async def settle(self) -> None:
        """Until both nodes hold nothing any more."""
        await until(lambda: all(n.prefill.num_jobs == n.decode.num_jobs == 0 and n.agent.num_open == 0 for n in self.nodes))
        await until(lambda: all(n.agent.num_held_slots == 0 for n in self.nodes))
        await until(lambda: all(n.engine.load().available_blocks == n.engine.load().total_blocks for n in self.nodes))
        for node in self.nodes:
            node.assert_no_leaks()

    @property
    def nodes(self) -> tuple[Node, Node]:
        return (self.prefill, self.decode)

    def close(self) -> None:
        for node in self.nodes:
            node.close()


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "condition never came true"
        await asyncio.sleep(0.002)


def play(scene: Coroutine[object, object, None], seconds: float = 100.0) -> None:
    asyncio.run(asyncio.wait_for(scene, seconds))
