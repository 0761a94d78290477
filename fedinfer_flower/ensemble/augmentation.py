"""Test-time augmentation: each site also answers altered copies of the query.

Five rules of FedSEI (arXiv 2603.02214), which uses rotations of up to 5 degrees. All
average a site's probabilities over the copies; four of them weight a site by how far its
answers to the copies lie from its answer to the query, each by another distance. With
gamma = 1, as published, the *less* stable model counts more: they are baselines.

The copies are made at the site. `tta-l2` and `tta-cosine` compare the logits that they are
given: sites hand over calibrated log-probabilities, FedSEI takes its networks' raw logits,
and the two weigh sites alike only where the raw logits are log-probabilities.

Axes: T copies, B queries, C classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import (
    RULES,
    Array,
    EnsembleRule,
    Evidence,
    SiteContext,
    softmax,
)
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.ensemble.weighted import WeightedRule
from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["TtaCosine", "TtaJs", "TtaKl", "TtaL2", "TtaSoft"]

_MAX_STEP = 1e100
"""A logit's change beyond which its square could overflow; far above any cap."""


def _augmented(logits: Array, site: SiteContext) -> Array:
    augmented = site.augmented_tbc
    if augmented is None or len(augmented) == 0:
        raise InvalidValueError(
            "a test-time augmentation rule needs answers to augmented copies of the query",
            hint="give the site an augmentation, or use 'entropy-weighted'",
        )
    if augmented.shape[1:] != logits.shape:
        raise ShapeError(f"augmented logits have shape {augmented.shape}, logits {logits.shape}")
    return augmented


def _mean_probabilities(augmented_tbc: Array) -> Array:
    return np.asarray(softmax(augmented_tbc).mean(axis=0))


@RULES.register("tta-soft")
@dataclass(frozen=True, kw_only=True)
class TtaSoft(EnsembleRule):
    """Average the probabilities of all sites and all augmented copies.

    Steadies answers of models that small changes of an input upset. It costs each site as
    many model runs as there are copies; prefer `mean-probability` where that matters.

    Score: ``phi_k = (1/T) sum_t softmax f_k(aug_t x)``; the query itself is not among the
    copies.

    Privacy
    -------
    Needs the sum only. The copies are made at the site and never leave it.

    Examples
    --------
    >>> logits = np.log(np.array([[0.5, 0.5]]))
    >>> copies = np.log(np.array([[[0.6, 0.4]], [[0.8, 0.2]]]))
    >>> site = SiteContext(present=np.array([True, True]), augmented_tbc=copies)
    >>> TtaSoft().score(logits, site)
    array([[0.7, 0.3]])
    """

    needs = frozenset({Evidence.AUGMENTED})

    def sensitivity_l2(self, n_classes: int) -> float:  # noqa: ARG002
        """Return the diameter of the probability simplex."""
        return math.sqrt(2.0)

    def score(self, logits: Array, site: SiteContext) -> Array:
        """Return the mean probabilities over the copies."""
        return _mean_probabilities(_augmented(logits, site))


@dataclass(frozen=True, kw_only=True)
class _TtaWeighted(WeightedRule):
    """Weights ``exp(gamma * min(u, u_max))``; a subclass writes the distance in u.

    u is the mean over copies of a distance between the top classes of the query's answer
    and the same classes of the copy's answer. u_max is the smaller of `max_instability`
    and the largest value that the distance can have at all.
    """

    gamma: float = option(1.0, low=-4.0, high=4.0)
    max_instability: float = option(4.0, low=1e-3, high=4.0)
    top: int = option(5, low=1, high=65_536)

    needs = frozenset({Evidence.AUGMENTED})

    @property
    def _u_max(self) -> float:
        return self.max_instability

    @abstractmethod
    def _distances(self, logits: Array, copies: Array, top: npt.NDArray[np.bool_]) -> Array:
        """Return distances of shape (n_augmentations, n_queries) over the classes in `top`."""

    def weight_bound(self, n_classes: int) -> float:  # noqa: ARG002
        """Return ``exp(gamma u_max)``; 1.0 for a negative gamma, since u is not negative."""
        return math.exp(max(self.gamma * self._u_max, 0.0))

    def answer(self, logits: Array, site: SiteContext) -> tuple[Array, Array]:
        """Return mean probabilities over the copies, weighted by their instability."""
        copies = _augmented(logits, site)
        top = self._top_classes(logits, site)
        instability = np.minimum(self._distances(logits, copies, top).mean(axis=0), self._u_max)
        return _mean_probabilities(copies), np.exp(self.gamma * instability)

    def _top_classes(self, logits: Array, site: SiteContext) -> npt.NDArray[np.bool_]:
        known = np.where(site.present, logits, -np.inf)
        count = min(self.top, logits.shape[-1])
        last = np.partition(known, -count, axis=-1)[:, -count, np.newaxis]
        # Classes tied for the last place are all in: their order in the list is no reason.
        return np.asarray((known >= last) & site.present)


@RULES.register("tta-l2")
@dataclass(frozen=True, kw_only=True)
class TtaL2(_TtaWeighted):
    """Weight sites by the Euclidean distance that augmentation moves their logits.

    A baseline: see the module's text. Depends on the scale of the logits; prefer `tta-js`,
    or `tta-soft`, which weights nobody.

    Score: ``(w_k p_k, w_k)`` with the mean ``p_k`` of `tta-soft` and
    ``w_k = exp(gamma min(u_k, max_instability))``, divided after the sum; u_k is the mean
    over copies of ``|z_0 - z_t|`` over the top classes of ``z_0``.

    Parameters
    ----------
    gamma : float
        1.0 as published; negative values favour stable models instead.
    max_instability : float
        Where u is cut, since the weight must be bounded. FedSEI does not cut.
    top : int
        Number of classes compared, of those that the site knows.

    Privacy
    -------
    Needs the sum only. A site sets its own weight, which can be ``exp(gamma *
    max_instability)`` times the least one. Reveals the weighted mean and the sum of the
    weights to the querier.

    Examples
    --------
    >>> copies = np.array([[[0.0, 0.0]]])
    >>> site = SiteContext(present=np.array([True, True]), augmented_tbc=copies)
    >>> TtaL2().score(np.array([[0.6, 0.8]]), site).round(2)
    array([[1.36, 1.36, 2.72]])
    """

    def _distances(self, logits: Array, copies: Array, top: npt.NDArray[np.bool_]) -> Array:
        with np.errstate(over="ignore"):
            steps = np.clip(copies - logits, -_MAX_STEP, _MAX_STEP)
        return np.asarray(np.sqrt((np.where(top, steps, 0.0) ** 2).sum(axis=-1)))


def _directions(logits: Array) -> Array:
    # Scaled by the largest entry first, whose square alone could overflow or vanish.
    largest = np.abs(logits).max(axis=-1, keepdims=True)
    scaled = logits / np.where(largest > 0.0, largest, 1.0)
    length = np.sqrt((scaled**2).sum(axis=-1, keepdims=True))
    return np.asarray(scaled / np.where(length > 0.0, length, 1.0))


@RULES.register("tta-cosine")
@dataclass(frozen=True, kw_only=True)
class TtaCosine(_TtaWeighted):
    """Weight sites by the angle that augmentation turns their logits.

    A baseline: see the module's text. Unlike `tta-l2` it does not depend on the scale of
    the logits, but on where their zero lies; prefer `tta-js`.

    Score: ``(w_k p_k, w_k)`` with the mean ``p_k`` of `tta-soft` and
    ``w_k = exp(gamma min(u_k, max_instability))``, divided after the sum; u_k is the mean
    over copies of ``1 - cos(z_0, z_t)`` over the top classes of ``z_0``, at most 2. It is
    worked out as ``|z_0/|z_0| - z_t/|z_t||^2 / 2``, which is the same and also has a value
    where all logits are zero.

    Parameters
    ----------
    gamma : float
        1.0 as published; negative values favour stable models instead.
    max_instability : float
        Where u is cut; no cut from 2 on.
    top : int
        Number of classes compared, of those that the site knows.

    Privacy
    -------
    Needs the sum only. A site sets its own weight, which can be ``exp(2 gamma)`` times
    the least one. Reveals the weighted mean and the sum of the weights to the querier.

    Examples
    --------
    >>> copies = np.array([[[1.0, 0.0]]])
    >>> site = SiteContext(present=np.array([True, True]), augmented_tbc=copies)
    >>> TtaCosine().score(np.array([[0.0, 1.0]]), site).round(2)
    array([[1.99, 0.73, 2.72]])
    """

    @property
    def _u_max(self) -> float:
        return min(self.max_instability, 2.0)

    def _distances(self, logits: Array, copies: Array, top: npt.NDArray[np.bool_]) -> Array:
        before = _directions(np.where(top, logits, 0.0))
        after = _directions(np.where(top, copies, 0.0))
        return np.asarray(0.5 * ((after - before) ** 2).sum(axis=-1))


def _top_probabilities(logits: Array, top: npt.NDArray[np.bool_]) -> Array:
    kept = np.where(top, softmax(logits), 0.0)
    mass = kept.sum(axis=-1, keepdims=True)
    return np.asarray(kept / np.where(mass > 0.0, mass, 1.0))


def _divergence(p: Array, q: Array) -> Array:
    # Outside the top classes both are zero; the floor makes their logarithms cancel.
    tiny = np.finfo(np.float64).tiny
    terms = p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))
    return np.asarray(np.maximum(terms.sum(axis=-1), 0.0))


@RULES.register("tta-kl")
@dataclass(frozen=True, kw_only=True)
class TtaKl(_TtaWeighted):
    """Weight sites by the Kullback-Leibler divergence that augmentation causes.

    A baseline: see the module's text. Prefer `tta-js`, whose distance is bounded.

    Score: ``(w_k p_k, w_k)`` with the mean ``p_k`` of `tta-soft` and
    ``w_k = exp(gamma min(u_k, max_instability))``, divided after the sum; u_k is the mean
    over copies of ``KL(p_0 | p_t)``, both renormalised over the top classes of ``z_0``.

    Parameters
    ----------
    gamma : float
        1.0 as published; negative values favour stable models instead.
    max_instability : float
        Where u is cut, since the weight must be bounded. FedSEI does not cut.
    top : int
        Number of classes compared, of those that the site knows.

    Privacy
    -------
    Needs the sum only. A site sets its own weight, which can be ``exp(gamma *
    max_instability)`` times the least one. Reveals the weighted mean and the sum of the
    weights to the querier.

    Examples
    --------
    >>> copies = np.log(np.array([[[0.25, 0.75]]]))
    >>> site = SiteContext(present=np.array([True, True]), augmented_tbc=copies)
    >>> TtaKl().score(np.log(np.array([[0.5, 0.5]])), site).round(2)
    array([[0.29, 0.87, 1.15]])
    """

    def _distances(self, logits: Array, copies: Array, top: npt.NDArray[np.bool_]) -> Array:
        return _divergence(_top_probabilities(logits, top), _top_probabilities(copies, top))


@RULES.register("tta-js")
@dataclass(frozen=True, kw_only=True)
class TtaJs(_TtaWeighted):
    """Weight sites by the Jensen-Shannon divergence that augmentation causes.

    A baseline: see the module's text. Of the four distances the one with a small bound;
    prefer `tta-soft`, which weights nobody.

    Score: ``(w_k p_k, w_k)`` with the mean ``p_k`` of `tta-soft` and
    ``w_k = exp(gamma min(u_k, max_instability))``, divided after the sum; u_k is the mean
    over copies of ``(KL(p_0 | m) + KL(p_t | m)) / 2`` with ``m = (p_0 + p_t) / 2``, both
    renormalised over the top classes of ``z_0``; at most log 2.

    Parameters
    ----------
    gamma : float
        1.0 as published; negative values favour stable models instead.
    max_instability : float
        Where u is cut; no cut from log 2 on.
    top : int
        Number of classes compared, of those that the site knows.

    Privacy
    -------
    Needs the sum only. A site sets its own weight, which can be ``2 ** gamma`` times the
    least one. Reveals the weighted mean and the sum of the weights to the querier.

    Examples
    --------
    >>> copies = np.log(np.array([[[0.25, 0.75]]]))
    >>> site = SiteContext(present=np.array([True, True]), augmented_tbc=copies)
    >>> TtaJs().score(np.log(np.array([[0.5, 0.5]])), site).round(2)
    array([[0.26, 0.78, 1.03]])
    """

    @property
    def _u_max(self) -> float:
        return min(self.max_instability, math.log(2.0))

    def _distances(self, logits: Array, copies: Array, top: npt.NDArray[np.bool_]) -> Array:
        before, after = _top_probabilities(logits, top), _top_probabilities(copies, top)
        middle = 0.5 * (before + after)
        return 0.5 * (_divergence(before, middle) + _divergence(after, middle))
