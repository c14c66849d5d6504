"""Weights from a model directory: safetensors only, every tensor checked by name, shape and finiteness before use.

Tensors are read one matrix at a time into memory of our own, so a file that changes afterwards changes nothing here, and a few rows of
a matrix at a time where its numbers are stored otherwise than they are to be held: beside the weights there is never more than
one wide tile (and one fused matrix of a layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitfire.core.errors import ModelError
from splitfire.core.model_config import ModelConfig
from splitfire.core.model_dir import ModelDir, TensorEntry
from splitfire.core.quant_config import Scheme
from splitfire.engine.formats.families import FAMILIES
from splitfire.engine.formats.held import Form, form_of, held_elements, hold, unsigned_middle
from splitfire.engine.formats.scales import QuantisedRows
from splitfire.engine.formats.stored import FLOATS, StoredMatrix
from splitfire.engine.kernels.linear import GroupedMatrix, Int8Matrix, Matrix, fuse_rows, quantise_rows, row_tiles
from splitfire.engine.kernels.rope import QkNorm
from splitfire.engine.models.transformer import LayerWeights, Weights
from splitfire.engine.tensors import EMBEDDING, FUSED, HEAD, NORM, CheckedTensors, check_tensors

Progress = Callable[[int, int], None]  # elements done, elements in all


class Cut(Protocol):
    """What is kept of what is read, by a module's name."""

    def matrix(self, name: str, whole: Matrix) -> Matrix: ...

    def bias(self, name: str, whole: Tensor) -> Tensor | None:
        """None: nothing of it."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How weights are to be held."""

    dtype: torch.dtype  # of computation
    device: torch.device
    allow_nonfinite: bool = False
    is_int8: bool = False  # matrices as Int8Matrix
    keeps_stored: bool = False  # quantised ones as GroupedMatrix, where not is_int8; the compiled step of a CPU cannot read them


def load_weights(model: ModelDir, options: LoadOptions, progress: Progress | None = None, cut: Cut | None = None) -> Weights:
    """Reads, checks and fuses all weights. ModelError when anything is not as config.json says. cut: while reading."""
    checked = check_tensors(model.config, model.tensors())
    with _Files() as files:
        loader = _Loader(files, options)
        for name, entry in checked.zeros.items():
            loader.require_zero(name, entry)
        matrices: dict[str, Matrix] = {}
        vectors: dict[str, Tensor] = {}
        for matrix in _with_progress(checked, progress):
            whole = loader.matrix(matrix)
            matrices[matrix.name] = whole if cut is None else cut.matrix(matrix.name, whole)
        for name, entry in checked.vectors.items():
            vector: Tensor | None = loader.plain(name, entry)
            if cut is not None and vector is not None and name.endswith(".bias"):
                vector = cut.bias(name.removesuffix(".bias"), vector)
            if vector is not None:
                vectors[name] = vector
    return _assemble(model.config, matrices, vectors)


def _with_progress(checked: CheckedTensors, progress: Progress | None) -> Iterator[StoredMatrix]:
    """Its matrices; vectors are too small to be told of."""
    total = sum(matrix.rows * matrix.columns for matrix in checked.matrices)
    done = 0
    for matrix in checked.matrices:
        yield matrix
        done += matrix.rows * matrix.columns
        if progress is not None:
            progress(done, total)


class _Files:
    """Opens each file once. Its tensors may be views of the file: nothing of them may outlive this."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str, entry: TensorEntry) -> Tensor:
        try:
            if entry.file not in self._open:
                self._open[entry.file] = self._stack.enter_context(safe_open(str(entry.file), framework="pt", device="cpu"))
            tensor: Tensor = self._open[entry.file].get_tensor(name)
        except (SafetensorError, OSError) as exc:
            raise ModelError(f"{entry.file.name}: {exc}") from exc
        return tensor


class _Loader:
    """From tensors as they are stored to tensors as they are held."""

    def __init__(self, files: _Files, options: LoadOptions) -> None:
        self._files = files
        self._options = options

    def plain(self, name: str, entry: TensorEntry) -> Tensor:
        """A tensor of floats, in the dtype of computation."""
        tensor = self._files.read(name, entry).to(self._options.dtype, copy=True)
        self._require_finite(tensor, name, entry)
        return tensor.to(self._options.device)

    def matrix(self, matrix: StoredMatrix) -> Matrix:
        if matrix.scheme is None:
            name, entry = f"{matrix.name}.weight", matrix.parts["weight"]
            if not self._options.is_int8:
                return self.plain(name, entry)
            weight = self._files.read(name, entry)
            return self._int8(matrix, lambda begin, end: weight[begin:end].float())
        rows = self._open(matrix, matrix.scheme)
        if not self._options.is_int8:
            form = form_of(matrix) if self._options.keeps_stored else None
            grouped = None if form is None else self._grouped(matrix, rows, form)
            return self._dequantised(matrix, rows) if grouped is None else grouped
        as_int8 = rows.as_int8()
        if as_int8 is None:
            return self._int8(matrix, rows.dequantise)
        return Int8Matrix(as_int8.elements.to(self._options.device), as_int8.scales.to(self._options.device))

    def require_zero(self, name: str, entry: TensorEntry) -> None:
        if bool(self._files.read(name, entry).any()):
            raise ModelError(f"{entry.file.name}: tensor {name} is not zero, and by config.json the model has no such bias")

    def _open(self, matrix: StoredMatrix, scheme: Scheme) -> QuantisedRows:
        tensors = {}
        for part, entry in matrix.parts.items():
            tensors[part] = self._files.read(f"{matrix.name}.{part}", entry)
            if entry.dtype in FLOATS:
                self._require_finite(tensors[part], f"{matrix.name}.{part}", entry)
        return FAMILIES[scheme.layout].open_rows(matrix, scheme, tensors)

    def _dequantised(self, matrix: StoredMatrix, rows: QuantisedRows) -> Tensor:
        held = torch.empty(rows.shape, dtype=self._options.dtype, device=self._options.device)
        for begin, end in row_tiles(rows.shape):
            tile = rows.dequantise(begin, end).to(self._options.dtype)
            self._require_finite_rows(tile, matrix)
            held[begin:end] = tile
        return held

    def _grouped(self, matrix: StoredMatrix, rows: QuantisedRows, form: Form) -> GroupedMatrix | None:
        """None when it cannot be: then its numbers can."""
        held = hold(form, matrix, rows.scales, self._options.device)
        if held is None:
            return None
        for begin, end in row_tiles(rows.shape):
            tile = rows.elements(begin, end)
            numbers = rows.scales.apply(tile.float(), begin).to(self._options.dtype)
            self._require_finite_rows(numbers, matrix)
            if not bool(torch.isfinite(numbers).all()):
                return None
            held.elements[begin:end] = held_elements(tile, held, unsigned_middle(matrix))
        return held

    def _int8(self, matrix: StoredMatrix, rows: Callable[[int, int], Tensor]) -> Int8Matrix:
        device = self._options.device
        elements = torch.empty(matrix.rows, matrix.columns, dtype=torch.int8, device=device)
        scales = torch.empty(matrix.rows, dtype=torch.float32, device=device)
        for begin, end in row_tiles(elements.shape):
            tile = rows(begin, end)
            self._require_finite_rows(tile, matrix)
            quantised = quantise_rows(tile)
            elements[begin:end], scales[begin:end] = quantised.elements, quantised.scales
        return Int8Matrix(elements, scales)

    def _require_finite_rows(self, rows: Tensor, matrix: StoredMatrix) -> None:
        part, entry = next(iter(matrix.parts.items()))
        self._require_finite(rows, f"{matrix.name}.{part}", entry)

    def _require_finite(self, tensor: Tensor, name: str, entry: TensorEntry) -> None:
        if not self._options.allow_nonfinite and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{entry.file.name}: tensor {name} has NaN or infinite values; --allow-nonfinite loads it anyway")


def _assemble(config: ModelConfig, matrices: dict[str, Matrix], vectors: dict[str, Tensor]) -> Weights:
    embed = matrices[EMBEDDING]
    layers = tuple(_layer(config, matrices, vectors, f"model.layers.{i}.") for i in range(config.num_layers))
    lm_head = embed if config.tie_word_embeddings else matrices[HEAD]
    return Weights(embed, layers, vectors[NORM], lm_head)


def _layer(config: ModelConfig, matrices: dict[str, Matrix], vectors: dict[str, Tensor], at: str) -> LayerWeights:
    """Pops its matrices, so that fused copies do not double the memory."""

    def fused(*names: str) -> Matrix:
        return fuse_rows([matrices.pop(f"{at}{name}") for name in names], vectors[NORM].dtype)

    def bias(*names: str) -> Tensor | None:
        parts = [vectors[f"{at}{name}.bias"] for name in names if f"{at}{name}.bias" in vectors]
        return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)

    qkv, gate_up = FUSED
    norm = None
    if config.qk_norm:
        q_norm, k_norm = vectors[f"{at}self_attn.q_norm.weight"], vectors[f"{at}self_attn.k_norm.weight"]
        norm = QkNorm(q_norm, k_norm, config.rms_norm_eps)
    return LayerWeights(
        input_norm=vectors[f"{at}input_layernorm.weight"],
        qkv=fused(*qkv),
        qkv_bias=bias(*qkv),
        qk_norm=norm,
        out=fused("self_attn.o_proj"),
        out_bias=bias("self_attn.o_proj"),
        post_norm=vectors[f"{at}post_attention_layernorm.weight"],
        gate_up=fused(*gate_up),
        gate_up_bias=bias(*gate_up),
        down=fused("mlp.down_proj"),
        down_bias=bias("mlp.down_proj"),
    )
