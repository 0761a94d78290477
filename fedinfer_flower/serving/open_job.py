"""`OpenJob`: a job between acceptance and its end, as runners and listeners see it."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fedinfer_flower.errors import FedInferError
from fedinfer_flower.serving.jobs import Job, JobRequest, JobState, Progress, Unsubscribe
from fedinfer_flower.serving.rows_answer import RowsAnswer

__all__ = ["JobEnds", "OpenJob"]

log = logging.getLogger("fedinfer_flower.gateway")


class JobEnds(Protocol):
    """Who writes down how jobs end."""

    def end(
        self,
        job: OpenJob,
        state: JobState,
        *,
        answer: bytes = b"",
        receipt: bytes = b"",
        provenance: Mapping[str, Any] | None = None,
        error: FedInferError | None = None,
        earned: Mapping[str, float] | None = None,
    ) -> bool:
        """End a job; False if it had ended before."""
        ...


class OpenJob:
    """One job; all methods may be called from any thread.

    Parameters
    ----------
    job : Job
    request : JobRequest
    ends : JobEnds
    money : str
        What is to be posted to the ledger if the job ends now.
    clock : callable
        Seconds since 1970, as the job's deadline is given.
    """

    def __init__(
        self,
        job: Job,
        request: JobRequest,
        *,
        ends: JobEnds,
        money: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._job, self.request, self.money = job, request, money
        self._ends = ends
        self._lock = threading.RLock()
        # By a clock that nobody sets: from here on, wall time is only shown. After a restart
        # it may have been set back: that gives a job no more time than it asked for.
        self._ends_at = time.monotonic() + min(job.deadline_at - clock(), request.timeout_s)
        self._claimed = False
        self._listeners: dict[object, Callable[[Job], None]] = {}
        self.rows = RowsAnswer(job.n_rows)

    @property
    def job_id(self) -> str:
        """Id of the job."""
        return self._job.job_id

    @property
    def job(self) -> Job:
        """The job as it stands."""
        return self._job

    @property
    def cancelled(self) -> bool:
        """Whether nothing is to be done for the job any more: called off, late, or ended."""
        return self._claimed

    @property
    def left_s(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self._ends_at - time.monotonic()

    # -- for runners -------------------------------------------------------------------

    def tell(self, progress: Progress) -> None:
        """Show how far the job is."""
        with self._lock:
            if not self._claimed:
                self.show(dataclasses.replace(self._job, progress=progress))

    def finish(
        self,
        answer: bytes,
        *,
        provenance: Mapping[str, Any],
        receipt: bytes = b"",
        earned: Mapping[str, float] | None = None,
    ) -> bool:
        """End the job with its answer; False if it had ended, and the answer is dropped.

        Parameters
        ----------
        earned : mapping of str to float, optional
            Credits at the sites' prices, by key id of the sites in the answer.
        """
        return self._ends.end(
            self,
            JobState.DONE,
            answer=answer,
            receipt=receipt,
            provenance=provenance,
            earned=earned,
        )

    def fail(self, error: FedInferError, *, provenance: Mapping[str, Any] | None = None) -> bool:
        """End the job with a typed error; False if it had ended."""
        return self._ends.end(self, JobState.FAILED, error=error, provenance=provenance)

    # -- for the core ------------------------------------------------------------------

    def begin(self) -> None:
        """Show that the sites are being asked."""
        with self._lock:
            if not self._claimed and self._job.state is JobState.ACCEPTED:
                self.show(dataclasses.replace(self._job, state=JobState.ASKING))

    def claim(self) -> bool:
        """Take the right to end the job; True for one caller only."""
        with self._lock:
            claimed, self._claimed = self._claimed, True
            return not claimed

    def show(self, job: Job) -> None:
        """Set how the job stands and tell those who listen, in order."""
        with self._lock:
            self._job = job
            for tell in list(self._listeners.values()):
                _tell(tell, job)

    def listen(self, tell: Callable[[Job], None]) -> Unsubscribe:
        """Call `tell` now and at every change."""
        token = object()
        with self._lock:
            if not self._job.state.ended:
                self._listeners[token] = tell
            _tell(tell, self._job)

        def stop() -> None:
            self._listeners.pop(token, None)

        return stop


def _tell(tell: Callable[[Job], None], job: Job) -> None:
    try:
        tell(job)
    except Exception as exc:  # a listener that is broken must not end a job
        log.warning("a listener of job %s failed (%s)", job.job_id, type(exc).__name__)
