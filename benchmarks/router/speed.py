"""What the router adds and how much it carries, with workers that answer at once, beside the bare relay.

added     time to first token beside that of a server which answers by itself, without any router; at one stream, and for a client
          that comes to 64 others that get a token every 20 ms
requests  300 bytes of text for one token: tokenizing, hashing, placing
relay     messages of one token, and of eight
processes the same requests at one process and at two

Rates are also given by the router's own processor time: what one core of it carries when nobody else wants that core.
"""

from __future__ import annotations

import time

from benchmarks.report import Row
from benchmarks.router.engine import Speed
from benchmarks.router.fake_worker import FleetShape
from benchmarks.router.load import Ask
from benchmarks.router.rig import Rig, rig
from benchmarks.router.runs import Loop, at_least, at_most, interleaved, plain, values

TEXT = Ask(300, 0, 1)
MANY = ("--max-requests=4096", "--ttft-target-s=3600")
OURS, BARE, NONE = "router", "bare", "no router"
STEP_S = 0.02  # of those that stream beside


def added(turns: int, seconds: float) -> list[Row]:
    """One client asks one thing after another; once alone, once while 64 streams run."""
    rows = []
    direct = rig(flags=(str(STEP_S),), num_clients=2, is_bare=True)
    with rig(flags=MANY, num_clients=2) as ours, rig(num_clients=2, is_bare=True) as bare, direct as none:
        for case, streams, bound in (("one stream", 0, 1.5), ("beside 64 streams", 64, 5.0)):
            taken: dict[str, list[list[float]]] = {OURS: [], BARE: [], NONE: []}
            for _ in range(turns):
                for name, made in ((OURS, ours), (BARE, bare), (NONE, none)):
                    taken[name].append(_ttft_ms(made, streams, seconds))
            p50, p99 = ({name: [times[len(times) * q // 100] for times in taken[name]] for name in taken} for q in (50, 99))
            more = {name: [a - b for a, b in zip(p50[name], p50[NONE], strict=True)] for name in (OURS, BARE)}
            rows.append(at_most(case, "added to TTFT p50", "ms", more[OURS], bound, more[BARE]))
            rows.append(plain(case, "TTFT p50, whole", "ms", p50[OURS], p50[BARE]))
            rows.append(plain(case, "TTFT p99, whole", "ms", p99[OURS], p99[BARE]))
    return rows


def requests(turns: int, seconds: float) -> list[Row]:
    with rig(flags=MANY) as ours, rig(is_bare=True) as bare:
        taken = interleaved(Loop(FleetShape(2, 2, Speed()), TEXT, 32, seconds), {OURS: ours, BARE: bare}, turns)
    case = "300 bytes of text, 1 token"
    rate = [values(taken[name], lambda run: len(run.answers) / run.cpu_s) for name in (OURS, BARE)]
    cost = [values(taken[name], lambda run: run.cpu_us_a_request) for name in (OURS, BARE)]
    return [
        at_least(case, "requests a processor second", "1/s", rate[0], 1500, rate[1]),
        plain(case, "requests a second, as seen", "1/s", values(taken[OURS], lambda run: run.requests_per_s), is_rate=True),
        plain(case, "processor time a request", "us", *cost),
    ]


def relay(turns: int, seconds: float) -> list[Row]:
    rows = []
    with rig(flags=MANY) as ours, rig(is_bare=True) as bare:
        rigs = {OURS: ours, BARE: bare}
        taken = interleaved(Loop(FleetShape(1, 1, Speed(step_s=0.006)), Ask(0, 20, 300), 64, seconds), rigs, turns)
        rate = [values(taken[name], lambda run: run.num_messages / run.cpu_s) for name in rigs]
        rows.append(at_least("1 token a message", "messages a processor second", "1/s", rate[0], 15e3, rate[1]))
        taken = interleaved(Loop(FleetShape(1, 1, Speed()), Ask(0, 20, 1000), 64, seconds), rigs, turns)
        seen = [values(taken[name], lambda run: run.num_messages / run.seconds) for name in rigs]
        rows.append(plain("as fast as workers send", "messages a second, as seen", "1/s", *seen, is_rate=True))
        loop = Loop(FleetShape(1, 1, Speed(step_s=0.006, tokens_per_step=8)), Ask(0, 20, 1600), 64, seconds)
        taken = interleaved(loop, rigs, turns)
        rate = [values(taken[name], lambda run: run.num_tokens / run.cpu_s) for name in rigs]
        rows.append(at_least("8 tokens a message", "tokens a processor second", "1/s", rate[0], 100e3, rate[1]))
    return rows


def processes(turns: int, seconds: float) -> list[Row]:
    """Two on one core, workers attached to both: neither can be faster, only dearer. What the bare relay pays for it is gRPC's."""
    loop, costs = Loop(FleetShape(2, 2, Speed()), TEXT, 32, seconds), {}
    for name, flags in ((OURS, MANY), (BARE, ())):
        is_bare = name == BARE
        with rig(flags=flags, is_bare=is_bare) as one, rig(flags=flags, num_routers=2, is_bare=is_bare) as two:
            taken = interleaved(loop, {"one": one, "two": two}, turns)
        costs[name] = [values(taken[number], lambda run: run.cpu_us_a_request) for number in ("one", "two")]
    more = {name: [100 * (b / a - 1) for a, b in zip(*cost, strict=True)] for name, cost in costs.items()}
    return [
        plain("one process", "processor time a request", "us", costs[OURS][0], costs[BARE][0]),
        plain("two processes", "processor time a request", "us", costs[OURS][1], costs[BARE][1]),
        at_most("two processes", "more processor time a request", "%", more[OURS], 15, more[BARE]),
    ]


def _ttft_ms(made: Rig, streams: int, seconds: float) -> list[float]:
    made.attach(FleetShape(2, 2, Speed(step_s=STEP_S)))
    others, one = made.clients
    if streams:
        others.begin("closed", Ask(0, 20, 50), streams, seconds + 1.0, 0)
        time.sleep(0.5)
    answers = one.do("closed", Ask(300, 0, 2), 1, seconds, 1)
    if streams:
        others.result()
    return sorted(1e3 * answer.ttft_s for answer in answers)
