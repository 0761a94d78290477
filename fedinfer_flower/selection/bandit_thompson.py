"""Thompson sampling: a site is asked as often as it might be the best.

Axes: K candidates, A cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.selection.bandit import BanditSelector, Cells, site_rng
from fedinfer_flower.selection.base import SELECTORS, Array, SelectionNeed
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["BanditThompson"]


@SELECTORS.register("bandit-thompson")
@dataclass(frozen=True, kw_only=True)
class BanditThompson(BanditSelector):
    """Draw what each site's accuracy may be, and ask the best of the draw.

    Index of a site for a class: one draw from ``Beta(1 + right, 1 + asked - right)``; 0.0
    where its model does not know the class. Prefer it to "bandit-ucb" unless choices have
    to be the same for every seed. Options as for `BanditSelector`.

    Privacy
    -------
    As "bandit-ucb". Draws are for exploration and protect nothing: whoever knows the seed,
    the tallies and the node ids can repeat them.

    References
    ----------
    .. [1] Chapelle, Li, An empirical evaluation of Thompson sampling, NeurIPS 2011.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> site = Candidate(site_id=1, profile=SiteProfile(name="a", classes=("x",)))
    >>> need = SelectionNeed(classes=("x",), seed=7)
    >>> bool((BanditThompson().score([site], need) == BanditThompson().score([site], need)).all())
    True
    """

    def index(self, cells: Cells, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return draws from the posterior, each site's from its own stream."""
        wrong_ka = np.maximum(cells.asked_ka - cells.right_ka, 0.0)
        drawn = [
            site_rng(need, candidate).beta(1.0 + right, 1.0 + wrong)
            for candidate, right, wrong in zip(candidates, cells.right_ka, wrong_ka, strict=True)
        ]
        return np.array(drawn).reshape(cells.known_ka.shape) * cells.known_ka
