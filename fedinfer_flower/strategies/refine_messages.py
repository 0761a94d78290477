"""The messages of one receiver's round, each with the name by which its reply is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

from fedinfer_flower.strategies.refine_mailbox import Ask
from fedinfer_flower.strategies.refine_onboarding import LanguageSite
from fedinfer_flower.strategies.refine_parts import Schedule
from fedinfer_flower.wire.actions import GENERATE, REFINE, REPHRASE, SHARE_CACHE
from fedinfer_flower.wire.envelope import Envelope
from fedinfer_flower.wire.refine_documents import (
    FetchRequest,
    RelayedAsk,
    RephraseRequest,
    ShareRequest,
)
from fedinfer_flower.wire.refine_job import AskedBatch
from fedinfer_flower.wire.refine_request import Part, RefineRequest
from fedinfer_flower.wire.refine_seats import SharerSeat

__all__ = ["RoundMessages", "RoundTerms", "Step", "StepKey"]

_SHORTEST_TTL_S: Final = 0.1


class Step(StrEnum):
    """What a message of an exchange asks for."""

    REPHRASE = "rephrase"
    SHARE = "share"
    FETCH = "fetch"
    REFINE = "refine"
    OWN = "own"


class StepKey(NamedTuple):
    """Which message of an exchange a reply belongs to: key ids and the step."""

    receiver: str
    step: Step
    sharer: str = ""


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """What is the same for all receivers of a round.

    Parameters
    ----------
    run_id : int
    number : int
        Of the round, from 1.
    keep : bool
        Whether a further round may follow.
    sealed : bool
    rephrase : str
    schedule : Schedule
    max_body_bytes : int
        Largest body that is fetched.
    observe : callable
        Called with (receiver, sharer, bytes, seconds) for every transfer.
    """

    run_id: int
    number: int
    keep: bool
    sealed: bool
    rephrase: str
    schedule: Schedule
    max_body_bytes: int
    observe: Callable[[LanguageSite, LanguageSite, str, int, float], None] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class RoundMessages:
    """Build the messages of one receiver's round.

    Parameters
    ----------
    batch : AskedBatch
    site : LanguageSite
        The receiver.
    sharers : mapping of key id to LanguageSite
    seats : mapping of key id to SharerSeat
    terms : RoundTerms
    hosted : bool
        Whether the coordinator holds the fusers.
    """

    batch: AskedBatch
    site: LanguageSite
    sharers: Mapping[str, LanguageSite]
    seats: Mapping[str, SharerSeat]
    terms: RoundTerms
    hosted: bool

    @property
    def host(self) -> str:
        """``"coordinator"`` or ``"receiver"``."""
        return "coordinator" if self.hosted else "receiver"

    def rephrase(self, now_s: float) -> Ask[StepKey]:
        """Ask the receiver to rewrite the questions for its sharers."""
        request = RephraseRequest(
            query_id=self.batch.query_id,
            round_number=self.terms.number,
            asked=self.batch.asked,
            sealed=self.terms.sealed,
            sharers=tuple(self.seats.values()),
            host=self.host,
            rephrase=self.terms.rephrase,
        )
        return self._to_receiver(Step.REPHRASE, REPHRASE, self._envelope(request), now_s)

    def share(self, ask: RelayedAsk, now_s: float) -> Ask[StepKey]:
        """Carry an ask to its sharer."""
        request = ShareRequest(
            query_id=self.batch.query_id,
            medium=ask.medium,
            body=ask.body,
            sealed=not self.hosted,
        )
        action = SHARE_CACHE if ask.medium == "cache" else GENERATE
        return self._to_sharer(Step.SHARE, ask.sharer, action, self._envelope(request), now_s)

    def fetch(self, ask: RelayedAsk, handle: str, now_s: float) -> Ask[StepKey]:
        """Fetch what a sharer offered."""
        request = FetchRequest(
            query_id=self.batch.query_id, handle=handle, ask=ask.body, sealed=not self.hosted
        )
        envelope = self._envelope(request)
        return self._to_sharer(Step.FETCH, ask.sharer, SHARE_CACHE, envelope, now_s)

    def refine(self, handle: str, parts: tuple[Part, ...], now_s: float) -> Ask[StepKey]:
        """Ask the receiver for answers with what the sharers gave."""
        # The questions travel again: a site may serve every message in a new process, which
        # knows nothing of the one before.
        request = RefineRequest(
            query_id=self.batch.query_id,
            round_number=self.terms.number,
            handle=handle,
            asked=self.batch.asked,
            sealed=self.terms.sealed,
            sharers=tuple(self.seats.values()),
            parts=parts,
            host=self.host,
            keep=self.terms.keep,
        )
        return self._to_receiver(Step.REFINE, REFINE, self._envelope(request), now_s)

    def alone(self, now_s: float) -> Ask[StepKey]:
        """Ask the receiver for its own answers."""
        request = RefineRequest(
            query_id=self.batch.query_id,
            round_number=self.terms.number,
            asked=self.batch.asked,
            sealed=self.terms.sealed,
            keep=self.terms.keep,
        )
        return self._to_receiver(Step.OWN, REFINE, self._envelope(request), now_s)

    def _envelope(
        self, request: RephraseRequest | ShareRequest | FetchRequest | RefineRequest
    ) -> Envelope:
        return request.to_envelope(run_id=self.terms.run_id)

    def _to_receiver(
        self, step: Step, action: str, envelope: Envelope, now_s: float
    ) -> Ask[StepKey]:
        key = StepKey(self.site.key_id, step)
        return self._ask(key, self.site.node_id, action, envelope, now_s)

    def _to_sharer(
        self, step: Step, sharer: str, action: str, envelope: Envelope, now_s: float
    ) -> Ask[StepKey]:
        key = StepKey(self.site.key_id, step, sharer)
        return self._ask(key, self.sharers[sharer].node_id, action, envelope, now_s)

    def _ask(
        self, key: StepKey, node_id: int, action: str, envelope: Envelope, now_s: float
    ) -> Ask[StepKey]:
        ttl_s = max(self.terms.schedule.end_s - now_s, _SHORTEST_TTL_S)
        return Ask(key=key, node_id=node_id, action=action, envelope=envelope, ttl_s=ttl_s)
