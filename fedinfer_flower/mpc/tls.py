"""Certificates of the links between parties: self-signed, of one session, pinned by all.

There is no certificate authority. Each party's certificate is part of a statement that its
identity signs; each link trusts exactly the certificates of the other two parties, in both
directions. A party's TLS key is worked out from its identity and a random salt in that
statement, so that a site whose processes come and go needs to store nothing.
"""

from __future__ import annotations

import datetime
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedinfer_flower.errors import EnvelopeError, ExpiredError
from fedinfer_flower.wire.identity import Identity

__all__ = ["SALT_BYTES", "VALID_HOURS", "certificate", "pem_of", "require_valid", "secret_pem"]

SALT_BYTES: Final = 32
VALID_HOURS: Final = 24
_INFO: Final = b"fedinfer/v1/mpc-link"
# Order of the group of P-256 (NIST SP 800-186, section 3.2.1.3).
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def _key(identity: Identity, salt: bytes) -> ec.EllipticCurvePrivateKey:
    # 384 bits reduced modulo a 256-bit order: a bias of 2^-128 (FIPS 186-5, A.2.1).
    derived = HKDF(hashes.SHA256(), 48, salt, _INFO).derive(identity.signing.private_bytes_raw())
    number = int.from_bytes(derived, "big") % (_ORDER - 1) + 1
    return ec.derive_private_key(number, ec.SECP256R1())


def certificate(identity: Identity, salt: bytes) -> bytes:
    """Return a self-signed certificate (DER) of the TLS key for this salt.

    Valid from an hour ago, for clocks that differ, and for `VALID_HOURS` from now.

    Examples
    --------
    >>> der = certificate(Identity.generate(), bytes(SALT_BYTES))
    >>> pem_of(der).splitlines()[0]
    b'-----BEGIN CERTIFICATE-----'
    """
    key = _key(identity, salt)
    # The name holds nothing that says which institution it is: TLS 1.2 sends it in clear.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"party-{salt.hex()[:16]}")])
    now = datetime.datetime.now(datetime.UTC)
    hour = datetime.timedelta(hours=1)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - hour)
        .not_valid_after(now + VALID_HOURS * hour)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(Encoding.DER)


def secret_pem(identity: Identity, salt: bytes) -> bytes:
    """Return the secret key of the certificate for this salt; it never travels."""
    return _key(identity, salt).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pem_of(der: bytes) -> bytes:
    """Return a certificate in PEM.

    Raises
    ------
    EnvelopeError
        If the bytes are no certificate.
    """
    return _read(der).public_bytes(Encoding.PEM)


def require_valid(der: bytes) -> None:
    """Require a certificate that is valid now.

    Raises
    ------
    EnvelopeError, ExpiredError
    """
    read, now = _read(der), datetime.datetime.now(datetime.UTC)
    if not read.not_valid_before_utc <= now <= read.not_valid_after_utc:
        raise ExpiredError(
            "a party's link certificate is not valid now",
            hint="collect the sites' statements again, and check the clocks",
        )


def _read(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except ValueError:
        raise EnvelopeError("the link certificate of a party is no certificate") from None
