"""Makes certificates: an authority that signs its own, and what it signs. X.509 with P-256 keys; no file is touched."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from splitfire.core.errors import ConfigError
from splitfire.core.identity import FleetRole

HOST_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
AUTHORITY_NAME = "splitfire fleet authority"


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate and its key: PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


class Authority:
    """Signs for one fleet. Its certificate is what both ends trust."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.certificate = certificate.public_bytes(Encoding.PEM)
        self.key = _pem(key)

    @classmethod
    def make(cls, begin: datetime, end: datetime) -> Authority:
        key, name = ec.generate_private_key(ec.SECP256R1()), _named(AUTHORITY_NAME)
        made = _begun(name, name, key, begin, end).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        may_sign = _usage(signs_certificates=True)
        return cls(made.add_extension(may_sign, critical=True).sign(key, SHA256()), key)

    @classmethod
    def load(cls, certificate: bytes, key: bytes) -> Authority:
        """ConfigError when these are not what `make` makes."""
        try:
            loaded, private = x509.load_pem_x509_certificate(certificate), load_pem_private_key(key, None)
        except (ValueError, TypeError) as exc:
            raise ConfigError("ca.pem and ca.key: are not a PEM certificate and its key; move them away to make others") from exc
        if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != loaded.public_key():
            raise ConfigError("ca.pem and ca.key: do not belong together; move them away to make others")
        return cls(loaded, private)

    def sign(self, role: FleetRole, hosts: Sequence[str], begin: datetime, end: datetime) -> Signed:
        """For one of that role, at these names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _begun(_named(role), self._certificate.subject, key, begin, min(end, self._certificate.not_valid_after_utc))
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        made = made.add_extension(_usage(signs_certificates=False), critical=True)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        made = made.add_extension(signer, critical=False)
        made = made.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(role), *map(_host, hosts)]), critical=False
        )
        return Signed(made.sign(self._key, SHA256()).public_bytes(Encoding.PEM), _pem(key))


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if HOST_NAME.fullmatch(name) is None:
            raise ConfigError(f"--host: is {name[:80]!r}, accepted: a host name or an address") from None
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
