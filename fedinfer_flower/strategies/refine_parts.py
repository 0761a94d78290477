"""What came from sharers towards one receiver, and how long each step may take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from fedinfer_flower.strategies.refine_hosting import FuserHost
from fedinfer_flower.strategies.refine_onboarding import LanguageSite
from fedinfer_flower.wire.refine_documents import ShareOffer
from fedinfer_flower.wire.refine_fields import Evidence
from fedinfer_flower.wire.refine_request import Part

__all__ = ["Collected", "Schedule"]

_FIRST_GUESS = 0.1
"""Of the time that is there, for one answer of a receiver that was never timed."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When each step of a round must be over, in seconds of a monotonic clock.

    The end is kept free for the receiver: once for the refined answer, once more for its
    own answer if that fails.

    Parameters
    ----------
    start_s, rephrase_by_s, share_by_s, refine_by_s, end_s : float

    Examples
    --------
    >>> times = Schedule.until(10.0, start_s=0.0)
    >>> times.rephrase_by_s, times.share_by_s, times.refine_by_s
    (3.5, 7.0, 8.5)
    """

    start_s: float
    rephrase_by_s: float
    share_by_s: float
    refine_by_s: float
    end_s: float

    @classmethod
    def until(cls, end_s: float, *, start_s: float, refine_s: float = 0.0) -> Schedule:
        """Split the time up to `end_s`.

        Parameters
        ----------
        end_s, start_s : float
        refine_s : float
            What the slowest receiver's last answer took; 0.0 if none was timed.
        """
        span = end_s - start_s
        needed = min(max(1.5 * (refine_s or _FIRST_GUESS * span), 0.05 * span), 0.3 * span)
        share_by_s = end_s - 2.0 * needed
        return cls(
            start_s=start_s,
            rephrase_by_s=start_s + 0.5 * (share_by_s - start_s),
            share_by_s=share_by_s,
            refine_by_s=end_s - needed,
            end_s=end_s,
        )


@dataclass(kw_only=True)
class Collected:
    """What sharers gave towards one receiver in one round.

    Parameters
    ----------
    host : FuserHost, optional
        Where the coordinator holds the fusers.
    receiver : LanguageSite
    sharers : dict of key id to LanguageSite
    run_id, round_number, rows : int
    query_id : str
    own_evidence : float32 array (B, 4), optional
        Of the receiver.
    """

    host: FuserHost | None
    receiver: LanguageSite
    sharers: dict[str, LanguageSite]
    run_id: int
    query_id: str
    round_number: int
    rows: int
    own_evidence: Evidence | None = field(default=None, repr=False)
    _parts: dict[str, tuple[str, bytes]] = field(default_factory=dict, repr=False)
    _evidence: dict[str, Evidence | None] = field(default_factory=dict, repr=False)
    _offers: dict[str, ShareOffer] = field(default_factory=dict, repr=False)

    def offer(self, sharer: str, offer: ShareOffer) -> None:
        """Note a body that can be fetched."""
        self._offers[sharer] = offer
        self._evidence[sharer] = offer.evidence

    def chosen_offers(
        self, waiting: Collection[str]
    ) -> tuple[dict[str, ShareOffer], tuple[str, ...]]:
        """Return the offers to fetch now, and the sharers whose offers nobody needs.

        Parameters
        ----------
        waiting : collection of str
            Key ids of sharers that are still to give.
        """
        if self.host is None or not self.host.gated:
            ready, self._offers = self._offers, {}
            return ready, ()
        if not self._offers or set(waiting) - self._offers.keys():
            return {}, ()  # the gate compares all of them at once
        offers, self._offers = self._offers, {}
        order = [*self._parts, *offers]
        chosen = self.host.choose(
            self.own_evidence, [self._evidence.get(s) for s in order], self.rows
        )
        wanted = {s for s, column in zip(order, chosen.T, strict=True) if column.any()}
        return (
            {s: offer for s, offer in offers.items() if s in wanted},
            tuple(s for s in offers if s not in wanted),
        )

    def take(self, sharer: str, medium: str, body: bytes) -> None:
        """Keep a body, projected if the coordinator fuses.

        Raises
        ------
        FedInferError
            If the coordinator fuses, and the body is not what it must be.
        """
        if self.host is None:
            self._parts[sharer] = (medium, body)
            return
        site = self.sharers[sharer]
        read = self.host.read(
            body,
            receiver=self.receiver,
            sharer=site,
            run_id=self.run_id,
            query_id=self.query_id,
            round_number=self.round_number,
        )
        self._evidence[sharer] = read.evidence
        if medium == "text":
            self._parts[sharer] = (medium, body)
            return
        projected = self.host.project(read, receiver=self.receiver, sharer=site, rows=self.rows)
        self._parts[sharer] = ("projected", projected)

    def drop(self, sharer: str) -> None:
        """Forget what a sharer gave."""
        self._parts.pop(sharer, None)
        self._offers.pop(sharer, None)

    def parts(self) -> tuple[Part, ...]:
        """Return what goes to the receiver, in the order of the sharers' key ids.

        Raises
        ------
        FuserError
            If a gate cannot choose.
        """
        order = sorted(self._parts)
        if self.host is None:
            return tuple(
                Part(sharer=s, medium=medium, body=body)
                for s in order
                for medium, body in [self._parts[s]]
            )
        chosen = self.host.choose(
            self.own_evidence, [self._evidence.get(s) for s in order], self.rows
        )
        return tuple(
            Part(sharer=s, medium=medium, body=body, gate=chosen[:, j])
            for j, s in enumerate(order)
            for medium, body in [self._parts[s]]
            if chosen[:, j].any()
        )
