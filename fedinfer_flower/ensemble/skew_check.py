"""Do the sites know different classes? Asked before any rule that trusts the middle of the answers.

Order statistics (median, trimmed mean, geometric median, medians of groups) take what most sites
say. Where a class is known to few sites, most sites are wrong about it, and such a rule does an
attacker's work for him: on digits with 10 sites and labels at Dirichlet 0.1 the median loses 31
points of accuracy to the mean, with nobody attacking.

The measure is the mean total-variation distance between a site's distribution of classes and the
pooled one: 0 for equal distributions, near 1 where each site has classes of its own. Axes: K
sites, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import Array, EnsembleRule, make_rule
from fedinfer_flower.errors import IncompatibleProtection, ShapeError
from fedinfer_flower.query import CountsKind, SiteProfile

__all__ = [
    "COUNTS_LIMIT",
    "ORDER_STATISTICS",
    "PRESENCE_LIMIT",
    "label_skew",
    "measured_skew",
    "regardless",
    "require_low_skew",
]

ORDER_STATISTICS: Final = frozenset(
    {"median", "trimmed-mean", "geometric-median", "group-median", "deep-set-trimmed"}
)
"""Rules that take the middle of the answers; `group-median` is a strategy."""

COUNTS_LIMIT: Final = 0.35
"""Largest skew of class counts at which order statistics run unasked. Measured by
``benchmarks/uncertainty.py`` on digits with logistic regression, 5 and 10 sites, 6 seeds, nobody
attacking: up to 0.32 (Dirichlet 1) the median loses at most 1.0 points of accuracy to the mean;
at 0.36 to 0.38, 1.5 to 2.2; at 0.41 to 0.42, 3.6 to 4.1; at 0.50, 9 to 13; at 0.65, 28 to 31."""

PRESENCE_LIMIT: Final = 0.1
"""The same of presence bits, which show less: 0.04 to 0.06 at Dirichlet 1, 0.08 to 0.10 at 0.7,
0.09 to 0.15 at 0.5."""


def label_skew(counts_kc: Array) -> float:
    """Return the mean total-variation distance of the sites' classes from the pooled ones.

    Parameters
    ----------
    counts_kc : float array of shape (n_sites, n_classes)
        Counts, or presence bits; sites without any are left out.

    Returns
    -------
    skew : float
        In [0, 1). Small sites of equal distribution are a little apart by chance: with n rows
        and C classes by about ``sqrt(C / (2 pi n))``.

    Examples
    --------
    >>> label_skew(np.array([[10.0, 10.0], [5.0, 5.0]]))
    0.0
    >>> label_skew(np.array([[10.0, 0.0], [0.0, 10.0]]))
    0.5
    """
    counts = np.asarray(counts_kc, dtype=np.float64)
    if counts.ndim != 2 or not (np.isfinite(counts).all() and (counts >= 0.0).all()):
        raise ShapeError("class counts are (n_sites, n_classes), finite and not negative")
    counts = counts[counts.sum(axis=1) > 0.0]
    if not len(counts):
        return 0.0
    own = counts / counts.sum(axis=1, keepdims=True)
    # Sites count alike in the pool: else one large site would be its own yardstick.
    distances = 0.5 * np.abs(own - own.mean(axis=0)).sum(axis=1)
    return float(distances.mean())


def measured_skew(profiles: Sequence[SiteProfile], classes: tuple[str, ...]) -> tuple[float, float]:
    """Return (skew, its limit) as far as the sites say which classes they have.

    Counts where all share them; presence bits where all share at least those; else the
    classes that the models know, which is never withheld.

    Examples
    --------
    >>> sites = [SiteProfile(name="a", classes=("x",)), SiteProfile(name="b", classes=("y",))]
    >>> measured_skew(sites, ("x", "y"))
    (0.5, 0.1)
    """
    if profiles and all(p.counts_kind is CountsKind.COUNTS for p in profiles):
        counts = [p.aligned_counts(classes, CountsKind.COUNTS) for p in profiles]
        return label_skew(np.stack(counts)), COUNTS_LIMIT
    present = [_knows(profile, classes) for profile in profiles]
    return (label_skew(np.stack(present)) if present else 0.0), PRESENCE_LIMIT


def regardless(name: str) -> EnsembleRule:
    """Return a rule by name that runs whatever the skew: for comparisons of all rules.

    Examples
    --------
    >>> regardless("median").options()["allow_skew"]
    True
    """
    return make_rule(name, {"allow_skew": True} if name in ORDER_STATISTICS else {})


def require_low_skew(
    rule: str,
    profiles: Sequence[SiteProfile],
    classes: tuple[str, ...],
    *,
    allow_skew: bool = False,
) -> str:
    """Refuse an order statistic where the sites know different classes; return a warning.

    Parameters
    ----------
    rule : str
        Registered name. Rules that take no middle always pass.
    profiles : sequence of SiteProfile
        Of the sites that will be asked.
    classes : tuple of str
    allow_skew : bool
        Go on regardless.

    Returns
    -------
    warning : str
        A sentence for the report; empty if there is nothing to say.

    Raises
    ------
    IncompatibleProtection
        If the skew is above its limit, unless `allow_skew`.

    Privacy
    -------
    Uses what the profiles say already. A site that lies about its counts hides skew, or
    makes it up; it gains no weight by that.

    Examples
    --------
    >>> sites = [SiteProfile(name="a", classes=("x",)), SiteProfile(name="b", classes=("y",))]
    >>> require_low_skew("mean-probability", sites, ("x", "y"))
    ''
    >>> require_low_skew("median", sites, ("x", "y"), allow_skew=True)[:31]
    "WARNING: rule 'median' trusts m"
    """
    if rule not in ORDER_STATISTICS:
        return ""
    skew, limit = measured_skew(profiles, classes)
    said = f"rule {rule!r} trusts most sites, and the sites' classes differ: skew {skew:.2f}"
    if skew > limit and not allow_skew:
        raise IncompatibleProtection(
            f"{said}, of which {limit:g} is the most",
            hint="use rule 'class-share', or 'dawid-skene' against hostile sites; or accept it:"
            f" make_rule({rule!r}, {{'allow_skew': True}})",
        )
    if skew > limit:
        return f"WARNING: {said}; above {limit:g} it is worse than the mean."
    if any(p.counts_kind is not CountsKind.COUNTS for p in profiles):
        return (
            f"Skew {skew:.2f} by class names or presence alone: without counts of all sites more"
            f" of it may be hidden from rule {rule!r}."
        )
    return ""


def _knows(profile: SiteProfile, classes: tuple[str, ...]) -> Array:
    if profile.class_counts is not None:
        return profile.aligned_counts(classes, CountsKind.PRESENCE)
    known = set(profile.classes)
    return np.array([float(name in known) for name in classes])
