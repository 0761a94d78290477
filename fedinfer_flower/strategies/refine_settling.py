"""From what happened to every batch to the one result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedinfer_flower.errors import NotEnoughNodesError, SiteFailedError
from fedinfer_flower.query import SiteStatus
from fedinfer_flower.strategies.refine_exchange import BatchOutcome, ReceiverOutcome
from fedinfer_flower.strategies.refine_onboarding import LanguageSite
from fedinfer_flower.strategies.refine_result import (
    Pairing,
    PlannedMedium,
    ReceiverAnswers,
    RefineResult,
    SharerOutcome,
)
from fedinfer_flower.strategies.refine_who import Who
from fedinfer_flower.wire.refine_job import RefineAnswer, RefinedPart

__all__ = ["settle"]


def settle(
    who: Who, batches: Sequence[BatchOutcome], *, introduction_s: float, run_id: int
) -> RefineResult:
    """Return the result of all batches."""
    outcomes = [o for batch in batches for o in batch.outcomes] + _missing(who)
    plans: dict[tuple[str, str], PlannedMedium] = {}
    for batch in batches:
        plans |= batch.plans
    return RefineResult(
        receivers=tuple(
            _answers_of(
                site, [b.receivers[site.key_id] for b in batches if site.key_id in b.receivers]
            )
            for site in who.receivers
        ),
        outcomes=tuple(outcomes),
        plans=tuple(plans[pair] for pair in sorted(plans)),
        pairings=_pairings(who, outcomes),
        rounds=tuple(batch.rounds for batch in batches),
        seconds=sum(batch.seconds for batch in batches),
        introduction_s=introduction_s,
        request_bytes=sum(batch.bytes_out for batch in batches),
        reply_bytes=sum(batch.bytes_in for batch in batches),
        sealed=who.sealed,
        answer=_answer(who, batches, run_id),
    )


def _answers_of(site: LanguageSite, found: Iterable[ReceiverOutcome]) -> ReceiverAnswers:
    texts: list[str | None] = []
    used: list[dict[str, str]] = []
    answered: list[bool] = []
    codes: list[str] = []
    for each in found:
        n = each.batch.n_questions
        texts += each.texts if each.texts is not None else [None] * n
        used += each.used or [{} for _ in range(n)]
        answered += [bool(each.body)] * n
        codes += [_code(each)] * n
    return ReceiverAnswers(
        name=site.name,
        answers=tuple(texts),
        used=tuple(used),
        answered=tuple(answered),
        error_codes=tuple(codes),
    )


def _code(found: ReceiverOutcome) -> str:
    if found.body:
        return ""
    return SiteFailedError.code if found.error is None else found.error.code


def _missing(who: Who) -> list[SharerOutcome]:
    return [
        SharerOutcome(
            query_id="",
            round=1,
            receiver=site.name,
            sharer=name,
            medium="own",
            status=SiteStatus.FAILED,
            error_code=NotEnoughNodesError.code,
        )
        for site in who.receivers
        for name in who.missing
    ]


def _pairings(
    who: Who, outcomes: Sequence[SharerOutcome]
) -> dict[tuple[str, str], tuple[Pairing, ...]]:
    digests = {s.name: s.card.model_digest for s in (*who.sharers, *who.receivers)}
    found: dict[tuple[str, str], set[Pairing]] = {}
    for o in outcomes:
        if o.status is SiteStatus.ANSWERED and o.medium in ("cache", "text"):
            same = digests[o.receiver] == digests[o.sharer]
            kind = Pairing.of(same_model=same, medium=o.medium)
            found.setdefault((o.receiver, o.sharer), set()).add(kind)
    return {pair: tuple(sorted(kinds)) for pair, kinds in sorted(found.items())}


def _answer(who: Who, batches: Sequence[BatchOutcome], run_id: int) -> RefineAnswer:
    parts = []
    failures: dict[str, str] = {}
    for each in (r for batch in batches for r in batch.receivers.values()):
        if each.body:
            parts.append(
                RefinedPart(
                    query_id=each.batch.query_id,
                    receiver=each.batch.receiver,
                    round=each.round_number,
                    n_questions=each.batch.n_questions,
                    answers=each.body,
                )
            )
        else:
            failures[each.batch.query_id] = _code(each)
    if who.job is not None:
        for batch in who.job.batches:
            if batch.receiver in who.absent:
                failures[batch.query_id] = NotEnoughNodesError.code
    job_id = who.job.job_id if who.job is not None else parts[0].query_id.rsplit("-", 2)[0]
    return RefineAnswer(job_id=job_id, run_id=run_id, parts=tuple(parts), failures=failures)
