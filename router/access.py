"""Which calls of the public ports are let through, and whose they are: from the method or path and the call's credential. Pure.

Deny by default: what NEEDS does not name is for administrators. Without keys everybody is the tenant `default`, who is an
administrator only where nobody but this machine reaches the port. The fleet's token is the credential of who operates it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import date
from enum import Enum, auto

from router.tenants import DEFAULT, OPERATOR, KeyRing, Tenant, cache_salt
from splitfire.core.errors import Forbidden, Unauthenticated

SCHEME = "bearer "


class Need(Enum):
    """What a call must show."""

    NOTHING = auto()
    KEY = auto()  # any tenant's
    VIEW = auto()  # an administrator's, where there are keys
    ADMIN = auto()


NEEDS: Mapping[str, Need] = {
    "/grpc.health.v1.Health/Check": Need.NOTHING,
    "/grpc.health.v1.Health/List": Need.NOTHING,
    "/grpc.health.v1.Health/Watch": Need.NOTHING,
    "/splitfire.v1.Inference/Generate": Need.KEY,
    "/splitfire.v1.Inference/Tokenize": Need.KEY,
    "/splitfire.v1.Inference/ListModels": Need.KEY,
    "/splitfire.v1.Inference/GetFleet": Need.VIEW,
    "/splitfire.v1.Inference/GetTraces": Need.KEY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Need.VIEW,
    # HTTP
    "/": Need.NOTHING,  # a page that holds nothing; what it asks for needs the key that is typed into it
    "/health": Need.NOTHING,
    "/v1/models": Need.KEY,
    "/v1/models/*": Need.KEY,
    "/v1/chat/completions": Need.KEY,
    "/v1/completions": Need.KEY,
    "/tokenize": Need.KEY,
    "/detokenize": Need.KEY,
    "/v1/files": Need.KEY,
    "/v1/files/*": Need.KEY,
    "/v1/files/*/content": Need.KEY,
    "/v1/batches": Need.KEY,
    "/v1/batches/*": Need.KEY,
    "/v1/batches/*/cancel": Need.KEY,
}


class Access:
    """`keys` None: there are none. Replacing them leaves calls that were let through alone."""

    def __init__(self, keys: KeyRing | None, fleet_token: bytes | None, today: Callable[[], date], *, is_loopback: bool) -> None:
        self.keys = keys
        self._token = fleet_token
        self._today = today
        self._everybody = replace(DEFAULT, is_admin=is_loopback)
        self._operator = replace(OPERATOR, cache_salt=cache_salt(fleet_token or b"", OPERATOR.name))

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Unauthenticated or Forbidden, unless the call may be made."""
        need = NEEDS.get(method, Need.ADMIN)
        if need is Need.NOTHING:
            return
        tenant = self.tenant(metadata)
        wants_admin = need is Need.ADMIN or (need is Need.VIEW and self.keys is not None)
        if wants_admin and not tenant.is_admin:
            raise Forbidden("this is for administrators: use a key of a tenant that is one", reason="admin_only")

    def tenant(self, metadata: Iterable[tuple[str, str | bytes]]) -> Tenant:
        """Whose call it is. Of all metadata (of HTTP: headers) only `authorization` counts, and only if it is there once."""
        given = [str(value) for name, value in metadata if name == "authorization"]
        key = given[0][len(SCHEME) :] if len(given) == 1 and given[0].lower().startswith(SCHEME) else ""
        if key and self._token is not None and hmac.compare_digest(key.encode(), self._token):
            return self._operator
        if self.keys is None:
            return self._everybody
        if not key:
            raise Unauthenticated("send the metadata `authorization: Bearer KEY`, once", reason="no_api_key")
        return self.keys.find(key, self._today())

    def named(self, name: str) -> Tenant | None:
        """A tenant whose work goes on though nobody calls. None: there is none of that name, or no longer."""
        if name == self._operator.name and self._token is not None:
            return self._operator
        if self.keys is None:
            return self._everybody if name == self._everybody.name else None
        return self.keys.named(name, self._today())

    def is_tenants(self, key: str) -> bool:
        """Whether it is an API key, and so nothing that a worker would show."""
        try:
            return self.keys is not None and bool(self.keys.find(key, self._today()))
        except Unauthenticated:
            return False
