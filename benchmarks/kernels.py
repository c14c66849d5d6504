"""Every Triton kernel compiled ahead of time, without a GPU: `python -m benchmarks.kernels [--target sm_90] [--only NAME]`.

For each configuration: registers, bytes spilled, shared memory, and whether products use tensor cores. Exit code 1 when one for sm_90
or sm_80 spills, does not fit, or multiplies without them. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

SHIPPED = ("sm_90", "sm_80")
TARGETS = (*SHIPPED, "gfx942")
SHARED_BYTES = {"sm_90": 227 << 10, "sm_80": 163 << 10, "gfx942": 64 << 10}
FORMATS = ("bf16", "int8", "e4m3")
ELEMENTS = {"bf16": "*bf16", "int8": "*i8", "e4m3": "*u8"}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel as something calls it: types of its arguments in order, and what it knows when it is compiled."""

    name: str
    module: str
    function: str
    types: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)
    has_products: bool = False


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of it; `error` when nothing did."""

    launch: Launch
    target: str
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    uses_tensor_cores: bool = False
    error: str = ""

    @property
    def is_good(self) -> bool:
        fits = not self.spilled_bytes and self.shared_bytes <= SHARED_BYTES[self.target]
        return not self.error and fits and self.uses_tensor_cores >= self.launch.has_products


def attention_types(element: str, *more: str) -> dict[str, str]:
    types = dict(q_rows="*bf16", q_stride="i32", out="*bf16", elements=element, scales="*fp16")
    types |= dict.fromkeys(("begins", "ends", "contexts", "lanes", "tables"), "*i32")
    types |= dict(table_stride="i32", ends_of="*i32", capacity="i32") | dict.fromkeys(more, "*fp32")
    types |= dict(factor="fp32", window="i32")
    return types | dict.fromkeys(("block_stride", "side_stride", "scale_block_stride", "scale_side_stride"), "i64")


def launches(target: str) -> Iterator[Launch]:
    kernels = "splitfire.engine.kernels.gpu."
    yield Launch(
        "cut", kernels + "spans", "_cut",
        dict(begins="*i32", ends="*i32", contexts="*i32", tile_ends="*i32", unit_ends="*i32", capacity="i32", tile_tokens="i32",
             num_kv_heads="i32", window="i32"),
        dict(UNIT=64, PLACES=256),
    )  # fmt: skip
    for number, name in enumerate(FORMATS):
        for dim in (64, 128):
            common = dict(FORMAT=number, GROUP=4, BLOCK_SIZE=32, UNIT=64, DIM=dim, WIDTH=dim)
            is_quantised, is_wide = name != "bf16", dim > 64  # attend_decode.num_warps, attend_prefill.prefill_rows
            for rows in (16, 64):
                types = attention_types(ELEMENTS[name], "partial_mixed", "partial_states") | dict(num_kv_heads="i32")
                types = {{"ends_of": "unit_ends"}.get(key, key): value for key, value in types.items()}
                yield Launch(
                    f"attend_decode {name} D{dim} rows {rows}", kernels + "attend_decode", "_attend", types,
                    common | dict(ROWS=rows, HAS_WINDOW=False), dict(num_warps=8 if rows >= 64 or (is_quantised and is_wide) else 4),
                    has_products=True,
                )  # fmt: skip
            types = {{"ends_of": "tile_ends"}.get(key, key): value for key, value in attention_types(ELEMENTS[name]).items()}
            yield Launch(
                f"attend_prefill {name} D{dim}", kernels + "attend_prefill", "_attend", types,
                common | dict(ROWS=64 if is_quantised or (is_wide and target != "sm_90") else 128, HAS_WINDOW=False),
                dict(num_warps=8, num_stages=3), has_products=True,
            )  # fmt: skip
        yield Launch(
            f"rope_norm_write {name}", kernels + "rope_norm_write", "_rope_norm_write",
            dict(qkv="*bf16", cos="*fp32", sin="*fp32", q_weight="*bf16", k_weight="*bf16", elements=ELEMENTS[name], scales="*fp16",
                 blocks="*i64", offsets="*i64", block_stride="i64", side_stride="i64", scale_block_stride="i64",
                 scale_side_stride="i64", num_heads="i32", num_kv_heads="i32", eps="fp32"),
            dict(HAS_NORM=True, FORMAT=number, BLOCK_SIZE=32, DIM=128, WIDTH=128, HEADS=8),
        )  # fmt: skip
    yield Launch(
        "attend_decode merge", kernels + "attend_decode", "_merge",
        dict(out="*bf16", begins="*i32", ends="*i32", contexts="*i32", unit_ends="*i32", capacity="i32", partial_mixed="*fp32",
             partial_states="*fp32", window="i32", num_kv_heads="i32"),
        dict(FORMAT=0, GROUP=4, ROWS=64, UNIT=64, DIM=128, WIDTH=128),
    )  # fmt: skip
    yield Launch(
        "add_rms_norm", kernels + "norm", "_add_rms_norm",
        dict(hidden="*bf16", update="*bf16", weight="*bf16", out="*bf16", width="i32", eps="fp32"),
        dict(WIDTH=4096, HAS_UPDATE=True), dict(num_warps=8),
    )  # fmt: skip
    for rows in (16, 32):
        yield Launch(
            f"linear int8 rows {rows}", kernels + "linear", "_int8",
            dict(x="*bf16", elements="*i8", scales="*fp32", bias="*bf16", out="*bf16", num_rows="i32", num_columns="i32", num_inputs="i32"),
            dict(ROWS=rows, COLUMNS=32, INPUTS=256 if rows == 16 else 128, HAS_BIAS=False), dict(num_stages=5), has_products=True,
        )  # fmt: skip
    given = dict(logits="*fp32", adjusted="*fp32", masks="*i32", temperatures="*fp32", mask_rows="*i32", adjusted_rows="*i32",
                 vocab="i32", mask_stride="i32")  # fmt: skip
    known = dict(PARTS=64, PIECE=2048, HAS_MASKS=True, HAS_ADJUSTED=True)
    for function, more in (
        ("_look", dict(found="*fp32")),
        ("_best", dict(keys="*i64", best="*i64", limit="fp32")),
        ("_decide", dict(keys="*i64", top_ks="*i32", top_ps="*fp32", min_ps="*fp32", found="*fp32", best="*i64", tokens="*i64",
                         logprobs="*fp32", limit="fp32")),
    ):  # fmt: skip
        yield Launch(f"draw {function}", kernels + "sample", function, given | more, known, dict(num_warps=8))
    yield Launch("silu_mul", kernels + "norm", "_silu_mul", dict(gate_up="*bf16", out="*bf16", width="i32"), dict(PIECE=1024))


def compile_launch(launch: Launch, target: str) -> Compiled:
    kernel = getattr(importlib.import_module(launch.module), launch.function)
    signature = {name: launch.types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or "stride" in name
    }
    source = ASTSource(
        kernel, signature, {(kernel.arg_names.index(name),): value for name, value in launch.constants.items()}, aligned
    )
    number = int(target[3:]) if target.startswith("sm_") else target
    gpu = GPUTarget("cuda", number, 32) if isinstance(number, int) else GPUTarget("hip", target, 64)
    try:
        made: Any = triton.compile(source, target=gpu, options=launch.options)
    except Exception as exc:  # whatever a compiler can say
        return Compiled(launch, target, error=f"{type(exc).__name__}: {exc}".splitlines()[0])
    if isinstance(number, int):
        registers, spilled = _ptxas(made.asm["ptx"], number)
        return Compiled(
            launch, target, registers, spilled, made.metadata.shared, bool(re.search(r"wgmma|mma\.sync", made.asm["ptx"]))
        )
    code = made.asm["amdgcn"]
    registers, spilled = (
        int(found.group(1)) if (found := re.search(rf"\.{key}:\s+(\d+)", code)) else 0 for key in ("vgpr_count", "vgpr_spill_count")
    )
    return Compiled(launch, target, registers, 4 * spilled, made.metadata.shared, "v_mfma" in code)


def _ptxas(ptx: str, number: int) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that are spilled, as Triton's own call of ptxas has them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(number).path, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{number}{'a' if number >= 90 else ''}",
                   str(source), "-o", str(source.with_suffix(".o"))]  # fmt: skip
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", said))
    return max(int(n) for n in re.findall(r"Used (\d+) registers", said)), spilled


def report(compiled: list[Compiled]) -> Table:
    table = Table("kernel", "target", "registers", "spilled B", "shared KiB", "tensor cores", "")
    for one in compiled:
        cores = ("yes" if one.uses_tensor_cores else "NO") if one.launch.has_products else ""
        numbers = ("", "", "") if one.error else (str(one.registers), str(one.spilled_bytes), f"{one.shared_bytes / 1024:.1f}")
        table.add_row(one.launch.name, one.target, *numbers, cores, one.error or ("" if one.is_good else "NO"))
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="all when not given")
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--quick", action="store_true", help="of each kernel the first configuration")
    args = parser.parse_args(argv)
    jobs = []
    for target in args.target or TARGETS:
        wanted = [launch for launch in launches(target) if args.only in launch.name]
        if args.quick:
            wanted = list({(launch.module, launch.function): launch for launch in reversed(wanted)}.values())
        jobs += [(launch, target) for launch in wanted]
    with ProcessPoolExecutor() as pool:
        compiled = list(pool.map(compile_launch, *zip(*jobs, strict=True)))
    Console(width=160).print(report(compiled))
    return int(not all(one.is_good for one in compiled if one.target in SHIPPED))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
