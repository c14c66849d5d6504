"""A fleet in one process and no time: the real router's flow, the real services, engines' schedulers and hand-off, with a
network, a clock and a model that are not.

The model's KV at a position is a function of all tokens up to it, and its next token a function of that; each step checks that
the KV it would read is right. So a block that was mixed up, stale or torn shows at the first token that depends on it. What
breaks a promise is put down in `Simulation.violations`, where no boundary of failure can swallow it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from zlib import crc32

import torch

from decode_svc.service import DecodeService
from kvtransfer.agent import AgentOptions, TransferAgent
from kvtransfer.frames import _FRAME, parse_frame, slot_bytes_for
from kvtransfer.transport import Done, Link, OnControl, SlotMemory
from prefill_svc.service import PrefillService
from router.admission import AdmissionLimits
from router.choice import Choice, RequestPlan
from router.placement import Rules
from router.views import Split
from router.worker_handle import WorkerHandle
from splitfire.core.errors import SplitfireError
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.layout import KvLayout
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.telemetry import Telemetry
from splitfire.core.wire import layout_to_wire
from splitfire.engine.blocks import BlockPool
from splitfire.engine.drawing import Drawn, StepTokens
from splitfire.engine.engine import NOTHING, Engine
from splitfire.engine.kernels.sample import SampledToken
from splitfire.engine.lending import Reservation
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Ready
from splitfire.engine.scheduler import Budget, Slice, Step
from splitfire.engine.sequence import SeqId, SequenceSpec
from splitfire.engine.updates import StepResult
from splitfire.v1 import fleet_pb2
from splitfire.worker.cache_feed import CacheFeeds
from splitfire.worker.context import RoleService, WorkerContext
from splitfire.worker.job import JobLimits, handoff_from_wire, make_job, peer_address, refusal
from tests.router.fakes import fingerprint, make_hello, make_inside

LAYOUT = KvLayout("fp32", num_layers=1, num_kv_heads=1, head_dim=4, block_size=8)
VOCAB = 4096
CPU = torch.device("cpu")


def kv_codes(tokens: Sequence[int]) -> list[int]:
    """What the model keeps at each position: 24 bits that depend on every token so far."""
    codes, code = [], 1
    for token in tokens:
        code = crc32(token.to_bytes(4, "little"), code)
        codes.append(code & 0xFFFFFF)
    return codes


def next_token(code: int, position: int, choice: int) -> int:
    return (code * 31 + position + 977 * choice) % VOCAB


def answer_to(prompt: Sequence[int], count: int, choice: int = 0) -> list[int]:
    """What any fleet must answer."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(kv_codes(tokens)[-1], len(tokens), choice))
    return tokens[len(prompt) :]


# -- the network


class Net:
    """Delays are drawn; control stays in order per link, payloads do not. `is_cut(source, target)` loses what is sent then.
    With `slots`, each found by its key, a peer writes where they lie; without they are sent to."""

    def __init__(self, random: Random, slots: dict[bytes, tuple[SimTransport, memoryview]] | None = None) -> None:
        self.random = random
        self.slots = slots
        self.violations: list[str] = []
        self.nodes: dict[bytes, SimTransport] = {}
        self.frozen: set[bytes] = set()
        self.is_cut: Callable[[bytes, bytes], bool] = lambda source, target: False
        self.damage: Callable[[memoryview], None] = lambda message: None
        self.fails: Callable[[], bool] = lambda: False  # whether a payload's send ends in an error
        self.loses_report: Callable[[], bool] = lambda: False  # whether a cache event does not arrive
        self.on_event: Callable[[], None] = lambda: None
        self.delay_s = 0.001
        self._last: dict[tuple[bytes, bytes], float] = {}
        self._held: dict[bytes, list[Callable[[], None]]] = {}

    def later(self, source: bytes, target: bytes, act: Callable[[], None], *, in_order: bool) -> None:
        if self.is_cut(source, target):
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + self.random.uniform(0.1, 1.0) * self.delay_s
        if in_order:
            at = self._last[(source, target)] = max(at, self._last.get((source, target), 0.0) + 1e-6)
        loop.call_at(at, self._act, target, act)

    def freeze(self, node: bytes) -> None:
        self.frozen.add(node)

    def thaw(self, node: bytes) -> None:
        self.frozen.discard(node)
        for act in self._held.pop(node, []):
            asyncio.get_running_loop().call_soon(act)

    def _act(self, target: bytes, act: Callable[[], None]) -> None:
        if target in self.frozen:
            self._held.setdefault(target, []).append(act)
            return
        self.on_event()
        act()


class SimTransport:
    """Promises what UCX does: nobody says that a peer died, a receive cannot be taken back, a send's memory is read on arrival."""

    name = "ucx"
    version = "sim"

    def __init__(self, net: Net, name: str) -> None:
        self.address = name.encode()
        self.dropped: Counter[str] = Counter()
        self.net = net
        self.is_dead = False
        self.on_control: OnControl | None = None
        self.posted: dict[int, tuple[memoryview, Done]] = {}
        self.early: dict[int, deque[Callable[[], None]]] = {}
        net.nodes[self.address] = self

    def start(self, on_control: OnControl) -> None:
        self.on_control = on_control

    def allocate(self, num_bytes: int) -> SlotMemory:
        buffer = memoryview(bytearray(num_bytes))
        if self.net.slots is None:
            return SlotMemory(buffer)
        key = str(len(self.net.slots)).encode()
        self.net.slots[key] = (self, buffer)
        return SlotMemory(buffer, key)

    def connect(self, address: bytes) -> Link:
        return _SimLink(self, address)

    def receive(self, tag: int, buffer: memoryview, done: Done) -> None:
        self.posted[tag] = (buffer, done)
        for act in self.early.pop(tag, ()):
            self.net.later(b"", self.address, act, in_order=False)

    def cancel(self, tag: int) -> bool:
        return False

    def close(self) -> None: ...

    def arrive(self, tag: int, message: memoryview, sent: Callable[[Exception | None], None]) -> None:
        if tag not in self.posted:
            self.early.setdefault(tag, deque()).append(lambda: self.arrive(tag, message, sent))
            return
        buffer, done = self.posted.pop(tag)
        buffer[: len(message)] = message
        self.net.damage(buffer[: len(message)])
        if not self.is_dead:
            done(None)
        sent(None)


class _SimLink:
    def __init__(self, source: SimTransport, target: bytes) -> None:
        self._source = source
        self._target = target
        self._reached: memoryview | None = None

    def send_control(self, frame: bytes) -> None:
        source, net = self._source, self._source.net

        def arrive() -> None:
            node = net.nodes.get(self._target)
            if node is not None and not node.is_dead and node.on_control is not None:
                node.on_control(memoryview(frame))

        if not source.is_dead:
            net.later(source.address, self._target, arrive, in_order=True)

    def send_payload(self, tag: int, message: memoryview, done: Done) -> None:
        source, net = self._source, self._source.net
        if not message and self._reached is not None:
            message = self._reached[: _FRAME.size + len(parse_frame(self._reached).body)]

        def sent(exc: Exception | None) -> None:
            net.later(self._target, source.address, lambda: None if source.is_dead else done(exc), in_order=False)

        def arrive() -> None:
            node = net.nodes.get(self._target)
            if node is not None:
                node.arrive(tag, message, sent)

        if net.fails():
            sent(ConnectionResetError())
        elif not source.is_dead:
            net.later(source.address, self._target, arrive, in_order=False)

    def reach(self, key: bytes) -> memoryview | None:
        net = self._source.net
        if not key or net.slots is None:
            return None
        owner, self._reached = net.slots[key]
        if not any(buffer.obj is self._reached.obj for buffer, _ in owner.posted.values()):
            net.violations.append("a slot was written that was not lent")
        return self._reached

    def close(self) -> None: ...


# -- a worker


class SimRunner:
    """The model. `pool` is real, so what is packed, sent and unpacked are real bytes."""

    runs_ahead = False

    def __init__(self, pool: KvPool, violations: list[str]) -> None:
        self.pool = pool
        self.model = self
        self.config = self
        self.vocab_size = VOCAB
        self._violations = violations

    def launch(self, step: Step) -> Ready:
        return Ready(self.run(step))

    def run(self, step: Step) -> StepTokens:
        drawn = {}
        for i, piece in enumerate(step.pieces()):
            sequence, size = piece.sequence, self.pool.layout.block_size
            codes = kv_codes([*sequence.tokens[: piece.end], *piece.drafts])
            end = len(codes)
            blocks = torch.tensor(sequence.block_ids[: -(-end // size)])
            cells = self.pool.elements[blocks].permute(0, 4, 1, 2, 3, 5).reshape(len(blocks) * size, -1)  # a row a position
            wanted = torch.tensor(codes, dtype=torch.float32)[:, None]
            wrong = (cells[: piece.begin] != wanted[: piece.begin]).any(1).nonzero()
            if len(wrong):
                self._violations.append(f"P3: sequence {sequence.spec.seq_id} reads wrong KV at {int(wrong[0])}")
            at = torch.arange(piece.begin, end)
            self.pool.elements[blocks[at // size], :, :, :, at % size] = wanted[piece.begin :, :, None, None, None]
            if piece.samples:
                drawn[i] = self._draw(piece, codes)
        return StepTokens.of_pieces(step, drawn)

    def _draw(self, piece: Slice, codes: list[int]) -> Drawn:
        sequence = piece.sequence
        if sequence.forks:
            ids = [next_token(codes[-1], piece.end, fork.choice) for fork in sequence.forks]
            return Drawn((), forks=tuple(Drawn((SampledToken(token, None, ()),)) for token in ids))
        tokens = [next_token(codes[piece.end - 1], piece.end, sequence.spec.choice)]
        while len(tokens) <= len(piece.drafts) and tokens[-1] == piece.drafts[len(tokens) - 1]:
            at_next = piece.end + len(tokens)
            tokens.append(next_token(codes[at_next - 1], at_next, sequence.spec.choice))
        return Drawn(tuple(SampledToken(token, None, ()) for token in tokens))


class SimHost:
    """`EngineHost` without its thread: a step takes `step_s` of virtual time."""

    def __init__(self, worker: SimWorker, engine: Engine, step_s: float) -> None:
        self.engine = engine
        self.step_s = step_s
        self.latest = NOTHING
        self._worker = worker
        self._is_running = False
        self._commands: deque[Callable[[], None]] = deque()
        engine.on_started = worker.on_started

    def add(self, spec: SequenceSpec) -> None:
        def begin() -> None:
            self.engine.add(spec)
            if self._worker.sim.is_poison(spec):  # whoever computes it dies a step later
                asyncio.get_running_loop().call_later(self.step_s, self._worker.sim.kill, self._worker.name)

        self._command(begin)

    def join(self, reservation: Reservation, first_tokens: Mapping[SeqId, int]) -> None:
        self._command(lambda: self.engine.join(reservation, first_tokens))

    def finish(self, seq_id: SeqId) -> None:
        self._command(lambda: self.engine.finish(seq_id))

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if not self._is_running:
            self._is_running = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        if self._worker.is_dead:
            return
        while self._commands:
            self._commands.popleft()()
        self.engine.blocks.check()  # P4 at every step
        if not self.engine.has_work:
            self._is_running = False
            return
        result = self.engine.step()
        asyncio.get_running_loop().call_later(self.step_s if result.num_rows else 0.02, self._end, result)

    def _end(self, result: StepResult) -> None:
        if not self._worker.is_dead:
            self._worker.when_awake(lambda: self._tell(result))
            self._worker.when_awake(self._turn)

    def _tell(self, result: StepResult) -> None:
        self.latest = result
        self._worker.on_step(result)


@dataclass(frozen=True)
class WorkerPlan:
    """One worker of a simulated fleet."""

    role: str
    num_blocks: int = 64
    chunk_tokens: int = 16
    step_s: float = 0.01
    max_running: int = 8


class SimWorker:
    """What `splitfire.worker.worker` joins, without gRPC. Implements `Replies` towards the router."""

    def __init__(self, sim: Simulation, name: str, plan: WorkerPlan) -> None:
        self.sim = sim
        self.name = name
        self.plan = plan
        self.incarnation = sim.random.randbytes(16)
        self.is_dead = False
        self.transport = SimTransport(sim.net, f"{name}-{self.incarnation.hex()[:4]}")
        pool = KvPool(LAYOUT, plan.num_blocks, CPU)
        runner = SimRunner(pool, sim.violations)
        clock = asyncio.get_running_loop().time
        engine = Engine(runner, BlockPool(plan.num_blocks), Budget(plan.chunk_tokens, plan.max_running), clock)  # type: ignore[arg-type]
        self.host = SimHost(self, engine, plan.step_s)
        options = AgentOptions(2, 4, 2 * slot_bytes_for(LAYOUT.block_bytes))
        self.agent = TransferAgent(
            self.transport,
            self.incarnation,
            sim.fingerprint.digest,
            options,
            clock,
            is_short_of_blocks=lambda: engine.lending.is_short,
        )
        context = WorkerContext(name, self.host, self.agent, LAYOUT, sim.telemetry, True, clock)  # type: ignore[arg-type]
        self.prefill, self.decode = PrefillService(context), DecodeService(context)
        self._limits = JobLimits(VOCAB, 1 << 20, plan.num_blocks, LAYOUT, sim.fingerprint)
        self.agent.start()
        hello = make_hello(plan.role, name, incarnation=self.incarnation)
        hello.kv_format.CopyFrom(layout_to_wire(LAYOUT))
        hello.fingerprint.block_size = LAYOUT.block_size
        hello.transports[0].address = self.transport.address
        hello.capacity.total_blocks, hello.capacity.max_running = plan.num_blocks, plan.max_running
        hello.capacity.chunk_tokens = plan.chunk_tokens
        hello.sends_cache_events = True
        self.handle = WorkerHandle(hello, reported_at=clock())
        sim.fleet.add(self.handle)
        self._reader = asyncio.create_task(self._read())
        self._reporter = asyncio.create_task(self._report())

    @property
    def services(self) -> tuple[RoleService, RoleService]:
        return (self.prefill, self.decode)

    def kill(self) -> None:
        """SIGKILL: the process is no more; the router notices its stream a little later."""
        self.is_dead = self.transport.is_dead = True
        self._reader.cancel()
        self._reporter.cancel()
        asyncio.get_running_loop().call_later(0.002, self.sim.fleet.remove, self.handle)

    def when_awake(self, act: Callable[[], None]) -> None:
        self.sim.net._act(self.transport.address, act)

    # -- up

    def output(self, output: fleet_pb2.SequenceOutput) -> None:
        self._up(lambda events: events.on_output(self.incarnation, output), output.attempt)

    def finished(self, finished: fleet_pb2.Finished) -> None:
        self._up(lambda events: events.on_finished(self.incarnation, finished), finished.attempt)

    def refused(self, refused: fleet_pb2.Refused) -> None:
        self._up(lambda events: events.on_refused(self.incarnation, refused), refused.attempt)

    def _up(self, tell: Callable[..., None], attempt: int) -> None:
        def arrive() -> None:
            events = self.handle.events(attempt)
            if events is not None:
                tell(events)

        self.sim.net.later(self.transport.address, b"router", arrive, in_order=True)

    async def _report(self) -> None:
        """Load, and what the prefix cache got and lost; of the latter `net.loses_report` may take some. No rates: steps take no time for
        the engine itself."""
        self.feed = feed = CacheFeeds(self.host.engine).open()
        while True:
            load = self.host.engine.load()
            report = fleet_pb2.Load(
                total_blocks=load.total_blocks,
                free_blocks=load.available_blocks,
                reserved_blocks=load.reserved_blocks,
                running_sequences=load.running,
                queued_tokens=load.queued_tokens,
                cached_blocks=load.cached_blocks,
            )
            if self.transport.address not in self.sim.net.frozen and self.handle in self.sim.fleet.workers:
                self.sim.fleet.on_report(fleet_pb2.ReportRequest(incarnation=self.incarnation, load=report))
                for events in feed.messages(asyncio.get_running_loop().time()):
                    message = fleet_pb2.ReportRequest(incarnation=self.incarnation, cache_events=events)
                    if not self.sim.net.loses_report() and not self.sim.fleet.on_report(message):
                        feed.resync()
            await asyncio.sleep(0.25)

    # -- down

    async def _read(self) -> None:
        while True:
            frame = await self.handle.outbox.get()
            self.sim.net.later(b"router", self.transport.address, lambda f=frame: self._on_frame(f), in_order=True)  # type: ignore[misc]

    def _on_frame(self, frame: fleet_pb2.AttachResponse) -> None:
        if self.is_dead:
            return
        kind = frame.WhichOneof("frame")
        if kind == "submit":
            self._submit(frame.submit)
        elif kind == "cancel":
            choice = frame.cancel.choice if frame.cancel.HasField("choice") else None
            for service in self.services:
                service.cancel(self, frame.cancel.attempt, choice)
        elif kind == "redirect":
            self.prefill.redirect(self, frame.redirect.attempt, handoff_from_wire(frame.redirect.handoff, "ucx"))
        elif kind == "peer_up":
            self.agent.meet(peer_address(frame.peer_up.peer, "ucx"))
        elif kind == "peer_gone":
            self.agent.peer_gone(frame.peer_gone.incarnation)

    def _submit(self, submit: fleet_pb2.Submit) -> None:
        try:
            job = make_job(submit, self, self._limits, asyncio.get_running_loop().time())
            (self.prefill if submit.part == fleet_pb2.PART_PREFILL else self.decode).submit(job)
        except SplitfireError as exc:
            self.refused(refusal(submit.attempt, exc, is_retryable=exc.is_retryable))

    def on_started(self, ids: tuple[SeqId, ...]) -> None:
        for seq_id in ids:
            for service in self.services:
                if service.owns(seq_id):
                    self._guarded(service, seq_id, lambda s=service, i=seq_id: s.on_started(i))  # type: ignore[misc]

    def on_step(self, result: StepResult) -> None:
        for row in result.plain:
            self._guarded(self.decode, row[0], lambda r=row: self.decode.on_token(*r))  # type: ignore[misc]
        for update in result.events:
            for service in self.services:
                if service.owns(update.seq_id):
                    self._guarded(service, update.seq_id, lambda s=service, u=update: s.on_update(u))  # type: ignore[misc]

    def _guarded(self, service: RoleService, seq_id: SeqId, act: Callable[[], None]) -> None:
        try:
            act()
        except SplitfireError as exc:
            service.fail(seq_id, exc)

    # -- what must hold

    @property
    def is_idle(self) -> bool:
        load = self.host.engine.load()
        return not (load.total_blocks - load.available_blocks or self.agent.num_open or self.agent.num_held_slots)


# -- the fleet


@dataclass
class Asked:
    """One request. `ended` is how."""

    prompt: tuple[int, ...]
    count: int
    choice: Choice
    task: asyncio.Task[None]
    error: SplitfireError | None = None


@dataclass
class Simulation:
    """Everything is drawn from one seed. Make it inside the virtual loop."""

    seed: int = 0
    split: Split = "always"
    in_place: bool = True  # prefill workers write into decode's slots where they lie
    violations: list[str] = field(default_factory=list)
    is_poison: Callable[[SequenceSpec], bool] = lambda spec: False  # a prompt that kills who computes it

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.net = Net(self.random, slots={} if self.in_place else None)
        self.net.violations = self.violations
        self.telemetry = Telemetry("sim", None)
        self.fingerprint: Fingerprint = replace(fingerprint(), block_size=LAYOUT.block_size)
        inside = make_inside(AdmissionLimits(64, 256, 1 << 24, 60.0, 60.0), Rules(self.split), self.random, VOCAB)
        self.fleet, self.admission, self.flow = inside.fleet, inside.admission, inside.flow
        self.flow._random = self.random
        self.workers: dict[str, SimWorker] = {}
        self.asked: list[Asked] = []

    def start(self, prefill: Sequence[WorkerPlan] | int = 1, decode: Sequence[WorkerPlan] | int = 1) -> None:
        plans = {"prefill": prefill, "decode": decode}
        for role, some in plans.items():
            every = [WorkerPlan(role)] * some if isinstance(some, int) else some
            for i, plan in enumerate(every):
                self.workers[f"{role[0]}{i}"] = SimWorker(self, f"{role[0]}{i}", replace(plan, role=role))

    def have_all_met(self) -> bool:
        """Each worker knows every one of the other role."""
        roles = Counter(w.plan.role for w in self.workers.values())
        return all(len(w.agent._peers._peers) == roles.total() - roles[w.plan.role] for w in self.workers.values())

    def ask(
        self, num_tokens: int, count: int = 6, *, seed: int | None = None, deadline_s: float = 60.0, priority: int = 2
    ) -> Asked:
        [asked] = self.ask_together(1, num_tokens, count, seed=seed, deadline_s=deadline_s, priority=priority)
        return asked

    def ask_together(
        self, n: int, num_tokens: int, count: int = 6, *, seed: int | None = None, deadline_s: float = 60.0, priority: int = 2
    ) -> list[Asked]:
        """`n` choices of one request."""
        draw = Random(len(self.asked) if seed is None else seed)
        prompt = tuple(draw.randrange(VOCAB) for _ in range(num_tokens))
        now = time.monotonic()
        plan = RequestPlan(
            f"r{len(self.asked)}", prompt, SamplingParams(temperature=0.0), StopParams(count, 0, frozenset()), priority, "", "", now,
            now + deadline_s,
        )  # fmt: skip
        choices = [Choice(plan, index, asyncio.Event()) for index in range(n)]
        first = self.flow.first_attempt(choices)
        asked = [Asked(prompt, count, choice, asyncio.create_task(self.flow.run(choice, first))) for choice in choices]
        self.asked += asked
        return asked

    def kill(self, name: str, restart_s: float | None = 0.5) -> None:
        """SIGKILL, and the supervisor's new process."""
        worker = self.workers[name]
        if worker.is_dead:
            return
        worker.kill()
        if restart_s is not None:
            asyncio.get_running_loop().call_later(restart_s, self._restart, name, worker.plan)

    def _restart(self, name: str, plan: WorkerPlan) -> None:
        self.workers[name] = SimWorker(self, name, plan)

    async def finish(self, *, may_fail: bool = False, hold_s: float = 1.0) -> None:
        """Every request comes to its end, right, and then nothing is held for longer than `hold_s`."""
        for asked in self.asked:
            try:
                await asked.task
            except asyncio.CancelledError:
                continue
            except SplitfireError as exc:
                asked.error = exc
                assert may_fail, f"{asked.choice.plan.request_id}: {exc} ({exc.reason})"
            expected = answer_to(asked.prompt, asked.count, asked.choice.index)
            assert asked.choice.ids == expected[: len(asked.choice.ids)], "wrong tokens reached the client"
            assert asked.error is not None or len(asked.choice.ids) == asked.count
        began = time.monotonic()
        while busy := [w.name for w in self.workers.values() if not w.is_dead and not w.is_idle]:
            assert time.monotonic() - began <= hold_s, f"{busy} still hold something"
            await asyncio.sleep(0.05)
        assert not self.violations, self.violations
        for worker in self.workers.values():
            assert worker.is_dead or not worker.handle.attempts

    def close(self) -> None:
        for worker in self.workers.values():
            worker._reader.cancel()
            worker._reporter.cancel()
