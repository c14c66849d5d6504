"""One matrix of a checkpoint as its headers describe it: which tensors it has, and whether they fit a scheme.

A matrix is plain when the file holds its `weight` in a float dtype; otherwise it must fit a scheme of the quantization_config, tensor by
tensor. Bits, groups and zero points show in the tensors, so schemes that a matrix fits nearly always mean the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitfire.core.errors import ModelError
from splitfire.core.model_dir import TensorEntry
from splitfire.core.quant_config import Grid, Scheme

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a matrix: the shapes and safetensors dtypes it may have."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    is_required: bool = True


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """`parts` are the tensors of the file, by the last word of their names; they have been checked."""

    name: str  # without `.weight`
    rows: int
    columns: int
    scheme: Scheme | None  # None: plain
    parts: Mapping[str, TensorEntry]

    def fail(self, part: str, message: str) -> ModelError:
        return ModelError(f"{self.parts[part].file.name}: tensor {self.name}.{part} {message}")


def plain_part(rows: int, columns: int) -> dict[str, Part]:
    return {"weight": Part(((rows, columns),), FLOATS)}


def scale_part(grid: Grid, rows: int, columns: int, dtypes: tuple[str, ...] = FLOATS, is_required: bool = True) -> Part:
    """Scales, or zero points beside them, [out, in] way round; without their dimensions of one too."""
    down, across = grid.shape(rows, columns)
    shapes: list[tuple[int, ...]] = [(down, across)]
    if across == 1:
        shapes.append((down,))
    if down == across == 1:
        shapes.append(())
    return Part(tuple(shapes), dtypes, is_required)


def require_part(name: str, part: Part, entry: TensorEntry | None, asked_by: str) -> None:
    """ModelError when the tensor `name` is missing, of another shape, or of a dtype that cannot be read."""
    if entry is None:
        if part.is_required:
            raise ModelError(f"tensor {name} is missing; {asked_by} asks for it")
        return
    if entry.dtype not in part.dtypes:
        raise ModelError(f"{entry.file.name}: tensor {name} is {entry.dtype}, accepted: {', '.join(part.dtypes)}")
    if entry.shape not in part.shapes:
        asked = " or ".join(str(list(shape)) for shape in part.shapes)
        raise ModelError(f"{entry.file.name}: tensor {name} has shape {list(entry.shape)}, {asked_by} asks for {asked}")


def meaning_on(scheme: Scheme, rows: int, columns: int) -> tuple[str, int, Grid]:
    """Equal for schemes by which the same tensors of a matrix [rows, columns] stand for the same numbers."""
    grid = Grid(min(scheme.grid.rows or rows, rows), min(scheme.grid.columns or columns, columns))
    return scheme.layout, scheme.bits if scheme.layout == "packed" else 0, grid


def require_groups(name: str, scheme: Scheme, columns: int) -> None:
    """Groups are whole; only blocks may be cut short at the end of a matrix."""
    size = scheme.grid.columns
    if scheme.grid.rows == 1 and size is not None and columns % size:
        raise ModelError(f"tensor {name}: the quantization_config's group size {size} does not divide its {columns} columns")
