"""One batch at the coordinator: what was asked, what came back, the running sum."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import FedInferError, QuorumNotMetError
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.query import (
    QueryId,
    QueryReport,
    SiteId,
    SiteOutcome,
    SiteProfile,
    SiteStatus,
)
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import Arrival
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.documents import CombinedBatch
from fedinfer_flower.wire.envelope import WireLimits
from fedinfer_flower.wire.messages import Question

__all__ = ["QueryRound"]

log = logging.getLogger("fedinfer_flower.coordinator")


class QueryRound:
    """State of one batch; thrown away with it.

    Parameters
    ----------
    asked : Question
    run_id : int
    rule : EnsembleRule
    rule_reason : str
    protection : Protection
    profiles : mapping of node id to SiteProfile
        The sites that are asked.
    failures : mapping of node id to FedInferError
        Sites that could not be onboarded: they count as missing.
    limits : WireLimits
    """

    def __init__(
        self,
        *,
        asked: Question,
        run_id: int,
        rule: EnsembleRule,
        rule_reason: str,
        protection: Protection,
        profiles: Mapping[int, SiteProfile],
        failures: Mapping[int, FedInferError],
        limits: WireLimits,
    ) -> None:
        self.asked = asked
        self.plan = ScorePlan.for_rule(
            rule, n_classes=len(asked.classes), n_sites_max=asked.n_sites
        )
        self.reply_bytes = protection.payload_bytes(self.plan, asked.n_queries)
        self._rule, self._rule_reason, self._protection = rule, rule_reason, protection
        self._run_id, self._profiles, self._limits = run_id, profiles, limits
        self._side = protection.coordinator_side(
            self.plan, n_queries=asked.n_queries, rule=rule, public_key=asked.public_key
        )
        self._outcomes: dict[int, SiteOutcome] = {}
        for node_id, error in failures.items():
            self._record(node_id, SiteStatus.FAILED, error=error)

    @property
    def complete(self) -> bool:
        """Whether every site that was asked has answered or failed."""
        return self._profiles.keys() <= self._outcomes.keys()

    def accumulate(self, arrival: Arrival) -> None:
        """Fold one reply in; a bad one is recorded and leaves no trace in the sum."""
        node_id = arrival.node_id
        # A second reply is never counted, nor one of a node that was not asked.
        if node_id in self._outcomes or node_id not in self._profiles:
            return
        payload: bytes | memoryview = b""
        try:
            envelope = read_arrival(arrival, run_id=self._run_id, limits=self._limits)
            payload = messages.read_answer(
                envelope,
                self.asked,
                run_id=self._run_id,
                sender=node_id,
                width=self.plan.width,
                commitment=self._profiles[node_id].commitment(),
            )
            self._side.add(payload)
        except FedInferError as exc:
            self._record(
                node_id,
                SiteStatus.FAILED,
                error=exc,
                payload_bytes=len(payload),
                seconds=arrival.seconds,
            )
        else:
            self._record(
                node_id,
                SiteStatus.ANSWERED,
                payload_bytes=len(payload),
                seconds=arrival.seconds,
            )

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
        for node_id in self._profiles:
            if node_id not in self._outcomes:
                self._record(node_id, SiteStatus.LATE, seconds=seconds)
        spent = self._protection.epsilon_delta(self.plan)
        report = QueryReport(
            query_id=QueryId(self.asked.query_id),
            n_queries=self.asked.n_queries,
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
        self._require_quorum(report, max(quorum, self._protection.min_cohort))
        batch = CombinedBatch(
            query_id=self.asked.query_id,
            n_queries=self.asked.n_queries,
            n_sites=len(report.answered),
            total=self._side.total(),
        )
        return batch, report

    def _require_quorum(self, report: QueryReport, needed: int) -> None:
        n_sites = len(report.answered)
        if n_sites >= needed:
            return
        reasons = "; ".join(
            f"{s.name}: {s.status.value} {s.error_code}".strip()
            for s in report.sites
            if s.status is not SiteStatus.ANSWERED
        )
        raise QuorumNotMetError(
            f"{n_sites} of {len(report.sites)} sites answered query {report.query_id} in"
            f" {report.seconds:.1f} s, {needed} are needed ({reasons})",
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
        profile = self._profiles.get(node_id)
        name = str(node_id) if profile is None else profile.name
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
