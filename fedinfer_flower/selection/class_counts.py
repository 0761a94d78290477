"""Class counts of sites that say more or less of them, on one scale.

Axes: K candidates, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedinfer_flower.profile import CountsKind
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["comparable_counts"]

Array = npt.NDArray[np.float64]


def comparable_counts(
    candidates: Sequence[Candidate], classes: tuple[str, ...], *, cap: float = math.inf
) -> Array:
    """Return a count of training examples for each site and class, stated or expected.

    A site that states counts is taken at its word, up to `cap`. One that states presence
    bits gets, for a class that it has, the mean count of those that state one; one that
    withholds both gets, for a class that its model knows, the mean over all that say
    anything, those without the class included. So saying nothing is neither rewarded nor
    punished on average. Where nobody states counts, presence bits count 1.

    Parameters
    ----------
    candidates : sequence of Candidate
    classes : tuple of str
    cap : float
        Most that a stated count is believed, in multiples of the median positive count of
        its class (of two, the lower). Without a cap one site that claims a trillion examples
        of everything leaves nothing for the others to add. A site that alone states a class
        is not bounded in it.

    Returns
    -------
    counts_kc : float array of shape (n_candidates, n_classes)
        Finite, not negative.

    Privacy
    -------
    From the profiles alone, which the coordinator holds. Counts are claims: nothing here
    checks them.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> def site(number, kind, counts):
    ...     profile = SiteProfile(
    ...         name=f"s{number}", classes=("a", "b"), counts_kind=kind, class_counts=counts
    ...     )
    ...     return Candidate(site_id=SiteId(number), profile=profile)
    >>> sites = [
    ...     site(1, CountsKind.COUNTS, (30.0, 0.0)),
    ...     site(2, CountsKind.PRESENCE, (1.0, 1.0)),
    ...     site(3, CountsKind.WITHHELD, None),
    ... ]
    >>> comparable_counts(sites, ("a", "b"))
    array([[30. ,  0. ],
           [30. ,  1. ],
           [30. ,  0.5]])
    """
    kinds = [candidate.profile.counts_kind for candidate in candidates]
    known_kc = np.array([candidate.knows(classes) for candidate in candidates], dtype=float)
    known_kc = known_kc.reshape(len(candidates), len(classes))
    stating = np.array([kind is CountsKind.COUNTS for kind in kinds], dtype=bool)
    saying = np.array([kind is not CountsKind.WITHHELD for kind in kinds], dtype=bool)
    counts_kc = known_kc.copy()
    for place in np.flatnonzero(stating).tolist():
        counts_kc[place] = candidates[place].profile.aligned_counts(classes, CountsKind.COUNTS)
    for c in range(len(classes)):
        column = counts_kc[:, c]
        stated = column[stating & (column > 0.0)]
        if len(stated):
            column[stating] = np.minimum(column[stating], cap * _median(stated))
            stated = column[stating & (column > 0.0)]
            column[saying & ~stating] *= stated.mean()
        if saying.any():
            column[~saying] *= column[saying].mean()
    return counts_kc


def _median(values: Array) -> float:
    # The lower of two, so that one liar beside one honest site does not set its own bound.
    return float(np.sort(values)[(len(values) - 1) // 2])
