"""Group B of bad inputs in a real fleet: a worker that says what cannot be, beside those that do their work.

Who may join and what a frame may say is tested at the router's door (tests/router/test_fleet.py, test_flow.py); here a client's answer has
to be right whatever one worker says. Tokens that could be right are not among it: a worker of the fleet is trusted with those.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from splitfire.core.fingerprint import Fingerprint
from splitfire.core.model_dir import ModelDir, weights_digest
from splitfire.core.wire import fingerprint_to_wire
from splitfire.v1 import fleet_pb2, fleet_pb2_grpc
from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import PICO
from tests.e2e.fleets import RunningFleet, start_fleet, until
from tests.router.fakes import make_hello

Frame = fleet_pb2.AttachRequest
Lie = Callable[[int], list[Frame]]


def tokens(attempt: int, offset: int, ids: list[int], choice: int = 0) -> Frame:
    output = fleet_pb2.SequenceOutput(attempt=attempt, offset=offset, token_ids=ids, choice=choice)
    return Frame(step_output=fleet_pb2.StepOutput(sequences=[output]))


LIES: dict[str, Lie] = {
    "B60 a gap": lambda attempt: [tokens(attempt, 5, [1])],
    "B60 an offset past all answers": lambda attempt: [tokens(attempt, 2**32 - 1, [1])],
    "B60 another attempt, then silence and death": lambda attempt: [tokens(attempt + 1000, 0, [1]), tokens(2**64 - 1, 0, [1])],
    "B60 a choice that nobody asked for": lambda attempt: [tokens(attempt, 0, [1], choice=7)],
    "B61 an id outside the vocabulary": lambda attempt: [tokens(attempt, 0, [4096])],
    "B61 a million tokens": lambda attempt: [tokens(attempt, 0, [1] * 1_000_000)],
    "a second hello": lambda attempt: [Frame(hello=make_hello())],
    "a refusal without sense": lambda attempt: [
        Frame(refused=fleet_pb2.Refused(attempt=attempt, code=99, reason="handoff_failed", message="x", is_retryable=True))
    ],
    "the end of somebody else's choice": lambda attempt: [
        Frame(finished=fleet_pb2.Finished(attempt=attempt, choice=5, reason=pb.FINISH_REASON_STOP)),
        Frame(finished=fleet_pb2.Finished(attempt=attempt + 1000, reason=pb.FINISH_REASON_STOP)),
    ],
}


class Liar:
    """A decode worker on a thread of its own that answers every Submit with one lie, and hangs up after `close`."""

    def __init__(self, fleet: RunningFleet, name: str, lie: Lie) -> None:
        self.num_told = 0
        self._lie = lie
        self._frames: queue.Queue[Frame | None] = queue.Queue()
        token = (fleet.fleet.directory / "fleet-token").read_text()
        self._channel = grpc.insecure_channel(fleet.status().worker_ports[0])
        hello = make_hello("decode", name)
        hello.fingerprint.CopyFrom(pico_fingerprint())
        self._frames.put(Frame(hello=hello))
        call = fleet_pb2_grpc.FleetStub(self._channel).Attach(
            iter(self._frames.get, None), metadata=(("authorization", f"Bearer {token}"),)
        )
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def has_lied(self) -> bool:
        return self.num_told > 0

    def close(self) -> None:
        """Hangs up when everything is said."""
        self._frames.put(None)
        self._thread.join(10)
        self._channel.close()

    def _run(self, call: Iterator[fleet_pb2.AttachResponse]) -> None:
        try:
            for frame in call:
                if frame.HasField("submit"):
                    for said in self._lie(frame.submit.attempt):
                        self._frames.put(said)
                    self.num_told += 1
        except grpc.RpcError:
            pass  # hung up


def pico_fingerprint() -> fleet_pb2.ModelFingerprint:
    model = ModelDir(PICO)
    weights = weights_digest([PICO / "model.safetensors"])
    rope = model.rope_digest(model.config.max_positions)
    return fingerprint_to_wire(Fingerprint(weights, model.config_digest, model.tokenizer_digest, rope, "plain", 32))


@pytest.fixture(scope="module")
def fleet() -> Iterator[RunningFleet]:
    with start_fleet("pico", router=("--split=always", "--placement=round_robin")) as fleet:  # everybody gets work
        yield fleet


@pytest.mark.parametrize("name", LIES)
def test_a_worker_that_lies_costs_nobody_an_answer(fleet: RunningFleet, name: str) -> None:
    prompts = [[number + 7] * 60 for number in range(2)]  # few: what fails at the liar is tried again out of a budget
    expected = [fleet.ids(prompt, 12) for prompt in prompts]
    liar = Liar(fleet, f"liar-{list(LIES).index(name)}", LIES[name])
    try:
        until(lambda: len(fleet.status().workers) == 3)
        with ThreadPoolExecutor(len(prompts)) as pool:
            while not liar.has_lied():
                answers = [pool.submit(fleet.ids, prompt, 12) for prompt in prompts]
                until(lambda: liar.has_lied() or all(answer.done() for answer in answers))  # noqa: B023
                if liar.has_lied():
                    liar.close()
                assert [answer.result(60) for answer in answers] == expected
    finally:
        liar.close()
    until(lambda: len(fleet.status().workers) == 2)
    fleet.assert_no_leaks()
