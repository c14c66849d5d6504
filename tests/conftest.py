"""Triton kernels run in Triton's interpreter here, on the CPU: it has to know before anybody imports triton. `make test-gpu` says no."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
