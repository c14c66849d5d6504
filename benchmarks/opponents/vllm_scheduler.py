"""What one step costs vLLM's own scheduler, no model behind it: `schedule` and `update_from_output`, as its engine core calls them.

Runs in build/vllm-venv and imports nothing of ours. Prints a JSON list of seconds, one for each decode step: of
the thread's own time, so that others on the machine do not count.

    vllm_scheduler.py CHECKPOINT NUM_SEQUENCES PROMPT_TOKENS NUM_STEPS
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

now = time.thread_time


def make_scheduler(checkpoint: str, num_sequences: int, num_tokens: int) -> Scheduler:
    """Prefix caching off, as on our side: prompts have nothing in common, and hashing them is not what is measured."""
    config = EngineArgs(
        model=checkpoint, max_model_len=2048, max_num_seqs=num_sequences, max_num_batched_tokens=8192, enable_prefix_caching=False
    ).create_engine_config()
    size = config.cache_config.block_size
    num_blocks = num_sequences * (num_tokens // size + 2) + 1
    spec = FullAttentionSpec(block_size=size, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
    config.cache_config.num_gpu_blocks = num_blocks
    cache = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return Scheduler(config, cache, StructuredOutputManager(config), block_size=size)


def step(scheduler: Scheduler) -> tuple[int, float]:
    """Every scheduled sequence that reached its end gets token 7. How many were scheduled, and the scheduler's own seconds."""
    began = now()
    scheduled = scheduler.schedule()
    seconds = now() - began
    ids = list(scheduled.num_scheduled_tokens)
    tokens = [[7] if scheduler.requests[i].num_computed_tokens >= scheduler.requests[i].num_prompt_tokens else [] for i in ids]
    output = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens)
    began = now()
    scheduler.update_from_output(scheduled, output)
    return len(ids), seconds + now() - began


def main(checkpoint: str, num_sequences: int, prompt_tokens: int, num_steps: int) -> None:
    scheduler = make_scheduler(checkpoint, num_sequences, prompt_tokens + num_steps + 16)
    draw = random.Random(1)
    for i in range(num_sequences):
        prompt = [draw.randrange(4, 4096) for _ in range(prompt_tokens)]
        sampling = SamplingParams(temperature=0.0, max_tokens=num_steps + 16, ignore_eos=True)
        scheduler.add_request(Request(f"request-{i}", prompt, sampling, None))
    while any(r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.requests.values()):
        step(scheduler)
    gc.collect()
    gc.freeze()
    steps = [step(scheduler) for _ in range(num_steps)]
    assert {num_scheduled for num_scheduled, _ in steps} == {num_sequences}
    print(json.dumps([seconds for _, seconds in steps]))


if __name__ == "__main__":
    main(sys.argv[1], *(int(a) for a in sys.argv[2:]))
