"""Diversity: good sites that are not alike.

Axes: K candidates, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.selection.base import (
    SELECTORS,
    Array,
    Selection,
    SelectionNeed,
    Selector,
    SiteEvidence,
)
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.class_counts import comparable_counts
from fedinfer_flower.selection.diversity_overlap import overlap_from_json
from fedinfer_flower.selection.lots import lots
from fedinfer_flower.selection.purse import Purse
from fedinfer_flower.selection.sequential_groups import own_coverage

__all__ = ["METHODS", "Diversity", "class_similarity"]

METHODS: Final = ("determinant", "overlap")
"""How likeness counts: by the volume that the sites span, or by their mean overlap."""

_JITTER: Final = 1e-3
"""Share of a site that is like no other: keeps the kernel of many sites positive definite
where there are fewer classes than sites."""


def class_similarity(counts_kc: Array) -> Array:
    """Return how alike the sites' class frequencies are (Bhattacharyya coefficient).

    Parameters
    ----------
    counts_kc : float array of shape (n_candidates, n_classes)

    Returns
    -------
    similarity_kk : float array of shape (n_candidates, n_candidates)
        In [0, 1], positive semidefinite; 1.0 for the same frequencies, 0.0 for no class in
        common or no data.

    Examples
    --------
    >>> class_similarity(np.array([[8.0, 2.0], [4.0, 1.0], [0.0, 5.0]])).round(2)
    array([[1.  , 1.  , 0.45],
           [1.  , 1.  , 0.45],
           [0.45, 0.45, 1.  ]])
    """
    totals = np.maximum(counts_kc.sum(axis=1, keepdims=True), 1e-12)
    roots = np.sqrt(counts_kc / totals)
    return np.asarray(np.minimum(roots @ roots.T, 1.0))


@SELECTORS.register("diversity")
@dataclass(frozen=True, kw_only=True)
class Diversity(Selector):
    """Take good sites, and of those that are alike only some.

    Two sites are alike if their class frequencies are, or, where `overlap` is given, if they
    err alike on audits; see `error_overlap`. Class frequencies are a stand-in: sites with
    the same classes may still err differently, and overlap from audits is what to prefer
    where the protection shows single answers. For a set that covers all classes prefer
    "coverage-greedy".

    A site is good by its audited accuracy, if any candidate was audited, else by its own
    coverage of the classes.

    Parameters
    ----------
    method : {"determinant", "overlap"}
        "determinant" takes, one by one, the site that most increases the determinant of the
        kernel ``exp(quality (r_i + r_j) / 2) S_ij``: greedy search for the likeliest set of
        a determinantal point process. "overlap" takes the site with the highest
        ``quality r_k - penalty mean_j S_kj`` over the sites taken so far.
    quality : float
        How much being good counts beside being different.
    penalty : float
        Of method "overlap".
    overlap : str
        JSON text from `overlap_to_json`; empty to go by class frequencies. A site that it
        does not name is as much like the others as they are on average.

    Raises
    ------
    InvalidValueError
        If an option is out of range or the text cannot be read.

    Privacy
    -------
    Needs class counts or presence bits of the profiles, which are claims, or audits whose
    single answers somebody was allowed to see. The overlap tells whoever reads the options
    which sites err alike.

    References
    ----------
    .. [1] Chen, Zhang, Zhou, Fast greedy MAP inference for determinantal point process,
       NeurIPS 2018, algorithm 1.

    Examples
    --------
    >>> from fedinfer_flower.profile import CountsKind, SiteProfile
    >>> def site(number, *counts):
    ...     profile = SiteProfile(
    ...         name=f"s{number}",
    ...         classes=("x", "y"),
    ...         counts_kind=CountsKind.COUNTS,
    ...         class_counts=counts,
    ...     )
    ...     return Candidate(site_id=number, profile=profile)
    >>> sites = [site(0, 9.0, 1.0), site(1, 8.0, 1.0), site(2, 1.0, 5.0)]
    >>> Diversity().select(sites, SelectionNeed(classes=("x", "y"), at_most=2)).site_ids
    (0, 2)
    """

    method: str = "determinant"
    quality: float = option(4.0, low=0.0, high=100.0)
    penalty: float = option(1.0, low=0.0, high=100.0)
    overlap: str = ""

    needs = frozenset({SiteEvidence.CLASS_COUNTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise InvalidValueError(
                f"diversity has no method called {self.method[:32]!r}",
                hint=f"use {' or '.join(METHODS)}",
            )
        if self.overlap:
            overlap_from_json(self.overlap)

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return how good each site is, in [0, 1]."""
        audited = [c.record.audits(need.classes)[1].any() for c in candidates]
        if any(audited):
            return np.array([c.competence(need.classes).mean() for c in candidates])
        own = own_coverage(candidates, need.classes)
        highest = own.max(initial=0.0)
        return np.asarray(own / highest if highest > 0.0 else own)

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Pick sites one by one; see the class.

        Raises
        ------
        SelectionError
            If fewer than ``need.at_least`` fit.
        """
        scores = self.score(candidates, need)
        similarity = self._similarity(candidates, need)
        ties_k = lots(candidates, need.seed)
        purse = Purse(
            [need.cost(candidate) for candidate in candidates],
            budget=need.budget,
            at_least=need.at_least,
            at_most=need.room(len(candidates)),
        )
        gains = _Volume(similarity) if self.method == "determinant" else _Likeness(similarity)
        weight = self.penalty if self.method == "overlap" else 1.0
        order: list[int] = []
        left = list(range(len(candidates)))
        while not purse.full:
            fitting = [k for k in left if purse.fits(k)]
            if not fitting:
                break
            worth = np.round(self.quality * scores + weight * gains.gains(), 12)[fitting]
            best = fitting[int(np.lexsort((ties_k[fitting], -worth))[0])]
            purse.take(best)
            gains.take(best)
            order.append(best)
            left.remove(best)
        return self.within_limits(candidates, need, order, scores)

    def _similarity(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        if not self.overlap:
            counts_kc = comparable_counts(candidates, need.classes)
            return class_similarity(counts_kc)
        sites, known = overlap_from_json(self.overlap)
        place = {site: k for k, site in enumerate(sites)}
        pairs = len(sites) * (len(sites) - 1)
        mean = (known.sum() - len(sites)) / pairs if pairs else 0.0
        found = [place.get(c.key_id or c.profile.name) for c in candidates]
        similarity = np.full((len(candidates), len(candidates)), mean)
        for i, here in enumerate(found):
            for j, there in enumerate(found):
                if here is not None and there is not None:
                    similarity[i, j] = known[here, there]
        np.fill_diagonal(similarity, 1.0)
        return similarity


class _Volume:
    """What each site adds to the logarithm of the determinant, by incremental Cholesky."""

    def __init__(self, similarity: Array) -> None:
        # An overlap counted on audits need not be positive semidefinite; a kernel is.
        values, vectors = np.linalg.eigh((similarity + similarity.T) / 2.0)
        kernel = (vectors * np.maximum(values, 0.0)) @ vectors.T
        self._kernel = (1.0 - _JITTER) * kernel + _JITTER * np.eye(len(kernel))
        self._rows = np.zeros((0, len(kernel)))
        self._left = self._kernel.diagonal().copy()

    def gains(self) -> Array:
        return np.asarray(np.log(np.maximum(self._left, 1e-12)))

    def take(self, place: int) -> None:
        root = np.sqrt(max(self._left[place], 1e-12))
        row = (self._kernel[place] - self._rows[:, place] @ self._rows) / root
        self._rows = np.vstack([self._rows, row])
        self._left = self._left - row**2


class _Likeness:
    """Minus the mean similarity of each site to those taken."""

    def __init__(self, similarity: Array) -> None:
        self._similarity = similarity
        self._sum = np.zeros(len(similarity))
        self._n_taken = 0

    def gains(self) -> Array:
        return np.asarray(-self._sum / max(self._n_taken, 1))

    def take(self, place: int) -> None:
        self._sum = self._sum + self._similarity[place]
        self._n_taken += 1
