"""A sealed job at the coordinator: who can open it, how to combine it, nothing of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import EnsembleRule, make_rule
from fedinfer_flower.errors import BindingError, FedInferError, SiteFailedError
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.documents import QueryJob
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.sealed_job import SealedBatch, SealedJob

__all__ = [
    "batches_of",
    "n_queries_of",
    "request_bytes_of",
    "sealed_rule",
    "sealed_template",
    "seated",
]


def seated(
    job: SealedJob, cards: Mapping[int, SiteCard], *, run_id: int
) -> tuple[dict[int, SiteCard], dict[int, FedInferError]]:
    """Return (sites of the job that are here, those of its roster that are not).

    A missing site has no node id here: it counts under its place in the roster, negative.

    Raises
    ------
    BindingError
        If the job is sealed for another run.
    """
    if job.run_id != run_id:
        raise BindingError(
            "the job is sealed for another run",
            hint="fetch the directory of this run and ask again",
        )
    wanted = set(job.roster.key_ids)
    here = {n: card for n, card in cards.items() if card.key_id in wanted}
    missing = wanted - {card.key_id for card in here.values()}
    failures: dict[int, FedInferError] = {
        -1 - job.roster.place_of(key_id): SiteFailedError(
            "the site is in the job's roster and not in this run", site=key_id[:16]
        )
        for key_id in missing
    }
    return here, failures


def sealed_rule(job: SealedJob, own: EnsembleRule | None) -> tuple[EnsembleRule, str]:
    """Return (rule, reason) of a job.

    Raises
    ------
    BindingError
        If the strategy was built for another rule.
    """
    rule = make_rule(job.rule, dict(job.rule_options))
    if own is not None and (own.name, own.options()) != (rule.name, rule.options()):
        raise BindingError(
            f"the job is sealed for rule {rule.name!r}, the strategy has {own.name!r}",
            hint="leave the strategy's rule at 'auto': the querier has chosen",
        )
    return rule, job.rule_reason


def sealed_template(job: SealedJob) -> Question:
    """Return the question as far as the coordinator knows it."""
    return Question(
        query_id="template",
        inputs=np.zeros((0, 1)),
        classes=job.classes,
        n_sites=len(job.roster),
        rule=job.rule,
        protection=job.protection,
        rule_options=job.rule_options,
        protection_options=job.protection_options,
        public_key=job.public_key,
        key_id=job.key_id,
        roster=job.roster,
        querier=job.querier,
        expires_at=job.expires_at,
        relay=job.relay,
    )


def batches_of(
    job: QueryJob | SealedJob,
) -> Iterator[tuple[str, npt.NDArray[np.generic] | SealedBatch]]:
    """Yield (query id, rows or sealed rows) of each batch."""
    if isinstance(job, SealedJob):
        for batch in job.batches:
            yield batch.query_id, batch
    else:
        yield from job.batches()


def request_bytes_of(job: QueryJob | SealedJob) -> int:
    """Return the bytes of a job's rows, as they travel to each site."""
    if isinstance(job, SealedJob):
        return sum(len(batch.sealed.body) for batch in job.batches)
    return int(job.inputs.nbytes)


def n_queries_of(job: QueryJob | SealedJob) -> int:
    """Return the number of rows of a job."""
    return job.n_queries if isinstance(job, SealedJob) else len(job.inputs)
