"""Whether a process that runs is also well."""

from __future__ import annotations

import http.client
import json
import math
import ssl
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from fedinfer_flower.errors import InvalidValueError

__all__ = ["BeatProbe", "HttpProbe", "Probe", "fetch_status"]

_MOST_STATUS_BYTES: Final = 1 << 16


class Probe(Protocol):
    """What a supervisor asks about a child. All calls come from one thread."""

    def start(self, *, now_s: float) -> None:
        """Forget the process before: a new one has been started."""
        ...

    def excuse(self, *, now_s: float) -> None:
        """Begin to count afresh: the supervisor itself was stopped for a while."""
        ...

    def check(self, *, now_s: float) -> str:
        """Return why the child is not well, in fixed words; empty if it is."""
        ...


class BeatProbe:
    """A status file whose ``beat_at`` has to change.

    Parameters
    ----------
    path : Path
        JSON with a number ``beat_at``, which the child writes while it is well.
    stale_s : float
        How long the number may stay the same.
    first_s : float
        How long the child may take until the file is there.

    Notes
    -----
    Only *changes* of the number count, on this process's own monotonic clock: a step of the
    machine's clock looks neither like a wedge nor like life. The file of an earlier process
    is removed when a child is started.
    """

    def __init__(self, path: Path, *, stale_s: float = 20.0, first_s: float = 120.0) -> None:
        if stale_s <= 0.0 or first_s <= 0.0:
            raise InvalidValueError("stale_s and first_s are positive")
        self.path = path
        self.stale_s = stale_s
        self.first_s = first_s
        self._beat: float | None = None
        self._changed_at = 0.0

    def start(self, *, now_s: float) -> None:
        """Remove the file of the process before."""
        self.path.unlink(missing_ok=True)
        self._beat, self._changed_at = None, now_s

    def excuse(self, *, now_s: float) -> None:
        """Count the beat as fresh."""
        self._changed_at = now_s

    def check(self, *, now_s: float) -> str:
        """Return words if the beat has stopped, or has never begun."""
        beat = _beat_of(self.path)
        if beat is not None and beat != self._beat:
            self._beat, self._changed_at = beat, now_s
        silent_s = now_s - self._changed_at
        if self._beat is None:
            return "no sign of life since its start" if silent_s > self.first_s else ""
        return "its heartbeat has stopped" if silent_s > self.stale_s else ""


class HttpProbe:
    """A URL that has to answer.

    Parameters
    ----------
    url : str
        Such as ``https://127.0.0.1:8443/health``.
    down_s : float
        How long it may be silent, or answer with anything but 200.
    first_s : float
        How long it may take until the first answer.
    every_s : float
        Seconds between requests.
    authorities : Path, optional
        PEM bundle of the authorities for TLS; default the system's.
    pinned : Path, optional
        PEM certificate that the server has to show, whatever name it is for.
    timeout_s : float
        Of one request.
    """

    def __init__(
        self,
        url: str,
        *,
        down_s: float = 15.0,
        first_s: float = 120.0,
        every_s: float = 2.0,
        authorities: Path | None = None,
        pinned: Path | None = None,
        timeout_s: float = 3.0,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise InvalidValueError("url begins with http:// or https://")
        self.url, self.down_s, self.first_s, self.every_s = url, down_s, first_s, every_s
        self.authorities, self.pinned, self.timeout_s = authorities, pinned, timeout_s
        self._answered = False
        self._well_at = self._asked_at = 0.0

    def start(self, *, now_s: float) -> None:
        """Wait for a first answer again."""
        self._answered, self._well_at, self._asked_at = False, now_s, -math.inf

    def excuse(self, *, now_s: float) -> None:
        """Count the last answer as fresh."""
        self._well_at = now_s

    @property
    def answered(self) -> bool:
        """Whether it has answered since `start`."""
        return self._answered

    def silent_s(self, *, now_s: float) -> float:
        """Return the seconds since it last answered, or was started."""
        return now_s - self._well_at

    def check(self, *, now_s: float) -> str:
        """Ask, if it is time to; return words if it has been silent for too long."""
        if now_s - self._asked_at >= self.every_s:
            self._asked_at = now_s
            status = fetch_status(
                self.url,
                timeout_s=self.timeout_s,
                authorities=self.authorities,
                pinned=self.pinned,
            )
            if status == http.client.OK:
                self._answered, self._well_at = True, now_s
        limit = self.down_s if self._answered else self.first_s
        return "it does not answer" if now_s - self._well_at > limit else ""


def fetch_status(
    url: str,
    *,
    timeout_s: float = 3.0,
    authorities: Path | None = None,
    pinned: Path | None = None,
) -> int:
    """Return the HTTP status of a GET; 0 if there is no answer, or not from the right server.

    Nothing but the request line is sent: no key, no cookie, and no proxy of the environment
    is used. Redirects are not followed.
    """
    parts = urlsplit(url)
    host, path = parts.hostname or "", parts.path or "/"
    connection: http.client.HTTPConnection
    try:
        if parts.scheme == "https":
            context = _context(authorities=authorities, pinned=pinned)
            connection = http.client.HTTPSConnection(
                host, parts.port, timeout=timeout_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
        try:
            connection.connect()
            if pinned is not None and not _shows(connection, pinned):
                return 0
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        return 0


def _context(*, authorities: Path | None, pinned: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if authorities is None else str(authorities))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if pinned is not None:
        # The certificate itself is compared; it need not name the address that is asked.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _shows(connection: http.client.HTTPConnection, pinned: Path) -> bool:
    sock = connection.sock
    if not isinstance(sock, ssl.SSLSocket):
        return False
    text = pinned.read_text(encoding="ascii", errors="replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    body = text[text.index(begin) : text.index(end) + len(end)]
    return sock.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(body)


def _beat_of(path: Path) -> float | None:
    try:
        with path.open("rb") as file:
            status = json.loads(file.read(_MOST_STATUS_BYTES))
        beat = status["beat_at"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(beat) if isinstance(beat, int | float) else None
