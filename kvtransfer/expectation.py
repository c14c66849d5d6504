"""What the decode side says of a transfer before it comes, and what it gives for it: the expectation, and the sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvtransfer.frames import DIGEST_SUM64
from splitfire.core.layout import KvLayout
from splitfire.v1 import kv_pb2


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the router said will come, and from whom."""

    transfer_id: bytes
    token: bytes
    incarnation: bytes  # of the sender
    num_tokens: int
    layout: KvLayout  # of the pool here; payloads arrive in its dtype
    fingerprint: bytes  # first 8 bytes
    rank: int = 0  # higher is granted first
    digest_algorithm: int = DIGEST_SUM64

    @property
    def num_blocks(self) -> int:
        return self.layout.blocks_for(self.num_tokens)


class Room(Enum):
    """What a sink says to an offer when it does not grant."""

    NOT_NOW = "not now"
    NEVER = "never"


class Sink(Protocol):
    """The owner of the pool the blocks go to. All calls on the io thread."""

    def reserve(self) -> int | Room:
        """Reserves blocks for the whole transfer; the first logical block that is needed (those before are here)."""

    def write(self, first_block: int, num_blocks: int, blocks: memoryview) -> list[int]:
        """Writes blocks where nobody can see them yet; the data part of each one's digest (kv.proto), of the bytes as they came."""

    def publish(self, first_block: int, num_blocks: int) -> None:
        """The digests of these blocks are right: they may be shared from now on."""

    def ready(self, first_tokens: Sequence[kv_pb2.FirstToken]) -> None:
        """Everything is here. The last call."""

    def revoked(self) -> None:
        """What was reserved is to be given back now; `reserve` may be called again."""

    def closed(self, reason: str, is_retryable: bool) -> None:
        """The transfer failed; what was reserved is to be given back. The last call."""
