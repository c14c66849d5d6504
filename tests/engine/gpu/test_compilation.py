"""Each kernel compiled ahead for a GPU that is not here: it fits, spills nothing, and multiplies by tensor cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(300)
def test_the_first_configuration_of_each_kernel_fits_an_h100() -> None:
    """All of them: `make kernels-report`. In a process that does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", "--target", "sm_90", "--quick"]
    done = subprocess.run(command, env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attend_prefill" in done.stdout and "draw _decide" in done.stdout
