"""Two routers over the same workers, sharing a port: each serves, and one that dies takes only its own streams with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import pytest

from splitfire.cli.supervisor import Fleet, FleetPlan
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc
from tests.e2e.fleets import LONG, SLOW, RunningFleet, greedy, start_fleet, until


class TwoRouters(Fleet):
    def __init__(self, plan: FleetPlan, say: Callable[[str], None]) -> None:
        super().__init__(replace(plan, num_routers=2), say)


class Door:
    """A connection to one of the routers."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        [self.worker_port] = self.stub.GetFleet(pb.GetFleetRequest(), timeout=5).worker_ports

    def status(self) -> pb.GetFleetResponse:
        return self.stub.GetFleet(pb.GetFleetRequest(), timeout=5)

    def ids(self, request: pb.GenerateRequest) -> list[int]:
        return [token for response in self.stub.Generate(request, timeout=60) for token in response.token_ids]


@pytest.fixture(scope="module")
def fleet() -> Iterator[RunningFleet]:
    with start_fleet("pico", prefill=1, decode=1, router=("--split=always",), worker=SLOW, kind=TwoRouters) as running:
        yield running


def doors_of(fleet: RunningFleet) -> dict[str, Door]:
    """A door to each router, by its process's name. The kernel chooses who gets a connection."""
    doors: dict[str, Door] = {}
    for _ in range(40):  # both, but for one case in 2 to the power of 39
        with contextlib.suppress(grpc.RpcError):
            door = Door(fleet.address)
            doors.setdefault(f"router-{fleet.fleet._worker_ports.index(door.worker_port)}", door)
        if len(doors) == 2:
            break
    return doors


def test_the_routers_count_what_the_other_sent(fleet: RunningFleet) -> None:
    """Each sees all the load, of its own and of the other, and both the same tokens."""
    doors = doors_of(fleet)
    calls = [door.stub.Generate(LONG) for door in doors.values()]
    for call in calls:
        next(call)
    for door in doors.values():
        until(lambda door=door: any(w.running_sequences == 2 for w in door.status().workers), 10)  # type: ignore[misc]
        assert door.status().running_requests == 1
    for call in calls:
        call.cancel()
    assert len({tuple(door.ids(greedy(count=20))) for door in doors.values()}) == 1


def test_a_killed_router_loses_only_its_own_streams(fleet: RunningFleet) -> None:
    """F13: the other's answers are as ever, the workers free everything of the dead one, and it comes back."""
    doors = doors_of(fleet)
    other, dying = doors["router-0"], doors["router-1"]
    prompts = [[(11 * i + c) % 4000 for i in range(120)] for c in range(3)]
    expected = [other.ids(greedy(prompt, 100)) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    lost = [dying.stub.Generate(LONG) for _ in range(3)]
    for call in lost:
        next(call)
    asking = [threading.Thread(target=lambda i=i: answers.update({i: other.ids(greedy(prompts[i], 100))})) for i in range(3)]
    for thread in asking:
        thread.start()
    fleet.process("router-1").kill()
    for call in lost:
        with pytest.raises(grpc.RpcError):
            for _ in call:
                pass
    for thread in asking:
        thread.join(60)
    assert [answers[i] for i in range(3)] == expected
    until(lambda: not any(w.running_sequences or w.free_blocks != w.total_blocks for w in other.status().workers), 5)
    assert {*doors_of(fleet)} == {"router-0"}, "new connections go to who is there"

    def is_back() -> bool:
        fleet.fleet.watch()
        return "router-1" in doors_of(fleet)

    until(is_back, 30)
    again = doors_of(fleet)["router-1"]
    until(lambda: len(again.status().workers) == 2, 15)
    assert again.ids(greedy(prompts[0], 100)) == expected[0]
