"""Rows in clear: the gateway asks for its callers, many in one message."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import FedInferError, QuorumNotMetError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.querier.querier import Querier
from fedinfer_flower.query import Deadline, SiteOutcome, SiteStatus
from fedinfer_flower.serving.asking import cause_of, check_least, price_a_row, signed_receipt
from fedinfer_flower.serving.jobs import JobKind, Progress
from fedinfer_flower.serving.open_job import OpenJob
from fedinfer_flower.serving.rows_answer import RowsFound, provenance_of
from fedinfer_flower.serving.runners import Bench, PartOfJob
from fedinfer_flower.strategies.fed_ensemble import FedEnsemble
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.arrays import array_from_bytes

__all__ = ["RowsRunner", "rows_of", "unique_rows"]

log = logging.getLogger("fedinfer_flower.gateway")

_RENEW_S: Final = 5.0
_WORTH_S: Final = 0.2
"""Asking again with less time than this would only ask for nothing."""


class RowsRunner:
    """Asks rows by `FedEnsemble`, sealed to the sites, with the gateway as the querier.

    A row that comes twice in a batch is asked once. A batch that fails is asked again where
    that can help: with fresh cards, if a site had another model than its card says; in two
    halves, if sites refused something that one caller's rows may be to blame for; with more
    time, for those of its jobs that have it.

    Privacy
    -------
    The gateway reads rows and combined answers, and under ``plain`` and ``dp`` each site's.
    Sites learn that the gateway asks, and not for whom.
    """

    kinds = frozenset({JobKind.ROWS})

    def run(self, jobs: Sequence[OpenJob], bench: Bench) -> None:
        """Ask whole jobs, in one batch."""
        self.run_parts([PartOfJob(job=j, start=0, stop=j.request.n_rows) for j in jobs], bench)

    def run_parts(
        self, parts: Sequence[PartOfJob], bench: Bench, *, may_renew: bool = True
    ) -> None:
        """Ask parts of jobs of one model, with rows of one shape and dtype, in one batch."""
        parts = [part for part in parts if not part.job.cancelled]
        if not parts:
            return
        outcomes: tuple[SiteOutcome, ...] = ()
        strategy = None
        try:
            strategy = self._strategy(parts, bench)
            self._ask(parts, bench, strategy)
            return
        except FedInferError as exc:
            outcomes = () if strategy is None else strategy.outcomes
            error = cause_of(exc, outcomes)
        stale = bench.membership.note(outcomes)
        bench.chronicle.note_outcomes(outcomes)
        again = [p for p in parts if not p.job.cancelled and p.job.left_s > _WORTH_S]
        for part in parts:
            if part not in again:
                part.job.fail(error)
        if not again:
            return
        if stale and may_renew:
            left_s = min(part.job.left_s for part in again)
            bench.membership.renew(stale, timeout_s=min(_RENEW_S, left_s / 2))
            self.run_parts(again, bench, may_renew=False)
        elif len(halves := _halves(again)) == 2 and _may_be_rows(outcomes):
            for half in halves:
                self.run_parts(half, bench, may_renew=False)
        elif len(again) < len(parts):
            self.run_parts(again, bench, may_renew=False)
        else:
            for part in again:
                part.job.fail(error)

    def _strategy(self, parts: Sequence[PartOfJob], bench: Bench) -> FedEnsemble:
        model = bench.model(parts[0].job.request.model)
        left_s = min(part.job.left_s for part in parts)
        # The answer has to be opened and written down by the deadline as well.
        timeout_s = left_s - min(0.1 * left_s, 0.25)
        if timeout_s <= 0.0:
            raise QuorumNotMetError("no time was left to ask the sites", hint="raise timeout_s")
        return FedEnsemble(
            rule=model.rule,
            protection=make_protection(model.protection, dict(model.protection_options)),
            deadline=Deadline(
                timeout_s=timeout_s, quorum=model.quorum, straggler_s=model.straggler_s
            ),
        )

    def _ask(self, parts: Sequence[PartOfJob], bench: Bench, strategy: FedEnsemble) -> None:
        name = parts[0].job.request.model
        cards = bench.membership.cards()
        check_least(bench.model(name), len(cards))
        rows, places = unique_rows([rows_of(p.job)[p.start : p.stop] for p in parts])
        querier = Querier(protection=strategy.protection, identity=bench.identity)
        job = querier.ask(
            rows,
            directory=bench.membership.directory(cards),
            batch_size=len(rows),
            rule="auto" if strategy.rule is None else strategy.rule,
            ttl_s=strategy.deadline.timeout_s,
        )
        for part in parts:
            part.job.tell(
                Progress(
                    rows_done=part.job.job.progress.rows_done,
                    rows=part.job.job.n_rows,
                    sites_asked=len(cards),
                )
            )
        with bench.grid() as grid:
            result = strategy.ask_cohort(
                grid, job, querier, cards=cards, all_cards=cards, run_id=bench.run_id
            )
        bench.membership.note(result.reports[0].sites)
        bench.chronicle.note_round(
            name, result.reports, cards, querier=bench.identity.key_id, metrics=bench.metrics
        )
        earned = price_a_row(result.reports[0], cards)
        receipt = signed_receipt(result, bench.identity)
        _hand_out(parts, places, result, receipt, earned)


def _hand_out(
    parts: Sequence[PartOfJob],
    places: Sequence[npt.NDArray[np.intp]],
    result: InferenceResult,
    receipt: bytes,
    earned: Mapping[str, float],
) -> None:
    provenance = provenance_of(result.reports)
    assert result.prediction is not None  # noqa: S101  the querier is here
    for part, where in zip(parts, places, strict=True):
        found = RowsFound(
            start=part.start,
            prediction=result.prediction,
            places=where,
            provenance=provenance,
            receipt=receipt,
            earned=earned,
        )
        whole, n_rows = part.job.rows, part.job.job.n_rows
        done = whole.put(found)
        if done < n_rows:
            part.job.tell(
                Progress(
                    rows_done=done,
                    rows=n_rows,
                    sites_asked=int(provenance["sites_asked"]),
                    sites_answered=int(provenance["sites_answered"]),
                )
            )
        else:
            part.job.finish(
                whole.body(),
                provenance=whole.provenance(),
                receipt=whole.receipt(),
                earned=whole.earned(),
            )


def rows_of(job: OpenJob) -> npt.NDArray[np.generic]:
    """Return the rows of a job.

    Raises
    ------
    ProtocolError
        If its body does not hold what its facts say.
    """
    facts = job.request.facts
    shape = tuple(int(size) for size in facts["shape"])
    return array_from_bytes(job.request.body, dtype=str(facts["dtype"]), shape=shape)


def unique_rows(
    blocks: Sequence[npt.NDArray[np.generic]],
) -> tuple[npt.NDArray[np.generic], list[npt.NDArray[np.intp]]]:
    """Return (all rows, each once, in the order in which they come; places of each block's).

    Rows are the same if their bytes are.

    Examples
    --------
    >>> rows, places = unique_rows([np.array([[2.0], [1.0]]), np.array([[2.0]])])
    >>> rows.tolist(), [p.tolist() for p in places]
    ([[2.0], [1.0]], [[0, 1], [0]])
    """
    rows = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    flat = np.ascontiguousarray(rows.reshape(len(rows), -1))
    named = flat.view(np.dtype((np.void, flat.dtype.itemsize * flat.shape[1]))).ravel()
    _, first, inverse = np.unique(named, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place_of = np.empty_like(order)
    place_of[order] = np.arange(len(order))
    places = place_of[inverse.ravel()]
    ends = np.cumsum([len(block) for block in blocks])[:-1]
    return rows[first[order]], list(np.split(places, ends))


def _halves(parts: Sequence[PartOfJob]) -> list[list[PartOfJob]]:
    """Return the parts in two halves of whole jobs; in one, if they are of one job."""
    job_ids = list(dict.fromkeys(part.job.job_id for part in parts))
    first = set(job_ids[: (len(job_ids) + 1) // 2])
    halves = (
        [p for p in parts if p.job.job_id in first],
        [p for p in parts if p.job.job_id not in first],
    )
    return [half for half in halves if half]


def _may_be_rows(outcomes: Collection[SiteOutcome]) -> bool:
    """Whether sites refused, which one caller's rows may be the reason for."""
    return any(outcome.status is SiteStatus.FAILED for outcome in outcomes)
