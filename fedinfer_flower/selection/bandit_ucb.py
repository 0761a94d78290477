"""Upper confidence bounds: a site is as good as its audits do not rule out.

Axes: K candidates, A cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.selection.bandit import BanditSelector, Cells
from fedinfer_flower.selection.base import SELECTORS, Array, SelectionNeed
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["BanditUcb"]


@SELECTORS.register("bandit-ucb")
@dataclass(frozen=True, kw_only=True)
class BanditUcb(BanditSelector):
    """Ask the sites that are good, or might be: combinatorial UCB.

    Index of a site for a class: ``min(1, right / asked + sqrt(width ln t / asked))`` with t
    the audits of that class over all candidates; 1.0 where the site was never audited, 0.0
    where its model does not know the class. Prefer "bandit-thompson" with few audits an
    epoch: this index is cautious, and explores for long.

    Options as for `BanditSelector`, and:

    Parameters
    ----------
    width : float
        1.5 is what the regret bound of the reference needs; less explores less.

    Privacy
    -------
    Needs audit tallies, which exist only under protections that show single answers;
    otherwise settled merits. A site that answers audits and other rows differently would be
    asked for what it is not; audits mixed among other rows are what prevents that.

    References
    ----------
    .. [1] Chen, Wang, Yuan, Combinatorial multi-armed bandit, ICML 2013, algorithm 1.
    .. [2] Garivier, Moulines, On upper-confidence bound policies for switching bandit
       problems, ALT 2011, for the window.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.selection.candidate import AuditTally, SiteRecord
    >>> def site(number, right):
    ...     tally = AuditTally(epoch=1, right={"x": right}, asked={"x": 1000.0})
    ...     profile = SiteProfile(name=f"s{number}", classes=("x",))
    ...     record = SiteRecord(tallies=(tally,))
    ...     return Candidate(site_id=number, profile=profile, record=record)
    >>> scores = BanditUcb().score([site(1, 500.0), site(2, 800.0)], SelectionNeed(classes=("x",)))
    >>> scores.round(3)
    array([0.607, 0.907])
    """

    width: float = option(1.5, low=0.0, high=100.0)

    def index(
        self,
        cells: Cells,
        candidates: Sequence[Candidate],  # noqa: ARG002
        need: SelectionNeed,  # noqa: ARG002
    ) -> Array:
        """Return upper confidence bounds."""
        seen = np.maximum(cells.asked_ka, 1e-12)
        # Windowed like the counts themselves, so that a window forgets in both.
        rounds = np.maximum(cells.asked_ka.sum(axis=0), 1.0)
        bound = cells.right_ka / seen + np.sqrt(self.width * np.log(rounds) / seen)
        bound = np.where(cells.asked_ka > 0.0, np.minimum(bound, 1.0), 1.0)
        return np.asarray(bound * cells.known_ka)
