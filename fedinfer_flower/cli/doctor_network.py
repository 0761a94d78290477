"""What a SuperLink and a gateway answer to somebody without a key."""

from __future__ import annotations

import email.utils
import http.client
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509

from fedinfer_flower.cli.doctor import Finding
from fedinfer_flower.cli.site_children import is_loopback
from fedinfer_flower.supervision.certificates import SOON_DAYS, certificate_facts

__all__ = ["examine_gateway", "examine_superlink"]

_TIMEOUT_S: Final = 5.0
_SKEW_S: Final = 60.0
"""A SuperLink refuses what a SuperNode signed more than some minutes ago."""
_HIDDEN: Final = frozenset({0, 401, 403, 404, 444, 502})
_MOST_BYTES: Final = 1 << 20

_PRIVATE_ROUTES: Final = {
    "control": ("/v1/control/list-runs", "anybody who reaches this can start runs"),
    "runtime": ("/v1/runtime/acquire-task", "anybody who reaches this can take a run's tasks"),
}


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """Status 0: none. `skew_s` is None without a date."""

    status: int = 0
    skew_s: float | None = None
    certificate: bytes = b""


def examine_superlink(address: str) -> Iterator[Finding]:
    """Look at a SuperLink from here, by its address as HOST:PORT."""
    host, _, port = address.rpartition(":")
    subject = f"SuperLink {address}"
    tls = _ask("https", host, port, "GET", "/health")
    scheme = "https" if tls.certificate else "http"
    answer = tls if tls.certificate else _ask("http", host, port, "GET", "/health")
    # A proxy that passes fleet routes alone answers /health with an error: it answers.
    if answer.status == 0:
        yield Finding(
            subject=subject,
            status="does not answer",
            ok=False,
            mend="is it up, and is the address right? a firewall shows like this as well",
        )
        return
    if scheme == "http":
        yield _plain(subject, host)
    else:
        yield from _certificate(subject, tls.certificate)
    yield from _skew(subject, answer)
    for name, (path, words) in _PRIVATE_ROUTES.items():
        found = _ask(scheme, host, port, "POST", path)
        hidden = found.status in _HIDDEN
        near = is_loopback(host)
        yield Finding(
            subject=f"{subject}, {name} routes",
            status="hidden" if hidden else f"reachable without credentials ({found.status})",
            ok=hidden or near,
            mend=""
            if hidden
            else f"{words}: "
            + (
                "let nobody else use this machine"
                if near
                else "publish /v1/fleet/ alone, as in deploy/nginx.conf"
            ),
        )


def examine_gateway(url: str) -> Iterator[Finding]:
    """Look at a gateway from here, by its URL."""
    parts = urlsplit(url if "://" in url else f"https://{url}")
    host, port = parts.hostname or "", str(parts.port or "")
    subject = f"gateway {parts.netloc}"
    health = _ask(parts.scheme, host, port, "GET", "/health")
    if health.status != http.client.OK:
        yield Finding(
            subject=subject,
            status=f"/health answers {health.status}" if health.status else "does not answer",
            ok=False,
            mend="fedinfer serve keeps it running; its log says why it does not",
        )
        return
    if parts.scheme == "http":
        yield _plain(subject, host)
    else:
        yield from _certificate(subject, health.certificate)
    ready = _ask(parts.scheme, host, port, "GET", "/ready")
    is_ready = ready.status == http.client.OK
    yield Finding(
        subject=subject,
        status="ready" if is_ready else f"not ready ({ready.status})",
        ok=is_ready,
        mend="" if is_ready else "/ready says why; are enough sites online?",
    )
    yield from _skew(subject, health)
    for path in ("/v1/models", "/v1/status", "/metrics"):
        found = _ask(parts.scheme, host, port, "GET", path)
        closed = found.status in (401, 403, 404)
        yield Finding(
            subject=f"{subject}, {path}",
            status="asks for a key" if closed else f"answers {found.status} without a key",
            ok=closed,
            mend="" if closed else "public-metrics = false in gateway.toml; no proxy may add a key",
        )


def _plain(subject: str, host: str) -> Finding:
    near = is_loopback(host)
    return Finding(
        subject=subject,
        status="plain HTTP" + (", on this machine" if near else ""),
        ok=near,
        mend="" if near else "certificates: what travels can be read and changed on its way",
    )


def _certificate(subject: str, data: bytes) -> Iterator[Finding]:
    facts = certificate_facts(x509.load_der_x509_certificate(data))
    ending = facts.days_left < SOON_DAYS
    yield Finding(
        subject=f"{subject}, certificate",
        status=f"ends in {facts.days_left:.0f} days",
        ok=not ending,
        mend="renew it: docs/how-to/rotate-keys.md" if ending else "",
    )
    if not facts.names:
        yield Finding(
            subject=f"{subject}, certificate",
            status="names nobody: no subjectAltName",
            ok=False,
            mend="make it anew, with subjectAltName=DNS:... or IP:...",
        )


def _skew(subject: str, answer: _Answer) -> Iterator[Finding]:
    if answer.skew_s is None:
        return
    far = abs(answer.skew_s) > _SKEW_S
    yield Finding(
        subject=f"{subject}, clock",
        status=f"{abs(answer.skew_s):.0f} s {'ahead of' if answer.skew_s > 0 else 'behind'} ours",
        ok=not far,
        mend="NTP on both: signatures and deadlines carry times" if far else "",
    )


def _ask(scheme: str, host: str, port: str, method: str, path: str) -> _Answer:
    """Send one request without credentials; the certificate is looked at, not believed."""
    connection: http.client.HTTPConnection
    certificate = b""
    try:
        number = int(port) if port else None
        if scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                host.strip("[]"), number, timeout=_TIMEOUT_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(host.strip("[]"), number, timeout=_TIMEOUT_S)
        try:
            connection.connect()
            if isinstance(connection.sock, ssl.SSLSocket):
                certificate = connection.sock.getpeercert(binary_form=True) or b""
            headers = {"Content-Type": "application/x-protobuf"} if method == "POST" else {}
            connection.request(
                method, path, body=b"" if method == "POST" else None, headers=headers
            )
            response = connection.getresponse()
            response.read(_MOST_BYTES)
            return _Answer(
                status=response.status,
                skew_s=_skew_of(response.headers.get("Date", "")),
                certificate=certificate,
            )
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        return _Answer(certificate=certificate)


def _skew_of(date: str) -> float | None:
    with suppress(TypeError, ValueError):
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
    return None
