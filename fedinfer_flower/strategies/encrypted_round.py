"""One encrypted batch at the coordinator: what was asked, what came back, the running sum."""

from __future__ import annotations

import logging

from fedinfer_flower.encrypted_query.ckks_batch import ReplySum
from fedinfer_flower.encrypted_query.documents import NAME, EncryptedQuestion, read_answer
from fedinfer_flower.errors import FedInferError, QuorumNotMetError
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
from fedinfer_flower.wire.documents import CombinedBatch
from fedinfer_flower.wire.envelope import WireLimits

__all__ = ["EncryptedRound"]

log = logging.getLogger("fedinfer_flower.coordinator")


class EncryptedRound:
    """One encrypted batch at the coordinator; thrown away with it.

    Parameters
    ----------
    asked : EncryptedQuestion
    run_id : int
    profiles : dict of node id to SiteProfile
        The sites that are asked.
    failures : dict of node id to FedInferError
        Sites that could not be onboarded: they count as missing.
    limits : WireLimits
    """

    def __init__(
        self,
        asked: EncryptedQuestion,
        run_id: int,
        profiles: dict[int, SiteProfile],
        failures: dict[int, FedInferError],
        limits: WireLimits,
    ) -> None:
        self.asked, self.agreements = asked, dict[int, float]()
        self._run_id, self._profiles, self._limits = run_id, profiles, limits
        self._sum = ReplySum(asked.plan, n_classes=len(asked.classes))
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
        try:
            envelope = read_arrival(arrival, run_id=self._run_id, limits=self._limits)
            logits, agreement = read_answer(
                envelope,
                self.asked,
                run_id=self._run_id,
                sender=node_id,
                commitment=self._profiles[node_id].commitment(),
            )
            self._sum.add(logits)
        except FedInferError as exc:
            self._record(node_id, SiteStatus.FAILED, error=exc, seconds=arrival.seconds)
        else:
            if agreement is not None:
                self.agreements[node_id] = agreement
            self._record(
                node_id,
                SiteStatus.ANSWERED,
                payload_bytes=len(logits),
                seconds=arrival.seconds,
            )

    def close(
        self, *, seconds: float, needed: int, key_here: bool
    ) -> tuple[CombinedBatch, QueryReport]:
        """Return the encrypted sum and its report.

        Raises
        ------
        QuorumNotMetError
            If fewer than `needed` sites answered.
        """
        for node_id in self._profiles:
            if node_id not in self._outcomes:
                self._record(node_id, SiteStatus.LATE, seconds=seconds)
        asked = self.asked
        report = QueryReport(
            query_id=QueryId(asked.query_id),
            n_queries=asked.n_queries,
            rule="mean-logit",
            protection=NAME,
            rule_reason="encrypted logits can only be added",
            sites=tuple(self._outcomes[n] for n in sorted(self._outcomes)),
            seconds=seconds,
            request_bytes=len(asked.inputs) + len(asked.public_key),
            key_at_coordinator=key_here,
        )
        if len(report.answered) < needed:
            reasons = "; ".join(
                f"{s.name}: {s.error_code or s.status.value} {s.error}".strip()
                for s in report.sites
                if s.status is not SiteStatus.ANSWERED
            )
            raise QuorumNotMetError(
                f"{len(report.answered)} of {len(report.sites)} sites answered query"
                f" {report.query_id}, {needed} are needed ({reasons})",
                hint="raise deadline.timeout_s, lower quorum, or mend the sites named",
            )
        batch = CombinedBatch(
            query_id=asked.query_id,
            n_queries=asked.n_queries,
            n_sites=len(report.answered),
            total=self._sum.total(),
        )
        return batch, report

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
