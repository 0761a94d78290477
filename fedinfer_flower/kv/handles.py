"""Caches that wait at a site until they are fetched, under handles that are secrets.

A body too large for one reply stays at the site for a short time; the reply carries a
handle instead. The store lives in the site's process: a handle that is lost with it is
normal, and the question is sent again.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from fedinfer_flower.errors import HandleError, InvalidValueError, SizeLimitError

__all__ = ["HandleStore"]

T = TypeVar("T")

_HANDLE_BYTES: Final = 24
"""192 random bits: guessing one of a million live handles takes 2**171 tries on average."""
_MAX_HANDLE_CHARS: Final = 128


@dataclass(frozen=True, eq=False, kw_only=True)
class _Kept(Generic[T]):
    item: T = field(repr=False)
    size_bytes: int
    expires_s: float
    run_id: int | str


class HandleStore(Generic[T]):
    """Keep objects for one fetch each, bounded in bytes, number and time.

    Parameters
    ----------
    max_bytes : int
        Most bytes held together; the oldest objects go first (least recently used: an
        object is used once, when it is fetched, and is gone then).
    max_items : int
        Most objects held.
    ttl_s : float
        Seconds until an object expires.
    clock : callable
        Returns seconds that never go back.

    Privacy
    -------
    A handle works for the querier and the run that it was made for, and for nobody else.
    What is stored is a keyed hash of handle, querier and run, so a memory dump's handles
    are of no use to other processes, and a lookup does not say whether the handle exists
    for another querier: unknown, spent, evicted, expired and foreign handles give the same
    error. A foreign attempt does not spend the handle. The store believes the querier that
    it is told: the caller verifies it first. Objects are not encrypted in memory.

    The bounds are the site's, not a querier's: one that fills the store pushes out the
    objects of others, who then ask again.

    Examples
    --------
    >>> store = HandleStore(max_bytes=1000)
    >>> handle = store.put("a cache", size_bytes=7, querier="q", run_id=1)
    >>> store.take(handle, querier="q", run_id=1)
    'a cache'
    >>> store.take(handle, querier="q", run_id=1)
    Traceback (most recent call last):
        ...
    fedinfer_flower.errors.HandleError: FI319 ...
    """

    def __init__(
        self,
        *,
        max_bytes: int = 256 << 20,
        max_items: int = 1024,
        ttl_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_items", max_items)):
            if type(value) is not int or value < 1:
                raise InvalidValueError(f"{name} of a handle store is a whole number from 1")
        if not (math.isfinite(ttl_s) and ttl_s > 0.0):
            raise InvalidValueError("ttl_s of a handle store is a positive number of seconds")
        self.max_bytes = max_bytes
        self.max_items = max_items
        self.ttl_s = ttl_s
        self._clock = clock
        # Of this store alone: digests of another process say nothing here.
        self._salt = secrets.token_bytes(32)
        self._kept: OrderedDict[bytes, _Kept[T]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"HandleStore(items={len(self)}, bytes={self.bytes_held})"

    def __len__(self) -> int:
        with self._lock:
            self._drop_expired()
            return len(self._kept)

    @property
    def bytes_held(self) -> int:
        """Bytes of all objects that can still be fetched."""
        with self._lock:
            self._drop_expired()
            return self._bytes

    def put(self, item: T, *, size_bytes: int, querier: str, run_id: int | str) -> str:
        """Keep an object and return its handle.

        Parameters
        ----------
        item : object
        size_bytes : int
            What it counts against `max_bytes`.
        querier : str
            Key id of the querier, verified by the caller.
        run_id : int or str
            The run, or whatever else separates tenants.

        Raises
        ------
        SizeLimitError
            If the object alone is larger than the store.
        """
        if type(size_bytes) is not int or size_bytes < 0:
            raise InvalidValueError("size_bytes is a whole number from 0")
        if size_bytes > self.max_bytes:
            raise SizeLimitError(
                f"an object of {size_bytes} bytes, the site keeps at most {self.max_bytes}",
                hint="share fewer tokens, a smaller codec or fewer questions at a time",
            )
        handle = secrets.token_urlsafe(_HANDLE_BYTES)
        key = self._key(handle, querier, run_id)
        with self._lock:
            self._drop_expired()
            while self._kept and (
                len(self._kept) >= self.max_items or self._bytes + size_bytes > self.max_bytes
            ):
                self._remove(next(iter(self._kept)))
            self._kept[key] = _Kept(
                item=item,
                size_bytes=size_bytes,
                expires_s=self._clock() + self.ttl_s,
                run_id=run_id,
            )
            self._bytes += size_bytes
        return handle

    def take(self, handle: str, *, querier: str, run_id: int | str) -> T:
        """Return the object of a handle and forget it.

        Raises
        ------
        HandleError
            If it is unknown, was fetched before, expired, made room for others, or belongs
            to another querier or run. The text is the same for all of these.
        """
        # The digest of something absurd costs time; it could not be a handle anyway.
        legal = isinstance(handle, str) and len(handle) <= _MAX_HANDLE_CHARS
        key = self._key(handle if legal else "", querier, run_id)
        with self._lock:
            self._drop_expired()
            if key in self._kept:
                return self._remove(key).item
        raise HandleError(
            "no object under this handle: unknown, fetched before, expired, or another querier's",
            hint="send the question again; the site computes its part anew",
        )

    def forget_run(self, run_id: int | str) -> None:
        """Drop all objects of a run, at its end."""
        with self._lock:
            for key in [k for k, kept in self._kept.items() if kept.run_id == run_id]:
                self._remove(key)

    def _key(self, handle: str, querier: str, run_id: int | str) -> bytes:
        # Lengths in front keep ("ab", "c") and ("a", "bc") apart; the type keeps 1 and "1".
        fields = [type(run_id).__name__, str(run_id), querier, handle]
        parts = [text.encode("utf-8", "surrogatepass") for text in fields]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._salt, message, hashlib.sha256)

    def _drop_expired(self) -> None:
        # Insertion order is order of expiry: one ttl for all.
        now = self._clock()
        while self._kept:
            key = next(iter(self._kept))
            if self._kept[key].expires_s > now:
                return
            self._remove(key)

    def _remove(self, key: bytes) -> _Kept[T]:
        kept = self._kept.pop(key)
        self._bytes -= kept.size_bytes
        return kept
