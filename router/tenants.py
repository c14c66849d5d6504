"""Who asks: a tenant, what it may have, and whose the API keys are. Pure.

A request's tenant comes from its key alone; nothing a client writes into a request or its metadata can name one.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date

from splitfire.core.errors import Unauthenticated
from splitfire.core.limits import MAX_API_KEY_CHARS
from splitfire.v1 import inference_pb2 as pb

KEY_ID = 12  # hexadecimal digits
SALT_CONTEXT = b"splitfire-cache-salt:"


@dataclass(frozen=True, slots=True)
class Tenant:
    """What one tenant may have. None: no bound but everybody's. Two with different salts never share a cached block."""

    name: str
    priority: int = pb.PRIORITY_STANDARD  # the highest that its requests get
    weight: float = 1.0  # its share beside others
    max_running: int | None = None  # choices
    max_queued: int | None = None  # requests beyond those that run
    tokens_per_minute: int | None = None  # prompt and output
    allow_special: bool = False  # special tokens written out in `text` count as such
    is_admin: bool = False
    key_id: str = ""  # of the key it came with: the beginning of its hash
    cache_salt: bytes = field(default=b"", repr=False)


DEFAULT = Tenant("default", pb.PRIORITY_INTERACTIVE)  # everybody, where there are no keys
OPERATOR = Tenant("operator", pb.PRIORITY_INTERACTIVE, is_admin=True)  # who has the fleet's token
RESERVED = (DEFAULT.name, OPERATOR.name)


@dataclass(frozen=True, slots=True)
class Credential:
    """The hash of a key, whose it is, and the last day it is good for (UTC)."""

    digest: bytes
    tenant: Tenant
    expires: date | None = None


class KeyRing:
    """Every credential, found by its hash, so that how long a look-up takes says nothing about any key."""

    def __init__(self, credentials: Sequence[Credential]) -> None:
        self._credentials = {c.digest: replace(c, tenant=replace(c.tenant, key_id=c.digest.hex()[:KEY_ID])) for c in credentials}

    def find(self, key: str, today: date) -> Tenant:
        """Unauthenticated when the key is nobody's, or too old."""
        digest = digest_of(key[: MAX_API_KEY_CHARS + 1])
        credential = self._credentials.get(digest)
        if credential is None or not hmac.compare_digest(credential.digest, digest):
            raise Unauthenticated("the API key is not known here", reason="unknown_api_key")
        if credential.expires is not None and today > credential.expires:
            raise Unauthenticated(f"the API key expired on {credential.expires}; ask for another", reason="expired_api_key")
        return credential.tenant

    def named(self, name: str, today: date) -> Tenant | None:
        """A tenant that has a key which is still good."""
        mine = (c for c in self._credentials.values() if c.tenant.name == name and (c.expires is None or today <= c.expires))
        return next((credential.tenant for credential in mine), None)


def digest_of(key: str) -> bytes:
    """What is kept of a key. Keys are 256 random bits, so nothing slower is needed."""
    return hashlib.sha256(key.encode()).digest()


def cache_salt(fleet_secret: bytes, name: str) -> bytes:
    """The same on every router of a fleet."""
    return hmac.digest(fleet_secret, SALT_CONTEXT + name.encode(), "sha256")
