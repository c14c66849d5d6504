"""What a client is sent, and what becomes of one that does not read."""

from __future__ import annotations

import asyncio

import pytest
from tokenizers import Tokenizer

from router.choice import Choice, RequestPlan
from router.detokenizer import Detokenizer
from router.stream import ChoiceStream, ClientWriter
from router.text import TextStream
from splitfire.core.errors import Exhausted
from splitfire.core.sampling import SamplingParams, StopParams
from splitfire.v1 import fleet_pb2
from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import PICO, VOCAB
from tests.model.clock import play

MOST_S = 0.0625  # exact in binary: the clock jumps, so an instant that is missed by a rounding is missed for ever
MESSAGE = pb.GenerateResponse()


async def never(_message: pb.GenerateResponse) -> None:
    await asyncio.Event().wait()


async def at_once(_message: pb.GenerateResponse) -> None: ...


def test_a_client_that_reads_nothing_is_given_up() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(Exhausted, match=r"read nothing for 0\.0625 s") as caught:
            async with ClientWriter(never, MOST_S) as client:
                await client.write(MESSAGE)
        assert caught.value.reason == "slow_consumer"
        assert loop.time() - began >= MOST_S

    play(scene())


def test_the_time_begins_anew_with_each_message() -> None:
    """Three messages that are slow, and none too slow; what waits for workers meanwhile is no client's fault."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def slowly(_message: pb.GenerateResponse) -> None:
            await asyncio.sleep(0.6 * MOST_S)

        async with ClientWriter(slowly, MOST_S) as client:
            for _ in range(3):
                await client.write(MESSAGE)
            await asyncio.sleep(2 * MOST_S)
            await client.write(MESSAGE)
        assert loop.time() - began > 4 * MOST_S

    play(scene())


def test_nothing_is_left_of_a_writer() -> None:
    """Neither a timer nor a cancellation that comes later, however it ended."""

    async def scene() -> None:
        with pytest.raises(KeyError):
            async with ClientWriter(at_once, MOST_S):
                raise KeyError
        async with ClientWriter(at_once, MOST_S) as client:
            await client.write(MESSAGE)
        await asyncio.sleep(3 * MOST_S)

    play(scene())


def test_who_is_cancelled_while_a_client_is_slow_is_cancelled() -> None:
    async def scene() -> None:
        is_writing = asyncio.Event()

        async def signalled(message: pb.GenerateResponse) -> None:
            is_writing.set()
            await never(message)

        async def handler() -> None:
            async with ClientWriter(signalled, 20.0) as client:
                await client.write(MESSAGE)

        task = asyncio.create_task(handler())
        await is_writing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    play(scene())


def streaming(stops: tuple[str, ...] = (), max_tokens: int = 100) -> tuple[Choice, ChoiceStream, Tokenizer]:
    tokenizer = Tokenizer.from_file(str(PICO / "tokenizer.json"))
    plan = RequestPlan("r", (1,), SamplingParams(seed=1), StopParams(max_tokens), 2, "", "", 0.0, 1.0)
    choice = Choice(plan, 0, asyncio.Event())
    return choice, ChoiceStream(choice, TextStream(Detokenizer(tokenizer), stops)), tokenizer


def come(choice: Choice, ids: list[int]) -> None:
    assert not choice.append(fleet_pb2.SequenceOutput(offset=len(choice.ids), token_ids=ids), VOCAB)


def test_what_came_while_the_client_was_busy_is_one_message() -> None:
    choice, stream, tokenizer = streaming()
    assert stream.take() is None
    ids = tokenizer.encode("one two three", add_special_tokens=False).ids
    come(choice, ids[:2])
    come(choice, ids[2:])
    message = stream.take()
    assert message is not None
    assert (message.offset, list(message.token_ids), message.text) == (0, ids, "one two three")
    assert stream.take() is None
    come(choice, ids[:1])
    choice.finish(pb.FINISH_REASON_LENGTH)
    last = stream.take()
    assert last is not None
    assert (last.offset, list(last.token_ids), last.text, last.finish_reason) == (len(ids), ids[:1], "one", pb.FINISH_REASON_LENGTH)
    assert stream.take() is None


def test_ids_past_a_stop_string_are_not_delivered_also_when_the_workers_have_finished() -> None:
    choice, stream, tokenizer = streaming(("two",))
    ids = tokenizer.encode("one two three", add_special_tokens=False).ids
    come(choice, ids)
    choice.finish(pb.FINISH_REASON_LENGTH)
    message = stream.take()
    assert message is not None
    assert message.text == "one "
    assert list(message.token_ids) == ids[: len(message.token_ids)] != ids
    assert message.finish_reason == choice.finish_reason == pb.FINISH_REASON_STOP
    assert stream.take() is None
