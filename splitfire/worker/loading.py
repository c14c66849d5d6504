"""From settings to an engine that is ready to run: find the model, choose dtypes, load, fingerprint. Blocking."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import structlog
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from splitfire.core.errors import ConfigError, ModelError
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.core.model_dir import ModelDir, others_who_may_change, weights_digest
from splitfire.core.model_source import resolve_model
from splitfire.core.settings import WorkerSettings
from splitfire.engine.blocks import BlockPool
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.checkpoint import Progress as LoadProgress
from splitfire.engine.device.handoff import require_shareable
from splitfire.engine.engine import Engine
from splitfire.engine.grammar import GrammarCompiler
from splitfire.engine.models.bodies import body_for, is_compiled, make_runner
from splitfire.engine.models.transformer import Weights
from splitfire.engine.parallel.followers import Followers
from splitfire.engine.parallel.group import ALONE
from splitfire.engine.parallel.leader import Leader
from splitfire.engine.parallel.pack import pack, unpack
from splitfire.engine.parallel.plan import RankPlan
from splitfire.engine.parallel.shards import require_shards, shard_layout
from splitfire.engine.pool import KvPool
from splitfire.engine.runner import Model, Runner, StepRunner
from splitfire.engine.scheduler import Budget
from splitfire.engine.tensors import check_tensors, stored_weight_bytes, weight_bytes, weight_format
from splitfire.worker.speculation import DraftPlan, make_speculator, plan_draft_model

log = structlog.get_logger("worker")
# A chunk is long enough to keep the processor busy and short enough that little KV is left to ship when the prompt is done.
# CPU: of 512 and 256, the shorter one costs 1 % of prefill and halves the gap to token 2 (python -m benchmarks.serve handoff).
CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# A step with one row takes as long as 14 more of them on a core (smol135: 8.5 ms, then 0.6 for each). GPU: not timed yet.
SATURATING_ROWS = {"cpu": 16, "cuda": None}
MIN_KV_MEMORY = 128 << 20  # when nobody says how much


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything a worker tells others about its model, and the engine that runs it."""

    model: ModelDir
    engine: Engine
    layout: KvLayout
    fingerprint: Fingerprint
    max_context: int
    chunk_tokens: int
    grammars: GrammarCompiler | None  # None: the tokenizer is of a kind that outputs cannot be held to
    followers: Followers | None  # the other ranks, if there are any


def load_model(settings: WorkerSettings) -> LoadedModel:
    """ConfigError, naming what is wrong, when the model or the settings cannot be used together."""
    device = _device(settings)
    model = ModelDir(resolve_model(settings.model))
    if others := others_who_may_change(model.path):
        log.warning("others can change the model directory", path=str(model.path), others=others)
    plan = _plan(settings, model, device)
    torch.set_num_threads(plan.num_threads)
    draft = plan_draft_model(settings, model, plan.dtype, plan.layout, plan.num_blocks, plan.max_context)
    num_slots = settings.max_peers * (settings.send_slots + settings.receive_slots) if settings.transport == "ucx" else 0
    _check_ranks(plan, model, draft, num_slots * settings.slot_size)
    options = replace(plan.load_options, device=device)
    with ExitStack() as undo:
        followers = Followers(plan) if plan.size > 1 else None
        if followers is not None:
            undo.callback(followers.close)
        runner, fingerprint = _load_runner(plan, model, options, followers, settings.max_running)
        speculator = make_speculator(settings, runner, draft, options)
        undo.pop_all()
    blocks = BlockPool(plan.num_blocks, caches_prefixes=settings.prefix_cache)
    chunk_tokens = settings.chunk_tokens or max(CHUNK_TOKENS[device.type], settings.block_size)
    budget = Budget(chunk_tokens, settings.max_running, settings.saturating_rows or SATURATING_ROWS[device.type])
    engine = Engine(runner, blocks, budget, time.monotonic, speculator)
    return LoadedModel(model, engine, plan.layout, fingerprint, plan.max_context, chunk_tokens, _grammars(model), followers)


def _plan(settings: WorkerSettings, model: ModelDir, device: torch.device) -> RankPlan:
    """Dtypes, sizes and threads of this worker's ranks, which may be one."""
    config, size = model.config, settings.tensor_parallel
    require_shards(config, size)
    max_context = settings.max_context or config.max_positions
    if max_context > config.max_positions and config.rope.rope_type != "dynamic":
        raise ConfigError(f"max_context is {max_context}, the model's positions end at {config.max_positions}")
    may_compile = settings.kernels == "auto"
    is_fast = may_compile and size == 1 and is_compiled(config, "", device)
    dtype = _dtype(settings.dtype, config.stored_dtype, device, is_compiled=is_fast)
    is_fast = is_fast and dtype != "fp16"
    # A compiled step computes in fp32 from weights of any kind: what is stored as bf16 says the same in half the memory.
    held = config.stored_dtype if is_fast and dtype == "fp32" and config.stored_dtype == "bf16" and not config.quant else dtype
    kv_dtype = dtype if settings.kv_dtype == "auto" else settings.kv_dtype
    layout = KvLayout(kv_dtype, config.num_layers, config.num_kv_heads, config.head_dim, settings.block_size)
    return RankPlan(
        model=str(model.path),
        size=size,
        device=device.type,
        held=held,
        dtype=dtype,
        is_int8=settings.weights == "int8",
        keeps_stored=settings.weights == "auto" and device.type == "cuda" and config.quant is not None,
        allow_nonfinite=settings.allow_nonfinite,
        may_compile=may_compile,
        max_context=max_context,
        layout=layout,
        num_blocks=num_blocks_of(settings.kv_memory, shard_layout(layout, size), max_context),
        num_threads=max(1, (settings.threads or len(settings.cpu_numbers) or torch.get_num_threads()) // size),
    )


def _load_runner(
    plan: RankPlan, model: ModelDir, options: LoadOptions, followers: Followers | None, num_lanes: int
) -> tuple[StepRunner, Fingerprint]:
    """Alone, or as rank 0."""
    config = model.config
    with ThreadPoolExecutor(1, "digest") as pool:
        digest = pool.submit(weights_digest, sorted({entry.file for entry in model.tensors().values()}))
        if followers is None:
            weights = _load(model, lambda progress: load_weights(model, options, progress))
        else:
            weights = _load(model, lambda progress: plan.load(model, 0, progress))
        fingerprint = Fingerprint(
            digest.result(),
            model.config_digest,
            model.tokenizer_digest,
            model.rope_digest(plan.max_context),
            weight_format(config.quant, plan.is_int8),
            plan.layout.block_size,
        )
    kernels = body_for(config, plan.dtype, options.device, may_compile=plan.may_compile, num_ranks=plan.size)
    num_bytes = _weight_bytes(plan, model)
    log.info("weights loaded", format=fingerprint.weight_format, dtype=plan.held, bytes=num_bytes, kernels=kernels, ranks=plan.size)
    if followers is None:
        body, kv = plan.build(weights, config, ALONE), KvPool(plan.layout, plan.num_blocks, options.device)
        return recorded_runner(body, kv, num_lanes, plan.max_context), fingerprint
    group, sharded = followers.join()
    return Runner(Leader(config, plan.build(weights, config, group), followers), sharded), fingerprint


def recorded_runner(model: Model, pool: KvPool, num_lanes: int, max_context: int) -> StepRunner:
    """The runner; on a GPU recording its steps shows how far it is, and what it took is logged."""
    began, before = time.monotonic(), 0
    if pool.device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left
        before = torch.cuda.memory_reserved(pool.device)
    columns = (TextColumn("recording steps"), BarColumn(), TextColumn("{task.completed} of {task.total}"))
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty() or pool.device.type == "cpu") as bar:
        task = bar.add_task("record", total=None)
        runner = make_runner(model, pool, num_lanes, max_context, lambda done, total: bar.update(task, completed=done, total=total))
    if pool.device.type == "cuda":
        compile_handoff(pool)
        took = round(time.monotonic() - began, 1)
        log.info("steps recorded", seconds=took, bytes=torch.cuda.memory_reserved(pool.device) - before)
    return runner


def compile_handoff(pool: KvPool) -> None:
    """Packs a block into every dtype and unpacks one, so that no hand-off waits for a compiler. The pool holds nothing yet."""
    for dtype in DTYPE_BYTES:
        payload = torch.empty(replace(pool.layout, dtype=dtype).block_bytes, dtype=torch.uint8, device=pool.device)
        pack(pool, [0], 0, dtype, payload)
        if dtype == pool.layout.dtype:
            unpack(pool, [0], payload)


def num_blocks_of(kv_memory: int | None, layout: KvLayout, max_context: int) -> int:
    """Blocks of the pool; the longest sequence fits, with one block to spare."""
    least = (layout.blocks_for(max_context) + 1) * layout.block_bytes
    if kv_memory is None:
        kv_memory = max(least, MIN_KV_MEMORY)
    if kv_memory < least:
        raise ConfigError(
            f"kv_memory is {kv_memory} bytes, one sequence of max_context = {max_context} tokens needs {least}; "
            f"give --kv-memory {-(-least >> 20)}MiB or a smaller --max-context"
        )
    return kv_memory // layout.block_bytes


def _grammars(model: ModelDir) -> GrammarCompiler | None:
    """Now and not with the first request: a large vocabulary takes a second, with the interpreter's lock held."""
    try:
        return GrammarCompiler(model.tokenizer_path, model.config.vocab_size, model.config.eos_token_ids)
    except ModelError as exc:
        log.warning("outputs of this model cannot be constrained", reason=str(exc))
        return None


def _load(model: ModelDir, read: Callable[[LoadProgress | None], Weights]) -> Weights:
    if unused := check_tensors(model.config, model.tensors()).unused:
        log.info("the checkpoint's scales of activations and KV are not used", tensors=len(unused), first=unused[0])
    if not sys.stderr.isatty():
        return read(None)
    columns = (TextColumn("loading {task.fields[name]}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("load", total=None, name=model.path.name)
        return read(lambda done, total: bar.update(task, completed=done, total=total))


def _device(settings: WorkerSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch sees no CUDA device; use --device cpu, or a CUDA build of PyTorch")
    size = settings.tensor_parallel
    if settings.device == "cuda" and size > 1:
        require_shareable()  # rank 0 reads and writes the pools of all
    if settings.device == "cuda" and size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel is {size}, a CUDA device for each rank, and PyTorch sees {torch.cuda.device_count()}; "
            "use --tensor-parallel with at most as many"
        )
    return torch.device(settings.device)


def _dtype(asked: str, stored: str, device: torch.device, *, is_compiled: bool) -> str:
    """On a CPU without bf16 units torch is several times faster in fp32 than in bf16, which it would have to emulate."""
    if asked != "auto":
        return asked
    if device.type == "cpu" and (stored == "fp16" or not (is_compiled or torch.cpu._is_avx512_bf16_supported())):
        return "fp32"
    return stored


def _weight_bytes(plan: RankPlan, model: ModelDir) -> int:
    """Of the whole model, loaded."""
    if plan.keeps_stored:
        return stored_weight_bytes(model.config, plan.held, check_tensors(model.config, model.tensors()))
    return weight_bytes(model.config, plan.held, plan.is_int8)


def _check_ranks(plan: RankPlan, model: ModelDir, draft: DraftPlan | None, slot_bytes: int) -> None:
    """`check_memory` where each rank is. slot_bytes: of the rings at their largest, which are where rank 0's GPU is if it has one."""
    draft_weights, draft_pool = (draft.weight_bytes, draft.pool_bytes) if draft is not None else (0, 0)
    pool = plan.num_blocks * plan.rank_layout.block_bytes
    whole, config = _weight_bytes(plan, model), model.config
    embedding = config.vocab_size * config.hidden_size * DTYPE_BYTES[plan.held]  # every rank has all of it
    weights = whole if plan.size == 1 else whole // plan.size + embedding
    if plan.device == "cpu":  # all in the same memory
        check_memory(plan.size * weights + draft_weights, plan.size * pool + draft_pool, plan.device_of(0))
        return
    for rank in range(plan.size):
        check_memory(weights + draft_weights, pool + draft_pool + (0 if rank else slot_bytes), plan.device_of(rank))


def check_memory(weight_bytes: int, pool_bytes: int, device: torch.device) -> None:
    """Refuses before allocating what cannot be there."""
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            with open("/proc/meminfo") as file:
                available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return
    if weight_bytes + pool_bytes > available:
        raise ConfigError(
            f"the model needs {weight_bytes >> 20} MiB and the KV pool {pool_bytes >> 20} MiB, {available >> 20} MiB are available; "
            "use a smaller model, or a smaller --kv-memory or --max-context"
        )
