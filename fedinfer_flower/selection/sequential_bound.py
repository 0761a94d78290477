"""How much the sites that were not asked yet could still add to a score.

Axes: K candidates, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.ensemble.weighted import WeightedRule
from fedinfer_flower.errors import ShapeError
from fedinfer_flower.profile import CountsKind
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["SHARE_RULES", "BoundedRule", "group_shares", "remaining_bound"]

SHARE_RULES: Final = {"class-share", "open-set-class-share", "prior-corrected-class-share"}
"""Rules whose score of a class lies between zero and the site's share of it."""

_ONE_SIDED: Final = {
    *("mean-probability", "majority-vote", "open-set", "borda", "tta-soft"),
    *("product-of-experts", "competence-vote"),
}
"""Rules whose scores all have one sign: an entry moves by the bound, not by twice that."""


@runtime_checkable
class BoundedRule(Protocol):
    """A rule that says itself how much further sites can add."""

    def remaining_bound(self, n_sites: int, n_classes: int) -> Array:
        """Return what `n_sites` more sites can add to a class against another, (n_classes,)."""
        ...


def remaining_bound(
    rule: EnsembleRule,
    not_asked: Sequence[Candidate],
    classes: tuple[str, ...],
    *,
    class_totals: Array | None = None,
    counts_kind: CountsKind = CountsKind.COUNTS,
) -> Array | None:
    """Return how far honest sites can still raise each class against any other.

    If the combined score of class a exceeds that of every other class c by more than the
    bound of c, no answer of these sites changes the label.

    Parameters
    ----------
    rule : EnsembleRule
        As asked of all sites. A rule that is not built in may have a `BoundedRule` method.
    not_asked : sequence of Candidate
    classes : tuple of str
    class_totals : float array of shape (n_classes,), optional
        As told to the sites: the sum of counts over *all* sites that may be asked, not over
        one group. Rules that weight by class share have no bound without it.
    counts_kind : CountsKind
        Whether these totals are of counts or of presence bits.

    Returns
    -------
    bound_c : float array of shape (n_classes,), or None
        None where the rule has no such bound: it compares sites with each other, or ranks
        classes by something other than a sum.

    Raises
    ------
    ShapeError
        If `class_totals` has another length than `classes`.

    Privacy
    -------
    Worked out from profiles; reads no score. A site that does not keep to its rule is not
    bound by it, except by the limits that the protection enforces.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import make_rule
    >>> from fedinfer_flower.profile import SiteProfile
    >>> site = Candidate(site_id=1, profile=SiteProfile(name="a", classes=("x", "y")))
    >>> remaining_bound(make_rule("mean-probability"), [site, site], ("x", "y"))
    array([2., 2.])
    """
    n_classes = len(classes)
    if class_totals is not None and class_totals.shape != (n_classes,):
        raise ShapeError(f"class totals have shape {class_totals.shape}, expected ({n_classes},)")
    if isinstance(rule, BoundedRule):
        return np.asarray(rule.remaining_bound(len(not_asked), n_classes), dtype=float)
    if rule.discloses is not Disclosure.SUM:
        return None
    if rule.name in SHARE_RULES:
        return _shares(not_asked, classes, class_totals, counts_kind)
    if isinstance(rule, WeightedRule):
        # The numerators rank the classes: the sum of the weights divides them all alike.
        return np.full(n_classes, len(not_asked) * rule.weight_bound(n_classes))
    if type(rule).class_totals is not EnsembleRule.class_totals:
        return None
    sides = 1.0 if rule.name in _ONE_SIDED else 2.0
    return np.full(n_classes, len(not_asked) * sides * rule.score_bound(n_classes))


def group_shares(
    rule: EnsembleRule,
    groups: Sequence[Sequence[Candidate]],
    classes: tuple[str, ...],
    *,
    class_totals: Array | None,
    counts_kind: CountsKind = CountsKind.COUNTS,
) -> Array | None:
    """Return how much of each class's examples each group holds, for rules that weight by it.

    Returns
    -------
    shares_gc : float array of shape (n_groups, n_classes), or None
        None for other rules, or where counts or totals are missing. Divide the totals of
        some groups by their shares, added up, and they are as if only these had been asked.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import make_rule
    >>> group_shares(make_rule("mean-probability"), [[]], ("x",), class_totals=np.ones(1))
    """
    if rule.name not in SHARE_RULES:
        return None
    shares = [_shares(group, classes, class_totals, counts_kind) for group in groups]
    known = [share for share in shares if share is not None]
    return np.stack(known) if len(known) == len(shares) else None


def _shares(
    not_asked: Sequence[Candidate],
    classes: tuple[str, ...],
    class_totals: Array | None,
    counts_kind: CountsKind,
) -> Array | None:
    withheld = any(c.profile.counts_kind is CountsKind.WITHHELD for c in not_asked)
    if class_totals is None or withheld:
        return None
    bound = np.zeros(len(classes))
    for candidate in not_asked:
        counts = candidate.counts(classes)
        if counts is None:  # a withheld count, which was ruled out
            return None
        if counts_kind is CountsKind.PRESENCE:
            counts = candidate.knows(classes)
        bound += np.minimum(counts / np.maximum(class_totals, 1e-12), 1.0)
    return bound
