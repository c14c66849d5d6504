"""What a process shows of itself on a connection: words that both ends share. Certificates are read in tls.py, shown by whoever has a port.

A certificate of a fleet says what its holder is by a URI among its names, which the router reads off the connection. A worker
cannot read one of the other end; it asks for the host name ROUTER_NAME instead, which only routers' certificates have,
whatever address they are dialled at.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

ROUTER_NAME = "router.splitfire"


class FleetRole(StrEnum):
    """What the holder of a certificate is, as the URI in it."""

    ROUTER = "splitfire://router"
    WORKER = "splitfire://worker"


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM: a certificate with those between it and its authority, its key, and where the other end's must come from (None: it needs none)."""

    certificates: bytes
    key: bytes = field(repr=False)
    authority: bytes | None = None
