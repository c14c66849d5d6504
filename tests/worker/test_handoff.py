"""Split = aggregated = transformers, KV bytes equal, and nothing left behind, through the real services and agents."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from kvtransfer.sender import Sender
from prefill_svc import ship
from splitfire.core.sampling import SamplingParams
from splitfire.engine.drafting import Draft, Verified
from splitfire.engine.engine import Engine
from splitfire.engine.kernels.pack import block_sums
from splitfire.engine.kernels.sample import noise_key
from splitfire.engine.lending import Reservation
from splitfire.engine.sequence import Purpose, SeqId
from splitfire.engine.sequence import Sequence as EngineSequence
from splitfire.v1 import fleet_pb2, inference_pb2, kv_pb2
from tests.checkpoints import VOCAB, assert_greedy, family_configs, save_checkpoint
from tests.engines import load_model, make_engine, make_spec
from tests.rig import Answer, Rig, play, until

WHOLE = fleet_pb2.PART_WHOLE
LENGTHS = (1, 2, 31, 32, 33, 100, 333, 600)


def prompts(seed: str, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("family", sorted(family_configs()))
def test_split_equals_aggregated_equals_transformers(family: str, tmp_path: Path) -> None:
    oracle = save_checkpoint(family_configs()[family], tmp_path)
    model = load_model(tmp_path)

    async def scene() -> None:
        rig = Rig(
            make_engine(model, block_size=16, chunk_tokens=48), make_engine(model, block_size=16, num_blocks=256, chunk_tokens=80)
        )
        asked: list[tuple[list[int], int, Answer, Answer]] = []
        for i, prompt in enumerate(prompts(family)):
            count = 3 + i
            asked.append((prompt, count, rig.ask(prompt, count), rig.ask(prompt, count, part=WHOLE)))
            await asyncio.sleep(0.005)
        await until(lambda: all(a.end and b.end for _, _, a, b in asked))
        for prompt, count, split, whole in asked:
            assert len(split.ids()) == count
            assert split.ids() == whole.ids(), len(prompt)
            assert_greedy(oracle, prompt, split.ids())
        await rig.settle()
        rig.close()

    play(scene())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(family_configs()["llama"], path)
    return path


def test_sampled_tokens_do_not_depend_on_how_they_are_made(llama: Path) -> None:
    """Alone, batched, split, aggregated, resumed in the middle: the same seed gives the same tokens."""
    model = load_model(llama)
    sampling = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=7, repetition_penalty=1.1, presence_penalty=0.2)

    async def scene() -> None:
        rig = Rig(make_engine(model, chunk_tokens=64), make_engine(model, num_blocks=256))
        for prompt in prompts("sampled", (5, 64, 200)):
            alone = rig.ask(prompt, 20, part=WHOLE, sampling=sampling)
            await until(lambda a=alone: a.end is not None)  # type: ignore[misc]
            crowd = [rig.ask(p, 20, part=WHOLE) for p in prompts("crowd", (9, 40, 77))]
            batched, split = rig.ask(prompt, 20, part=WHOLE, sampling=sampling), rig.ask(prompt, 20, sampling=sampling)
            resumed = rig.ask(prompt, 20, sampling=sampling, output=alone.ids()[:7])
            other = rig.ask(prompt, 20, sampling=sampling, choice=1)
            await until(lambda: all(a.end is not None for a in (*crowd, batched, split, resumed, other)))  # noqa: B023
            assert alone.ids() == batched.ids() == split.ids()
            assert resumed.ids() == alone.ids()[7:]
            assert other.ids() != alone.ids()
        await rig.settle()
        rig.close()

    play(scene())


def test_noise_keys_differ() -> None:
    keys = {noise_key(seed, choice, position) for seed in range(20) for choice in range(8) for position in range(50)}
    assert len(keys) == 20 * 8 * 50


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("chunk_tokens", [32, 100, 512])
def test_kv_bytes_equal(llama: Path, block_size: int, chunk_tokens: int) -> None:
    """P12: what decode holds is bit for bit what a local prefill with the same chunk plan would have written."""
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(
            make_engine(model, block_size=block_size, chunk_tokens=chunk_tokens),
            make_engine(model, block_size=block_size, num_blocks=256),
        )
        local = make_engine(model, block_size=block_size, chunk_tokens=chunk_tokens)
        for prompt in prompts("bytes", (1, block_size - 1, block_size, block_size + 1, 150)):
            taken: list[torch.Tensor] = []
            decode = rig.decode.engine
            join = decode.join
            decode.join = spy_on_joins(decode, taken)  # type: ignore[method-assign, assignment]
            answer = rig.ask(prompt, 2)
            await until(lambda a=answer: a.end is not None)  # type: ignore[misc]
            decode.join = join  # type: ignore[method-assign]
            expected = local_kv(local, prompt)
            assert torch.equal(taken[0].view(torch.int32), expected.view(torch.int32))
        await rig.settle()
        rig.close()

    play(scene())


def spy_on_joins(engine: Engine, taken: list[torch.Tensor]) -> Callable[[Reservation, Mapping[SeqId, int]], None]:
    """`engine.join` that first copies what the blocks hold."""
    join = engine.join

    def spy(reservation: Reservation, first_tokens: Mapping[SeqId, int]) -> None:
        taken.append(engine.runner.pool.elements[reservation.block_ids].clone())
        join(reservation, first_tokens)

    return spy


def local_kv(engine: Engine, prompt: list[int]) -> torch.Tensor:
    spec = make_spec(prompt, 2, purpose=Purpose.PREFILL, block_size=engine.runner.pool.layout.block_size)
    engine.add(spec)
    block_ids: tuple[int, ...] = ()
    while engine.has_work:
        for update in engine.step().updates:
            block_ids = update.block_ids
    blocks = engine.runner.pool.elements[list(block_ids)].clone()
    valid = len(prompt) - (len(block_ids) - 1) * engine.runner.pool.layout.block_size
    blocks[-1, :, :, :, valid:] = 0  # K14: positions past the valid tokens travel as zeros
    engine.finish(spec.seq_id)
    return blocks


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        *(("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "fp16")),
        *(("fp32", "int8"), ("bf16", "fp8_e4m3"), ("int8", "int8"), ("int8", "bf16"), ("fp8_e4m3", "int8")),
    ],
)
def test_pools_of_different_precision_exchange_kv(llama: Path, prefill: str, decode: str) -> None:
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model, dtype=prefill), make_engine(model, dtype=decode))
        answers = [rig.ask(p, 5) for p in prompts("dtypes", (1, 40, 130))]
        await until(lambda: all(a.end for a in answers))
        assert all(len(a.ids()) == 5 for a in answers)
        await rig.settle()
        rig.close()

    play(scene())


def test_only_what_decode_misses_moves(llama: Path) -> None:
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        [prompt] = prompts("prefix", (200,))
        moved = []
        answers = []
        for tail in ([1, 2, 3], [4, 5, 6]):
            answer = rig.ask([*prompt, *tail], 4)
            await until(lambda a=answer: a.end is not None)  # type: ignore[misc]
            answers.append(answer)
            assert answer.end is not None
            moved.append(answer.end.kv_transfer.blocks)
        assert moved == [7, 1]
        await rig.settle()
        rig.close()

    play(scene())


def test_one_token_never_moves_anything(llama: Path) -> None:
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        answer = rig.ask([1, 2, 3], 1)
        await until(lambda: answer.end is not None)
        assert answer.end is not None
        assert answer.end.reason == inference_pb2.FINISH_REASON_LENGTH
        assert len(answer.ids()) == 1
        await rig.settle()
        rig.close()

    play(scene())


def test_a_first_token_that_ends_the_request_withdraws_the_transfer(llama: Path) -> None:
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        [prompt] = prompts("eos", (100,))
        first = rig.ask(prompt, 1)
        await until(lambda: first.end is not None)
        answer = rig.ask(prompt, 10, stop=frozenset(first.ids()))
        await until(lambda: answer.end is not None)
        assert answer.end is not None
        assert answer.end.reason == inference_pb2.FINISH_REASON_STOP
        assert answer.ids() == first.ids()
        await rig.settle()
        rig.close()

    play(scene())


def test_a_withdrawn_hand_off_is_no_failure_at_decode(llama: Path) -> None:
    """Decode must not refuse what prefill finishes: the router might hear the refusal first."""
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        [prompt] = prompts("withdrawn", (100,))
        first = rig.ask(prompt, 1)
        await until(lambda: first.end is not None)
        answer = rig.ask(prompt, 9, stop=frozenset(first.ids()))
        await until(lambda: answer.end is not None)
        await rig.settle()
        assert answer.refusals == []
        rig.close()

    play(scene())


@pytest.mark.parametrize("turns", [0, 1, 3, 6, 10, 15, 25, 40, 80])
def test_cancel_at_any_time_frees_everything(llama: Path, turns: int) -> None:
    """F46: whatever stage it is in, both workers hold nothing afterwards, and its batch mate never notices."""
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model, chunk_tokens=32), make_engine(model), receive_slots=2)
        mate_prompt, prompt = prompts("cancel", (50, 400))
        expected = rig.ask(mate_prompt, 30)
        await until(lambda: expected.end is not None)
        mate = rig.ask(mate_prompt, 30)
        answer = rig.ask(prompt, 50)
        for _ in range(turns):
            await asyncio.sleep(0.001)
        rig.cancel(answer)
        began = asyncio.get_running_loop().time()
        await until(lambda: mate.end is not None)
        await rig.settle()
        assert asyncio.get_running_loop().time() - began < 5
        assert mate.ids() == expected.ids()
        assert not answer.refusals
        rig.close()

    play(scene())


def test_a_pool_too_small_for_all_serves_them_one_after_another(llama: Path) -> None:
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model, num_blocks=40), make_engine(model, num_blocks=14))
        answers = [rig.ask(p, 12) for p in prompts("small", (150, 160, 170, 180, 190))]
        await until(lambda: all(a.end or a.refusals for a in answers))
        done = [a for a in answers if a.end]
        assert done
        for answer in done:
            assert len(answer.ids()) == 12
        for answer in answers:
            assert all(r.is_retryable for r in answer.refusals)
        await rig.settle()
        rig.close()

    play(scene())


def test_a_dead_prefill_worker_frees_decode_at_once(llama: Path) -> None:
    model = load_model(llama)

    async def scene() -> None:
        rig = Rig(make_engine(model, chunk_tokens=32), make_engine(model))
        [prompt] = prompts("dead", (600,))
        answer = rig.ask(prompt, 5)
        await until(lambda: rig.decode.engine.load().available_blocks < 128)
        rig.hub.lose(rig.prefill.agent.transport.address)
        rig.decode.agent.peer_gone(rig.prefill.agent.incarnation)
        assert rig.decode.engine.load().available_blocks == 128
        assert [r.is_retryable for r in answer.refusals] == [True]
        rig.close()

    play(scene())


def test_nan_kv_with_a_right_digest_fails_its_request_alone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B83: the wire believes a digest; the logits tell. Neither who comes after with the same prompt, nor who gets the blocks
    next, finds anything of it."""
    model = load_model(llama)
    [bad_prompt] = prompts("nan", (100,))
    honest = ship.BlockShipment.pack

    def poisoned(
        shipment: ship.BlockShipment, first_block: int, num_blocks: int, dtype: str, payload: memoryview, *, digest: bool
    ) -> list[int]:
        sums = honest(shipment, first_block, num_blocks, dtype, payload, digest=digest)
        if list(shipment.job.spec.prompt) != bad_prompt:
            return sums
        out = torch.frombuffer(payload, dtype=torch.uint8)
        out.view(torch.float32).fill_(float("nan"))
        return block_sums(out, num_blocks)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model, num_blocks=12))
        oracle = Rig(make_engine(model), make_engine(model))
        mate_prompt, next_prompt = prompts("nan mate", (90, 300))

        async def right(prompt: list[int]) -> list[int]:
            answer = oracle.ask(prompt, 20, part=WHOLE)
            await until(lambda: answer.end is not None)
            return answer.ids()

        with monkeypatch.context() as patched:
            patched.setattr(ship.BlockShipment, "pack", poisoned)
            mate, bad = rig.ask(mate_prompt, 20), rig.ask(bad_prompt, 20)
            await until(lambda: mate.end is not None and bool(bad.refusals))
        assert [(r.reason, r.is_retryable) for r in bad.refusals] == [("nonfinite_logits", False)]
        assert mate.ids() == await right(mate_prompt)
        rig.cancel(bad)
        await rig.settle()
        for prompt in (bad_prompt, next_prompt):  # its prefix; then every block there is
            answer = rig.ask(prompt, 20)
            await until(lambda answer=answer: answer.end is not None or bool(answer.refusals))  # type: ignore[misc]
            assert not answer.refusals
            assert answer.ids() == await right(prompt)
            await rig.settle()
        for one in (rig, oracle):
            one.close()

    play(scene())


@pytest.mark.parametrize("change", [{"token_id": VOCAB}, {"token_id": 2**32 - 1}, {"offset": 1}, {"choice": 1}])
def test_a_first_token_that_is_none_is_refused_and_everything_freed(
    llama: Path, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B85."""
    model = load_model(llama)
    finish = Sender.finish

    def lying(sender: Sender, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        for token in first_tokens:
            token.MergeFrom(kv_pb2.FirstToken(**change))  # type: ignore[arg-type]
        finish(sender, first_tokens)

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        [prompt] = prompts("first", (100,))
        monkeypatch.setattr(Sender, "finish", lying)
        answer = rig.ask(prompt, 10)
        await until(lambda: bool(answer.refusals))
        assert [r.reason for r in answer.refusals] == ["handoff_failed"]
        assert "bad_first_token" in answer.refusals[0].message
        rig.cancel(answer)
        await rig.settle()
        rig.close()

    play(scene())


class Echo:
    """Proposes what the sequence's own answer was; every third time with a wrong token in it."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.num_proposed = 0

    def can_skip(self, num_decoding: int) -> bool:
        return False

    def skip(self, num_decoding: int) -> None:
        """Never called."""

    def propose(self, decoding: Sequence[EngineSequence], room: int) -> dict[SeqId, Draft]:
        self.num_proposed += 1
        drafts = {}
        for sequence in decoding:
            following = self.answer[sequence.num_output :][:4]
            if self.num_proposed % 3 == 0:
                following[1:2] = [4000]
            if following:
                drafts[sequence.spec.seq_id] = Draft(tuple(following), "echo")
        return drafts

    def verified(self, results: Sequence[Verified], num_rows: int, duration_s: float) -> None: ...

    def forget(self, seq_id: SeqId) -> None: ...


def test_drafts_after_a_hand_off_change_nothing_and_are_counted(llama: Path) -> None:
    """First token again in the first frame, log-probabilities with every token, whatever the number of tokens in a frame."""
    model = load_model(llama)
    sampling = SamplingParams(temperature=0.8, seed=4, logprobs=2, repetition_penalty=1.2)
    prompt = prompts("drafts", (77,))[0]

    async def scene() -> None:
        plain = Rig(make_engine(model), make_engine(model))
        expected = plain.ask(prompt, 30, sampling=sampling)
        await until(lambda: expected.end is not None)
        await plain.settle()
        plain.close()
        rig = Rig(make_engine(model), make_engine(model, speculator=Echo(expected.ids())))
        for part in (None, WHOLE):
            answer = rig.ask(prompt, 30, sampling=sampling, part=part)
            await until(lambda a=answer: a.end is not None)  # type: ignore[misc]
            assert answer.ids() == expected.ids()
            assert sorted(answer.logprobs) == list(range(30))
            for i, scored in answer.logprobs.items():
                assert scored.chosen.token_id == expected.ids()[i]
                assert scored.chosen.logprob == pytest.approx(expected.logprobs[i].chosen.logprob, abs=1e-4)
            assert 15 < answer.accepted_draft_tokens < answer.draft_tokens
        counts = rig.decode.engine.draft_counts()["echo"]
        assert counts.num_drafted > counts.num_accepted > 30
        await rig.settle()
        rig.close()

    play(scene())


def ends(answers: list[Answer]) -> bool:
    return all(answer.end is not None or answer.refusals for answer in answers)


@pytest.mark.parametrize("length", [64, 77])
def test_choices_of_one_prompt_move_its_kv_once_and_are_those_of_requests_of_their_own(llama: Path, length: int) -> None:
    model = load_model(llama)
    sampling = SamplingParams(temperature=1.0, seed=4, logprobs=1, presence_penalty=0.3)
    prompt = prompts("together", (length,))[0]

    async def scene() -> None:
        rig = Rig(make_engine(model, chunk_tokens=32), make_engine(model))
        alone = [rig.ask(prompt, 20, sampling=sampling, choice=c) for c in range(4)]
        await until(lambda: ends(alone))
        await rig.settle()
        rig.close()
        for part in (None, WHOLE):
            fresh = Rig(make_engine(model, chunk_tokens=32), make_engine(model))
            answers = fresh.ask_together(4, prompt, 20, sampling=sampling, part=part)
            await until(lambda a=answers: ends(a))  # type: ignore[misc]
            for mine, other in zip(answers, alone, strict=True):
                assert mine.ids() == other.ids() and len(mine.ids()) == 20
                assert sorted(mine.logprobs) == list(range(20))
                a, b = mine.logprobs[0].chosen, other.logprobs[0].chosen
                assert (a.token_id, a.logprob) == (b.token_id, pytest.approx(b.logprob, abs=1e-4))
            if part is None:
                moved = [f.kv_transfer.blocks for a in answers for f in a.finished if f.reason]
                assert moved == [-(-length // 32)] * 4
                [shipped] = {f.transfer_id for a in answers for f in a.finished if not f.reason}
                assert shipped
                tally = fresh.decode.decode._context.tally
                assert sum(tally.endings.values()) == 1, "one hand-off for all"
            await fresh.settle()
            fresh.close()

    play(scene())


@pytest.mark.parametrize("when", ["at once", "after the first tokens", "while they generate"])
def test_a_choice_that_is_cancelled_leaves_the_others(llama: Path, when: str) -> None:
    model = load_model(llama)
    sampling = SamplingParams(temperature=1.0, seed=4)
    prompt = prompts("leave", (200,))[0]

    async def scene() -> None:
        rig = Rig(make_engine(model, chunk_tokens=32), make_engine(model))
        alone = [rig.ask(prompt, 40, sampling=sampling, choice=c) for c in range(3)]
        await until(lambda: ends(alone))
        for who in ([0], [1, 2], [0, 1, 2]):
            answers = rig.ask_together(3, prompt, 40, sampling=sampling)
            wanted = {"at once": 0, "after the first tokens": 1, "while they generate": 10}[when]
            await until(lambda a=answers, n=wanted: min(len(x.tokens) for x in a) >= n)  # type: ignore[misc]
            for i in who:
                rig.cancel(answers[i], i)
            left = [a for i, a in enumerate(answers) if i not in who]
            await until(lambda a=left: ends(a))  # type: ignore[misc]
            for i, answer in enumerate(answers):
                assert i in who or answer.ids() == alone[i].ids()
                assert not answer.refusals
            await rig.settle()
        rig.close()

    play(scene())


def test_choices_that_end_with_their_first_token_are_not_handed_over(llama: Path) -> None:
    model = load_model(llama)
    sampling = SamplingParams(temperature=1.0, seed=4)
    prompt = prompts("first", (50,))[0]

    async def scene() -> None:
        rig = Rig(make_engine(model), make_engine(model))
        alone = [rig.ask(prompt, 8, sampling=sampling, choice=c) for c in range(4)]
        await until(lambda: ends(alone))
        firsts = [a.ids()[0] for a in alone]
        for stop in (frozenset(firsts[:1]), frozenset(firsts[1:]), frozenset(firsts)):
            answers = rig.ask_together(4, prompt, 8, sampling=sampling, stop=stop)
            await until(lambda a=answers: ends(a))  # type: ignore[misc]
            for mine, other in zip(answers, alone, strict=True):
                cut = [i for i, token in enumerate(other.ids()) if token in stop]
                assert mine.ids() == other.ids()[: cut[0] + 1 if cut else 8]
                assert mine.end is not None
                assert (mine.end.reason == inference_pb2.FINISH_REASON_STOP) == bool(cut)
            if stop == frozenset(firsts):
                for answer in answers:
                    rig.cancel(answer)  # as the router does at decode
            await rig.settle()
        rig.close()

    play(scene())


def test_a_hand_off_that_fails_is_one_refusal_for_all_its_choices(llama: Path) -> None:
    model = load_model(llama)
    prompt = prompts("lost", (100,))[0]

    async def scene() -> None:
        rig = Rig(make_engine(model, chunk_tokens=32), make_engine(model))
        answers = rig.ask_together(3, prompt, 20)
        await until(lambda: rig.prefill.agent.num_open > 0)
        rig.prefill.agent.peer_gone(rig.decode.agent.incarnation)
        await until(lambda: all(a.refusals for a in answers))
        for answer in answers:
            assert not any(r.HasField("choice") for r in answer.refusals)
            assert all(r.is_retryable for r in answer.refusals)
        rig.cancel(answers[0])
        await rig.settle()
        rig.close()

    play(scene())
