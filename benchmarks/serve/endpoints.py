"""How a server is asked: ours over gRPC, others over OpenAI's streaming HTTP. The clock is this process's, and the same for all."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.serve.answers import Answer
from splitfire.cli.client import Client
from splitfire.v1 import inference_pb2 as pb

TIMEOUT_S = 600.0
FIRST_ORDINARY_ID = 4  # ids below are special tokens of the tokenizers we make


@dataclass(frozen=True, slots=True)
class Piece:
    """What one message of a stream brought."""

    num_tokens: int
    kv_bytes: int = 0
    num_cached: int = 0


class Endpoint(Protocol):
    """A server that streams. Called from several threads at once; closing a stream ends its request."""

    def stream(self, prompt: Sequence[int], output_tokens: int) -> Generator[Piece, None, None]:
        """Greedy, exactly `output_tokens` tokens whatever they are."""


class GrpcEndpoint:
    """A router of ours."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    def stream(self, prompt: Sequence[int], output_tokens: int) -> Generator[Piece, None, None]:
        request = pb.GenerateRequest(
            prompt_token_ids=prompt,
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.StoppingParams(max_tokens=output_tokens, ignore_eos=True),
        )
        for response in self._client.generate(request, TIMEOUT_S):
            summary = response.summary
            yield Piece(len(response.token_ids), summary.kv_transfer.bytes, summary.usage.cached_prompt_tokens)


class HttpEndpoint:
    """POST /v1/completions with `stream`, as vLLM, llama.cpp and our server around OpenVINO GenAI have it."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    def stream(self, prompt: Sequence[int], output_tokens: int) -> Generator[Piece, None, None]:
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"port {self._port} answers {response.status}: {response.read(500).decode(errors='replace')}")
            for line in response:
                if line.startswith(b"data: {"):
                    yield Piece(_num_tokens(json.loads(line[6:])))
        finally:
            connection.close()


def _num_tokens(event: dict[str, object]) -> int:
    """Of one server-sent event: its ids where the server gives them, else one for each text."""
    if "error" in event:
        raise RuntimeError(f"the stream ends with {event['error']}")
    choices = event["choices"]
    assert isinstance(choices, list)
    return sum(len(c["token_ids"]) if c.get("token_ids") is not None else int(bool(c.get("text"))) for c in choices)


def ask(endpoint: Endpoint, prompt: Sequence[int], output_tokens: int) -> Answer:
    """One request from beginning to end."""
    times: list[float] = []
    kv_bytes = num_cached = 0
    began = time.perf_counter()
    for piece in endpoint.stream(prompt, output_tokens):
        times += [time.perf_counter() - began] * piece.num_tokens
        kv_bytes += piece.kv_bytes
        num_cached += piece.num_cached
    if len(times) != output_tokens:
        raise RuntimeError(f"{output_tokens} tokens were asked for, {len(times)} came")
    return Answer(tuple(times), kv_bytes, num_cached)


def random_prompt(draw: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    return [draw.randrange(FIRST_ORDINARY_ID, vocab_size) for _ in range(num_tokens)]
