"""What a querier asks of a gateway once a job is in: its end, its answer, its receipt."""

from __future__ import annotations

import dataclasses

from fedinfer_flower.errors import (
    BindingError,
    GatewayError,
    QueryCancelledError,
    ReceiptError,
    UnknownNameError,
    UnknownQueryError,
)
from fedinfer_flower.querier.gateway_asking import (
    LONGEST_WAIT_S,
    SPARE_S,
    TELLING_WAIT_S,
    Submitted,
    directory_of_another_run,
    submit_talk,
)
from fedinfer_flower.querier.gateway_job import (
    Answer,
    GatewayJob,
    check_receipt,
    read_job,
    read_prediction,
)
from fedinfer_flower.querier.gateway_wire import MAX_ANSWER_BYTES, Call, Talk, Terms, exchange
from fedinfer_flower.query import Prediction
from fedinfer_flower.receipts.receipt import MAX_RECEIPT_BYTES
from fedinfer_flower.wire.documents import CombinedAnswer

__all__ = ["cancel_talk", "finish_talk"]


def finish_talk(submitted: Submitted, terms: Terms) -> Talk[Answer]:
    """Wait for the end of a job; open and check what came of it.

    Raises
    ------
    QueryCancelledError
        If the job was called off.
    GatewayError
        If the time given ran out before it ended.
    FedInferError
        What the job ended with; what is wrong with the answer, or with its receipt.
    """
    while True:
        try:
            ended = yield from _followed(submitted, terms)
            break
        except BindingError:
            asked = submitted.sealed
            if asked is None:
                raise
            fresh = yield from directory_of_another_run(
                submitted.asking, asked.run_id, submitted.times, terms
            )
            if fresh is None:
                raise
            submitted = yield from submit_talk(
                submitted.asking, terms, fresh=fresh, times=submitted.times + 1
            )
    prediction = yield from _opened(submitted, ended, terms)
    answer = Answer(
        prediction=prediction,
        provenance=ended.provenance,
        job_id=ended.job_id,
        asked_times=submitted.times,
    )
    return (yield from _with_receipt(answer, submitted, terms))


def _followed(submitted: Submitted, terms: Terms) -> Talk[GatewayJob]:
    job, tell = submitted.job, submitted.asking.on_progress
    while True:
        if job.error is not None:
            raise job.error
        if tell is not None:
            tell(job)
        if job.state == "cancelled":
            raise QueryCancelledError("the query was called off", hint="ask again")
        if job.ended:
            if job.state != "done":
                raise GatewayError("the gateway says that the query failed, and not why")
            return job
        if terms.left_s <= 0.0:
            raise GatewayError(
                "the time given ran out; the gateway goes on with the query until its own deadline",
                hint=f"the job is {job.job_id}",
            )
        wait_s = min(TELLING_WAIT_S if tell else LONGEST_WAIT_S, terms.left_s)
        call = Call(
            method="GET",
            path=f"/v1/queries/{submitted.job.job_id}",
            params={"wait_s": f"{wait_s:.3f}"},
            timeout_s=wait_s + SPARE_S,
            max_bytes=MAX_ANSWER_BYTES,
        )
        seen = read_job((yield from exchange(call, terms)).body)
        if seen.job_id != submitted.job.job_id:
            raise BindingError("the gateway's reply is about another job")
        job = seen


def _opened(submitted: Submitted, ended: GatewayJob, terms: Terms) -> Talk[Prediction]:
    if submitted.querier is None:
        return read_prediction(ended.answer or {}, n_rows=submitted.n_rows)
    path = f"/v1/queries/{ended.job_id}/answer"
    call = Call(method="GET", path=path, max_bytes=MAX_ANSWER_BYTES)
    reply = yield from exchange(call, terms)
    return submitted.querier.open(CombinedAnswer.from_bytes(reply.body))


def _with_receipt(answer: Answer, submitted: Submitted, terms: Terms) -> Talk[Answer]:
    mode = submitted.asking.receipt
    if mode == "skip":
        return answer
    path = f"/v1/queries/{answer.job_id}/receipt"
    call = Call(method="GET", path=path, max_bytes=MAX_RECEIPT_BYTES)
    try:
        receipt = (yield from exchange(call, terms)).body
    except (UnknownNameError, UnknownQueryError):
        receipt = b""
    if not receipt:
        if mode == "require":
            raise ReceiptError(
                "the gateway has no receipt of the query",
                hint="sites sign one where receipts are on; receipt='verify' goes on without",
            )
        return answer
    querier = submitted.querier
    checks = check_receipt(
        receipt,
        pins=submitted.asking.pins,
        sealed=submitted.sealed,
        querier="" if querier is None else querier.identity.key_id,
    )
    return dataclasses.replace(answer, receipt=receipt, checks=checks)


def cancel_talk(job_id: str, terms: Terms) -> Talk[GatewayJob]:
    """Call a job off; return it as it stands, which may be ended otherwise."""
    call = Call(method="DELETE", path=f"/v1/queries/{job_id}")
    reply = yield from exchange(call, terms)
    return read_job(reply.body)
