"""Batches of questions, one for each receiver: made here in clear, or taken from a sealed job."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from fedinfer_flower.strategies.refine_options import RefineOptions
from fedinfer_flower.strategies.refine_who import Who
from fedinfer_flower.wire.refine_asked import Asked, QuerierConsent
from fedinfer_flower.wire.refine_job import AskedBatch, RefineJob

__all__ = ["clear_batches", "sealed_batches"]


def clear_batches(
    questions: Sequence[str], who: Who, options: RefineOptions, *, run_id: int
) -> list[list[AskedBatch]]:
    """Return the coordinator's own questions, cut into batches."""
    job_id, size = secrets.token_hex(12), options.batch_size
    return [
        [
            _clear_batch(
                questions[start : start + size],
                who,
                options,
                run_id=run_id,
                number=number,
                batch=f"{job_id}-{number}",
                place=place,
            )
            for place in range(len(who.receivers))
        ]
        for number, start in enumerate(range(0, len(questions), size))
    ]


def sealed_batches(job: RefineJob, who: Who) -> list[list[AskedBatch]]:
    """Return the batches of a job whose receivers are there."""
    wanted = {site.key_id for site in who.receivers}
    numbers = sorted({batch.number for batch in job.batches})
    grouped = [[b for b in job.batches if b.number == n and b.receiver in wanted] for n in numbers]
    return [group for group in grouped if group]


def _clear_batch(
    questions: Sequence[str],
    who: Who,
    options: RefineOptions,
    *,
    run_id: int,
    number: int,
    batch: str,
    place: int,
) -> AskedBatch:
    receiver = who.receivers[place]
    consent = QuerierConsent(
        run_id=run_id,
        query_id=f"{batch}-{place}",
        batch=batch,
        allow=() if options.medium == "own" else tuple(sorted(who.allow)),
        receiver=receiver.key_id,
        sharers=tuple(site.key_id for site in who.sharers_of(receiver)),
        max_rounds=who.rounds,
    )
    asked = Asked(
        questions=tuple(questions),
        consent=consent,
        decoding=options.decoding,
        rephrase=options.rephrase,
    )
    return AskedBatch(
        query_id=consent.query_id,
        number=number,
        receiver=receiver.key_id,
        n_questions=len(questions),
        asked=asked.to_bytes(),
    )
