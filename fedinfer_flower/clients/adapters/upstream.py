"""HTTP to a site's own model server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama.

Bounded in every way: where it may be, how long an answer may take, how often it is asked
again, how large a reply may be. Nothing of request or reply gets into an error text.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from fedinfer_flower.errors import InvalidValueError, ModelAnswerError, ModelError

__all__ = ["Upstream", "read_api_key"]

_KEY: Final = re.compile(r"[\x21-\x7e]{1,4096}")
_AGAIN: Final = frozenset({-1, 429, 502, 503, 504})
_FIRST_PAUSE_S: Final = 0.2
_MOST_REPLY_BYTES: Final = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A model server as one site reaches it, for any number of threads.

    Parameters
    ----------
    url : str
        Up to and including ``/v1``. Over HTTPS, or on this machine.
    model : str
        Name of the model at the server.
    api_key : str
        Sent as a bearer token; empty for none.
    timeout_s : float
        For one answer, all attempts taken together.
    attempts : int
        When the server cannot be reached or says that it is busy.
    max_reply_bytes : int
    allow_http : bool
        Speak plain HTTP to another machine: whoever is between reads all questions.

    Raises
    ------
    InvalidValueError
        If something is out of its range, or `url` is not one to send questions to.

    Privacy
    -------
    The server reads the questions in clear, and is part of the site: it must be the site's
    own. Redirects are not followed, and proxies of the environment are not used, so nothing
    is sent anywhere else.
    """

    url: str
    model: str
    api_key: str = field(default="", repr=False)
    timeout_s: float = 60.0
    attempts: int = 3
    max_reply_bytes: int = _MOST_REPLY_BYTES
    allow_http: bool = False
    _client: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        import httpx

        ok = (
            0.0 < self.timeout_s <= 3600.0
            and 1 <= self.attempts <= 10
            and 1024 <= self.max_reply_bytes <= 1 << 30
            and 0 < len(self.model) <= 200
        )
        if not ok:
            raise InvalidValueError(
                "an upstream has a model name, timeout-s up to 3600, 1 to 10 attempts and"
                " max-reply-bytes from 1024"
            )
        if self.api_key and not _KEY.fullmatch(self.api_key):
            raise InvalidValueError("the upstream's API key is not printable ASCII")
        _require_url(self.url, allow_http=self.allow_http)
        # One client, whose certificates take a while to load; no connection stays open.
        client = httpx.Client(
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )
        object.__setattr__(self, "_client", client)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return the reply's JSON object.

        Parameters
        ----------
        path : str
            After the URL: ``"completions"``.
        body : mapping
            JSON values; ``model`` is added.

        Raises
        ------
        ModelAnswerError
            If the server is not reached, late, too long, refuses, or answers no JSON object.
        """
        status, found = self._asked(path, body)
        if found is None:
            raise _failed(status)
        return found

    def try_post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Do as `post`, and return None if the server refuses: a status from 400 to 499."""
        status, found = self._asked(path, body)
        if found is None and 400 <= status < 500 and status not in (401, 403, 429):
            return None
        if found is None:
            raise _failed(status)
        return found

    def _asked(self, path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any] | None]:
        """Return (last status, 0 if there was no answer; the reply, None without one)."""
        data = json.dumps({"model": self.model, **body}, allow_nan=False).encode()
        until = time.monotonic() + self.timeout_s
        pause_s, status = _FIRST_PAUSE_S, 0
        for _ in range(self.attempts):
            if status:
                time.sleep(max(0.0, min(pause_s, until - time.monotonic())))
                pause_s *= 2.0
            if time.monotonic() > until:
                break
            status, reply = self._once(path, data, until=until)
            if status == 200:
                return status, _json_object(reply)
            if status not in _AGAIN:
                break
        return max(status, 0), None

    def _once(self, path: str, data: bytes, *, until: float) -> tuple[int, bytes]:
        """Return (status, body); status -1 if there was no whole answer."""
        import httpx

        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
        }
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        url = f"{self.url.rstrip('/')}/{path}"
        left_s = max(0.001, until - time.monotonic())
        try:
            with self._client.stream(
                "POST", url, content=data, headers=headers, timeout=left_s
            ) as reply:
                parts, size = [], 0
                # Of an error nothing is read: its text may quote the question. Raw: what is
                # compressed all the same could grow without bound.
                for part in reply.iter_raw() if reply.status_code == 200 else ():
                    size += len(part)
                    if size > self.max_reply_bytes:
                        raise ModelAnswerError("the site's model server answered with too much")
                    # httpx bounds the time between two parts, and not the whole.
                    if time.monotonic() > until:
                        return -1, b""
                    parts.append(part)
                return reply.status_code, b"".join(parts)
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return -1, b""


def read_api_key(*, env: str, file: Path | None) -> str:
    """Return the API key of an environment variable or a file; empty if neither is named.

    Raises
    ------
    ModelError
        If both are named, or the one that is holds no key, or others may read the file.
    """
    if env and file is not None:
        raise ModelError("give api-key-env or api-key-file, not both")
    if env:
        key = os.environ.get(env, "").strip()
        where = f"the environment variable {env[:64]!r}"
    elif file is not None:
        where = f"the file {file.name!r}"
        try:
            if os.name == "posix" and file.stat().st_mode & 0o077:
                raise ModelError(f"{where} can be read by others", hint=f"chmod 600 {file.name}")
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise ModelError(f"{where} cannot be read: {type(exc).__name__}") from None
    else:
        return ""
    if not _KEY.fullmatch(key):
        raise ModelError(f"{where} holds no API key", hint="one line of printable ASCII")
    return key


def _require_url(url: str, *, allow_http: bool) -> None:
    hint = "https://host/v1, or http://127.0.0.1:8000/v1 for a server on this machine"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise InvalidValueError("the upstream's url is none", hint=hint) from None
    if parts.username or parts.password or parts.query or parts.fragment or not host:
        # Not even quoted: it may hold a password.
        raise InvalidValueError("the upstream's url has more than a host and a path", hint=hint)
    if parts.scheme == "https" or (parts.scheme == "http" and (allow_http or _is_loopback(host))):
        return
    raise InvalidValueError("the upstream's url is neither https nor on this machine", hint=hint)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _failed(status: int) -> ModelAnswerError:
    words = f"answered {status}" if status else "was not reached, or not done in time"
    return ModelAnswerError(f"the site's model server {words}")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data, parse_constant=_not_finite)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelAnswerError("the site's model server answered with no JSON object")
    return found


def _not_finite(_: str) -> float:
    return math.nan
