"""`Endings`: writes down how jobs end, in an order that survives a crash at any point."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fedinfer_flower.errors import (
    AuditLogError,
    FedInferError,
    NotEnoughNodesError,
    QuorumNotMetError,
)
from fedinfer_flower.incentives.payments.base import MICRO
from fedinfer_flower.observability.audit_log import AuditLog
from fedinfer_flower.observability.metrics import GatewayMetrics
from fedinfer_flower.serving.accounting import Accounts, Money
from fedinfer_flower.serving.jobs import Job, JobState
from fedinfer_flower.serving.open_job import OpenJob
from fedinfer_flower.serving.outbox import Outbox
from fedinfer_flower.serving.status import Chronicle

__all__ = ["Endings"]

log = logging.getLogger("fedinfer_flower.gateway")

_EVENTS = {
    JobState.DONE: "done",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


class Endings:
    """Ends jobs: each once, by whoever comes first.

    The order is: audit log; outbox, where the result lies beside what is to be posted; those
    who listen; ledger; and a note in the outbox that it was posted.

    Parameters
    ----------
    outbox : Outbox
    accounts : Accounts, optional
    audit : AuditLog, optional
        An answer that cannot be entered in it is not given.
    metrics : GatewayMetrics
    chronicle : Chronicle
    gone : callable
        Called with a job that ended.
    clock : callable
    """

    def __init__(
        self,
        *,
        outbox: Outbox,
        accounts: Accounts | None,
        audit: AuditLog | None,
        metrics: GatewayMetrics,
        chronicle: Chronicle,
        gone: Callable[[OpenJob], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox, self._accounts, self._audit = outbox, accounts, audit
        self._metrics, self._chronicle = metrics, chronicle
        self._gone, self._clock = gone, clock
        self._closed = False
        self._posting = threading.Lock()
        self._no_audit = self._no_disk = ""

    @property
    def broken(self) -> str:
        """Why no answer can be given at present; empty while one can."""
        return self._no_audit or self._no_disk

    def close(self) -> None:
        """Write no more: what ends from now on is for the next start."""
        self._closed = True

    def accepted(self, job: OpenJob) -> None:
        """Enter a job in the audit log.

        Raises
        ------
        AuditLogError
            If that cannot be done; the job has failed then.
        """
        try:
            self._enter("accepted", job.job)
        except AuditLogError as exc:
            job.fail(exc)
            raise
        self._metrics.jobs_accepted.inc(model=job.job.model, kind=job.job.kind.value)

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
        if self._closed or not job.claim():
            return False
        money = self._money(job, earned if state is JobState.DONE else None)
        facts = dict(provenance or {})
        if money is not None and state is JobState.DONE:
            facts["credits"] = money.cost / MICRO
        ended = dataclasses.replace(
            job.job,
            state=state,
            ended_at=self._clock(),
            answer=answer,
            receipt=receipt,
            provenance=facts,
            error={} if error is None else Job.error_facts(error),
        )
        ended, money = self._written(job, ended, money)
        self._gone(job)
        self._count(ended)
        job.show(ended)
        if money is not None:
            self.settle(ended.job_id, money)
        return True

    def _written(self, job: OpenJob, ended: Job, money: Money | None) -> tuple[Job, Money | None]:
        """Write an end down; return it as it is told, and what is to be posted now."""
        try:
            self._enter(_EVENTS[ended.state], ended)
        except AuditLogError as exc:
            money, ended = self._money(job, None), _failed(ended, exc)
        try:
            self._outbox.end(ended, money="" if money is None else money.to_json())
        except FedInferError as exc:
            # It is still open on disk: the next start asks again, or gives the fee back.
            self._no_disk = exc.message
            return _failed(ended, exc), None
        self._no_disk = ""
        return ended, money

    def late(self, job: OpenJob, *, missing: tuple[int, int] | None) -> None:
        """End a job whose deadline has passed."""
        error: FedInferError
        if missing is not None:
            error = NotEnoughNodesError(
                f"{missing[0]} sites can be asked, {missing[1]} are needed",
                hint="start the sites' SuperNodes; /v1/status says what they last answered",
            )
        else:
            error = QuorumNotMetError(
                f"no answer within {job.request.timeout_s:g} s",
                hint="raise timeout_s; /v1/status says how long the sites take",
            )
        job.fail(error, provenance=job.rows.provenance())

    def settle(self, job_id: str, money: Money) -> None:
        """Post what is to be posted; if the ledger cannot be used, later."""
        if self._accounts is None or money.stage != "settle":
            return
        try:
            with self._posting:
                self._accounts.post(money)
                self._outbox.set_money(job_id, "")
        except FedInferError as exc:
            log.error("job %s is not settled yet: %s", job_id, exc.code)
            self._chronicle.note_error(exc, job_id=job_id)

    def _money(self, job: OpenJob, earned: Mapping[str, float] | None) -> Money | None:
        return Money.from_json(job.money).settled(earned or {}) if job.money else None

    def _enter(self, event: str, job: Job) -> None:
        if self._audit is None:
            return
        facts: dict[str, str | int | float | bool] = {
            "job_id": job.job_id,
            "querier": job.owner,
            "model": job.model,
            "kind": job.kind.value,
            "n_rows": job.n_rows,
        }
        for name, key in (
            ("protection", "protection"),
            ("rule", "rule"),
            ("epsilon", "epsilon_per_query"),
            ("credits", "credits"),
            ("degraded", "degraded"),
        ):
            if key in job.provenance:
                facts[name] = job.provenance[key]
        if job.error:
            facts["code"] = job.error["code"]
        try:
            self._audit.append(event, **facts)
        except FedInferError as exc:
            self._no_audit = exc.message
            raise AuditLogError(exc.message, hint=exc.hint) from None
        self._no_audit = ""

    def _count(self, ended: Job) -> None:
        self._chronicle.note_end(ended)
        self._metrics.jobs_ended.inc(
            model=ended.model, state=ended.state.value, code=ended.error.get("code", "")
        )
        self._metrics.job_seconds.observe(
            max(ended.ended_at - ended.accepted_at, 0.0), model=ended.model
        )
        if ended.state is JobState.DONE:
            self._metrics.rows.inc(ended.n_rows, model=ended.model)


def _failed(ended: Job, error: FedInferError) -> Job:
    return dataclasses.replace(
        ended, state=JobState.FAILED, answer=b"", receipt=b"", error=Job.error_facts(error)
    )
