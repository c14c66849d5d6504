"""One process of Dynamo's: `engine` (a fake one) or `router` (its KV router, and the clients that ask it). Runs in Dynamo's own
environment, knows nothing of ours but the engine's arithmetic, and speaks JSON lines on its standard streams.

No NATS and no etcd: discovery over files, requests over TCP, cache events over ZMQ, all of which Dynamo brings itself.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from hashlib import blake2b
from typing import Any

import uvloop
from dynamo._core import (  # type: ignore[import-not-found]  # in Dynamo's environment it is
    DistributedRuntime,
    KvEventPublisher,
    KvRouter,
    KvRouterConfig,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_model,
)

from benchmarks.router.engine import PrefixCache, Speed

ENDPOINT, MODEL = "bench.worker.generate", "benchmarked"
SETTLE_S = 3.0  # until the router has found every engine


class Engine:
    """First in, first out; a token every `step_s`; tells what its cache got and lost."""

    def __init__(self, speed: Speed, block_size: int, publisher: Any) -> None:
        self.prompt_tokens = self.cached_tokens = 0
        self._speed, self._block_size, self._publisher = speed, block_size, publisher
        self._cache = PrefixCache(speed.cached_blocks)
        self._turn = asyncio.Lock()
        self._free_at = 0.0

    async def generate(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        ids: list[int] = request["token_ids"]
        await self._prefill(ids)
        yield {"token_ids": [300]}
        left, next_at = request["stop_conditions"]["max_tokens"] - 1, time.monotonic()
        while left > 0:
            next_at += self._speed.step_s
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            yield {"token_ids": [300] * min(left, self._speed.tokens_per_step)}
            left -= self._speed.tokens_per_step

    async def _prefill(self, ids: list[int]) -> None:
        names = _names(ids, self._block_size)
        async with self._turn:
            num_cached = min(self._cache.depth(names), (len(ids) - 1) // self._block_size) * self._block_size
            self._free_at = max(self._free_at, time.monotonic()) + self._speed.prefill_s(len(ids) - num_cached)
            await asyncio.sleep(self._free_at - time.monotonic())
            change = self._cache.add(names)
            self.prompt_tokens += len(ids)
            self.cached_tokens += num_cached
        if change.stored:
            first = names.index(change.stored[0])
            begin, parent = first * self._block_size, names[first - 1] if first else None
            fresh = names[first:]
            tokens = ids[begin : begin + len(fresh) * self._block_size]
            self._publisher.publish_stored(tokens, [self._block_size] * len(fresh), list(fresh), parent)
        if change.removed:
            self._publisher.publish_removed(list(change.removed))


def _names(ids: Sequence[int], block_size: int) -> tuple[int, ...]:
    """63 bits of chained hashes: Dynamo wants them signed."""
    names, parent = [], b""
    for begin in range(0, len(ids) - block_size + 1, block_size):
        parent = blake2b(parent + repr(ids[begin : begin + block_size]).encode(), digest_size=8).digest()
        names.append(int.from_bytes(parent, "little") >> 1)
    return tuple(names)


async def engine(model: str, speed: Speed, block_size: int) -> None:
    """Until standard input ends; then what its cache found."""
    loop = asyncio.get_running_loop()
    endpoint = DistributedRuntime(loop, "file", "tcp", event_plane="zmq").endpoint(ENDPOINT)
    made = Engine(speed, block_size, KvEventPublisher(endpoint, kv_block_size=block_size, enable_local_indexer=True))

    async def generate(request: dict[str, Any], context: object = None) -> AsyncIterator[dict[str, Any]]:
        async for answer in made.generate(request):
            yield answer

    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate, graceful_shutdown=False))
    config = ModelRuntimeConfig()
    config.total_kv_blocks, config.max_num_seqs = speed.cached_blocks, 256
    await asyncio.sleep(0.5)
    await register_model(
        ModelInput.Tokens, ModelType.Completions, endpoint, model, MODEL, worker_type=WorkerType.Aggregated,
        kv_cache_block_size=block_size, runtime_config=config, skip_model_assets=True,
    )  # fmt: skip
    _say({"ready": True})
    await loop.run_in_executor(None, sys.stdin.read)
    _say({"prompt_tokens": made.prompt_tokens, "cached_tokens": made.cached_tokens})
    serving.cancel()


async def router(num_engines: int, block_size: int) -> None:
    """Plays the prompts of one line of standard input; times to first token."""
    loop = asyncio.get_running_loop()
    endpoint = DistributedRuntime(loop, "file", "tcp", event_plane="zmq").endpoint(ENDPOINT)
    client = await endpoint.client()
    while len(client.instance_ids()) < num_engines:  # noqa: ASYNC110 - there is nothing to wait for
        await asyncio.sleep(0.1)
    routing = KvRouter(endpoint, block_size, KvRouterConfig())
    await asyncio.sleep(SETTLE_S)
    prompts = json.loads(await loop.run_in_executor(None, sys.stdin.readline))

    async def ask(ids: list[int], max_tokens: int) -> float:
        began, first = time.perf_counter(), 0.0
        stream = await routing.generate(token_ids=ids, model=MODEL, stop_conditions={"max_tokens": max_tokens})
        async for answer in stream:
            if answer["token_ids"] and not first:
                first = time.perf_counter() - began
        return first

    began, tasks = time.perf_counter(), []
    for at_s, ids, max_tokens in prompts:
        await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(ids, max_tokens)))
    _say({"ttft_s": await asyncio.gather(*tasks)})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    kind, *rest = json.loads(sys.argv[1])
    uvloop.run(router(*rest) if kind == "router" else engine(rest[0], Speed(**rest[1]), rest[2]))
