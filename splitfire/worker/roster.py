"""Which peers there are, by the word of every router this worker is attached to. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable

VOUCH_S = 15.0  # how long a peer is believed in when every router that knew it is out of reach


class Roster:
    """A peer is gone when the last router that knew it says so, or when nobody has vouched for it for VOUCH_S: a router
    that restarts, or one of several that loses a stream, must not cost transfers of others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._vouchers: dict[bytes, set[Hashable]] = {}
        self._alone_since: dict[bytes, float] = {}

    def up(self, router: Hashable, incarnation: bytes) -> None:
        self._vouchers.setdefault(incarnation, set()).add(router)
        self._alone_since.pop(incarnation, None)

    def gone(self, router: Hashable, incarnation: bytes) -> bool:
        """A router lost sight of the peer; True when nobody knows it any more."""
        vouchers = self._vouchers.get(incarnation, set())
        vouchers.discard(router)
        if vouchers:
            return False
        self._forget(incarnation)
        return True

    def router_lost(self, router: Hashable) -> None:
        for incarnation, vouchers in self._vouchers.items():
            if router in vouchers:
                vouchers.discard(router)
                if not vouchers:
                    self._alone_since[incarnation] = self._clock()

    def expired(self) -> list[bytes]:
        """Peers nobody has vouched for, for too long; told once."""
        now = self._clock()
        old = [incarnation for incarnation, since in self._alone_since.items() if now - since > VOUCH_S]
        for incarnation in old:
            self._forget(incarnation)
        return old

    def _forget(self, incarnation: bytes) -> None:
        self._vouchers.pop(incarnation, None)
        self._alone_since.pop(incarnation, None)
