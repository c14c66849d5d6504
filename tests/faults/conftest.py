"""Every fault is met twice: payloads written into the receiver's slots, as on one host, and payloads sent."""

from __future__ import annotations

import pytest

from tests.faults import sims


@pytest.fixture(params=[True, False], ids=["in place", "sent"], autouse=True)
def in_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(sims, "IN_PLACE", request.param)
    return bool(request.param)
