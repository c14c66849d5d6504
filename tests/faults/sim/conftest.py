"""Once is enough here: how payloads go is drawn where it matters."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def in_place() -> bool:
    """In the place of the one that has every fault met twice."""
    return True
