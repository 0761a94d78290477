"""One exchange of language models, sealed, with the gateway as its querier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flwr.serverapp import Grid

from fedinfer_flower.errors import NotEnoughNodesError, QuorumNotMetError
from fedinfer_flower.querier.language_querier import LanguageQuerier, OpenedAnswers
from fedinfer_flower.query import Deadline
from fedinfer_flower.serving.text_sites import LIMITS
from fedinfer_flower.strategies.base import Progress
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.strategies.refine_onboarding import LanguageSites
from fedinfer_flower.strategies.refine_options import consents
from fedinfer_flower.strategies.refine_result import RefineResult
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.refine_fields import MEDIA

__all__ = ["Exchanged", "exchange", "merged_facts", "willing"]

_SKEW_S: Final = 60.0
"""By how much a site's clock may be ahead of the gateway's."""


class _Introduced(FedRefine):
    """A refinement among sites that have introduced themselves already."""

    def __init__(self, *, sites: LanguageSites, **settings: Any) -> None:
        super().__init__(**settings)
        self._sites = sites

    def configure_onboarding(self, grid: Grid, run_id: int) -> LanguageSites:  # noqa: ARG002
        self._run_id = run_id
        return self._sites


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What came of an exchange.

    Parameters
    ----------
    result : RefineResult
    opened : mapping of receiver to OpenedAnswers
    query_ids : tuple of str
    """

    result: RefineResult
    opened: Mapping[str, OpenedAnswers]
    query_ids: tuple[str, ...]

    @property
    def by_receiver(self) -> dict[str, tuple[str | None, ...]]:
        """Answers by receiver."""
        return {name: answers.texts for name, answers in self.opened.items()}


def willing(sites: LanguageSites, named: Sequence[str] | None = None) -> list[str]:
    """Return who answers, of the named sites or all, in the order in which they are named.

    Raises
    ------
    NotEnoughNodesError
        If nobody does.
    """
    answering = [site.name for site in sites.sites if site.card.answers]
    found = answering if named is None else [name for name in named if name in answering]
    if not found:
        raise NotEnoughNodesError(
            "no site that may answer is there",
            hint="receiver of this model in gateway.toml; answers in the sites' policies",
        )
    return found


def exchange(
    grid: Grid,
    sites: LanguageSites,
    questions: Sequence[str],
    *,
    settings: Mapping[str, Any],
    identity: Identity,
    timeout_s: float,
    progress: Progress | None = None,
) -> Exchanged:
    """Ask receivers, and open what they answer.

    Parameters
    ----------
    grid : Grid
    sites : LanguageSites
    questions : sequence of str
    settings : mapping
        Of `FedRefine`: ``receiver`` (names), ``sharers``, ``medium``, ``allow``,
        ``rephrase``, ``rounds``, ``decoding``, ``batch_size``.
    identity : Identity
        Of the gateway; sites can pin it.
    timeout_s : float
        Of the whole exchange.
    progress : callable, optional

    Raises
    ------
    QueryError, ProtocolError
        As `FedRefine.start` and `LanguageQuerier.open`.

    Privacy
    -------
    The gateway reads questions and answers, receivers too; sharers read rewritten questions.
    The SuperLink carries sealed bytes: it learns who asks whom, sizes and times.
    """
    medium = settings.get("medium", "auto")
    receivers = willing(sites, settings["receiver"])
    wanted = settings.get("sharers")
    sharers = [n for n in sites.names if wanted is None or n in wanted]
    alone = medium == "own" or not sharers or sharers == receivers[:1] == receivers
    given = consents(settings.get("allow", ("text",)))
    querier = LanguageQuerier([site.card for site in sites.sites], identity=identity)
    size = settings.get("batch_size", 32)
    job = querier.ask(
        questions,
        receiver=receivers,
        sharers=None if alone else sharers,
        allow=() if alone else tuple(m for m in MEDIA if m in given),
        rounds=1 if alone else settings.get("rounds", 1),
        rephrase=settings.get("rephrase", "template"),
        decoding=settings.get("decoding", {}),
        batch_size=size,
        ttl_s=timeout_s + _SKEW_S,
    )
    strategy = _Introduced(
        sites=sites,
        receiver=receivers,
        medium="own" if alone else medium,
        allow=tuple(given) if given else ("text",),
        rephrase=settings.get("rephrase", "template"),
        deadline=Deadline(timeout_s=timeout_s / -(-len(questions) // size)),
        batch_size=size,
        min_available_nodes=1,
        limits=LIMITS,
    )
    result = strategy.start(grid, job, progress=progress)
    if result.answer is None:
        raise QuorumNotMetError("the receivers answered nothing that could be opened")
    return Exchanged(
        result=result,
        opened=querier.open(result.answer, job=job),
        query_ids=tuple(batch.query_id for batch in job.batches),
    )


def merged_facts(exchanges: Sequence[Exchanged]) -> dict[str, Any]:
    """Return how answers came about, as JSON values: no question, no answer."""
    results = [each.result for each in exchanges]
    outcomes = [o for result in results for o in result.outcomes]
    answering = {r.name: any(r.answered) for result in results for r in result.receivers}
    asked = {*answering, *(o.sharer for o in outcomes)}
    answered = {name for name, gave in answering.items() if gave}
    answered |= {o.sharer for o in outcomes if not o.error_code}
    helpers = {(o.receiver, o.sharer, o.medium) for o in outcomes if o.sharer != o.receiver}
    return {
        "receivers": sorted(answering),
        "sharers": [
            {"receiver": receiver, "site": sharer, "medium": medium}
            for receiver, sharer, medium in sorted(helpers)
        ],
        "sites_asked": len(asked),
        "sites_answered": len(answered),
        "rounds": max((n for result in results for n in result.rounds), default=0),
        "degraded": any(result.degraded for result in results),
        "seconds": round(sum(result.seconds for result in results), 4),
        "request_bytes": sum(result.request_bytes for result in results),
        "reply_bytes": sum(result.reply_bytes for result in results),
        "query_ids": [query_id for each in exchanges for query_id in each.query_ids],
    }
