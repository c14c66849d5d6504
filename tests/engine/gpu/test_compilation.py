"""Each kernel compiled ahead for a GPU that is not here: it fits, spills nothing, and multiplies by tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.long)])
def test_the_first_configuration_of_each_kernel_fits_the_chip(target: str) -> None:
    """All of them, and gfx942: `make kernels-report`. In a process that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--target", target, "--quick"]
    done = subprocess.run(command, env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = (
        "attend_prefill.attend",
        "attend_decode.attend",
        "attend_decode.merge",
        "rope_norm_write",
        "sample.decide",
        "linear.linear",
    )
    assert all(kernel in done.stdout for kernel in kernels)
