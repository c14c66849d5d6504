"""Head of line: ten prompts of 8000 tokens are asked and cancelled, then a short one is. With real workers, `smol135` on a core each.

What is cancelled is looked at between chunks, and a chunk is at most 250 ms long; the short prompt may wait for one and a half.
"""

from __future__ import annotations

import random
import statistics
import time

import grpc

from benchmarks.report import Row
from benchmarks.router.rig import ROOT
from benchmarks.router.runs import at_most, plain
from benchmarks.serve.fleets import Cores, fleet, vocab_size
from benchmarks.serve.workloads import Shape
from splitfire.v1 import inference_pb2 as pb
from splitfire.v1 import inference_pb2_grpc

CHECKPOINT = ROOT / "build" / "checkpoints" / "smol135"
LONG, SHORT = Shape(8000, 16), Shape(64, 4)
NUM_LONG = 10
FLAGS = ("--kv-memory=1GiB", "--max-context=8192")
CHUNK_S = 0.25
BEFORE_CANCEL_S = 1.0
TIMEOUT_S = 120.0


def head(turns: int, _seconds: float) -> list[Row]:
    if not (CHECKPOINT / "model.safetensors").exists():
        return [Row("head of line", "skipped: no checkpoint: make checkpoint", "", 0.0, None, "", None, "", None, 0.0)]
    with fleet(str(CHECKPOINT), Cores((0,), (1,)), FLAGS) as running, grpc.insecure_channel(running.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        draw = random.Random(0)
        vocab = vocab_size(str(CHECKPOINT))
        _ttft_s(stub, _request(draw, SHORT, vocab))  # warm
        idle = [_ttft_s(stub, _request(draw, SHORT, vocab)) for _ in range(2 * turns + 1)]
        behind = [_behind_long(stub, draw, vocab) for _ in range(turns)]
    usual = statistics.median(idle)
    case = f"{NUM_LONG} x {LONG.prompt} tokens cancelled, then {SHORT.prompt}"
    return [
        plain(case, "idle TTFT", "ms", [1e3 * s for s in idle]),
        plain(case, "TTFT", "ms", [1e3 * s for s in behind]),
        at_most(case, "above idle, in chunks of 250 ms", "", [(s - usual) / CHUNK_S for s in behind], 1.5),
    ]


def _behind_long(stub: inference_pb2_grpc.InferenceStub, draw: random.Random, vocab: int) -> float:
    calls = [stub.Generate(_request(draw, LONG, vocab), timeout=TIMEOUT_S) for _ in range(NUM_LONG)]
    time.sleep(BEFORE_CANCEL_S)
    for call in calls:
        call.cancel()
    taken = _ttft_s(stub, _request(draw, SHORT, vocab))
    time.sleep(2 * CHUNK_S)
    return taken


def _ttft_s(stub: inference_pb2_grpc.InferenceStub, request: pb.GenerateRequest) -> float:
    began = time.perf_counter()
    first = 0.0
    for response in stub.Generate(request, timeout=TIMEOUT_S):
        if response.token_ids and not first:
            first = time.perf_counter() - began
    return first


def _request(draw: random.Random, shape: Shape, vocab: int) -> pb.GenerateRequest:
    stopping = pb.StoppingParams(max_tokens=shape.output, ignore_eos=True)
    return pb.GenerateRequest(prompt_token_ids=[draw.randrange(4, vocab) for _ in range(shape.prompt)], stopping=stopping)
