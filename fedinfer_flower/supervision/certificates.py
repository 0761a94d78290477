"""What a certificate says, as far as a deployment fails by it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509

from fedinfer_flower.errors import DeploymentError

__all__ = [
    "SOON_DAYS",
    "CertificateFacts",
    "certificate_facts",
    "read_certificates",
    "require_valid",
]

SOON_DAYS: Final = 30
"""A certificate that ends within so many days is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """One certificate.

    Parameters
    ----------
    days_left : float
        Until it ends; negative if it has.
    starts_in_days : float
        Until it begins; negative if it has.
    names : tuple of str
        DNS names and addresses it is for, of the subject alternative name only: the common
        name counts for nothing.
    is_authority : bool
        Whether it may sign others.
    """

    days_left: float
    starts_in_days: float
    names: tuple[str, ...]
    is_authority: bool


def read_certificates(
    path: Path, *, now: datetime.datetime | None = None
) -> tuple[CertificateFacts, ...]:
    """Read all certificates of a PEM file, in its order.

    Raises
    ------
    DeploymentError
        If there is none in it, or it cannot be read.
    """
    at = now or datetime.datetime.now(datetime.UTC)
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as exc:
        raise DeploymentError(
            f"the certificate file {path.name!r} cannot be read ({type(exc).__name__})"
        ) from None
    except ValueError:
        raise DeploymentError(
            f"{path.name!r} holds no certificate in PEM form",
            hint="-----BEGIN CERTIFICATE-----; a key is another file",
        ) from None
    return tuple(certificate_facts(certificate, now=at) for certificate in found)


def require_valid(path: Path, *, now: datetime.datetime | None = None) -> str:
    """Require that every certificate of a file is valid now.

    Returns
    -------
    str
        A warning if one ends soon; else empty.

    Raises
    ------
    DeploymentError
        If one has ended, or has not begun.
    """
    facts = read_certificates(path, now=now)
    least = min(facts, key=lambda f: f.days_left)
    if least.days_left < 0:
        raise DeploymentError(
            f"a certificate in {path.name!r} ended {-least.days_left:.0f} days ago",
            hint="make another; docs/how-to/rotate-keys.md says in which order",
        )
    if any(f.starts_in_days > 0 for f in facts):
        raise DeploymentError(
            f"a certificate in {path.name!r} is not valid yet",
            hint="check this machine's clock",
        )
    if least.days_left < SOON_DAYS:
        return f"a certificate in {path.name!r} ends in {least.days_left:.0f} days"
    return ""


def certificate_facts(
    certificate: x509.Certificate, *, now: datetime.datetime | None = None
) -> CertificateFacts:
    """Return what a certificate says."""
    at = now or datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = [
            *extension.value.get_values_for_type(x509.DNSName),
            *map(str, extension.value.get_values_for_type(x509.IPAddress)),
        ]
    except (x509.ExtensionNotFound, ValueError):
        names = []
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        is_authority = basic.value.ca
    except (x509.ExtensionNotFound, ValueError):
        is_authority = False
    return CertificateFacts(
        days_left=(certificate.not_valid_after_utc - at) / day,
        starts_in_days=(certificate.not_valid_before_utc - at) / day,
        names=tuple(names),
        is_authority=is_authority,
    )
