"""The hand-off under real faults: real processes killed and frozen in the middle of it, over real UCX and real TCP.

Whatever happens, the answer is the undisturbed greedy one, and nothing stays held. Moments are told by what a worker has
computed (its processor time) or what a client has read, never by a clock, so a slow machine tries the same ones.
"""

from __future__ import annotations

import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from splitfire.core import limits
from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import assert_greedy, pico_oracle
from tests.e2e.fleets import RunningFleet, cpu_s, generated_at, greedy, start_fleet, until

LASTING = 1800  # tokens of an answer: a second and more
NOBODY_NOTICED, FAILED, PASSED_ON = (0, 0), (1, 0), (0, 1)  # tries: an attempt failed; the prompt was not computed again
LONG = 1500  # tokens: 47 blocks, so a prompt passes through its two slots two dozen times
SLOW_RING = ("--chunk-tokens=64", "--slot-size=256KiB", "--send-slots=2", "--receive-slots=2")
PEER_DIED_S, ALL_LIVE_S = 20.0, 5.0  # P5: how long something may stay held
MAX_TRIES, NEARLY_ALL = 8, 0.9  # to be there in time; of a prompt: then it is not any more
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Pair:
    """The workers that requests of one session go to."""

    session: str
    prefill: str
    decode: str


class Asked:
    """A request under way, on a thread of its own. The stream contract is checked as it comes (P2)."""

    def __init__(self, fleet: RunningFleet, request: pb.GenerateRequest) -> None:
        self.prompt = list(request.prompt_token_ids)
        self.ids: list[int] = []
        self.summary = pb.Summary()
        self.num_tokens = request.stopping.max_tokens
        self._responses = fleet.stub.Generate(request, timeout=90)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for response in self._responses:
                if response.HasField("summary"):
                    self.summary = response.summary
                else:
                    assert response.offset == len(self.ids), "contiguous, nothing twice"
                    self.ids += response.token_ids
        except BaseException as exc:
            self._error = exc

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def request_id(self) -> str:
        return self.summary.request_id

    def until(self, num_tokens: int) -> None:
        """The client has read as many."""
        until(lambda: len(self.ids) >= num_tokens or self.is_over, 60)
        assert not self.is_over

    def join(self) -> None:
        self._thread.join(90)
        assert self.is_over
        if self._error is not None:
            raise self._error

    def assert_right(self) -> None:
        """All of it, as if nothing had happened."""
        self.join()
        assert len(self.ids) == self.num_tokens
        assert_greedy(pico_oracle(), self.prompt, self.ids)


class Stage:
    """A fleet to do harm to, with one worker of each role to spare: who was killed starts again beside the next tests."""

    def __init__(self, fleet: RunningFleet) -> None:
        self.fleet = fleet
        self.prompt_cpu_s = min(self._time_prompt() for _ in range(2))

    def _time_prompt(self) -> float:
        pair = self.pair()
        process = self.fleet.process(pair.prefill)
        before = cpu_s(process)
        self.fleet.generate(self.long(pair))
        return cpu_s(process) - before

    def pair(self) -> Pair:
        """A session of its own, and where it lives."""
        self.wait(2)
        session = f"session-{next(_numbers)}"
        while True:  # on a busy machine prefill's last frame may be later than an answer's summary waits for it
            summary = self.fleet.generate(greedy(new_prompt(40), 8, session_id=session))[0].summary
            if len(generated_at(summary)) == 1 and any(phase.name == "prefill" for phase in summary.phases):
                self.last_pair = Pair(session, *workers_of(summary, "prefill"), *generated_at(summary))
                self.last_used = time.monotonic()
                return self.last_pair

    def long(self, pair: Pair, count: int = 8) -> pb.GenerateRequest:
        """A prompt nobody has seen, so all of it is computed and moved."""
        return greedy(new_prompt(LONG), count, session_id=pair.session)

    def short(self, pair: Pair, count: int) -> pb.GenerateRequest:
        return greedy(new_prompt(100), count, session_id=pair.session)

    def ask_and_wait(self, share: float, only: Pair | None = None) -> tuple[Pair, Asked]:
        """A long request whose prompt is computed up to `share`, what is computed being on its way to decode, and where: at the pair `only`, or
        at any. One more is asked where it went elsewhere, for its session is a preference, and where this process looked too late: by the
        processor time of who computes, for what a client has read may be late as well."""
        for _ in range(MAX_TRIES):
            pair = only or self.pair()
            process = self.fleet.process(pair.prefill)
            before = cpu_s(process)
            asked = Asked(self.fleet, self.long(pair))
            until(lambda: cpu_s(process) > before + share * self.prompt_cpu_s or asked.ids or asked.is_over, 60)  # noqa: B023
            if cpu_s(process) < before + NEARLY_ALL * self.prompt_cpu_s and not asked.ids and not asked.is_over:
                return pair, asked
            asked.join()
            if pair.prefill in workers_of(asked.summary, "prefill"):
                self.prompt_cpu_s = min(self.prompt_cpu_s, cpu_s(process) - before)
        raise AssertionError(f"too late {MAX_TRIES} times")

    def strike(self, role: str, share: float) -> tuple[Pair, Asked]:
        """Kills a worker while a prompt is computed and sent, `share` of which is done. One that nobody noticed was another worker's: three
        times at most."""
        for _ in range(3):
            pair, asked = self.ask_and_wait(share)
            self.fleet.process(getattr(pair, role)).kill()
            self.ends_well(asked, seconds=PEER_DIED_S)
            if self.tries(asked) != NOBODY_NOTICED:
                break
        return pair, asked

    def said(self, event: str, request_id: str) -> int:
        """How often the router logged `event` of a request."""
        lines = self.fleet.fleet.children[0].log.read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return sum(e["event"] == event and e.get("request_id") == request_id for e in entries)

    def tries(self, asked: Asked) -> tuple[int, int]:
        """Attempts that failed, and prompts that were passed on as they were."""
        return self.said("attempt failed", asked.request_id), self.said("redirected", asked.request_id)

    def ends_well(self, *requests: Asked, seconds: float) -> None:
        """Every answer is right and nothing is held by anybody: by what was reported, and by what is reported after that."""
        for asked in requests:
            asked.join()
        self.fleet.assert_no_leaks(seconds)
        self._start_again()
        every_report_is_newer = for_s(limits.REPORT_EVERY_S + 0.2)
        for asked in requests:
            asked.assert_right()
        until(every_report_is_newer, 5)
        self.fleet.assert_no_leaks(seconds)

    def wait(self, num_workers: int) -> None:
        """At least so many of each role are there, or all, and know each other."""
        until(lambda: self._has(num_workers), 60, lambda: str(self.fleet.status()))

    def _has(self, num_workers: int) -> bool:
        self._start_again()
        status = self.fleet.status()
        roles = [w.role for w in status.workers]
        num_prefill, num_decode = roles.count(pb.ROLE_PREFILL), roles.count(pb.ROLE_DECODE)
        plan = self.fleet.fleet.plan
        is_enough = num_prefill >= min(num_workers, plan.num_prefill) and num_decode >= min(num_workers, plan.num_decode)
        return is_enough and len(status.pairs) == num_prefill * num_decode

    def _start_again(self) -> None:
        for child in self.fleet.fleet.children:
            code = child.process.poll() if child.process is not None else None
            assert code in (None, -signal.SIGKILL), f"{child.name} ended by itself: {code}"
            child.delay_s = 0.0  # at once
        self.fleet.fleet.watch()  # finds who is dead,
        self.fleet.fleet.watch()  # and starts it


def new_prompt(length: int) -> list[int]:
    number = next(_numbers)
    return [(31 * number + (7 + number) * i) % 4000 + 1 for i in range(length)]


def workers_of(summary: pb.Summary, phase: str) -> set[str]:
    return {p.worker for p in summary.phases if p.name == phase}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with start_fleet("pico", prefill=3, decode=3, worker=(*SLOW_RING, "--speculate=off"), router=("--split=always",)) as fleet:
        yield Stage(fleet)


# -- a worker freezes, and comes back; first of all, for a worker that was killed shortly before would not be used for a while


def test_sigstop_prefill_zombie_write_rejected(stage: Stage) -> None:
    """F14: decode gives the transfer up after 2 s; what the zombie had under way lands nowhere, and it goes on elsewhere."""
    pair, asked = stage.ask_and_wait(0.3)
    frozen(stage.fleet.process(pair.prefill), for_s(5.0))
    stage.ends_well(asked, seconds=ALL_LIVE_S)
    assert_used_again(stage, "prefill", pair.prefill)


def test_sigstop_decode_mid_stream_goes_on(stage: Stage) -> None:
    """F15: too short to be given up."""
    pair = stage.pair()
    asked = Asked(stage.fleet, stage.short(pair, LASTING))
    asked.until(5)
    frozen(stage.fleet.process(pair.decode), for_s(5.0))
    stage.ends_well(asked, seconds=ALL_LIVE_S)
    assert_used_again(stage, "decode", pair.decode)


@pytest.mark.long
def test_zombies_that_were_given_up_change_nothing_and_are_used_again(stage: Stage) -> None:
    """F14, F15: a prefill worker in mid transfer and a decode worker in mid stream, until the router has let go of both."""
    stage.wait(3)
    first, second = stage.pair(), stage.pair()
    while second.prefill == first.prefill or second.decode == first.decode:
        second = stage.pair()
    _, sends = stage.ask_and_wait(0.3, first)
    zombies = [stage.fleet.process(first.prefill), stage.fleet.process(second.decode)]
    zombies[0].suspend()
    streams = Asked(stage.fleet, stage.short(second, LASTING))
    streams.until(5)
    zombies[1].suspend()
    try:
        for asked in (sends, streams):
            asked.join()
        until(lambda: len(stage.fleet.status().workers) == 4, 30)
        stage.fleet.assert_no_leaks(PEER_DIED_S)
    finally:
        for zombie in zombies:
            zombie.resume()
    stage.wait(3)
    stage.ends_well(sends, streams, seconds=ALL_LIVE_S)
    assert_used_again(stage, "prefill", first.prefill)
    assert_used_again(stage, "decode", second.decode)


def frozen(process: psutil.Process, is_over: Callable[[], bool]) -> None:
    process.suspend()
    try:
        until(is_over, 30)
    finally:
        process.resume()


def for_s(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def assert_used_again(stage: Stage, role: str, name: str) -> None:
    """The same process serves a request that is placed on it."""
    pair = stage.pair()
    while getattr(pair, role) != name:  # drawn among equals
        pair = stage.pair()
    asked = Asked(stage.fleet, stage.short(pair, 5))
    asked.assert_right()
    assert asked.summary.kv_transfer.bytes > 0 and stage.tries(asked) == NOBODY_NOTICED
    stage.fleet.assert_no_leaks(ALL_LIVE_S)


# -- prefill dies


def test_kill_prefill_mid_compute(stage: Stage) -> None:
    """F02: in its first chunk; nothing is on its way yet."""
    _, asked = stage.strike("prefill", 0.0)
    assert stage.tries(asked) == FAILED


@pytest.mark.parametrize("share", [0.15, pytest.param(0.45, marks=pytest.mark.long), 0.75])
def test_kill_prefill_mid_transfer(stage: Stage, share: float) -> None:
    """F03: decode holds blocks for all of the prompt, and some of it."""
    _, asked = stage.strike("prefill", share)
    assert stage.tries(asked) == FAILED


def test_kill_prefill_after_commit(stage: Stage) -> None:
    """F05: decode has everything. Its second token is the first that a client sees of it."""
    pair = stage.pair()
    asked = Asked(stage.fleet, stage.short(pair, LASTING))
    asked.until(2)
    stage.fleet.process(pair.prefill).kill()
    stage.ends_well(asked, seconds=PEER_DIED_S)
    assert stage.tries(asked) == NOBODY_NOTICED


# -- decode dies


def test_kill_decode_while_queued(stage: Stage) -> None:
    """F06: the prompt is computed and its first token streamed; decode never answered the offer."""
    for _ in range(3):  # its session is a preference
        pair = stage.pair()
        decode = stage.fleet.process(pair.decode)
        decode.suspend()
        asked = Asked(stage.fleet, stage.short(pair, 20))
        asked.until(1)
        decode.kill()
        stage.ends_well(asked, seconds=PEER_DIED_S)
        if stage.tries(asked) != NOBODY_NOTICED:
            break
    assert stage.tries(asked) == PASSED_ON


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_kill_decode_mid_receive(stage: Stage, share: float) -> None:
    """F07: prefill still has every block."""
    pair, asked = stage.strike("decode", share)
    assert stage.tries(asked) == PASSED_ON
    assert workers_of(asked.summary, "prefill") <= {pair.prefill}, "none where it told too late"


@pytest.mark.parametrize("tokens", [1, pytest.param(7, marks=pytest.mark.long), 63])
def test_kill_decode_mid_stream(stage: Stage, tokens: int) -> None:
    """F08, P9."""
    pair = stage.pair()
    asked = Asked(stage.fleet, stage.short(pair, LASTING))
    asked.until(tokens)
    stage.fleet.process(pair.decode).kill()
    stage.ends_well(asked, seconds=PEER_DIED_S)


def test_restart_same_address_new_incarnation() -> None:
    """F19: both ends of the only pair, under the names they had."""
    with start_fleet("pico", prefill=1, decode=1, worker=SLOW_RING) as fleet:
        stage = Stage(fleet)
        pair = stage.pair()
        before = [fleet.worker(name).incarnation for name in (pair.prefill, pair.decode)]
        for name in (pair.prefill, pair.decode):
            fleet.process(name).kill()
        until(lambda: not set(before) & {w.incarnation for w in fleet.status().workers})
        found = stage.pair()
        asked = Asked(fleet, stage.short(found, 5))
        stage.ends_well(asked, seconds=ALL_LIVE_S)
        assert asked.summary.kv_transfer.bytes > 0 and stage.tries(asked) == NOBODY_NOTICED
        assert (found.prefill, found.decode) == (pair.prefill, pair.decode)


# -- other fleets, while this one idles


@pytest.mark.long
def test_over_tcp_a_killed_decode_worker_costs_the_same_as_over_ucx() -> None:
    with start_fleet("pico", prefill=1, decode=2, worker=(*SLOW_RING, "--transport=tcp")) as fleet:
        stage = Stage(fleet)
        pair = stage.pair()
        asked = Asked(fleet, stage.long(pair))
        stage.ends_well(asked, seconds=ALL_LIVE_S)
        moved = asked.summary.kv_transfer
        assert (moved.transport, moved.blocks) == ("tcp", 47)
        _, asked = stage.strike("decode", 0.4)
        assert stage.tries(asked) == PASSED_ON
        assert asked.summary.kv_transfer.transport == "tcp"


@pytest.mark.long
def test_a_death_with_100_transfers_in_flight_is_noticed_within_one_second(tmp_path: Path) -> None:
    """Both decode workers are frozen until 204 prompts are computed and offered to them; the one with more dies, the other wakes."""
    trace = tmp_path / "trace.json"
    flags = ("--max-running=256", "--kv-memory=416MiB", "--slot-size=256KiB", "--chunk-tokens=16384")
    with start_fleet("pico", prefill=1, decode=2, worker=flags, shared=(f"--trace-file={trace}",)) as fleet:
        prompts = [new_prompt(130) for _ in range(12)]
        expected = [fleet.ids(prompt, 4) for prompt in prompts]  # and prefill keeps their KV: the rest goes fast
        for prompt, ids in zip(prompts, expected, strict=True):
            assert_greedy(pico_oracle(), prompt, ids)
        decodes = {name: fleet.process(name) for name in ("decode-0", "decode-1")}
        asked = None
        while asked is None:
            fleet.assert_no_leaks(PEER_DIED_S)
            asked = pile_up(fleet, prompts, list(decodes.values()))
        placed = fleet.stub.GetFleet(pb.GetFleetRequest(last=60), timeout=10).decisions  # five of each prompt
        receivers = [decision.candidates[0].decode_worker_id for decision in placed]
        least, most = sorted(decodes, key=receivers.count)
        victim, other = decodes[most], decodes[least]
        killed_at = time.time()
        victim.kill()
        other.resume()
        for i, one in enumerate(asked):
            one.join()
            assert one.ids == expected[i % len(prompts)]
        fleet.assert_no_leaks(PEER_DIED_S)
        until(lambda: len(aborted_ships(trace, killed_at)) >= 100, 5)
        assert max(aborted_ships(trace, killed_at)) - killed_at < 1.0


def pile_up(fleet: RunningFleet, prompts: Sequence[list[int]], decodes: Sequence[psutil.Process]) -> list[Asked] | None:
    """Freezes the decode workers, and asks until 102 transfers to each have begun. None where that took so long that the
    router holds them for lost: then they are awake, and nothing is under way."""
    for process in decodes:
        process.suspend()
    asked = []
    try:
        is_late = for_s(limits.SUSPECT_AFTER_S - 0.5)
        asked = [Asked(fleet, greedy(prompts[i % len(prompts)], 4)) for i in range(204)]
        until(lambda: is_late() or all(a.ids for a in asked), 30)
        if all(a.ids for a in asked):
            return asked
    finally:
        if not all(a.ids for a in asked):
            for process in decodes:
                process.resume()
    for one in asked:
        one.join()
    return None


def aborted_ships(trace: Path, since: float) -> Sequence[float]:
    """When prefill gave up each transfer that did not reach its receiver."""
    events = json.loads(trace.read_text())
    ships = [e for e in events if e["ph"] == "X" and e["name"] == "ship" and e["args"]["splitfire.outcome"] != "received"]
    return [ended for e in ships if (ended := (e["ts"] + e["dur"]) / 1e6) >= since]


def test_idle_then_request(stage: Stage) -> None:
    """F78: longer than any keepalive, which other fleets' tests were good for; a link made before is used at once, whichever."""
    pair, idle_s = stage.last_pair, limits.KEEPALIVE_TIME_S + limits.KEEPALIVE_TIMEOUT_S
    until(lambda: time.monotonic() - stage.last_used > idle_s, 20)
    asked = Asked(stage.fleet, stage.short(pair, 5))
    stage.ends_well(asked, seconds=ALL_LIVE_S)
    assert asked.summary.kv_transfer.transport == "ucx" and stage.tries(asked) == NOBODY_NOTICED
