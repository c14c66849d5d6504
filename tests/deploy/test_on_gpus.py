"""Replicas that share a list of GPUs out among themselves; with a `splitfire` that only says what it was given."""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import ROOT

SCRIPT = ROOT / "deploy" / "image" / "on-gpus.sh"


@pytest.fixture
def bin_directory(tmp_path: Path) -> Path:
    """Says it, and stays until it is told to go."""
    program = tmp_path / "splitfire"
    program.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $*"\nread _\n')
    program.chmod(0o755)
    return tmp_path


@pytest.fixture
def role() -> Iterator[str]:
    """A name of this test's own, for its locks."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    for path in Path("/dev/shm").glob(f"splitfire-{name}*"):
        path.unlink()


@contextmanager
def worker(directory: Path, gpus: str, role: str, size: str = "1") -> Iterator[str]:
    """What it said first."""
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "SPLITFIRE_TENSOR_PARALLEL": size}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [str(SCRIPT), gpus, role, "--flag"], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def test_each_takes_what_the_others_left(bin_directory: Path, role: str) -> None:
    with worker(bin_directory, "4,5", role) as first, worker(bin_directory, "4,5", role) as second:
        assert (first, second) == (f"4 {role} --flag", f"5 {role} --flag")
        with worker(bin_directory, "4,5", role) as third:
            assert third.startswith("splitfire: every 1 of the GPUs 4,5")
    with worker(bin_directory, "4,5", role) as again:
        assert again.startswith("4 "), "who was killed has nothing any more"


def test_ranks_of_one_worker_come_together(bin_directory: Path, role: str) -> None:
    with worker(bin_directory, "0,1,2,3,4", role, "2") as first, worker(bin_directory, "0,1,2,3,4", role, "2") as second:
        assert (first.split()[0], second.split()[0]) == ("0,1", "2,3")
        with worker(bin_directory, "0,1,2,3,4", role, "2") as third:
            assert third.startswith("splitfire: "), "one GPU is not two"


def test_roles_may_share_a_gpu(bin_directory: Path, role: str) -> None:
    with worker(bin_directory, "0", role) as prefill, worker(bin_directory, "0", role + "2") as decode:
        assert (prefill.split()[0], decode.split()[0]) == ("0", "0")


@pytest.mark.parametrize("gpus", ["GPU-1a,GPU-2b", "GPU-1a, GPU-2b"])
def test_gpus_may_have_other_names(gpus: str, bin_directory: Path, role: str) -> None:
    with worker(bin_directory, gpus, role) as first, worker(bin_directory, gpus, role) as second:
        assert (first.split()[0], second.split()[0]) == ("GPU-1a", "GPU-2b")
