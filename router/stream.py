"""What a client is sent: the new tokens of a choice as one message, and the summary that ends the stream."""

from __future__ import annotations

from collections.abc import Sequence

from router.choice import Choice, phases_of
from router.text import TextStream
from splitfire.v1 import inference_pb2 as pb


class ChoiceStream:
    """What of one choice has been sent. Ids become text here, when the client's turn comes."""

    def __init__(self, choice: Choice, text: TextStream) -> None:
        self.choice = choice
        self.num_sent = 0
        self.is_finished = False
        self._text = text

    def take(self) -> pb.GenerateResponse | None:
        """Everything new as one message; None when there is nothing."""
        choice = self.choice
        if self.is_finished:
            return None
        fresh = choice.ids[self.num_sent :]
        response = pb.GenerateResponse(choice=choice.index, offset=self.num_sent)
        for token_id in fresh:
            response.text += self._text.push(token_id)
            response.token_ids.append(token_id)
            if self._text.is_stopped:
                choice.stop()
                break
        response.logprobs.extend(choice.logprobs[self.num_sent : self.num_sent + len(response.token_ids)])
        self.num_sent += len(response.token_ids)
        if choice.finish_reason != pb.FINISH_REASON_UNSPECIFIED and (self._text.is_stopped or self.num_sent == len(choice.ids)):
            response.text += self._text.flush()
            response.finish_reason = choice.finish_reason
            self.is_finished = True
        return response if response.token_ids or self.is_finished else None


def summary_of(choices: Sequence[Choice], streams: Sequence[ChoiceStream], queued_at: float, ended_at: float) -> pb.Summary:
    """The last message of a stream; phases, cache and transfer are those of choice 0."""
    plan, timeline = choices[0].plan, choices[0].timeline
    num_sent = sum(s.num_sent for s in streams)
    return pb.Summary(
        request_id=plan.request_id,
        seed=plan.sampling.seed,
        usage=pb.Usage(
            prompt_tokens=len(plan.prompt),
            cached_prompt_tokens=min(timeline.cached_tokens, len(plan.prompt)),
            generated_tokens=num_sent,
            draft_tokens=sum(c.draft_tokens for c in choices),
            accepted_draft_tokens=min(num_sent, sum(c.accepted_draft_tokens for c in choices)),  # some came after a stop string
        ),
        phases=phases_of(choices[0], queued_at, ended_at),
        kv_transfer=timeline.kv_transfer,
    )
