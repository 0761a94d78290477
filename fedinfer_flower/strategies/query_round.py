"""One batch at the coordinator: what was asked, what came back, the running sum."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import BindingError, FedInferError, QuorumNotMetError, SizeLimitError
from fedinfer_flower.privacy.base import CoordinatorSide, Protection, ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.query import (
    QueryId,
    QueryReport,
    SiteId,
    SiteOutcome,
    SiteStatus,
)
from fedinfer_flower.receipts.statement import SignedStatement, cohort_digest
from fedinfer_flower.settlement.book import EvidenceBook
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.strategies.relaying import RelaySide
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.documents import CombinedBatch
from fedinfer_flower.wire.envelope import Envelope, WireLimits
from fedinfer_flower.wire.messages import Question
from fedinfer_flower.wire.recovery import RecoveryCall, read_recovered

__all__ = ["QueryRound"]

log = logging.getLogger("fedinfer_flower.coordinator")


class QueryRound:
    """State of one batch; thrown away with it.

    Parameters
    ----------
    asked : Question
        Without its rows, where they are sealed.
    n_queries : int
    content : bytes
        Digest of the message that asks: masks are bound to it.
    run_id : int
    rule : EnsembleRule
    rule_reason : str
    protection : Protection
    cards : mapping of node id to SiteCard
        The sites that are asked.
    failures : mapping of node id to FedInferError
        Sites that could not be onboarded: they count as missing.
    limits : WireLimits
    book : EvidenceBook, optional
        Takes the second copies of answers.
    """

    def __init__(
        self,
        *,
        asked: Question,
        n_queries: int,
        content: bytes = b"",
        run_id: int,
        rule: EnsembleRule,
        rule_reason: str,
        protection: Protection,
        cards: Mapping[int, SiteCard],
        failures: Mapping[int, FedInferError],
        limits: WireLimits,
        book: EvidenceBook | None = None,
    ) -> None:
        self.asked, self.content = asked, content
        self.n_queries = n_queries
        self.plan = ScorePlan.for_rule(
            rule, n_classes=len(asked.classes), n_sites_max=asked.n_sites
        )
        self.reply_bytes = protection.payload_bytes(self.plan, n_queries)
        self._rule, self._rule_reason, self._protection = rule, rule_reason, protection
        self._run_id, self._cards, self._limits = run_id, cards, limits
        self._book = book
        self._nodes = {card.key_id: node_id for node_id, card in cards.items()}
        cohort = (
            Cohort(
                query_id=asked.query_id,
                roster=asked.roster,
                public_key=asked.public_key,
                content=content,
            )
            if protection.needs_roster
            else None
        )
        self._side: CoordinatorSide
        if asked.relay:
            self._side = RelaySide(protection, self.plan, most_bytes=self.reply_bytes)
        else:
            self._side = protection.coordinator_side(
                self.plan,
                n_queries=n_queries,
                rule=rule,
                public_key=asked.public_key,
                cohort=cohort,
            )
        self.statements: list[SignedStatement] = []
        self._outcomes: dict[int, SiteOutcome] = {}
        for node_id, error in failures.items():
            self._record(node_id, SiteStatus.FAILED, error=error)

    @property
    def complete(self) -> bool:
        """Whether every site that was asked has answered or failed."""
        return self._cards.keys() <= self._outcomes.keys()

    @property
    def outcomes(self) -> Mapping[int, SiteOutcome]:
        """How each site fared, as far as that is known, by node id."""
        return dict(self._outcomes)

    @property
    def answered(self) -> tuple[int, ...]:
        """Node ids of the sites whose answers are in the sum."""
        done = SiteStatus.ANSWERED
        return tuple(n for n, outcome in self._outcomes.items() if outcome.status is done)

    def accumulate(self, arrival: Arrival) -> None:
        """Fold one reply in; a bad one is recorded and leaves no trace in the sum."""
        node_id = arrival.node_id
        # A second reply is never counted, nor one of a node that was not asked.
        if node_id in self._outcomes or node_id not in self._cards:
            return
        payload: bytes | memoryview = b""
        try:
            envelope = read_arrival(arrival, run_id=self._run_id, limits=self._limits)
            payload = messages.read_answer(
                envelope,
                self.asked,
                n_queries=self.n_queries,
                run_id=self._run_id,
                sender=node_id,
                width=self.plan.width,
                commitment=self._cards[node_id].profile.commitment(),
            )
            statement = self._statement(envelope, arrival.node_id, payload)
            self._side.add(payload, sender=self._cards[node_id].key_id)
        except FedInferError as exc:
            self._record(
                node_id,
                SiteStatus.FAILED,
                error=exc,
                payload_bytes=len(payload),
                seconds=arrival.seconds,
            )
        else:
            if statement is not None:
                self.statements.append(statement)
            self._keep_evidence(envelope, node_id)
            self._record(
                node_id,
                SiteStatus.ANSWERED,
                payload_bytes=len(payload),
                seconds=arrival.seconds,
            )

    def _keep_evidence(self, envelope: Envelope, node_id: int) -> None:
        """Note the second copy of an answer; without a good one the site earns nothing."""
        if self._book is None:
            return
        card = self._cards[node_id]
        try:
            self._book.add(
                self.asked.query_id,
                card.key_id,
                bytes(envelope.section("evidence")),
                n_queries=self.n_queries,
                n_classes=len(self.asked.classes),
            )
        except SizeLimitError as exc:
            # Totals over some of the sites, taken from the sum over all, tell the others'
            # answers: all evidence of a batch is kept, or none.
            self._book.forget(self.asked.query_id)
            self._book = None
            log.warning("evidence of this batch is dropped: %s", exc)
        except FedInferError as exc:
            log.warning("%s", exc.at_site(card.profile.name))

    def _statement(
        self, envelope: Envelope, node_id: int, payload: bytes | memoryview
    ) -> SignedStatement | None:
        """Return the site's statement, after checking that it is of this very answer."""
        raw = bytes(envelope.section("statement"))
        if not raw:
            return None
        signed = SignedStatement.from_bytes(raw)
        signed.verify()
        said, querier = signed.statement, self.asked.querier
        facts = (
            (said.query_id, self.asked.query_id),
            (said.run_id, self._run_id),
            (said.site_key_id, self._cards[node_id].key_id),
            (said.n_rows, self.n_queries),
            (said.site, self._cards[node_id].profile.name),
            (said.profile_commitment, self._cards[node_id].profile.commitment()),
            (said.protection, self._protection.name),
            (dict(said.protection_options), dict(self._protection.options())),
            (said.rule, self._rule.name),
            (dict(said.rule_options), dict(self._rule.options())),
            (said.query_sealed, self.asked.querier is not None),
            (said.querier_key_id, "" if querier is None else querier.key_id),
            (said.session_key_id, self.asked.key_id),
            (said.n_sites_asked, self.asked.n_sites),
            (said.cohort_digest, cohort_digest(self.asked.roster.key_ids)),
            (said.min_cohort, self._protection.min_cohort),
            (said.payload_digest, hashlib.sha256(payload).hexdigest()),
            (bool(said.evidence), bool(envelope.section("evidence"))),
        )
        if any(is_said != is_so for is_said, is_so in facts):
            raise BindingError("the site's statement is about another answer than it sent")
        return signed

    def recovery_calls(self) -> dict[int, RecoveryCall]:
        """Return what to ask of which site before the sum can be opened; empty if nothing.

        Raises
        ------
        QueryError
            If too few sites answered, or their help does not suffice.
        """
        if not isinstance(self._side, MaskedSum):
            return {}
        return {
            self._nodes[key_id]: RecoveryCall(
                query_id=self.asked.query_id,
                protection=self._protection.name,
                protection_options=self._protection.options(),
                public_key=self.asked.public_key,
                roster=self.asked.roster,
                request=request,
                content=self.content,
            )
            for key_id, request in self._side.recovery_requests().items()
        }

    def accumulate_recovery(self, arrival: Arrival) -> None:
        """Take in one reply of a recovery round; a bad one is logged and left out."""
        card = self._cards.get(arrival.node_id)
        if card is None or not isinstance(self._side, MaskedSum):
            return
        try:
            envelope = read_arrival(arrival, run_id=self._run_id, limits=self._limits)
            reply = read_recovered(
                envelope,
                query_id=self.asked.query_id,
                run_id=self._run_id,
                sender=arrival.node_id,
            )
            self._side.add_recovery(reply, sender=card.key_id)
        except FedInferError as exc:
            log.warning("%s", exc.at_site(card.profile.name))

    def require_answers(self, *, seconds: float, quorum: int) -> None:
        """Refuse to go on with fewer answers than the quorum, or than the protection needs.

        Raises
        ------
        QuorumNotMetError
            Naming the sites that are missing.
        """
        for node_id in self._cards:
            if node_id not in self._outcomes:
                self._record(node_id, SiteStatus.LATE, seconds=seconds)
        least = self._protection.least_sites(self.plan.n_sites_max)
        self._require_quorum(max(quorum, least), seconds)

    def close(
        self, *, seconds: float, quorum: int, request_bytes: int, key_at_coordinator: bool
    ) -> tuple[CombinedBatch, QueryReport]:
        """Return the combined batch and its report.

        Raises
        ------
        QuorumNotMetError
            If fewer sites answered than the quorum, or than the protection needs in a
            sum before it may be released.
        """
        self.require_answers(seconds=seconds, quorum=quorum)
        spent = self._protection.epsilon_delta(self.plan)
        report = QueryReport(
            query_id=QueryId(self.asked.query_id),
            n_queries=self.n_queries,
            rule=self._rule.name,
            protection=self._protection.name,
            rule_reason=self._rule_reason,
            sites=tuple(self._outcomes[n] for n in sorted(self._outcomes)),
            seconds=seconds,
            request_bytes=request_bytes,
            key_at_coordinator=key_at_coordinator,
            epsilon_per_query=None if spent is None else spent[0],
            delta_per_query=None if spent is None else spent[1],
        )
        batch = CombinedBatch(
            query_id=self.asked.query_id,
            n_queries=self.n_queries,
            n_sites=len(report.answered),
            total=self._side.total(),
            content=self.content,
        )
        return batch, report

    def _require_quorum(self, needed: int, seconds: float) -> None:
        outcomes = [self._outcomes[n] for n in sorted(self._outcomes)]
        missing = [s for s in outcomes if s.status is not SiteStatus.ANSWERED]
        n_sites = len(outcomes) - len(missing)
        if n_sites >= needed:
            return
        reasons = "; ".join(f"{s.name}: {s.status.value} {s.error_code}".strip() for s in missing)
        raise QuorumNotMetError(
            f"{n_sites} of {len(outcomes)} sites answered query {self.asked.query_id} in"
            f" {seconds:.1f} s, {needed} are needed ({reasons})",
            hint="raise deadline.timeout_s, lower quorum, or mend the sites named",
        )

    def _record(
        self,
        node_id: int,
        status: SiteStatus,
        *,
        error: FedInferError | None = None,
        payload_bytes: int = 0,
        seconds: float = 0.0,
    ) -> None:
        card = self._cards.get(node_id)
        name = str(node_id) if card is None else card.profile.name
        if error is not None:
            error = error.at_site(name)
            log.warning("%s", error)
        self._outcomes[node_id] = SiteOutcome(
            site_id=SiteId(node_id),
            name=name,
            status=status,
            payload_bytes=payload_bytes,
            seconds=seconds,
            error_code="" if error is None else error.code,
            error="" if error is None else error.message,
        )
