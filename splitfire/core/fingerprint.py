"""Which model a worker runs. Workers exchange KV only when all of this is equal, and it enters every block hash."""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from hashlib import blake2b

from splitfire.core.errors import Mismatch

PROTOCOL_MAJOR = 1  # of fleet.proto and kv.proto; a change that old peers cannot read raises it
PROTOCOL_MINOR = 0


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests are 32 bytes each."""

    weights: bytes
    config: bytes
    tokenizer: bytes
    rope: bytes
    weight_format: str
    block_size: int
    protocol_major: int = PROTOCOL_MAJOR

    @property
    def digest(self) -> bytes:
        """32 bytes over every field; its first 8 stand in each payload header."""
        whole = blake2b(digest_size=32, person=b"splitfire-model")
        for part in (self.weights, self.config, self.tokenizer, self.rope, self.weight_format.encode()):
            whole.update(struct.pack("<I", len(part)))
            whole.update(part)
        whole.update(struct.pack("<II", self.block_size, self.protocol_major))
        return whole.digest()

    def require_equal(self, other: Fingerprint, mine: str, theirs: str) -> None:
        """Mismatch naming the first field that differs between `mine` and `theirs` (names of processes)."""
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there:
                shown = [v.hex()[:12] if isinstance(v, bytes) else str(v) for v in (here, there)]
                raise Mismatch(
                    f"{field.name} differs: {mine} has {shown[0]}, {theirs} has {shown[1]}; start both from the same model",
                    reason=f"fingerprint_{field.name}",
                )
