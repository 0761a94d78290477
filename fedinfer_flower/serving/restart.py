"""What becomes of jobs that a process left behind when it ended or was killed."""

from __future__ import annotations

from fedinfer_flower.errors import (
    BindingError,
    FedInferError,
    QuorumNotMetError,
    UnavailableError,
)
from fedinfer_flower.serving.accounting import Money
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.jobs import JobKind, JobState
from fedinfer_flower.serving.outbox import Stored

__all__ = ["verdict"]


def verdict(
    stored: Stored, config: GatewayConfig, *, run_id: int, now: float
) -> FedInferError | None:
    """Return why a job that has not ended cannot be asked again; None if it can.

    A job in clear is asked again from its first row, under new query ids: sites that have
    answered it before answer again, and are paid once. A sealed job names its run and its
    query ids, which sites answer once.
    """
    if stored.money and Money.from_json(stored.money).stage == "reserve":
        return UnavailableError(
            "the gateway was stopped while it accepted the query", hint="ask again"
        )
    if stored.job.deadline_at <= now:
        return QuorumNotMetError(
            "the gateway was stopped, and the query's time passed before it was back",
            hint="ask again",
        )
    model = config.models.get(stored.job.model)
    if model is None or (model.kind == "language") != (stored.job.kind is JobKind.TEXT):
        return UnavailableError("the gateway does not serve this model any more")
    if stored.job.kind is JobKind.SEALED:
        if stored.run_id != run_id:
            return BindingError(
                "the job is sealed for a run that has ended: the gateway was started again",
                hint="fetch the directory again and seal the queries anew",
            )
        if stored.job.state is JobState.ASKING:
            return BindingError(
                "the gateway was stopped while the sites answered, which they do once",
                hint="seal the queries anew",
            )
    return None
