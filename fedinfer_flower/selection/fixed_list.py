"""Fixed: ask the sites on a list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedinfer_flower.errors import InvalidValueError, SelectionError
from fedinfer_flower.selection.base import SELECTORS, Array, Selection, SelectionNeed, Selector
from fedinfer_flower.selection.candidate import Candidate

__all__ = ["FixedList"]

_KEY = "key:"
_PREFIX = re.compile(r"[0-9a-f]{8,64}")
"""At least 8 hex digits: 32 bits keep honest keys apart. Grinding out a key with the same
8 digits takes minutes, with the same 32 it is out of reach."""


@SELECTORS.register("fixed")
@dataclass(frozen=True, kw_only=True)
class FixedList(Selector):
    """Ask exactly the sites on a list, in its order; a site that is missing is an error.

    Parameters
    ----------
    sites : str
        Separated by commas. ``key:`` and 8 to 64 hex digits mean the site whose key id
        begins so; anything else is a site's name. A name is what the site calls itself: any
        site may take it. A key id is its identity, if enough of it is given: 32 digits
        against somebody who makes keys to fit.

    Privacy
    -------
    Needs names or key ids, which are in the directory.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> sites = [
    ...     Candidate(
    ...         site_id=SiteId(n),
    ...         profile=SiteProfile(name=f"s{n}", classes=("x",)),
    ...         key_id=f"{n}" * 64,
    ...     )
    ...     for n in range(3)
    ... ]
    >>> fixed = FixedList(sites="key:22222222, s0")
    >>> fixed.select(sites, SelectionNeed(classes=("x",))).site_ids
    (2, 0)
    """

    sites: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        entries = self.entries
        if not all(entries):
            raise InvalidValueError(
                "selector 'fixed' has an empty list, or an empty entry",
                hint="sites='north,key:9f8e7d6c5b4a3928'",
            )
        if len(set(entries)) != len(entries):
            raise InvalidValueError("selector 'fixed' names a site twice")
        for entry in entries:
            if entry.startswith(_KEY) and not _PREFIX.fullmatch(entry.removeprefix(_KEY)):
                raise InvalidValueError(
                    f"{entry[:80]!r} is no beginning of a key id",
                    hint="8 to 64 digits 0-9 a-f, as `fedinfer key` prints them",
                )

    @property
    def entries(self) -> tuple[str, ...]:
        """The list, one text a site."""
        return tuple(entry.strip() for entry in self.sites.split(","))

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:  # noqa: ARG002
        """Return 1.0 for sites on the list, 0.0 for others."""
        scores = np.zeros(len(candidates))
        for entry in self.entries:
            scores[_matching(entry, candidates)] = 1.0
        return scores

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Return all sites on the list, or raise.

        Raises
        ------
        SelectionError
            If a site is missing, an entry fits several, two entries mean the same site, or
            the list does not fit the limits as a whole.
        """
        order = [self._place(entry, candidates) for entry in self.entries]
        if len(set(order)) != len(order):
            raise SelectionError("two entries of the fixed list mean the same site")
        selection = self.within_limits(
            candidates,
            need,
            order,
            self.score(candidates, need),
            reasons={k: f"fixed: {e!r}" for k, e in zip(order, self.entries, strict=True)},
        )
        if len(selection.site_ids) < len(order):
            raise SelectionError(
                f"the fixed list has {len(order)} sites, {len(selection.site_ids)} fit the limits",
                hint="raise the budget or at_most, or shorten the list",
            )
        return selection

    @staticmethod
    def _place(entry: str, candidates: Sequence[Candidate]) -> int:
        matching = _matching(entry, candidates)
        if not matching:
            raise SelectionError(
                f"site {entry[:80]!r} of the fixed list is not there, or a gate refused it",
                hint="start the site, take it off the list, or loosen the gate",
            )
        if len(matching) > 1:
            raise SelectionError(
                f"{len(matching)} sites go by {entry[:80]!r}",
                hint="give more digits of the key id: names are what sites call themselves",
            )
        return matching[0]


def _matching(entry: str, candidates: Sequence[Candidate]) -> list[int]:
    if entry.startswith(_KEY):
        prefix = entry.removeprefix(_KEY)
        return [k for k, site in enumerate(candidates) if site.key_id.startswith(prefix)]
    return [k for k, site in enumerate(candidates) if site.profile.name == entry]
