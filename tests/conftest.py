"""Triton kernels run in Triton's interpreter here, on the CPU: it has to know before anybody imports triton. `make test-gpu` says no."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")

# An example may be kept waiting by the other tests that run on this machine; pytest's own time limit ends what hangs.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

collect_ignore = ["browser", "compose"]  # they want a browser and a Docker engine: make test-browser, make test-compose
