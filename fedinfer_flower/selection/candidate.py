"""A site as a selector sees it: what it declared, and what the coordinator remembers of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.profile import CountsKind, SiteProfile
from fedinfer_flower.query import SiteId

__all__ = ["AuditTally", "Candidate", "SiteRecord"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class AuditTally:
    """How often a site was right on audit queries of one class, in one epoch.

    Parameters
    ----------
    epoch : int
        Number of the epoch, for sliding windows.
    right, asked : mapping of class name to float
        Weighted counts; ``right <= asked``. Under protections that show no single answer
        there are no tallies, only `SiteRecord.merits`.
    """

    epoch: int
    right: Mapping[str, float]
    asked: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, asked in self.asked.items():
            right = self.right.get(name, 0.0)
            if not (math.isfinite(asked) and 0.0 <= right <= asked):
                raise InvalidValueError("an audit tally has 0 <= right <= asked")
        if set(self.right) - set(self.asked):
            raise InvalidValueError("an audit tally counts right answers of classes not asked")


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """What the coordinator remembers of one site.

    Parameters
    ----------
    owner : str
        Who owns the site, as registered with the coordinator; empty if nobody said.
        Wins over the ``owner`` of the model card, which is the site's own claim.
    jurisdiction : str
        As registered; wins over the model card's.
    tallies : tuple of AuditTally
        Oldest first.
    merits : tuple of (int, float)
        (epoch, contribution score a query) of settled epochs, oldest first.
    latencies_s : tuple of float
        Seconds of the latest answers, oldest first.
    last_seen_at : float, optional
        Seconds since 1970; None if the site was never asked.
    epsilon_left : float, optional
        Privacy budget left for this querier; None if it has no cap, or does not say.
    reputation : (float, float)
        Beta parameters (alpha, beta); their mean is the chance of honest work.
    cluster : str
        Duplicate cluster of the last settlement; empty if alone.

    Privacy
    -------
    Held by the coordinator (or the querier, who may select under seal). Tallies come from
    audit queries whose answers it was allowed to see one by one.
    """

    owner: str = ""
    jurisdiction: str = ""
    tallies: tuple[AuditTally, ...] = ()
    merits: tuple[tuple[int, float], ...] = ()
    latencies_s: tuple[float, ...] = ()
    last_seen_at: float | None = None
    epsilon_left: float | None = None
    reputation: tuple[float, float] = (1.0, 1.0)
    cluster: str = ""

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) and x > 0.0 for x in self.reputation):
            raise InvalidValueError("a reputation is two positive numbers")

    def audits(self, classes: tuple[str, ...], *, since_epoch: int = 0) -> tuple[Array, Array]:
        """Return (right, asked) over the classes, each of shape (n_classes,)."""
        recent = [t for t in self.tallies if t.epoch >= since_epoch]
        right = [sum(t.right.get(c, 0.0) for t in recent) for c in classes]
        asked = [sum(t.asked.get(c, 0.0) for t in recent) for c in classes]
        return np.array(right, dtype=float), np.array(asked, dtype=float)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A site that might be asked.

    Parameters
    ----------
    site_id : int
        Flower's node id; any number that names the site where there is none.
    profile : SiteProfile
        What the site declared at onboarding.
    key_id : str
        Fingerprint of its key.
    record : SiteRecord
        What is remembered of it.

    Examples
    --------
    >>> profile = SiteProfile(name="north", classes=("a", "b"), model_card={"owner": "ward 3"})
    >>> Candidate(site_id=SiteId(7), profile=profile).owner
    'ward 3'
    """

    site_id: SiteId
    profile: SiteProfile
    key_id: str = ""
    record: SiteRecord = field(default_factory=SiteRecord)

    @property
    def owner(self) -> str:
        """Registered owner, else the claimed one, else the site's own key or number."""
        return (
            self.record.owner
            or self.profile.model_card.get("owner", "")
            or self.key_id
            or f"site {self.site_id}"
        )

    @property
    def jurisdiction(self) -> str:
        """Registered jurisdiction, else the claimed one; may be empty."""
        return self.record.jurisdiction or self.profile.model_card.get("jurisdiction", "")

    @property
    def price(self) -> float:
        """What the site asks for one query row."""
        return self.profile.price_per_query

    def counts(self, classes: tuple[str, ...]) -> Array | None:
        """Return training counts over the classes; presence bits if that is all; else None."""
        if self.profile.class_counts is None:
            return None
        return self.profile.aligned_counts(classes, self.profile.counts_kind)

    def knows(self, classes: tuple[str, ...]) -> Array:
        """Return 1.0 for each class that the model knows, shape (n_classes,)."""
        if self.profile.class_counts is not None:
            return self.profile.aligned_counts(classes, CountsKind.PRESENCE)
        known = set(self.profile.classes)
        return np.array([float(c in known) for c in classes])

    def latency_s(self, quantile: float = 0.95) -> float | None:
        """Return a quantile of the latest latencies; None if the site was never timed."""
        seen = self.record.latencies_s
        return float(np.quantile(seen, quantile)) if seen else None

    def competence(
        self, classes: tuple[str, ...], *, prior: float = 1.0, since_epoch: int = 0
    ) -> Array:
        """Return the posterior mean accuracy per class under a symmetric Beta prior.

        Parameters
        ----------
        prior : float
            Pseudo-counts of right and of wrong answers; a class that was never audited is
            at 0.5, and one that the model does not know at 0.0.

        Returns
        -------
        competence_c : float array of shape (n_classes,)
        """
        right, asked = self.record.audits(classes, since_epoch=since_epoch)
        return np.asarray((right + prior) / (asked + 2.0 * prior) * self.knows(classes))
