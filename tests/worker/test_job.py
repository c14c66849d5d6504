"""What a router submits is checked again before it is taken."""

from __future__ import annotations

import pytest

from splitfire.core.errors import ExceedsContext, ExceedsPool, InvalidInput, SplitfireError, Unsupported
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.layout import KvLayout
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.core.wire import sampling_to_wire, stopping_to_wire
from splitfire.v1 import fleet_pb2
from splitfire.worker.job import Job, JobLimits, make_job
from tests.rig import _Replies

LAYOUT = KvLayout("fp32", 1, 1, 8, 8)
LIMITS = JobLimits(100, 400, 40, LAYOUT, Fingerprint(b"w" * 32, b"c" * 32, b"t" * 32, b"r" * 32, "plain", 8))


def make(**changes: object) -> Job:
    submit = fleet_pb2.Submit(
        attempt=7,
        part=fleet_pb2.PART_WHOLE,
        prompt_token_ids=range(20),
        sampling=sampling_to_wire(SamplingParams()),
        stopping=stopping_to_wire(StopParams(10)),
    )
    submit.MergeFrom(fleet_pb2.Submit(**changes))  # type: ignore[arg-type]
    return make_job(submit, _Replies({}), LIMITS, 0.0)


def test_a_request_of_one_choice_is_no_group() -> None:
    job = make(choice=3)
    assert job.members() == (job,)
    assert (job.choice, job.spec.forks, job.is_member) == (3, (), False)


def test_each_choice_of_several_has_an_id_of_its_own() -> None:
    job = make(choice=2, more_choices=[0, 5])
    members = job.members()
    assert [m.choice for m in members] == [2, 0, 5] and all(m.is_member and m.attempt == 7 for m in members)
    assert len({job.spec.seq_id, *(m.spec.seq_id for m in members)}) == 4
    assert [f.seq_id for f in job.spec.forks] == [m.spec.seq_id for m in members]
    assert not any(m.spec.forks for m in members)


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        (dict(choice=1, more_choices=[1]), InvalidInput, "more_choices"),
        (dict(more_choices=[4, 4]), InvalidInput, "more_choices"),
        (dict(more_choices=range(1, 9)), InvalidInput, "more_choices"),
        (dict(more_choices=[1], output_token_ids=[5]), InvalidInput, "more_choices"),
        (dict(more_choices=[1], grammar=fleet_pb2.OutputGrammar(text="x")), InvalidInput, "more_choices"),
        (dict(prompt_token_ids=[100]), InvalidInput, "prompt_token_ids"),
        (dict(prompt_token_ids=range(90), stopping=stopping_to_wire(StopParams(310))), ExceedsContext, "max_tokens"),
        (dict(output_token_ids=range(10)), InvalidInput, "output_token_ids"),
        (dict(part=9), Unsupported, "part"),
        (dict(block_hashes=[b"x" * 32]), InvalidInput, "block_hashes"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, object], kind: type[SplitfireError], field: str) -> None:
    with pytest.raises(kind, match=field):
        make(**changes)


def test_request_bigger_than_pool_rejected() -> None:
    """F27: what can never fit is refused when it is submitted, however much is free."""
    assert make(stopping=stopping_to_wire(StopParams(300)))
    with pytest.raises(ExceedsPool, match="needs more than the 40 blocks of this worker") as caught:
        make(stopping=stopping_to_wire(StopParams(301)))
    assert not caught.value.is_retryable
