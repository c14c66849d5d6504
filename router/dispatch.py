"""What workers are sent of an attempt: the same Submit to both ends at once, each with its own end of the transfer. Event loop only."""

from __future__ import annotations

import secrets

from router.attempt import Attempt
from router.fleet import Fleet
from router.worker_handle import WorkerHandle
from splitfire.core.wire import grammar_to_wire, sampling_to_wire, stopping_to_wire
from splitfire.v1 import fleet_pb2


def send(attempt: Attempt, fleet: Fleet) -> None:
    """To the workers it was placed on."""
    placement = attempt.placement
    prefill = fleet.worker(placement.prefill) if placement.prefill else None
    decode = fleet.worker(placement.decode) if placement.decode else None
    submit = _submit(attempt)
    if prefill is not None and decode is not None:
        to_decode, to_prefill = handoff_ends(prefill, decode)
        attempt.transfer_id = to_decode.transfer_id
        prefill.send(submit=_part(submit, fleet_pb2.PART_PREFILL, to_decode))
        decode.send(submit=_part(submit, fleet_pb2.PART_DECODE, to_prefill))
    elif prefill is not None:
        prefill.send(submit=_part(submit, fleet_pb2.PART_PREFILL))
    elif decode is not None:
        decode.send(submit=_part(submit, fleet_pb2.PART_WHOLE))


def send_again(attempt: Attempt, prefill: WorkerHandle, decode: WorkerHandle) -> None:
    """Another decode worker for a prompt that `prefill` holds: a new transfer."""
    to_decode, to_prefill = handoff_ends(prefill, decode)
    attempt.transfer_id = to_decode.transfer_id
    decode.send(submit=_part(_submit(attempt), fleet_pb2.PART_DECODE, to_prefill))
    prefill.send(redirect=fleet_pb2.Redirect(attempt=attempt.number, handoff=to_decode))


def handoff_ends(prefill: WorkerHandle, decode: WorkerHandle) -> tuple[fleet_pb2.Handoff, fleet_pb2.Handoff]:
    """One transfer as each end is told of it: to prefill, who receives; to decode, who sends."""
    transfer_id, token = secrets.token_bytes(16), secrets.token_bytes(16)
    to_decode = fleet_pb2.Handoff(transfer_id=transfer_id, token=token, peer=decode.peer())
    return to_decode, fleet_pb2.Handoff(transfer_id=transfer_id, token=token, peer=prefill.peer())


def _submit(attempt: Attempt) -> fleet_pb2.Submit:
    """What the workers are to continue: the ids this attempt began with, whatever it has brought since."""
    choice, *others = attempt.choices.values()
    plan, ids = choice.plan, choice.ids[: attempt.resumed_at]
    return fleet_pb2.Submit(
        attempt=attempt.number,
        request_id=plan.request_id,
        prompt_token_ids=plan.prompt,
        output_token_ids=ids,
        predicted_token_ids=plan.predicted,
        choice=choice.index,
        more_choices=[other.index for other in others],
        sampling=sampling_to_wire(plan.sampling),
        stopping=stopping_to_wire(plan.stopping),
        priority=plan.priority,  # type: ignore[arg-type]
        block_hashes=attempt.block_hashes,
        traceparent=plan.traceparent,
        cache_salt=plan.cache_salt,
        grammar=grammar_to_wire(plan.grammar) if plan.grammar is not None else None,
    )


def _part(submit: fleet_pb2.Submit, part: fleet_pb2.Part.ValueType, handoff: fleet_pb2.Handoff | None = None) -> fleet_pb2.Submit:
    """For one worker."""
    mine = fleet_pb2.Submit()
    mine.CopyFrom(submit)
    mine.part = part
    if part == fleet_pb2.PART_PREFILL:
        mine.ClearField("predicted_token_ids")  # only for who generates
    if handoff is not None:
        mine.handoff.CopyFrom(handoff)
    return mine
