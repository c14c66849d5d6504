"""`quantization_config` of a config.json as a frozen object: FP8, INT8 and INT4 checkpoints, and how their matrices are stored.

It says which ways of storing a matrix a checkpoint uses; which of its matrices are stored so, and which plainly, its tensors say
(engine/formats/). So nothing here matches module names: `ignore`, `targets`, `modules_to_not_convert` and `dynamic` are not read, and no
regular expression of a file is ever run. How activations and the KV cache were to be quantised is not read either: activations stay
in the dtype of computation, KV in the pool's. Whatever else cannot be computed exactly is refused by name. Pure: no tensors, no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from splitfire.core import limits
from splitfire.core.json_fields import JsonFields

Layout = Literal["fp8", "int8", "packed", "awq", "gptq"]
FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized", "mixed-precision", "dense")
PACKED_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which elements of a matrix [out, in] share a scale: blocks of so many rows and columns. None: as many as there are."""

    rows: int | None
    columns: int | None

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the scales of a matrix [rows, columns]; blocks at its end may be cut short."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.columns or columns))


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way of storing a matrix. `layout` names the file of engine/formats/ that reads it."""

    layout: Layout
    bits: int  # an element
    grid: Grid
    has_zeros: bool = False  # asymmetric: a zero point beside each scale
    scale_name: str = "weight_scale"
    zero_offset: int = 0  # what a stored zero point lacks
    is_reordered: bool = False  # columns find their scale through an index, which must be there


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """No scheme: every matrix is stored plainly after all."""

    method: str
    schemes: tuple[Scheme, ...]


def parse_quant_config(config: JsonFields) -> QuantConfig | None:
    """Of a whole config.json; None when it has no quantization_config. ModelError naming what cannot be read (B104)."""
    read = config.inside("quantization_config")
    if read is None:
        return None
    method = read.one_of("quant_method", tuple(_METHODS))
    return QuantConfig(method, _METHODS[method](read))


def _fp8(read: JsonFields) -> tuple[Scheme, ...]:
    """Qwen's and DeepSeek's blocks, and a scale for each matrix or row. The two names of a scale mean the same: a factor."""
    read.one_of("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    grids = [Grid(None, None), Grid(1, None)]
    if read.values.get("weight_block_size") is not None:
        grids = [_block(read, "weight_block_size")]
    return tuple(Scheme("fp8", 8, grid, scale_name=name) for grid in grids for name in ("weight_scale_inv", "weight_scale"))


def _fbgemm_fp8(read: JsonFields) -> tuple[Scheme, ...]:
    return (Scheme("fp8", 8, Grid(1, None)),)


def _awq(read: JsonFields) -> tuple[Scheme, ...]:
    version = next((name for name in ("version", "checkpoint_format", "format") if read.values.get(name) is not None), None)
    if version is not None and str(read.values[version]).lower() != "gemm":
        raise read.fail(version, f"is {read.values[version]!r}, accepted: gemm")
    bits = read.one_of("bits" if "bits" in read.values else "w_bit", (4,))
    if not read.boolean("zero_point", True):
        raise read.fail("zero_point", "is False, accepted: true")
    grid = _group(read, "group_size" if "group_size" in read.values else "q_group_size")
    return (Scheme("awq", bits, grid, has_zeros=True, scale_name="scales"),)


def _gptq(read: JsonFields) -> tuple[Scheme, ...]:
    """Version 1 stores every zero point less one."""
    version = read.one_of("checkpoint_format" if "checkpoint_format" in read.values else "format", ("gptq", "gptq_v2"), "gptq")
    if read.boolean("is_marlin_format", False):
        raise read.fail("is_marlin_format", "is True, accepted: false")
    bits = read.one_of("bits", PACKED_BITS)
    return (
        Scheme(
            "gptq",
            bits,
            _group(read, "group_size"),
            has_zeros=True,
            scale_name="scales",
            zero_offset=1 if version == "gptq" else 0,
            is_reordered=read.boolean("desc_act", False),
        ),
    )


def _compressed_tensors(read: JsonFields) -> tuple[Scheme, ...]:
    whole = read.one_of("format", FORMATS)
    sparsity = read.inside("sparsity_config")
    if sparsity is not None and sparsity.values:
        sparsity.one_of("format", ("dense",))
    transform = read.inside("transform_config")
    if transform is not None and transform.values.get("config_groups"):
        raise read.fail(
            "transform_config", "transforms of weights and activations are not supported by this version, accepted: null"
        )
    groups = read.inside("config_groups")
    if groups is None or len(groups.values) > limits.MAX_QUANT_GROUPS:
        raise read.fail("config_groups", f"accepted: an object of at most {limits.MAX_QUANT_GROUPS} groups")
    schemes = []
    for name in groups.values:
        group = groups.inside(name)
        weights = None if group is None else group.inside("weights")
        if group is None or weights is None:
            continue  # what it quantises are activations
        stored = group.one_of("format", FORMATS, default=whole)
        if stored == "mixed-precision":
            raise group.fail("format", "accepted in a group: " + ", ".join(f for f in FORMATS if f != stored))
        if stored != "dense":
            schemes.append(_compressed(weights, stored))
    return tuple(dict.fromkeys(schemes))


def _compressed(weights: JsonFields, stored: str) -> Scheme:
    """The `weights` of one group, stored in the format of this name."""
    kinds = {"float-quantized": ("float",), "naive-quantized": ("float", "int")}.get(stored, ("int",))
    kind = weights.one_of("type", kinds)
    if weights.boolean("dynamic", False):
        raise weights.fail("dynamic", "is True, accepted for weights: false")
    is_symmetric = weights.boolean("symmetric", True)
    if kind == "float":
        if not is_symmetric:
            raise weights.fail("symmetric", "is False, accepted for type float: true")
        return Scheme("fp8", weights.one_of("num_bits", (8,)), _strategy(weights))
    grid = _strategy(weights)
    is_packed = stored == "pack-quantized"
    if is_packed and not is_symmetric and grid.rows != 1:
        raise weights.fail("strategy", "accepted for asymmetric packed weights: group, channel")
    return Scheme(
        "packed" if is_packed else "int8",
        weights.one_of("num_bits", PACKED_BITS),
        grid,
        has_zeros=not is_symmetric,
        is_reordered=is_packed and weights.values.get("actorder") in ("group", "dynamic", True),
    )


def _strategy(weights: JsonFields) -> Grid:
    """compressed-tensors' own rule where it is not said: a group size makes it group, -1 channel, nothing tensor."""
    size = weights.values.get("group_size")
    default = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), default=default)
    if strategy == "block":
        return _block(weights, "block_structure")
    if strategy == "group":
        return Grid(1, weights.integer("group_size", 1, 8 * limits.MAX_HIDDEN_SIZE))
    return Grid(1 if strategy == "channel" else None, None)


def _group(read: JsonFields, field: str) -> Grid:
    """-1: one group for the whole row."""
    size = read.values.get(field)
    return Grid(1, None if size == -1 else read.integer(field, 1, 8 * limits.MAX_HIDDEN_SIZE))


def _block(read: JsonFields, field: str) -> Grid:
    sides = read.values.get(field)
    largest = 8 * limits.MAX_HIDDEN_SIZE
    if isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and 1 <= side <= largest for side in sides):
        return Grid(sides[0], sides[1])
    raise read.fail(field, f"is {sides!r}, accepted: two integers from 1 to {largest}, such as [128, 128]")


_METHODS: dict[str, Callable[[JsonFields], tuple[Scheme, ...]]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "awq": _awq,
    "gptq": _gptq,
}
