"""The masked sum at the coordinator, and what survivors do for it when sites drop out.

Notation: y_i is what site i sends, r_ij the mask of the pair (i, j), added by the one with
the lower place and subtracted by the other, b_i the self-mask. Over the survivors S,

    sum y_i = sum x_i + sum r_iQ + sum b_i + sum over i in S, j dropped of (+/-) r_ij .

Survivors hand over the seeds of the last term (32 bytes a pair) and shares of the b_i. What
stays is x and the querier's masks r_iQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    ProtectionRefusedError,
    RecoveryError,
    SignatureError,
)
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.mask_graph import (
    FULL_GRAPH_MAX,
    LEAST_PRESENT,
    neighbours,
    thinnest_window,
)
from fedinfer_flower.privacy.masked_answer import MaskedAnswer, MaskedTotal
from fedinfer_flower.privacy.masks import SEED_BYTES, RingArray, leaf, mask, pair_key
from fedinfer_flower.privacy.recovery_messages import (
    Phase,
    Records,
    RecoveryRequest,
    pack_records,
    read_records,
    survivors_statement,
)
from fedinfer_flower.privacy.self_mask import (
    combine_shares,
    open_share,
    self_seed,
    share_threshold,
)
from fedinfer_flower.wire.identity import Identity

__all__ = ["MaskedSum", "Masking", "recovery_reply"]

_SHARE = 16
SIGNATURE_DOMAIN = "survivor set"


class Masking(Protocol):
    """What this module needs to know of a masking protection."""

    @property
    def self_mask(self) -> bool:
        """Whether sites add a mask of their own."""

    def dropouts_max(self, n_sites: int) -> int:
        """Return how many sites may drop out."""

    def least_sites(self, n_sites_max: int) -> int:
        """Return the fewest survivors."""


class MaskedSum:
    """Adds masked answers, and removes what dropouts leave behind. Holds no key.

    Call `add` for every answer; then, until `recovery_requests` is empty, send each site
    its request and hand every reply to `add_recovery`; then `total`.

    Parameters
    ----------
    protection : Protection
        One that is also a `Masking`.
    plan : ScorePlan
    cohort : Cohort
    n_queries : int
    """

    def __init__(
        self, protection: Protection, plan: ScorePlan, cohort: Cohort, n_queries: int
    ) -> None:
        self._protection = protection
        self._masking: Masking = protection  # type: ignore[assignment]
        self._plan, self._cohort = plan, cohort
        self._count = n_queries * plan.width
        self._sum: RingArray = np.zeros(self._count, dtype=np.uint32)
        self._shares: dict[int, dict[int, bytes]] = {}
        self._survivors: set[int] = set()
        self._phase: Phase | None = None
        self._done = False
        self._signatures: Records = {}
        self._seeds: dict[int, Records] = {}
        self._opened: dict[int, dict[int, bytes]] = {}

    def __repr__(self) -> str:
        return f"<{self._protection.name} coordinator side, {self.n_sites} sites>"

    @property
    def n_sites(self) -> int:
        """Sites in the sum."""
        return len(self._survivors)

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:
        """Add one site's masked answer.

        Raises
        ------
        ProtocolError
            If it is not an answer of this batch, or its sender has no place in the roster
            or one already in the sum.
        """
        if self._phase is not None or self._done:
            raise BindingError("an answer after the survivors were fixed")
        self._plan.require_room(self.n_sites)
        place = self._cohort.roster.place_of(sender)
        if place in self._survivors:
            raise BindingError("a second answer of one site")
        others = self._neighbours(place)
        answer = MaskedAnswer.from_bytes(
            payload,
            context=self._cohort.context(),
            count=self._count,
            n_shares=len(others) if self._masking.self_mask else 0,
        )
        self._sum = self._sum + answer.entries
        self._survivors.add(place)
        self._shares[place] = dict(zip(others, answer.shares, strict=False))

    def recovery_requests(self) -> Mapping[str, bytes]:
        """Close the round before and return the requests of the next one, by key id.

        Raises
        ------
        RecoveryError
            If replies that the sum needs are missing.
        """
        if self._done:
            return {}
        if self._phase is None:
            self._protection.require_cohort(self.n_sites, self._plan)
            if self._masking.self_mask:
                self._phase = Phase.CONFIRM
                return self._requests(Phase.CONFIRM, self._survivors)
            bereft = {c for c in self._survivors if self._dropped_beside(c)}
            self._phase = Phase.REVEAL
            if bereft:
                return self._requests(Phase.REVEAL, bereft)
            self._done = True
            return {}
        if self._phase is Phase.CONFIRM:
            self._require_confirmed()
            self._phase = Phase.REVEAL
            return self._requests(Phase.REVEAL, self._survivors)
        self._unmask()
        self._done = True
        return {}

    def add_recovery(self, payload: bytes | memoryview, *, sender: str) -> None:
        """Take in a survivor's reply; nothing that raises leaves a trace.

        Raises
        ------
        ProtocolError
            If the reply is not what an honest survivor would send.
        """
        place = self._cohort.roster.place_of(sender)
        if place not in self._survivors or self._phase is None or self._done:
            raise BindingError("a recovery reply that nobody asked for")
        raw, n_sites = bytes(payload), len(self._cohort.roster)
        if self._phase is Phase.CONFIRM:
            identity = self._cohort.roster.seats[place].identity
            statement = survivors_statement(self._cohort, frozenset(self._survivors))
            identity.verify(SIGNATURE_DOMAIN, statement, raw)
            self._signatures[place] = raw
            return
        seeds, rest = read_records(raw, SEED_BYTES, n_sites)
        shares, rest = read_records(rest, _SHARE, n_sites)
        mine = self._shares_for(place).keys() if self._masking.self_mask else set()
        if rest or set(seeds) != self._dropped_beside(place) or not shares.keys() <= mine:
            raise EnvelopeError("a recovery reply with other seeds or shares than asked for")
        self._seeds[place] = seeds
        for owner, share in shares.items():
            self._opened.setdefault(owner, {})[place] = share

    def total(self) -> bytes:
        """Return the sum under the querier's masks.

        Raises
        ------
        QuorumNotMetError
            If too few sites are in it.
        RecoveryError
            If dropouts were not made good.
        """
        self._protection.require_cohort(self.n_sites, self._plan)
        if not self._done:
            if self._masking.self_mask or len(self._survivors) < len(self._cohort.roster):
                raise RecoveryError("the sum still holds masks: recovery was not carried out")
            self._done = True
        done = MaskedTotal(
            context=self._cohort.context(),
            survivors=frozenset(self._survivors),
            entries=self._sum,
        )
        return done.to_bytes(len(self._cohort.roster))

    # -- parts -------------------------------------------------------------------------

    def _neighbours(self, place: int) -> tuple[int, ...]:
        roster = self._cohort.roster
        return neighbours(place, len(roster), roster.digest())

    def _dropped_beside(self, place: int) -> set[int]:
        return set(self._neighbours(place)) - self._survivors

    def _shares_for(self, place: int) -> Records:
        """Return the sealed shares that other survivors sent for this site."""
        return {
            owner: self._shares[owner][place]
            for owner in self._neighbours(place)
            if owner in self._survivors
        }

    def _requests(self, phase: Phase, places: set[int]) -> Mapping[str, bytes]:
        roster = self._cohort.roster
        reveal = phase is Phase.REVEAL and self._masking.self_mask
        return {
            roster.key_ids[place]: RecoveryRequest(
                phase=phase,
                context=self._cohort.context(),
                survivors=frozenset(self._survivors),
                signatures=self._signatures if reveal else {},
                shares=self._shares_for(place) if reveal else {},
            ).to_bytes(len(roster))
            for place in sorted(places)
        }

    def _require_confirmed(self) -> None:
        needed = self._masking.least_sites(len(self._cohort.roster))
        if len(self._signatures) < needed:
            raise RecoveryError(
                f"{len(self._signatures)} sites confirmed who survived, {needed} must",
                hint="ask again with a longer deadline",
            )

    def _unmask(self) -> None:
        total = self._sum.copy()
        query_id = self._cohort.batch_id
        for place in self._survivors:
            missing = self._dropped_beside(place) - self._seeds.get(place, {}).keys()
            if missing:
                raise RecoveryError(
                    f"the site at place {place} answered and then left, so that"
                    f" {len(missing)} dropouts beside it cannot be made good",
                    hint="ask again",
                )
            for dropped, seed in self._seeds.get(place, {}).items():
                stream = mask(seed, self._count)
                total = total - stream if place < dropped else total + stream
            if self._masking.self_mask:
                total = total - mask(self_seed(self._secret_of(place), query_id), self._count)
        self._sum = total

    def _secret_of(self, place: int) -> bytes:
        others = self._neighbours(place)
        n_sites = len(self._cohort.roster)
        needed = share_threshold(len(others), self._masking.dropouts_max(n_sites))
        shares = self._opened.get(place, {})
        if len(shares) < needed:
            raise RecoveryError(
                f"{len(shares)} shares of the self-mask of the site at place {place} arrived,"
                f" {needed} are needed",
                hint="ask again with a longer deadline",
            )
        chosen = sorted(shares)[:needed]
        return combine_shares({others.index(holder): shares[holder] for holder in chosen})


def recovery_reply(
    masking: Masking,
    request: bytes | memoryview,
    *,
    cohort: Cohort,
    identity: Identity,
    admit: Callable[[frozenset[str]], None],
) -> bytes:
    """Answer a recovery request at a site that is among the survivors.

    Parameters
    ----------
    request : bytes
    cohort : Cohort
        Of a batch that this site answered.
    admit : callable
        Given the key ids of the dropped sites, raises unless the site may still treat
        exactly these as dropped in this batch: one set a batch, for ever.

    Raises
    ------
    ProtectionRefusedError
        If the sum would be of fewer sites than the site agreed to.
    SignatureError
        If too few survivors confirmed the same set.
    """
    asked = RecoveryRequest.from_bytes(request, cohort)
    roster = cohort.roster
    place = roster.place_of(identity.key_id)
    needed = masking.least_sites(len(roster))
    if place not in asked.survivors or len(asked.survivors) < needed:
        raise ProtectionRefusedError(
            f"this site helps to open a sum with its own answer and of {needed} sites or"
            f" more, not of {len(asked.survivors)}"
        )
    if len(roster) > FULL_GRAPH_MAX + 1 and (
        thinnest_window(asked.survivors, len(roster), roster.digest()) < LEAST_PRESENT
    ):
        # Two gaps in the circle, and the few between them would open apart.
        raise ProtectionRefusedError(
            "the sites that are said to have answered share too few masks with each other",
            hint="ask again; by chance this happens to one large batch in thousands",
        )
    if asked.phase is Phase.REVEAL and masking.self_mask:
        _require_signatures(asked, cohort, needed)
    dropped = frozenset(range(len(roster))) - asked.survivors
    admit(frozenset(roster.key_ids[p] for p in dropped))
    if asked.phase is Phase.CONFIRM:
        if not masking.self_mask:
            raise EnvelopeError("a confirm round where there are no self-masks")
        return identity.sign(SIGNATURE_DOMAIN, survivors_statement(cohort, asked.survivors))
    return _reveal(asked, cohort, identity, place, dropped, masking)


def _require_signatures(asked: RecoveryRequest, cohort: Cohort, needed: int) -> None:
    statement = survivors_statement(cohort, asked.survivors)
    good = 0
    for place, signature in asked.signatures.items():
        try:
            cohort.roster.seats[place].identity.verify(SIGNATURE_DOMAIN, statement, signature)
        except SignatureError:
            continue
        good += place in asked.survivors
    if good < needed:
        raise SignatureError(
            f"{good} sites confirmed this set of survivors, {needed} must before a mask is removed"
        )


def _reveal(
    asked: RecoveryRequest,
    cohort: Cohort,
    identity: Identity,
    place: int,
    dropped: frozenset[int],
    masking: Masking,
) -> bytes:
    session, query_id = cohort.session(), cohort.batch_id
    seats = cohort.roster.seats
    beside = neighbours(place, len(seats), cohort.roster.digest())
    least = share_threshold(len(beside), masking.dropouts_max(len(seats)))
    if len(asked.survivors & frozenset(beside)) < least:
        # With all of them called dropped, this site would strip its own answer.
        raise ProtectionRefusedError(
            f"fewer than {least} of the sites that share masks with this one are said to have"
            " answered"
        )
    seeds: Records = {}
    shares: Records = {}
    for other in beside:
        pair = pair_key(identity.agreement, seats[other].identity.agreement_key, session)
        if other in dropped:
            seeds[other] = leaf(pair, "pair", query_id)
        elif other in asked.shares:
            try:
                shares[other] = open_share(asked.shares[other], pair, query_id, sender=other)
            except FedInferError:
                continue  # one site's bad share must not keep the others from theirs
    return pack_records(seeds, SEED_BYTES) + pack_records(shares, _SHARE)
