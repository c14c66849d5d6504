"""Certificates and keys from files, checked as they are read: what no other end would accept is refused here, with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from splitfire.core.errors import ConfigError, one_line
from splitfire.core.identity import ROUTER_NAME, FleetRole, Identity
from splitfire.core.secret_files import read_bounded, read_private

MAX_PEM_BYTES = 1 << 20


def read_certificate(certificate: Path, key: Path, now: datetime) -> Identity:
    """What a port shows to clients."""
    return _read(certificate, key, now)[0]


def read_authority(path: Path) -> bytes:
    """Certificates of who is trusted."""
    content = read_bounded(path, "certificate", MAX_PEM_BYTES)
    _parse(path, content)
    return content


def read_identity(certificate: Path, key: Path, authority: Path, role: FleetRole, now: datetime) -> Identity:
    """What this process is in the fleet."""
    identity, chain = _read(certificate, key, now)
    trusted = read_authority(authority)
    if not _comes_from(chain, _parse(authority, trusted)):
        raise ConfigError(f"certificate {certificate}: was not signed by {authority}; make both with `splitfire certs`")
    names = _names(chain[0])
    needed = {str(role)} | ({ROUTER_NAME} if role is FleetRole.ROUTER else set())
    if not needed <= names:
        raise ConfigError(
            f"certificate {certificate}: is not for a {role.name.lower()}: has the names {', '.join(sorted(names)) or 'none'}, "
            f"needs {' and '.join(sorted(needed))}"
        )
    return replace(identity, authority=trusted)


def _read(certificate: Path, key: Path, now: datetime) -> tuple[Identity, Sequence[x509.Certificate]]:
    content = read_bounded(certificate, "certificate", MAX_PEM_BYTES)
    chain = _parse(certificate, content)
    leaf, secret = chain[0], read_private(key, "private key", MAX_PEM_BYTES)
    if now >= leaf.not_valid_after_utc:
        raise ConfigError(f"certificate {certificate}: expired at {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; make another")
    if now < leaf.not_valid_before_utc:
        raise ConfigError(f"certificate {certificate}: is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    try:
        public = load_pem_private_key(secret, None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"private key {key}: is not a PEM key without a password") from exc
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if public.public_bytes(*form) != leaf.public_key().public_bytes(*form):
        raise ConfigError(f"private key {key}: is not the key of certificate {certificate}")
    return Identity(content, secret), chain


def _parse(path: Path, content: bytes) -> Sequence[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as exc:
        raise ConfigError(f"certificate {path}: is not PEM: {one_line(str(exc), 80)}") from exc


def _comes_from(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]) -> bool:
    """Each was signed by the one after it, the last by one of `authorities`."""
    followed = all(_signed(child, parent) for child, parent in pairwise(chain))
    return followed and any(_signed(chain[-1], authority) for authority in authorities)


def _signed(child: x509.Certificate, parent: x509.Certificate) -> bool:
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {str(value) for kind in (x509.UniformResourceIdentifier, x509.DNSName) for value in names.get_values_for_type(kind)}
