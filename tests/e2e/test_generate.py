"""The main job, end to end: a prompt in over gRPC, KV over UCX between processes, tokens out, equal to transformers'."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from transformers import AutoTokenizer

from splitfire.v1 import inference_pb2 as pb
from tests.checkpoints import PICO, ROOT, assert_greedy, family_configs, pico_oracle, save_checkpoint
from tests.e2e.fleets import PROMPT, RunningFleet, greedy, start_fleet


@pytest.mark.parametrize("length", [1, 31, 32, 33, 300, 600])
def test_tokens_equal_transformers_and_kv_moved(pico: RunningFleet, length: int) -> None:
    prompt = [(7 * i + length) % 4000 + 10 for i in range(length)]
    answer = pico.generate(greedy(prompt, 24))[0]
    assert_greedy(pico_oracle(), prompt, answer.ids)
    assert answer.finish_reason == pb.FINISH_REASON_LENGTH
    summary = answer.summary
    assert (summary.usage.prompt_tokens, summary.usage.generated_tokens) == (length, 24)
    layout_bytes = 6 * 2 * 2 * 32 * 64 * 4
    assert summary.kv_transfer.blocks == -(-length // 32)
    assert summary.kv_transfer.bytes == summary.kv_transfer.blocks * layout_bytes
    assert summary.kv_transfer.transport == "ucx"


def test_text_in_text_out(pico: RunningFleet) -> None:
    prompt = "def add(a, b):\n    return"
    tokenizer = AutoTokenizer.from_pretrained(PICO)
    request = pb.GenerateRequest(
        text=prompt, sampling=pb.SamplingParams(temperature=0.0), stopping=pb.StoppingParams(max_tokens=20)
    )
    answer = pico.generate(request)[0]
    assert_greedy(pico_oracle(), tokenizer(prompt).input_ids, answer.ids)
    assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)


def test_predicted_output_makes_the_same_answer_from_drafts(pico: RunningFleet) -> None:
    """Whether it comes true or not."""
    request = pb.GenerateRequest(
        text="def add(a, b):\n    return",
        sampling=pb.SamplingParams(temperature=0.0),
        stopping=pb.StoppingParams(max_tokens=120, ignore_eos=True),
    )
    plain = pico.generate(request)[0]
    for predicted, least in ((plain.text, 40), ("# nothing like it\n" * 20, 0)):
        request.predicted_output = predicted
        for _ in range(10):  # steps with drafts that took longer than without are followed by some without
            answer = pico.generate(request)[0]
            assert answer.ids == plain.ids
            usage = answer.summary.usage
            if usage.accepted_draft_tokens >= least:
                break
        assert least <= usage.accepted_draft_tokens <= usage.draft_tokens


def test_the_same_seed_gives_the_same_tokens_and_the_summary_tells_it(pico: RunningFleet) -> None:
    stopping = pb.StoppingParams(max_tokens=40, ignore_eos=True)
    request = pb.GenerateRequest(prompt_token_ids=PROMPT, stopping=stopping, sampling=pb.SamplingParams(temperature=1.5))
    drawn = pico.generate(request)[0]
    request.sampling.seed = drawn.summary.seed
    assert pico.generate(request)[0].ids == drawn.ids
    request.sampling.seed += 1
    assert pico.generate(request)[0].ids != drawn.ids


def test_choices_are_independent_and_numbered(pico: RunningFleet) -> None:
    request = pb.GenerateRequest(
        prompt_token_ids=PROMPT, n=3, sampling=pb.SamplingParams(seed=5), stopping=pb.StoppingParams(max_tokens=12, ignore_eos=True)
    )
    answers = pico.generate(request)
    assert sorted(answers) == [0, 1, 2]
    assert len({tuple(a.ids) for a in answers.values()}) == 3
    assert answers[0].summary.usage.generated_tokens == 36
    request.n = 1
    assert pico.generate(request)[0].ids == answers[0].ids


def test_logprobs_come_with_every_token(pico: RunningFleet) -> None:
    request = greedy(count=6)
    request.sampling.logprobs = 3
    answer = pico.generate(request)[0]
    assert [p.chosen.token_id for p in answer.logprobs] == answer.ids
    for scored in answer.logprobs:
        assert len(scored.top) == 3
        assert scored.top[0].token_id == scored.chosen.token_id, "greedy"
        assert scored.top[0].logprob >= scored.top[1].logprob >= scored.top[2].logprob
        assert scored.chosen.logprob <= 0


def test_stop_strings_end_the_text_before_them(pico: RunningFleet) -> None:
    request = pb.GenerateRequest(
        text="import os\nimport", sampling=pb.SamplingParams(temperature=0.0), stopping=pb.StoppingParams(max_tokens=60)
    )
    whole = pico.generate(request)[0]
    stop = whole.text[10:14]
    request.stopping.stop.append(stop)
    cut = pico.generate(request)[0]
    assert cut.finish_reason == pb.FINISH_REASON_STOP
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert cut.summary.usage.generated_tokens == len(cut.ids) < 60


def test_one_token_never_transfers(pico: RunningFleet) -> None:
    answer = pico.generate(greedy(count=1))[0]
    assert len(answer.ids) == 1
    assert not answer.summary.HasField("kv_transfer")


def test_a_prefix_seen_before_is_neither_computed_nor_moved_again(pico: RunningFleet) -> None:
    prompt = [(3 * i) % 4000 + 50 for i in range(320)]
    first = pico.generate(greedy([*prompt, 1, 2], 4))[0].summary
    second = pico.generate(greedy([*prompt, 3, 4], 4))[0].summary
    assert first.usage.cached_prompt_tokens == 0
    assert second.usage.cached_prompt_tokens == 320
    assert second.kv_transfer.blocks == 1


def test_chat_tokenize_and_models(pico: RunningFleet) -> None:
    messages = [pb.ChatMessage(role="user", content="sort a list")]
    tokens = pico.stub.Tokenize(pb.TokenizeRequest(messages=messages))
    expected = AutoTokenizer.from_pretrained(PICO).apply_chat_template(
        [{"role": "user", "content": "sort a list"}], add_generation_prompt=True, return_dict=False
    )
    assert list(tokens.token_ids) == expected
    assert tokens.context_length == 2048
    answer = pico.generate(pb.GenerateRequest(messages=messages, stopping=pb.StoppingParams(max_tokens=5, ignore_eos=True)))[0]
    assert answer.summary.usage.prompt_tokens == len(expected)
    [model] = pico.stub.ListModels(pb.ListModelsRequest()).models
    assert (model.id, model.context_length, model.vocab_size, model.has_chat_template) == ("pico", 2048, 4096, True)
    assert len(model.fingerprint) == 64


def test_phases_tell_where_the_time_went_and_add_up(pico: RunningFleet) -> None:
    for turn in range(10):  # where the router is late with a token, the hand-off is hidden behind it, or all steps are
        summary = pico.generate(greedy([(11 * i + turn) % 4000 for i in range(600)], 12))[0].summary
        if {"prefill", "unpack", "forward"} <= {phase.name for phase in summary.phases}:
            break
    legs = {
        pb.LEG_FIRST_TOKEN: summary.first_token_s,
        pb.LEG_SECOND_TOKEN: summary.second_token_s,
        pb.LEG_REST: summary.rest_s,
    }
    at = 0.0
    for leg, seconds in legs.items():
        phases = [p for p in summary.phases if p.leg == leg]
        assert seconds > 0
        assert sum(p.duration_s for p in phases) == pytest.approx(seconds, abs=1e-9)
        for phase in phases:
            assert phase.duration_s > 0
            assert phase.start_s == pytest.approx(at, abs=1e-9), "no gap, no overlap"
            at += phase.duration_s
    workers = {p.name: p.worker for p in summary.phases}
    assert workers["prefill"] == "prefill-0"
    assert workers["step"] == workers["forward"] == workers["unpack"] == "decode-0"
    assert {"accept", "admit", "place", "dispatch", "prefill", "transit", "stream"} <= set(workers)
    chunks = [p for p in summary.phases if p.name == "prefill"]
    assert len(chunks) == 3  # of at most 256 tokens
    assert sum(p.tokens for p in chunks) == 600
    [forward] = [p for p in summary.phases if p.name == "forward"]
    assert 1 <= forward.count <= 10


def test_the_pair_measured_itself_and_used_shared_memory(pico: RunningFleet) -> None:
    [pair] = pico.status().pairs
    assert (pair.transport, pair.path) == ("ucx", "shared memory")
    assert 0 < pair.round_trip_s < 0.1
    assert pair.bytes_per_s > 0


def test_a_client_that_knows_only_the_proto(pico: RunningFleet, tmp_path: Path) -> None:
    """Stock generated code, nothing of ours."""
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{ROOT / 'proto'}",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
    ]
    subprocess.run([*command, "splitfire/v1/inference.proto"], check=True, cwd=ROOT / "proto")
    script = f"""
import sys, grpc
sys.path.insert(0, {str(tmp_path)!r})
from splitfire.v1 import inference_pb2 as pb, inference_pb2_grpc
assert pb.__file__.startswith({str(tmp_path)!r})
stub = inference_pb2_grpc.InferenceStub(grpc.insecure_channel({pico.address!r}))
request = pb.GenerateRequest(prompt_token_ids={PROMPT}, sampling={{"temperature": 0}}, stopping={{"max_tokens": 8, "ignore_eos": True}})
print([t for r in stub.Generate(request) for t in r.token_ids])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(ran.stdout) == pico.ids(count=8)


def test_reflection_and_health_serve_stock_tools(pico: RunningFleet) -> None:
    """`buf curl` finds the service by reflection, as grpcurl does; health answers for both names."""
    curl = [str(Path(sys.executable).parent / "buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    body = json.dumps({"text": "x = ", "sampling": {"temperature": 0}, "stopping": {"max_tokens": 4, "ignore_eos": True}})
    ran = subprocess.run(
        [*curl, "-d", body, f"http://{pico.address}/splitfire.v1.Inference/Generate"], capture_output=True, text=True, check=True
    )
    assert '"generatedTokens": 4' in ran.stdout
    for service in ("", "splitfire.v1.Inference"):
        body = json.dumps({"service": service})
        ran = subprocess.run(
            [*curl, "-d", body, f"http://{pico.address}/grpc.health.v1.Health/Check"], capture_output=True, text=True, check=True
        )
        assert json.loads(ran.stdout) == {"status": "SERVING"}


def test_workers_answer_health_probes_too(pico: RunningFleet) -> None:
    health = importlib.import_module("grpc_health.v1.health_pb2")
    stubs = importlib.import_module("grpc_health.v1.health_pb2_grpc")
    for child in pico.fleet.children[1:]:
        ready = next(json.loads(line) for line in child.log.read_text().splitlines() if '"ready"' in line)
        with grpc.insecure_channel(f"127.0.0.1:{ready['status_port']}") as channel:
            for service in ("", "splitfire.v1.Worker"):
                answer = stubs.HealthStub(channel).Check(health.HealthCheckRequest(service=service), timeout=5)
                assert answer.status == health.HealthCheckResponse.SERVING


def test_aggregated_gives_the_same_tokens(pico: RunningFleet) -> None:
    """P11, across processes: split = aggregated, greedy and sampled."""
    sampled = pb.GenerateRequest(
        prompt_token_ids=PROMPT,
        sampling=pb.SamplingParams(seed=1, temperature=0.9, top_p=0.9),
        stopping=pb.StoppingParams(max_tokens=20, ignore_eos=True),
    )
    with start_fleet("pico", prefill=0, router=("--split=never",)) as whole:
        assert whole.ids() == pico.ids()
        answer = whole.generate(sampled)[0]
        assert answer.ids == pico.generate(sampled)[0].ids
        assert not answer.summary.HasField("kv_transfer")
        whole.assert_no_leaks()


@pytest.mark.parametrize("family", ["qwen3", "mistral-window"])
def test_a_checkpoint_of_another_family_from_disk(family: str, tmp_path: Path) -> None:
    oracle = save_checkpoint(family_configs()[family], tmp_path / family, max_shard="300KB")
    with start_fleet(str(tmp_path / family), worker=("--dtype=fp32", "--block-size=16", "--chunk-tokens=64")) as fleet:
        for length in (1, 70, 300):
            prompt = [(13 * i + length) % 4000 for i in range(length)]
            answer = fleet.generate(greedy(prompt, 12))[0]
            assert_greedy(oracle, prompt, answer.ids)
            assert answer.summary.kv_transfer.bytes > 0
        assert fleet.stub.ListModels(pb.ListModelsRequest()).models[0].id == family
        fleet.assert_no_leaks()
