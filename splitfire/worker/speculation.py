"""From settings to a speculator: which drafters, the draft model if there is one, and the measured cost table. Blocking."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from hashlib import sha256

import structlog

from splitfire.core.errors import ConfigError
from splitfire.core.layout import KvLayout
from splitfire.core.model_dir import ModelDir
from splitfire.core.model_source import resolve_model
from splitfire.core.settings import WorkerSettings
from splitfire.engine.blocks import BlockPool
from splitfire.engine.checkpoint import LoadOptions, load_weights
from splitfire.engine.models.bodies import build, is_compiled, make_runner
from splitfire.engine.models.rope import rope_table
from splitfire.engine.pool import TORCH_DTYPES, KvPool
from splitfire.engine.runner import StepRunner
from splitfire.engine.speculation.controller import Controller
from splitfire.engine.speculation.costs import StepCosts
from splitfire.engine.speculation.draft_model import DraftModel
from splitfire.engine.speculation.measure import DRAFT_SHAPES, SHAPES, measure_steps
from splitfire.engine.speculation.modelled import Modelled
from splitfire.engine.speculation.speculator import BatchSpeculator, Sources
from splitfire.engine.tensors import weight_bytes

log = structlog.get_logger("worker")
MEASURE_S = 0.5  # of the start, for the cost table
DRAFT_POOL_SHARE = 4  # the draft pool holds as many tokens as the target's, in at most a quarter of its bytes


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """A draft model that fits the target, and the pool it gets."""

    model: ModelDir
    layout: KvLayout
    num_blocks: int
    max_context: int

    @property
    def weight_bytes(self) -> int:
        return weight_bytes(self.model.config, self.layout.dtype, is_int8=False)

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes


def plan_draft_model(
    settings: WorkerSettings, target: ModelDir, dtype: str, layout: KvLayout, num_blocks: int, max_context: int
) -> DraftPlan | None:
    """None when no draft model is asked for. `layout` and `num_blocks` are the target's pool's; `dtype` is computed in."""
    if not settings.uses_draft_model:
        return None
    model = ModelDir(resolve_model(settings.draft_model))
    if _digest(model) != _digest(target):
        raise ConfigError(
            f"draft_model {model.path.name} has another tokenizer.json than {target.path.name}; drafts would mean nothing"
        )
    mine, theirs = model.config.vocab_size, target.config.vocab_size
    if mine != theirs:
        raise ConfigError(
            f"draft_model {model.path.name} has vocab_size {mine}, {target.path.name} has {theirs}: they must be equal"
        )
    config = model.config
    mirrored = KvLayout(dtype, config.num_layers, config.num_kv_heads, config.head_dim, layout.block_size)
    context = min(max_context, config.max_positions)
    affordable = num_blocks * layout.block_bytes // DRAFT_POOL_SHARE // mirrored.block_bytes
    return DraftPlan(model, mirrored, max(mirrored.blocks_for(context), min(num_blocks, affordable)), context)


def make_speculator(
    settings: WorkerSettings, runner: StepRunner, draft: DraftPlan | None, options: LoadOptions
) -> BatchSpeculator | None:
    """None where nothing is to be speculated: off, or a worker that only computes prompts."""
    if not settings.speculates:
        return None
    model = _load(draft, replace(options, is_int8=False), settings) if draft is not None else None
    clock = time.perf_counter
    points = measure_steps(runner, SHAPES, MEASURE_S, settings.max_running, clock)
    draft_points = (
        measure_steps(model.runner, DRAFT_SHAPES, MEASURE_S / 4, settings.max_running, clock) if model is not None else ()
    )
    log.info(
        "cost of a step, in ms",
        target={f"{p.num_sequences}x{p.num_rows}": round(1000 * p.seconds, 2) for p in points},
        draft={f"{p.num_rows}": round(1000 * p.seconds, 2) for p in draft_points},
    )
    controller = Controller(StepCosts(points, draft_points))
    is_auto = settings.speculate == "auto"
    sources = Sources(lookup=is_auto or settings.speculate == "lookup", predicted=is_auto or settings.speculate == "predicted")
    return BatchSpeculator(controller, clock, sources, Modelled(model, controller) if model is not None else None)


def _load(draft: DraftPlan, options: LoadOptions, settings: WorkerSettings) -> DraftModel:
    config = draft.model.config
    runs_compiled = settings.kernels == "auto" and is_compiled(config, draft.layout.dtype, options.device)
    held = options.dtype if runs_compiled else TORCH_DTYPES[draft.layout.dtype]  # torch would compute in what is held
    weights = load_weights(draft.model, replace(options, dtype=held))
    rope = rope_table(config.rope, config.head_dim, draft.max_context, options.device)
    body = build(config, weights, rope, draft.layout.dtype, may_compile=settings.kernels == "auto")
    pool = KvPool(draft.layout, draft.num_blocks, options.device)
    runner = make_runner(body, pool, settings.max_running, draft.max_context, lambda done, total: None)
    log.info("draft model loaded", model=draft.model.path.name, bytes=draft.weight_bytes, pool_bytes=draft.pool_bytes)
    return DraftModel(runner, BlockPool(draft.num_blocks, caches_prefixes=False), draft.max_context, settings.max_running)


def _digest(model: ModelDir) -> bytes:
    """Of the tokenizer alone: chat templates may differ."""
    return sha256(model.tokenizer_path.read_bytes()).digest()
