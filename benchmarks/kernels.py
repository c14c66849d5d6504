"""Every Triton kernel compiled ahead of time, without a GPU: `python -m benchmarks.kernels [--target sm_90] [--only NAME]`.

For each configuration that ships: registers, bytes spilled, shared memory, and whether products use tensor cores and, on NVIDIA,
what they read is copied ahead of them (not copied so are loads that Triton could not put together into words of 4 bytes). Exit code 1
when one spills, does not fit, or multiplies without. What is compiled is what launches.py saw. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.launches import Launch, launches
from splitfire.engine.kernels.gpu.chips import Chip

SHARED_BYTES = {"sm_90": 227 << 10, "sm_80": 163 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of it; `error` when nothing did."""

    launch: Launch
    target: Chip
    registers: int = 0
    spilled_bytes: int = 0
    shared_bytes: int = 0
    uses_tensor_cores: bool = False
    copies_ahead: bool = False
    error: str = ""

    @property
    def is_good(self) -> bool:
        fits = not self.spilled_bytes and self.shared_bytes <= SHARED_BYTES[self.target]
        return not self.error and fits and (self.uses_tensor_cores and self.copies_ahead) >= self.launch.has_products


def compile_launch(launch: Launch, target: Chip) -> Compiled:
    kernel = getattr(importlib.import_module(launch.module), launch.function)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], object] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in launch.constants:
            constants[(i,)], signature[name] = launch.constants[name], "constexpr"
        else:
            signature[name] = specialised(launch.types[name], (i,), constants, hints)
    source = ASTSource(kernel, signature, constants, hints)
    number = int(target[3:]) if target != "gfx942" else 0
    gpu = GPUTarget("cuda", number, 32) if number else GPUTarget("hip", target, 64)
    try:
        made: Any = triton.compile(source, target=gpu, options=launch.options)
    except Exception as exc:  # whatever a compiler can say
        return Compiled(launch, target, error=f"{type(exc).__name__}: {exc}".splitlines()[0])
    if number:
        ptx = made.asm["ptx"]
        has_products = bool(re.search(r"wgmma|mma\.sync", ptx))
        return Compiled(launch, target, *_ptxas(ptx, number), made.metadata.shared, has_products, "cp.async" in ptx)
    code = made.asm["amdgcn"]
    registers, spilled = (
        int(found.group(1)) if (found := re.search(rf"\.{key}:\s+(\d+)", code)) else 0 for key in ("vgpr_count", "vgpr_spill_count")
    )
    return Compiled(launch, target, registers, 4 * spilled, made.metadata.shared, "v_mfma" in code, copies_ahead=True)


def specialised(
    kind: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], object], hints: dict[tuple[int, ...], Any]
) -> Any:
    """The type for Triton of the argument at `path`; adds what it is known to be."""
    if isinstance(kind, tuple):
        return type(kind)(*(specialised(part, (*path, i), constants, hints) for i, part in enumerate(kind)))
    if kind is None:
        constants[path] = None
        return "constexpr"
    name, _, is_multiple = kind.partition(":")
    if is_multiple or name[0] == "*":
        hints[path] = [["tt.divisibility", 16]]
    return name


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
    table = Table("kernel", "target", "registers", "spilled B", "shared KiB", "tensor cores", "ahead", "")
    for one in compiled:
        products = [
            ("yes" if has else "NO") if one.launch.has_products else "" for has in (one.uses_tensor_cores, one.copies_ahead)
        ]
        numbers = ("", "", "") if one.error else (str(one.registers), str(one.spilled_bytes), f"{one.shared_bytes / 1024:.1f}")
        table.add_row(one.launch.name, one.target, *numbers, *products, one.error or ("" if one.is_good else "NO"))
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--target", choices=get_args(Chip), action="append", help="all when not given")
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--quick", action="store_true", help="of each kernel the first configuration")
    args = parser.parse_args(argv)
    jobs = []
    for target in args.target or get_args(Chip):
        wanted = [launch for launch in launches(target) if args.only in launch.name]
        if args.quick:
            wanted = list({(launch.module, launch.function): launch for launch in reversed(wanted)}.values())
        jobs += [(launch, target) for launch in {repr(replace(launch, name="")): launch for launch in reversed(wanted)}.values()]
    with ProcessPoolExecutor() as pool:
        compiled = list(pool.map(compile_launch, *zip(*jobs, strict=True)))
    Console(width=160).print(report(compiled))
    return int(not all(one.is_good for one in compiled))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
