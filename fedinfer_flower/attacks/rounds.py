"""One batch under one protection, with all roles in this process.

What a role sees is made by that role's own code: sites protect, the coordinator adds, the
querier opens. Only the network is missing.

Axes: K sites, B queries, S width of a score.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import (
    CoordinatorSide,
    KeyPair,
    Protection,
    ScorePlan,
)
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

__all__ = ["Round", "label_of", "read_one", "read_sum"]


def label_of(protection: Protection) -> str:
    """Return a protection's name with epsilon and options that are not the default.

    Examples
    --------
    >>> from fedinfer_flower.privacy.dp import DP
    >>> label_of(DP(epsilon=1.0))
    'dp(epsilon=1)'
    """
    usual = type(protection)().options()
    told = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in protection.options().items()
        if key == "epsilon" or value != usual[key]
    ]
    return f"{protection.name}({', '.join(told)})" if told else protection.name


class Round:
    """A batch of `n_queries` rows for a cohort of sites.

    Parameters
    ----------
    protection : Protection
    rule : EnsembleRule
    n_classes, n_queries, n_sites : int
    keys : KeyPair, optional
        Of the querier; fresh ones by default.
    identities : tuple of Identity, optional
        Of the sites, if the protection needs a roster; fresh ones by default.

    Examples
    --------
    >>> import numpy as np
    >>> from fedinfer_flower.ensemble.base import make_rule
    >>> from fedinfer_flower.privacy.plain import Plain
    >>> batch = Round(Plain(), make_rule("mean-probability"), n_classes=2, n_queries=1, n_sites=3)
    >>> side = batch.coordinator()
    >>> for site in range(3):
    ...     side.add(batch.payload(site, np.array([[0.25, 0.75]])), sender=batch.sender(site))
    >>> batch.open(batch.total(side), n_sites=3)
    array([[0.75, 2.25]])
    """

    def __init__(
        self,
        protection: Protection,
        rule: EnsembleRule,
        *,
        n_classes: int,
        n_queries: int,
        n_sites: int,
        keys: KeyPair | None = None,
        identities: tuple[Identity, ...] = (),
    ) -> None:
        self.protection, self.rule = protection, rule
        self.n_queries, self.n_sites = n_queries, n_sites
        self.plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=n_sites)
        self.keys = protection.make_keys() if keys is None else keys
        self.identities = identities
        self.cohort: Cohort | None = None
        if protection.needs_roster:
            if not identities:
                self.identities = tuple(Identity.generate() for _ in range(n_sites))
            seats = tuple(Seat(identity=i.public, commitment="0" * 64) for i in self.identities)
            self.cohort = Cohort(
                # Masks are bound to it: never used twice.
                query_id=secrets.token_hex(16),
                roster=Roster(seats),
                public_key=self.keys.public_key,
            )

    def sender(self, site: int) -> str:
        """Return the key id of a site; empty where payloads are not bound to sites."""
        return self.identities[site].key_id if self.identities else ""

    def payload(self, site: int, scores: Array) -> bytes:
        """Return what a site sends for its scores of shape (n_queries, width)."""
        side = self.protection.site_side(
            self.plan,
            public_key=self.keys.public_key,
            cohort=self.cohort,
            identity=self.identities[site] if self.identities else None,
        )
        return side.protect(scores)

    def coordinator(self) -> CoordinatorSide:
        """Return a fresh coordinator side of this batch."""
        return self.protection.coordinator_side(
            self.plan,
            n_queries=self.n_queries,
            rule=self.rule,
            public_key=self.keys.public_key,
            cohort=self.cohort,
        )

    def total(self, side: CoordinatorSide) -> bytes:
        """Return the combined payload; honest sites help where masks must be recovered."""
        requests = getattr(side, "recovery_requests", None)
        if requests is not None:
            self.recover(side, requests)
        return side.total()

    def recover(self, side: Any, requests: Callable[[], Any]) -> None:
        """Carry out recovery rounds until there is nothing left to ask."""
        by_key = {identity.key_id: identity for identity in self.identities}
        while asked := dict(requests()):
            for key_id, request in asked.items():
                reply = self.protection.recovery_reply(  # type: ignore[attr-defined]
                    request,
                    cohort=self.cohort,
                    identity=by_key[key_id],
                    admit=lambda dropped: None,  # noqa: ARG005
                )
                side.add_recovery(reply, sender=key_id)

    def open(self, total: bytes, *, n_sites: int) -> Array:
        """Return what the querier opens, shape (n_queries, width)."""
        side = self.protection.querier_side(self.plan, keys=self.keys, cohort=self.cohort)
        return side.open(total, n_queries=self.n_queries, n_sites=n_sites)


def read_one(protection: Protection, rule: EnsembleRule, scores: Array, *, n_classes: int) -> Array:
    """Return what the coordinator alone reads in one site's payload.

    Parameters
    ----------
    protection : Protection
        One that reveals `Disclosure.SCORES`.
    rule : EnsembleRule
    scores : float array of shape (n_queries, width)
        The site's true scores.
    n_classes : int

    Raises
    ------
    InvalidValueError
        If the protection shows the coordinator sums only.
    """
    if protection.reveals is not Disclosure.SCORES:
        raise InvalidValueError(f"protection {protection.name!r} shows the coordinator sums only")
    batch = Round(protection, rule, n_classes=n_classes, n_queries=len(scores), n_sites=1)
    side = batch.coordinator()
    side.add(batch.payload(0, scores))
    return batch.open(side.total(), n_sites=1)


def read_sum(
    protection: Protection, rule: EnsembleRule, scores_kbs: Array, *, n_classes: int
) -> Array:
    """Return what the querier opens: the combined scores, shape (n_queries, width)."""
    n_sites, n_queries = scores_kbs.shape[:2]
    batch = Round(protection, rule, n_classes=n_classes, n_queries=n_queries, n_sites=n_sites)
    side = batch.coordinator()
    for site, scores in enumerate(scores_kbs):
        side.add(batch.payload(site, scores), sender=batch.sender(site))
    return batch.open(batch.total(side), n_sites=n_sites)
