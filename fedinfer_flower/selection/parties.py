"""Parties: which sites are one, because they have one owner or answer as one."""

from __future__ import annotations

from collections.abc import Sequence

from fedinfer_flower.selection.candidate import Candidate

__all__ = ["parties"]


def parties(
    candidates: Sequence[Candidate], *, registered_only: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Group candidates into parties: same owner or same duplicate cluster, taken together.

    A site without an owner and a cluster is a party of its own. A sum over sites of one
    party tells that party's answer, however many sites it has.

    Parameters
    ----------
    candidates : sequence of Candidate
    registered_only : bool
        Believe registered owners only: all sites that nobody registered are one party. An
        owner that sites claim for themselves costs nothing to make up.

    Returns
    -------
    parties : tuple of tuple of int
        Places in `candidates`, in order of the first of each party.

    Examples
    --------
    >>> from fedinfer_flower.profile import SiteProfile
    >>> from fedinfer_flower.query import SiteId
    >>> from fedinfer_flower.selection.candidate import SiteRecord
    >>> profile = SiteProfile(name="s", classes=("x",))
    >>> sites = [
    ...     Candidate(site_id=SiteId(n), profile=profile, record=record)
    ...     for n, record in enumerate(
    ...         [SiteRecord(owner="a"), SiteRecord(owner="b"), SiteRecord(owner="a")]
    ...     )
    ... ]
    >>> parties(sites)
    ((0, 2), (1,))
    """
    parent = list(range(len(candidates)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[tuple[str, str], int] = {}
    for place, candidate in enumerate(candidates):
        owner = candidate.record.owner if registered_only else candidate.owner
        marks = [("owner", owner)]
        if candidate.record.cluster:
            marks.append(("cluster", candidate.record.cluster))
        for mark in marks:
            low, high = sorted((root(first.setdefault(mark, place)), root(place)))
            parent[high] = low
    grouped: dict[int, list[int]] = {}
    for place in range(len(candidates)):
        grouped.setdefault(root(place), []).append(place)
    return tuple(tuple(places) for places in grouped.values())
