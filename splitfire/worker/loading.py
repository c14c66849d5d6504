"""From settings to an engine that is ready to run: find the model, choose dtypes, load, fingerprint. Blocking."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from splitfire.core.errors import ConfigError, ModelError
from splitfire.core.fingerprint import Fingerprint
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir, others_who_may_change, weights_digest
from splitfire.core.model_source import resolve_model
from splitfire.core.settings import WorkerSettings
from splitfire.engine.blocks import BlockPool
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.engine import Engine
from splitfire.engine.grammar import GrammarCompiler
from splitfire.engine.models.bodies import body_for, build, is_compiled
from splitfire.engine.models.rope import rope_table
from splitfire.engine.models.transformer import Weights
from splitfire.engine.pool import TORCH_DTYPES, KvPool
from splitfire.engine.runner import Runner
from splitfire.engine.scheduler import Budget
from splitfire.engine.tensors import check_tensors, weight_bytes, weight_format
from splitfire.worker.speculation import make_speculator, plan_draft_model

log = structlog.get_logger("worker")
# A chunk is long enough to keep the processor busy and short enough that little KV is left to ship when the prompt is done.
# CPU: of 512 and 256, the shorter one costs 1 % of prefill and halves the gap to token 2 (python -m benchmarks.serve handoff).
CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
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


def load_model(settings: WorkerSettings) -> LoadedModel:
    """ConfigError, naming what is wrong, when the model or the settings cannot be used together."""
    torch.set_num_threads(settings.threads or len(settings.cpu_numbers) or torch.get_num_threads())
    device = _device(settings)
    model = ModelDir(resolve_model(settings.model))
    if others := others_who_may_change(model.path):
        log.warning("others can change the model directory", path=str(model.path), others=others)
    config = model.config
    max_context = settings.max_context or config.max_positions
    if max_context > config.max_positions and config.rope.rope_type != "dynamic":
        raise ConfigError(f"max_context is {max_context}, the model's positions end at {config.max_positions}")
    may_compile = settings.kernels == "auto"
    is_fast = may_compile and is_compiled(config, "", device)
    dtype = _dtype(settings.dtype, config.stored_dtype, device, is_compiled=is_fast)
    is_fast = is_fast and dtype != "fp16"
    layout = KvLayout(
        dtype if settings.kv_dtype == "auto" else settings.kv_dtype,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        settings.block_size,
    )
    num_blocks = num_blocks_of(settings.kv_memory, layout, max_context)
    # A compiled step computes in fp32 from weights of any kind: what is stored as bf16 says the same in half the memory.
    held = config.stored_dtype if is_fast and dtype == "fp32" and config.stored_dtype == "bf16" and not config.quant else dtype
    options = LoadOptions(TORCH_DTYPES[held], device, settings.allow_nonfinite, settings.weights == "int8")
    num_weight_bytes = weight_bytes(config, held, options.is_int8)
    draft = plan_draft_model(settings, model, dtype, layout, num_blocks, max_context)
    draft_bytes = (draft.weight_bytes, draft.pool_bytes) if draft is not None else (0, 0)
    check_memory(num_weight_bytes + draft_bytes[0], num_blocks * layout.block_bytes + draft_bytes[1], device)
    with ThreadPoolExecutor(1, "digest") as pool:
        digest = pool.submit(weights_digest, sorted({entry.file for entry in model.tensors().values()}))
        weights = _load(model, options)
        fingerprint = Fingerprint(
            digest.result(),
            model.config_digest,
            model.tokenizer_digest,
            model.rope_digest(max_context),
            weight_format(config.quant, options.is_int8),
            settings.block_size,
        )
    kernels = body_for(config, dtype, device, may_compile=may_compile)
    log.info("weights loaded", format=fingerprint.weight_format, dtype=held, bytes=num_weight_bytes, kernels=kernels)
    rope = rope_table(config.rope, config.head_dim, max_context, device)
    runner = Runner(build(config, weights, rope, dtype, may_compile=may_compile), KvPool(layout, num_blocks, device))
    blocks = BlockPool(num_blocks, caches_prefixes=settings.prefix_cache)
    chunk_tokens = settings.chunk_tokens or max(CHUNK_TOKENS[device.type], settings.block_size)
    speculator = make_speculator(settings, runner, draft, options)
    engine = Engine(runner, blocks, Budget(chunk_tokens, settings.max_running), time.monotonic, speculator)
    return LoadedModel(model, engine, layout, fingerprint, max_context, chunk_tokens, _grammars(model))


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


def _load(model: ModelDir, options: LoadOptions) -> Weights:
    if unused := check_tensors(model.config, model.tensors()).unused:
        log.info("the checkpoint's scales of activations and KV are not used", tensors=len(unused), first=unused[0])
    if not sys.stderr.isatty():
        return load_weights(model, options)
    columns = (TextColumn("loading {task.fields[name]}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("load", total=None, name=model.path.name)
        return load_weights(model, options, lambda done, total: bar.update(task, completed=done, total=total))


def _device(settings: WorkerSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch sees no CUDA device; use --device cpu, or a CUDA build of PyTorch")
    return torch.device(settings.device)


def _dtype(asked: str, stored: str, device: torch.device, *, is_compiled: bool) -> str:
    """On a CPU without bf16 units torch is several times faster in fp32 than in bf16, which it would have to emulate."""
    if asked != "auto":
        return asked
    if device.type == "cpu" and (stored == "fp16" or not (is_compiled or torch.cpu._is_avx512_bf16_supported())):
        return "fp32"
    return stored


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
