"""step.cpp through ctypes: a whole step of a dense transformer on a CPU with AVX-512, in a build of its own for those with bf16 units.

The structures are twins of those in step.cpp, matmul.h and attend.h; whoever fills one keeps alive what it points to.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import POINTER, Structure, c_bool, c_float, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from splitfire.core.layout import DTYPE_BYTES, KvLayout
from splitfire.core.sampling import SamplingParams
from splitfire.engine.kernels.native import load_library

VERSION = 3  # of what step.cpp and this file agree on
PANEL, LANES = 32, 16  # of matmul.h
MAX_HEAD_DIM, LEAST_BLOCK = 256, 8  # of attend.h
MAX_GROUP = 48  # query heads of one KV head: MAX_ROWS of attend.h
WEIGHTS = (torch.bfloat16, torch.float32, torch.int8)  # Weight of matmul.h
DOTS = {torch.bfloat16: 3, torch.int8: 4}  # also of Weight: with activations in bf16
NO_WINDOW = 1 << 62
_KV_FORMATS = {dtype: number for number, dtype in enumerate(DTYPE_BYTES)}


class Matrix(Structure):
    """[columns, inputs] in panels."""

    _fields_ = (
        *((name, c_void_p) for name in ("panels", "scales", "bias")),
        *((name, c_int64) for name in ("columns", "inputs", "format")),
    )


class Layer(Structure):
    """One layer's weights."""

    _fields_ = (
        ("input_norm", c_void_p), ("qkv", Matrix), ("q_norm", c_void_p), ("k_norm", c_void_p), ("out", Matrix),
        ("post_norm", c_void_p), ("gate_up", Matrix), ("down", Matrix), ("window", c_int64),
    )  # fmt: skip


class Model(Structure):
    """All of a model."""

    _fields_ = (
        *((name, c_int64) for name in ("num_layers", "hidden", "num_heads", "intermediate")),
        ("eps", c_float), ("attention_factor", c_float), ("layers", POINTER(Layer)), ("inverse_frequencies", c_void_p),
        ("final_norm", c_void_p), ("head", Matrix), ("embed", c_void_p), ("embed_scales", c_void_p),
        ("rounds", c_int64),
    )  # fmt: skip


class Pool(Structure):
    """Where KV lies."""

    _fields_ = (
        ("raw", c_void_p),
        *((name, c_int64) for name in ("block_bytes", "block_size", "kv_heads", "head_dim", "scale_offset", "format")),
    )


class Step(Structure):
    """What is to be computed, and where the results go."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_spans", "num_rows")),
        *((name, c_void_p) for name in ("token_ids", "positions", "begins", "contexts", "lanes", "tables")),
        ("table_stride", c_int64),
        *((name, c_void_p) for name in ("rows", "logits", "best")),
    )


class Draw(Structure):
    """draw.h's."""

    _fields_ = (
        ("logits", c_void_p), ("vocab", c_int64), ("temperature", c_float), ("top_k", c_int64), ("top_p", c_float), ("min_p", c_float),
        ("key", c_uint64),
    )  # fmt: skip


def _load() -> ctypes.CDLL | None:
    """Of the two builds the one for processors with bf16 units, where they are."""
    for name in ("_step_bf16", "_step"):
        library = load_library(name, VERSION)
        if library is None:
            continue
        library.splitfire_runs_here.restype = library.splitfire_has_bf16_units.restype = c_bool
        library.splitfire_engine.argtypes, library.splitfire_engine.restype = (c_int64,), c_void_p
        library.splitfire_end.argtypes, library.splitfire_end.restype = (c_void_p,), None
        library.splitfire_step.argtypes = (c_void_p, POINTER(Model), POINTER(Pool), POINTER(Step))
        library.splitfire_multiply.argtypes = (c_void_p, POINTER(Matrix), c_void_p, c_int64, c_void_p)
        library.splitfire_step.restype = library.splitfire_multiply.restype = None
        library.splitfire_draw.argtypes, library.splitfire_draw.restype = (POINTER(Draw),), c_int64
        if library.splitfire_runs_here():
            return library
    return None


_library = _load()


def is_available() -> bool:
    """Whether the library was built, for this version of the code, and this processor can run it."""
    return _library is not None


def has_bf16_units() -> bool:
    """Whether products and attention can be computed in bf16."""
    return _library is not None and bool(_library.splitfire_has_bf16_units())


def draw(logits: Tensor, params: SamplingParams, key: int) -> int:
    """kernels/sample.py's `draw_row`."""
    assert _library is not None
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    min_p = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
    row = Draw(logits.data_ptr(), logits.numel(), params.temperature, params.top_k, params.top_p, min_p, key)
    token = int(_library.splitfire_draw(row))
    if token < 0:
        raise ValueError("no token may be drawn")
    return token


class StepEngine:
    """A team of threads and its memory. One step at a time; other Python threads run meanwhile."""

    def __init__(self, num_threads: int) -> None:
        assert _library is not None
        self._end = _library.splitfire_end
        self._engine = c_void_p(_library.splitfire_engine(num_threads))

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._end(self._engine)

    def run(self, model: Model, pool: Pool, step: Step) -> None:
        """step.cpp's splitfire_step."""
        assert _library is not None
        _library.splitfire_step(self._engine, model, pool, step)

    def multiply(self, matrix: Matrix, x: Tensor) -> Tensor:
        """x [rows, inputs] fp32, or bf16 for DOTS, times the matrix -> [rows, columns] fp32. For tests."""
        assert _library is not None
        assert x.is_contiguous() and x.shape[1] == matrix.inputs
        assert x.dtype == (torch.bfloat16 if matrix.format in DOTS.values() else torch.float32)
        out = torch.full((x.shape[0], matrix.columns), torch.nan)
        _library.splitfire_multiply(self._engine, matrix, x.data_ptr(), x.shape[0], out.data_ptr())
        return out


def pack_panels(weight: Tensor) -> Tensor:
    """weight [columns, inputs] -> the bytes of its panels, as matmul.h reads them. Columns are filled up with zeros."""
    columns, inputs = weight.shape
    panels = -(-columns // PANEL)
    if columns % PANEL:
        weight = torch.cat((weight, weight.new_zeros(panels * PANEL - columns, inputs)))
    if weight.dtype == torch.bfloat16:  # two inputs of a column side by side
        return weight.view(panels, 2, LANES, inputs // 2, 2).permute(0, 3, 1, 2, 4).contiguous().view(-1)
    return weight.view(panels, PANEL, inputs).permute(0, 2, 1).contiguous().view(-1)


def interleave_panels(weight: Tensor, num_parts: int) -> Tensor:
    """weight [columns, inputs], `num_parts` parts of equal height one below the other -> their panels in turn, each part filled up to whole
    panels."""
    if num_parts == 1:
        return weight
    parts = weight.chunk(num_parts)
    missing = -len(parts[0]) % PANEL
    whole = [torch.cat((p, p.new_zeros(missing, p.shape[1]))) if missing else p for p in parts]
    return torch.stack([p.view(-1, PANEL, p.shape[1]) for p in whole], 1).view(-1, weight.shape[1])


def pool_of(raw: Tensor, layout: KvLayout) -> Pool:
    """The structure of a KV pool's bytes."""
    assert layout.block_size % LEAST_BLOCK == 0
    return Pool(
        raw.data_ptr(), layout.block_bytes, layout.block_size, layout.num_kv_heads, layout.head_dim, layout.scale_offset,
        _KV_FORMATS[layout.dtype],
    )  # fmt: skip
