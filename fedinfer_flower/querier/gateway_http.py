"""What both gateway clients set up alike: address, API key, TLS, headers."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from fedinfer_flower.errors import ConfigError, GatewayError, SizeLimitError
from fedinfer_flower.observability.tracing import headers_out
from fedinfer_flower.querier.gateway_wire import Call, Reply

__all__ = ["Access", "access", "lost", "read_key_file"]

KEY_VARIABLE: Final = "FEDINFER_API_KEY"
KEY_FILE_VARIABLE: Final = "FEDINFER_API_KEY_FILE"
_MAX_KEY_CHARS: Final = 256
_MOST_CAUSES: Final = 16
_BAD_CERTIFICATE: Final = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "no authority that is trusted has signed it",
    19: "no authority that is trusted has signed it",
    20: "no authority that is trusted has signed it",
    62: "it is for another name",
    64: "it is for another address",
}
"""By OpenSSL's number of the fault."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where a gateway is, and who asks.

    Parameters
    ----------
    url : str
        Without a slash at its end.
    key : str
        Never shown.
    tls : ssl.SSLContext or None
        None for ``http``.
    """

    url: str
    key: str = field(repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def client_options(self) -> dict[str, Any]:
        """Return how an httpx client is made."""
        return {
            "base_url": self.url,
            "verify": self.tls if self.tls is not None else True,
            # Another server would get the key.
            "follow_redirects": False,
            # A proxy sees the key of a request that is not encrypted.
            "trust_env": self.tls is not None,
            "headers": {
                "authorization": f"Bearer {self.key}",
                "accept-encoding": "identity",
                "user-agent": "fedinfer-flower",
            },
        }

    def request(self, client: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
        """Build the request of a call."""
        return client.build_request(
            call.method,
            call.path,
            params=dict(call.params),
            headers={**headers_out(), **call.headers},
            content=call.body or None,
            timeout=httpx.Timeout(call.timeout_s, connect=min(call.timeout_s, 10.0)),
        )


def access(
    url: str, *, api_key: str | None, key_file: Path | None, ca: Path | None, insecure: bool
) -> Access:
    """Check where the gateway is, and find the key.

    Raises
    ------
    ConfigError
        For an address that cannot be, one without encryption off this machine, a key that
        is missing, or a certificate that cannot be read.
    """
    try:
        urlsplit(url)  # stricter than httpx about brackets
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        raise ConfigError("the gateway's url is none", hint="https://HOST:PORT") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError("the gateway's url is none", hint="https://HOST:PORT")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigError(
            "the gateway's url has more than scheme, host, port and path",
            hint="the key goes into api_key, FEDINFER_API_KEY or a key file, never into the url",
        )
    if parsed.scheme == "http" and not insecure and not _is_loopback(parsed.host):
        raise ConfigError(
            "http:// to another machine: the API key, and queries in clear, would travel"
            " unencrypted",
            hint="https://, with ca=... for a private authority; insecure=True inside a tunnel",
        )
    if parsed.scheme == "http" and ca is not None:
        raise ConfigError("a certificate authority with http://", hint="https://")
    return Access(
        url=str(parsed).rstrip("/"),
        key=_key(api_key, key_file),
        tls=_tls(ca) if parsed.scheme == "https" else None,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _tls(ca: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"the certificate authority cannot be read: {type(exc).__name__}", hint="ca: a PEM file"
        ) from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _key(api_key: str | None, key_file: Path | None) -> str:
    if api_key is not None and key_file is not None:
        raise ConfigError("an API key and a key file: one of both")
    if api_key is None and key_file is None:
        api_key = os.environ.get(KEY_VARIABLE)
        named = os.environ.get(KEY_FILE_VARIABLE)
        key_file = Path(named) if api_key is None and named else None
    if key_file is not None:
        api_key = read_key_file(key_file)
    if not api_key:
        raise ConfigError(
            "no API key for the gateway",
            hint=f"api_key=..., {KEY_VARIABLE}, or a file named by {KEY_FILE_VARIABLE}",
        )
    if len(api_key) > _MAX_KEY_CHARS or not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("the API key has characters that no key has")
    return api_key


def read_key_file(path: Path) -> str:
    """Read an API key from a file that only its owner may read.

    Raises
    ------
    ConfigError
        If it cannot be read, or others can read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read(_MAX_KEY_CHARS * 4)
    except OSError as exc:
        raise ConfigError(f"the API key file cannot be read: {type(exc).__name__}") from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"the API key file {path.name!r} can be read by others",
            hint=f"chmod 600 {path.name}; if others did read it, have the key revoked",
        )
    return raw.decode("ascii", errors="replace").strip()


def lost(exc: httpx.HTTPError | TimeoutError) -> Reply:
    """Return what stands for a reply that did not come."""
    # The text of a foreign exception may hold anything; its type says enough.
    bad = _certificate_error(exc)
    if bad is None:
        return Reply(lost=type(exc).__name__)
    why = _BAD_CERTIFICATE.get(bad.verify_code, "it is not to be trusted")
    return Reply(lost=f"its certificate is refused: {why}", final=True)


def _certificate_error(exc: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """Return the refusal of a certificate that a failure comes from, if it does."""
    seen = 0
    while exc is not None and seen < _MOST_CAUSES:
        if isinstance(exc, ssl.SSLCertVerificationError):
            return exc
        exc, seen = exc.__cause__ or exc.__context__, seen + 1
    return None


def reply_of(response: httpx.Response, body: bytes) -> Reply:
    """Return a reply; refuse one that would have to be unpacked."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise GatewayError("the gateway's reply is compressed, which nobody asked for")
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(status=response.status_code, headers=headers, body=body)


def require_room(n_bytes: int, limit: int) -> None:
    """Stop reading a reply that is too large.

    Raises
    ------
    SizeLimitError
        If it is.
    """
    if n_bytes > limit:
        raise SizeLimitError(f"the gateway's reply has more than {limit} bytes")
