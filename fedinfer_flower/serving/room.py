"""`Room`: how much the gateway has accepted and not answered, in rows and in bytes."""

from __future__ import annotations

import threading

from fedinfer_flower.errors import QuotaExceededError
from fedinfer_flower.serving.config import LimitsConfig
from fedinfer_flower.serving.jobs import JobRequest

__all__ = ["Room"]


class Room:
    """Rows and bytes of the jobs that have not ended; all methods from any thread.

    Parameters
    ----------
    limits : LimitsConfig
        Its `queued_rows` and `queued_bytes`. Bodies are in memory until their jobs end, and a
        row may be as large as a body.

    Attributes
    ----------
    n_rows, n_bytes : int
        Taken.

    Examples
    --------
    >>> from fedinfer_flower.serving.jobs import JobKind
    >>> room = Room(LimitsConfig(queued_rows=3))
    >>> asked = JobRequest(owner="a", model="m", kind=JobKind.ROWS, body=b"1234", n_rows=2,
    ...                    timeout_s=1.0)
    >>> room.take(asked)
    >>> room.n_rows, room.n_bytes
    (2, 4)
    >>> room.take(asked)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.QuotaExceededError: FI415 ...
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self.n_rows = self.n_bytes = 0

    def take(self, request: JobRequest, *, always: bool = False) -> None:
        """Take room for a job.

        Parameters
        ----------
        always : bool
            There or not: it was accepted before.

        Raises
        ------
        QuotaExceededError
            If there is not enough.
        """
        with self._lock:
            n_rows, n_bytes = self.n_rows + request.n_rows, self.n_bytes + len(request.body)
            for kept, most, what in (
                (n_rows, self._limits.queued_rows, "rows"),
                (n_bytes, self._limits.queued_bytes, "bytes"),
            ):
                if kept > most and not always:
                    raise QuotaExceededError(
                        f"the gateway keeps at most {most} {what} that are not answered",
                        hint="ask again in a while, or in smaller parts",
                    )
            self.n_rows, self.n_bytes = n_rows, n_bytes

    def give_back(self, request: JobRequest) -> None:
        """Give the room of a job back."""
        with self._lock:
            self.n_rows -= request.n_rows
            self.n_bytes -= len(request.body)
