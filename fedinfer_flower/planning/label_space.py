"""The label space of an answer, and what the sites together know of each class."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedinfer_flower.query import CountsKind, SiteProfile

__all__ = ["class_totals", "shared_classes"]


def shared_classes(profiles: Mapping[int, SiteProfile]) -> tuple[str, ...]:
    """Return the union of all class names, numbers in numerical order before words.

    Examples
    --------
    >>> a = SiteProfile(name="a", classes=("10", "9"))
    >>> b = SiteProfile(name="b", classes=("cat", "9"))
    >>> shared_classes({1: a, 2: b})
    ('9', '10', 'cat')
    """
    names = {name for profile in profiles.values() for name in profile.classes}
    return tuple(sorted(names, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n)))


def class_totals(
    profiles: Mapping[int, SiteProfile], classes: tuple[str, ...]
) -> tuple[npt.NDArray[np.float64] | None, CountsKind]:
    """Return (sum of the committed class counts, their kind).

    Counts and presence bits do not add up: where only some sites share counts, all are
    read as presence bits. Where any site withholds both there are no totals.
    """
    kinds = {profile.counts_kind for profile in profiles.values()}
    if not kinds or CountsKind.WITHHELD in kinds:
        return None, CountsKind.WITHHELD
    kind = CountsKind.COUNTS if kinds == {CountsKind.COUNTS} else CountsKind.PRESENCE
    totals = np.zeros(len(classes))
    for profile in profiles.values():
        totals += profile.aligned_counts(classes, kind)
    return totals, kind
