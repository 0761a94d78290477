"""How much a caller may ask: requests a second, rows a minute and a day, jobs at a time."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import QuotaExceededError, UnknownQueryError
from fedinfer_flower.serving.jobs import Board, Job, JobRequest
from fedinfer_flower.serving.outbox import request_digest
from fedinfer_flower.serving.problem import HttpProblem

if TYPE_CHECKING:
    from fedinfer_flower.serving.auth import Caller
    from fedinfer_flower.serving.key_store import KeyStore

__all__ = ["Buckets", "FailureLimit", "Quotas", "RequestLimit"]

_MAX_NAMES: Final = 10_000
"""Buckets that are kept; an attacker with more addresses than that gets fresh ones."""

_STRIPES: Final = 64


class Buckets:
    """Token buckets by name; thread-safe.

    Parameters
    ----------
    clock : callable
        Monotonic seconds.

    Examples
    --------
    >>> buckets = Buckets(clock=lambda: 0.0)
    >>> [buckets.take("me", 1, rate=0.5, burst=2) for _ in range(3)]
    [0.0, 0.0, 2.0]
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str, n: float, *, rate: float, burst: float) -> float:
        """Take `n` tokens; return 0.0, or the seconds after which there are enough.

        A negative `n` gives tokens back.
        """
        now = self._clock()
        with self._lock:
            level, at = self._levels.pop(name, (burst, now))
            level = min(burst, level + rate * max(0.0, now - at))
            # Rounding must not refuse what was promised for this moment.
            enough = level + 1e-9 >= n
            if enough:
                level = min(burst, level - n)
            self._levels[name] = (level, now)
            if len(self._levels) > _MAX_NAMES:
                self._levels.popitem(last=False)
            return 0.0 if enough else (n - level) / rate


class RequestLimit:
    """Requests a second of one API key.

    Parameters
    ----------
    per_s, burst : float
    clock : callable
    """

    def __init__(
        self,
        *,
        per_s: float = 200.0,
        burst: float = 400.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_s, self._burst = per_s, burst
        self._buckets = Buckets(clock=clock)

    def take(self, name: str) -> float:
        """Count one; return 0.0, or the seconds to wait."""
        return self._buckets.take(name, 1.0, rate=self._per_s, burst=self._burst)


class FailureLimit(RequestLimit):
    """Requests without a valid key from one address.

    Parameters
    ----------
    per_s, burst : float
    clock : callable
    """

    def __init__(
        self,
        *,
        per_s: float = 0.2,
        burst: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(per_s=per_s, burst=burst, clock=clock)


class Quotas:
    """Rows a minute and a day, and jobs at a time, of each key.

    Parameters
    ----------
    keys : KeyStore
        Keeps the rows of the day: they outlive the process.
    clock : callable
        Monotonic seconds.

    Notes
    -----
    Rows are counted before a job is handed in, and given back if it is not accepted. With an
    idempotency key they are counted under that key and what is asked: handed in again, while
    the earlier job is still there, they are not counted again. A crash between the two loses
    rows of the day's quota, and never wins any. Rows of the minute and jobs at a time are
    kept in memory.
    """

    def __init__(self, keys: KeyStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._minute = Buckets(clock=clock)
        self._notes = Buckets(clock=clock)
        self._lock = threading.Lock()
        self._open: dict[str, set[str]] = {}
        self._coming: dict[str, int] = {}
        self._stripes = tuple(threading.Lock() for _ in range(_STRIPES))

    def submit(self, board: Board, request: JobRequest, caller: Caller) -> Job:
        """Count the rows of a job, and hand it in.

        Raises
        ------
        HttpProblem
            With `QuotaExceededError`.
        FedInferError
            As `Board.submit`.
        """
        if not (caller.rows_per_minute or caller.rows_per_day or caller.concurrent):
            return board.submit(request)
        use = use_id(request)
        # Twins one after the other: one that is refused takes its count back, and another that
        # relied on it would be for free.
        alone = self._stripes[int(use, 16) % _STRIPES] if use else contextlib.nullcontext()
        with alone:
            return self._submit(board, request, caller, use)

    def _submit(self, board: Board, request: JobRequest, caller: Caller, use: str) -> Job:
        earlier = self._keys.rows.earlier(caller.key_id, use) if use else ""
        stale = earlier if earlier and not _is_there(board, earlier, caller) else ""
        if earlier and not stale:
            return board.submit(request)
        with self._place(caller):
            self._take_minute(caller, request.n_rows)
            try:
                counted = self._keys.rows.count(
                    caller.key_id,
                    request.n_rows,
                    limit=caller.rows_per_day,
                    use=use,
                    stale=stale,
                )
            except BaseException:
                self._give_back(caller, request.n_rows)
                raise
            if not counted:
                self._give_back(caller, request.n_rows)
            try:
                job = board.submit(request)
            except BaseException:
                if counted:
                    self._keys.rows.uncount(caller.key_id, request.n_rows, use=use)
                    self._give_back(caller, request.n_rows)
                raise
            if use:
                self._keys.rows.settle(caller.key_id, use, job.job_id)
            self._follow(board, job, caller)
        return job

    def may_note(self, key_id: str) -> bool:
        """Whether one more refusal of this key is written down."""
        return self._notes.take(key_id, 1.0, rate=0.2, burst=20.0) == 0.0

    @contextlib.contextmanager
    def _place(self, caller: Caller) -> Iterator[None]:
        key_id = caller.key_id
        with self._lock:
            coming = self._coming.get(key_id, 0)
            if caller.concurrent and coming + len(self._open.get(key_id, ())) >= caller.concurrent:
                raise HttpProblem(
                    QuotaExceededError(
                        f"the API key has {caller.concurrent} queries open, which is its most",
                        hint="wait for one to end, or cancel one",
                    ),
                    retry_after_s=1.0,
                )
            self._coming[key_id] = coming + 1
        try:
            yield
        finally:
            with self._lock:
                left = self._coming[key_id] - 1
                if left:
                    self._coming[key_id] = left
                else:
                    del self._coming[key_id]

    def _take_minute(self, caller: Caller, n_rows: int) -> None:
        most = caller.rows_per_minute
        if not most:
            return
        if n_rows > most:
            raise HttpProblem(
                QuotaExceededError(
                    f"{n_rows} rows at once are more than the {most} a minute of this API key",
                    hint="ask in smaller parts",
                ),
                retry_after_s=60.0,
            )
        wait_s = self._minute.take(caller.key_id, n_rows, rate=most / 60.0, burst=most)
        if wait_s > 0.0:
            raise HttpProblem(
                QuotaExceededError(f"the API key has {most} rows a minute, which are used up"),
                retry_after_s=wait_s,
            )

    def _give_back(self, caller: Caller, n_rows: int) -> None:
        if most := caller.rows_per_minute:
            self._minute.take(caller.key_id, -n_rows, rate=most / 60.0, burst=most)

    def _follow(self, board: Board, job: Job, caller: Caller) -> None:
        if not caller.concurrent or job.state.ended:
            return
        key_id = caller.key_id
        with self._lock:
            self._open.setdefault(key_id, set()).add(job.job_id)

        def tell(now: Job) -> None:
            if now.state.ended:
                with self._lock:
                    still = self._open.get(key_id, set())
                    still.discard(now.job_id)
                    if not still:
                        self._open.pop(key_id, None)

        try:
            board.listen(job.job_id, owner=key_id, tell=tell)
        except UnknownQueryError:  # it ended, and was fetched and forgotten, in between
            with self._lock:
                self._open.get(key_id, set()).discard(job.job_id)


def use_id(request: JobRequest) -> str:
    """Return under which name the rows of a request are counted once; empty for none.

    Another request under the same key has another name: a thousand rows do not pass for the
    one that was counted, should that one be refused.
    """
    if not request.idempotency_key:
        return ""
    key = hashlib.sha256(request.idempotency_key.encode())
    return hashlib.sha256(key.digest() + request_digest(request)).hexdigest()


def _is_there(board: Board, job_id: str, caller: Caller) -> bool:
    try:
        board.find(job_id, owner=caller.key_id)
    except UnknownQueryError:
        return False
    return True
