"""Values of the gateway: what was accepted, how far it is, how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from fedinfer_flower.errors import FedInferError, InvalidValueError

__all__ = ["Board", "Job", "JobKind", "JobRequest", "JobState", "Progress", "Unsubscribe"]

Unsubscribe = Callable[[], None]


class JobKind(StrEnum):
    """What a job's body is."""

    ROWS = "rows"
    SEALED = "sealed"
    TEXT = "text"


class JobState(StrEnum):
    """Where a job is. The last three are ends."""

    ACCEPTED = "accepted"
    ASKING = "asking"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to the job."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What an application asks of the gateway.

    Parameters
    ----------
    owner : str
        Id of the API key; nobody else sees the job.
    model : str
        A model of `GatewayConfig.models`.
    kind : JobKind
    body : bytes
        ``ROWS``: an array as `wire.arrays` packs it, ``dtype`` and shape in `facts`.
        ``SEALED``: `SealedJob.to_bytes`. ``TEXT``: UTF-8 JSON, see `serving.text_job`.
    facts : mapping
        What else the body needs to be read: JSON values.
    n_rows : int
        Rows, or questions; what quotas count.
    timeout_s : float
        Seconds after which the job ends in any case.
    idempotency_key : str
        Two requests of one owner with the same key are one job; empty for none.

    Privacy
    -------
    ``ROWS`` and ``TEXT`` are read by the gateway, and lie in its outbox until the job ends.
    """

    owner: str
    model: str
    kind: JobKind
    body: bytes = field(repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)
    n_rows: int
    timeout_s: float
    idempotency_key: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.n_rows < 1 or not (math.isfinite(self.timeout_s) and self.timeout_s > 0.0):
            raise InvalidValueError("a job has at least one row, and a positive timeout_s")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is.

    Parameters
    ----------
    rows_done, rows : int
    sites_asked, sites_answered : int
        Of the batch that is being asked.
    text : str
        What is there of an answer in text.
    """

    rows_done: int = 0
    rows: int = 0
    sites_asked: int = 0
    sites_answered: int = 0
    text: str = field(default="", repr=False)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it stands.

    Parameters
    ----------
    job_id : str
        32 hex digits, from a CSPRNG.
    owner, model, kind, n_rows : see `JobRequest`
    state : JobState
    accepted_at, deadline_at, ended_at : float
        Seconds since 1970; `ended_at` is 0.0 before the end.
    progress : Progress
    answer : bytes
        ``ROWS`` and ``TEXT``: UTF-8 JSON. ``SEALED``: `CombinedAnswer.to_bytes`. Empty unless
        the state is ``DONE``.
    receipt : bytes
        What the sites signed, where they did.
    error : mapping
        Of a failed job: ``code``, ``type``, ``message``, ``hint``.
    provenance : mapping
        How the answer came about, JSON values: ``sites_asked``, ``sites_answered``,
        ``degraded``, ``rule``, ``protection``, ``epsilon_per_query``, ``delta_per_query``,
        ``request_bytes``, ``reply_bytes``, ``seconds``, ``query_ids``, ``credits``,
        ``disagreement``; a key that does not apply is absent.
    """

    job_id: str
    owner: str
    model: str
    kind: JobKind
    n_rows: int
    state: JobState
    accepted_at: float
    deadline_at: float
    ended_at: float = 0.0
    progress: Progress = field(default_factory=Progress)
    answer: bytes = field(default=b"", repr=False)
    receipt: bytes = field(default=b"", repr=False)
    error: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def error_facts(exc: FedInferError) -> dict[str, str]:
        """Return what `error` holds of a typed error."""
        return {
            "code": exc.code,
            "type": type(exc).__name__,
            "message": exc.message,
            "hint": exc.hint,
        }


class Board(Protocol):
    """What the HTTP routes know of the gateway. All methods may be called from any thread."""

    def submit(self, request: JobRequest) -> Job:
        """Accept a job: when this returns, it is on disk and will end by its deadline.

        The same idempotency key with the same body gives the earlier job, as it stands.

        Raises
        ------
        BindingError
            If the idempotency key was used with another request.
        InvalidValueError, ProtocolError
            If the model does not exist, or the body does not fit it.
        QuotaExceededError
            If the queue is full.
        UnavailableError
            If the gateway is closing.
        """
        ...

    def find(self, job_id: str, *, owner: str) -> Job:
        """Return a job; raises `UnknownQueryError` if it is not there or not the owner's."""
        ...

    def cancel(self, job_id: str, *, owner: str) -> Job:
        """Call a job off, unless it has ended; sites that were asked may answer all the same."""
        ...

    def listen(self, job_id: str, *, owner: str, tell: Callable[[Job], None]) -> Unsubscribe:
        """Call `tell` at every change, from some thread, and once at once with the job."""
        ...

    def models(self) -> tuple[Mapping[str, Any], ...]:
        """Return what `/v1/models` shows of each model: JSON values with ``id`` and ``kind``."""
        ...

    def directory(self, model: str) -> bytes:
        """Return `Directory.to_bytes` of the sites, for sealing; raises `UnavailableError`."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Return what the dashboard shows, JSON values; see `serving.status`."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Return (whether queries would be answered now, why not)."""
        ...
