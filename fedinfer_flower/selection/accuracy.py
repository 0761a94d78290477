"""How right chosen sites are expected to be together, from their audits.

Axes: K chosen sites, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.class_counts import comparable_counts

__all__ = ["AccuracyEstimate", "audited_accuracy"]

_UNKNOWN: Final = "unknown: no audits"


class AccuracyEstimate(NamedTuple):
    """An expected accuracy and what it rests on.

    Parameters
    ----------
    value : float, optional
        In [0, 1]; None if unknown.
    basis : str
    """

    value: float | None
    basis: str


def audited_accuracy(chosen: Sequence[Candidate], classes: tuple[str, ...]) -> AccuracyEstimate:
    """Estimate the accuracy of chosen sites together from their audits.

    For each class, the audited accuracies of the sites (shrunk towards 0.5 by one right and
    one wrong answer) are averaged with the sites' shares of the class's examples; then over
    classes. That is the accuracy of asking one site by lot, drawn by class share. An
    ensemble of sites that err independently is better, so read it as a rough floor; it is
    no bound, for sites may err together. Sites and classes without audits are left out, and
    the basis says how many were there.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> from fedinfer_flower.selection.candidate import AuditTally, SiteRecord
    >>> record = SiteRecord(tallies=(AuditTally(epoch=1, right={"x": 7.0}, asked={"x": 8.0}),))
    >>> profile = SiteProfile(name="a", classes=("x",))
    >>> audited_accuracy([Candidate(site_id=SiteId(1), profile=profile, record=record)], ("x",))
    AccuracyEstimate(value=0.8, basis='audits of 1 of 1 sites, 1 of 1 classes')
    """
    n_sites = len(chosen)
    if not n_sites:
        return AccuracyEstimate(None, _UNKNOWN)
    asked_kc = np.array([site.record.audits(classes)[1] for site in chosen]) > 0.0
    shares_kc = comparable_counts(chosen, classes) * asked_kc
    covered = shares_kc.sum(axis=0) > 0.0
    if not covered.any():
        return AccuracyEstimate(None, _UNKNOWN)
    competence_kc = np.array([site.competence(classes) for site in chosen])
    # Divided by the largest first: sums of very large counts stay exact enough.
    scaled_kc = shares_kc[:, covered] / shares_kc[:, covered].max(axis=0)
    accuracy_c = (scaled_kc * competence_kc[:, covered]).sum(axis=0) / scaled_kc.sum(axis=0)
    basis = (
        f"audits of {int(asked_kc.any(axis=1).sum())} of {n_sites} sites,"
        f" {int(covered.sum())} of {len(classes)} classes"
    )
    return AccuracyEstimate(float(accuracy_c.mean()), basis)
