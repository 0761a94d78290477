"""Sealed jobs: passed on unread, answered with what only their querier can open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedinfer_flower.errors import FedInferError, QuorumNotMetError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.query import Deadline
from fedinfer_flower.serving.asking import cause_of, price_a_row, signed_receipt
from fedinfer_flower.serving.jobs import JobKind, Progress
from fedinfer_flower.serving.open_job import OpenJob
from fedinfer_flower.serving.rows_answer import provenance_of
from fedinfer_flower.serving.runners import Bench
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["SealedRunner"]


class SealedRunner:
    """Passes sealed jobs on, each by itself, and the combined answer back.

    Nothing is asked twice: the sites answer a query id once, so that a job which failed has
    to be sealed anew by its querier.

    Privacy
    -------
    The gateway reads who asks, which sites, by which rule, and how many rows; no row. Of the
    answers it sees what the protection shows a coordinator.
    """

    kinds = frozenset({JobKind.SEALED})

    def run(self, jobs: Sequence[OpenJob], bench: Bench) -> None:
        """Run jobs one after the other."""
        for job in jobs:
            if job.cancelled:
                continue
            try:
                self._run_one(job, bench)
            except FedInferError as exc:
                job.fail(exc)

    def _run_one(self, job: OpenJob, bench: Bench) -> None:
        sealed = SealedJob.from_bytes(job.request.body)
        model = bench.model(job.request.model)
        n_batches, left_s = len(sealed.batches), job.left_s
        # Each batch has its share of the time: they are asked one after the other.
        timeout_s = (left_s - min(0.1 * left_s, 0.25)) / n_batches
        if timeout_s <= 0.0:
            raise QuorumNotMetError("no time was left to ask the sites", hint="raise timeout_s")
        strategy = FedEnsemble(
            protection=make_protection(model.protection, dict(model.protection_options)),
            deadline=Deadline(
                timeout_s=timeout_s, quorum=model.quorum, straggler_s=model.straggler_s
            ),
        )
        cards = bench.membership.cards()
        n_asked = len(sealed.roster)

        def progress(done: int, rows: int) -> None:
            job.tell(Progress(rows_done=done, rows=rows, sites_asked=n_asked))

        progress(0, sealed.n_queries)
        try:
            with bench.grid() as grid:
                result = strategy.ask_cohort(
                    grid,
                    sealed,
                    None,
                    cards=cards,
                    all_cards=cards,
                    progress=progress,
                    run_id=bench.run_id,
                )
        except FedInferError as exc:
            bench.membership.note(strategy.outcomes)
            bench.chronicle.note_outcomes(strategy.outcomes)
            raise cause_of(exc, strategy.outcomes) from None
        for report in result.reports:
            bench.membership.note(report.sites)
        querier = sealed.querier.key_id
        bench.chronicle.note_round(
            job.request.model, result.reports, cards, querier=querier, metrics=bench.metrics
        )
        job.finish(
            result.combined.to_bytes(),
            provenance=provenance_of(result.reports),
            receipt=signed_receipt(result, bench.identity),
            earned=_earned(result, cards),
        )


def _earned(result: InferenceResult, cards: Mapping[int, SiteCard]) -> dict[str, float]:
    total: dict[str, float] = {}
    for report in result.reports:
        for key_id, price in price_a_row(report, cards).items():
            total[key_id] = total.get(key_id, 0.0) + price * report.n_queries
    return total
