"""Base of selectors that learn from audits whom to ask, while they ask; no selector itself.

Axes: K candidates, A cells: one a class, or a single one where only merits are known.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import option
from fedinfer_flower.selection.base import (
    Array,
    Selection,
    SelectionNeed,
    Selector,
    SiteEvidence,
)
from fedinfer_flower.selection.candidate import Candidate
from fedinfer_flower.selection.lots import lots
from fedinfer_flower.selection.purse import Purse

__all__ = ["BanditSelector", "Cells", "gather_cells"]

_WORD = 2**64


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """What is known of each site in each cell.

    Parameters
    ----------
    right_ka, asked_ka : float array of shape (n_candidates, n_cells)
        ``0 <= right <= asked``.
    known_ka : float array of shape (n_candidates, n_cells)
        1.0 where the site's model knows the class, else 0.0.
    """

    right_ka: Array
    asked_ka: Array
    known_ka: Array

    def means(self) -> Array:
        """Return the posterior mean under a uniform prior; 0.0 for classes not known."""
        return np.asarray((self.right_ka + 1.0) / (self.asked_ka + 2.0) * self.known_ka)


def gather_cells(candidates: Sequence[Candidate], need: SelectionNeed, window: int) -> Cells:
    """Return the audits of the latest epochs; settled merits where there are no audits.

    A merit counts as one audit, right to the degree at which it lies between the lowest and
    the highest merit of all candidates: a ranking, not an accuracy.

    Parameters
    ----------
    window : int
        Epochs; 0 for all.
    """
    if not candidates:
        nothing = np.zeros((0, 1))
        return Cells(right_ka=nothing, asked_ka=nothing, known_ka=nothing)
    since = need.epoch - window + 1 if window else 0
    audits = [c.record.audits(need.classes, since_epoch=since) for c in candidates]
    if any(asked.any() for _, asked in audits):
        return Cells(
            right_ka=np.stack([right for right, _ in audits]),
            asked_ka=np.stack([asked for _, asked in audits]),
            known_ka=np.stack([c.knows(need.classes) for c in candidates]),
        )
    merits = [[v for epoch, v in c.record.merits if epoch >= since] for c in candidates]
    values = [value for site in merits for value in site]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    width = high - low
    ranked = [[(v - low) / width if width > 0.0 else 0.5 for v in site] for site in merits]
    if not values:
        known = np.stack([c.knows(need.classes) for c in candidates])
        return Cells(right_ka=np.zeros_like(known), asked_ka=np.zeros_like(known), known_ka=known)
    return Cells(
        right_ka=np.array([[sum(site)] for site in ranked]),
        asked_ka=np.array([[float(len(site))] for site in merits]),
        known_ka=np.ones((len(candidates), 1)),
    )


@dataclass(frozen=True, kw_only=True)
class BanditSelector(Selector):
    """Pick the set whose best sites, class by class, have the highest index.

    The worth of a set is the mean over cells of the mean of its `top` highest indices: for
    each class somebody should know it. It is built greedily. Then, in this order: if the
    set's worth by posterior means is below ``(1 - eta)`` times that of the set that the
    means alone favour, that one is taken (nothing is risked beyond eta); and with
    probability `epsilon` the last site is replaced by one drawn by lot, so that no site is
    written off for good.

    Parameters
    ----------
    window : int
        Latest epochs whose audits count; 0 for all. Set it where sites change.
    epsilon : float
        Probability of a site drawn by lot. These draws are exempt from `eta`.
    eta : float
        Share of the incumbents' expected worth that may be put at risk; 1.0 for any.
    top : int
        Sites that each class should have.
    """

    window: int = option(0, low=0, high=1_000_000)
    epsilon: float = option(0.05, low=0.0, high=1.0)
    eta: float = option(0.1, low=0.0, high=1.0)
    top: int = option(1, low=1, high=100)

    needs = frozenset({SiteEvidence.AUDITS})

    @abstractmethod
    def index(self, cells: Cells, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return the index of each site in each cell, in [0, 1], shape (n_candidates, n_cells)."""

    def score(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Array:
        """Return the mean index over cells."""
        cells = gather_cells(candidates, need, self.window)
        return np.asarray(self.index(cells, candidates, need).mean(axis=1))

    def select(self, candidates: Sequence[Candidate], need: SelectionNeed) -> Selection:
        """Pick a set; see the class.

        Raises
        ------
        SelectionError
            If fewer than ``need.at_least`` fit.
        """
        cells = gather_cells(candidates, need, self.window)
        index_ka, means_ka = self.index(cells, candidates, need), cells.means()
        bold = self._greedy(index_ka, candidates, need)
        safe = self._greedy(means_ka, candidates, need)
        is_bold = self._worth(means_ka[bold]) >= (1.0 - self.eta) * self._worth(means_ka[safe])
        order = bold if is_bold else safe
        said = "by index" if is_bold else "incumbent: the index would risk more than eta"
        reasons = dict.fromkeys(order, f"{self.name}: {said}")
        drawn = self._drawn(order, candidates, need)
        if drawn is not None:
            order = [*order[: need.room(len(candidates)) - 1], drawn]
            reasons[drawn] = f"{self.name}: drawn by lot, to learn about it"
        return self.within_limits(
            candidates,
            need,
            order,
            index_ka.mean(axis=1),
            reasons=reasons,
            expected_accuracy=self._expected(cells, order),
        )

    def _expected(self, cells: Cells, order: list[int]) -> float | None:
        """Return a rough expectation: in each class the set's best site by posterior mean."""
        is_audited = cells.known_ka.shape[1] > 1 and cells.asked_ka[order].any()
        return float(cells.means()[order].max(axis=0).mean()) if is_audited and order else None

    def _worth(self, values_ka: Array) -> float:
        """Return the mean over cells of the mean of the `top` highest values."""
        highest = np.sort(values_ka, axis=0)[-self.top :]
        return float(highest.sum(axis=0).mean() / self.top) if len(values_ka) else 0.0

    def _greedy(
        self, values_ka: Array, candidates: Sequence[Candidate], need: SelectionNeed
    ) -> list[int]:
        purse = _purse(candidates, need)
        own = np.round(values_ka.mean(axis=1), 12)
        ties_k = lots(candidates, need.seed)
        chosen: list[int] = []
        left = list(range(len(candidates)))
        # The `top` highest values of each class among the chosen, lowest first.
        highest = np.zeros((self.top, values_ka.shape[1]))
        while not purse.full:
            fitting = [k for k in left if purse.fits(k)]
            if not fitting:
                break
            gains_ka = np.maximum(values_ka[fitting] - highest[0], 0.0)
            worth = np.round((highest.sum(axis=0) + gains_ka).mean(axis=1) / self.top, 12)
            # A site that adds nothing to any class is still judged by what it knows.
            best = fitting[int(np.lexsort((ties_k[fitting], -own[fitting], -worth))[0])]
            purse.take(best)
            chosen.append(best)
            left.remove(best)
            highest = np.sort(np.vstack([highest, values_ka[best]]), axis=0)[1:]
        return chosen

    def _drawn(
        self, order: list[int], candidates: Sequence[Candidate], need: SelectionNeed
    ) -> int | None:
        """Return a site outside the set that takes the last place, or None."""
        if self.epsilon == 0.0 or site_rng(need).random() >= self.epsilon:
            return None
        purse = _purse(candidates, need)
        for place in order[: need.room(len(candidates)) - 1]:
            purse.take(place)
        outside = [k for k in range(len(candidates)) if k not in order and purse.fits(k)]
        ties_k = lots(candidates, need.seed + need.epoch)
        return min(outside, key=lambda k: float(ties_k[k])) if outside else None


def site_rng(need: SelectionNeed, candidate: Candidate | None = None) -> np.random.Generator:
    """Return the draws of this epoch, of one site or of the set; the same for the same seed."""
    words = [need.seed % _WORD, need.epoch % _WORD]
    return np.random.default_rng(words + ([] if candidate is None else [candidate.site_id % _WORD]))


def _purse(candidates: Sequence[Candidate], need: SelectionNeed) -> Purse:
    prices: npt.NDArray[np.float64] = np.array([need.cost(c) for c in candidates], dtype=float)
    return Purse(
        prices.tolist(),
        budget=need.budget,
        at_least=need.at_least,
        at_most=need.room(len(candidates)),
    )
