"""How much of a sum is whose: the check that a stack is no way to read one site.

A stack in which all blocks but one are zero makes the sum of the scores that one site's
answer, under masks or encryption as well. So whoever is asked to use a stack works out, of
the parameters alone, how far each site's answer moves the sum.

The response of a site to the C sure answers, centred over them, is a C x S matrix R_k. Its
norm is the site's amplitude; ``max_u |R_k u|^2 / sum_j |R_j u|^2`` says whether any number
that can be worked out linearly from the sum, a column or a mixture, is one site's alone.

A deep set has one embedding for all sites and the same R for each. There only answers tell
sites apart, so a site compares amplitudes on its own held-out rows (`check_on_rows`).

What this does not stop: a sum of few confident answers with unequal weights tells who said
what, as does a class that one site alone knows, under `class-share` as under a stack; the
other sites together can always subtract their own answers; a stack tuned to one query.

Axes: K sites, B rows, C classes, S width of a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule, SiteContext, make_rule
from fedinfer_flower.ensemble.fitted import FittedAggregator, remember
from fedinfer_flower.errors import ProtectionRefusedError

__all__ = [
    "MAX_DIRECTION",
    "MIN_EFFECTIVE",
    "Participation",
    "check_on_rows",
    "check_participation",
    "load_stack",
    "participation",
    "stack_scores",
]

MIN_EFFECTIVE: Final = 0.6
"""Least ``(sum a)^2 / sum a^2`` of the amplitudes, as a share of the number of sites. Stacks
of sites with few classes each (Dirichlet 0.1) have 0.88 and more."""

MAX_DIRECTION: Final = 0.9
"""Largest share that a site may have of the energy in any direction of the sum; trained
stacks of such sites have up to 0.7."""

_MAX_SHARE: Final = 0.5
_SLACK: Final = 1.5
"""Two or three sites cannot all be below a half: then 1.5 equal shares are the limit."""

_MAX_ON_ROWS: Final = 0.6
_MORE_THAN_MEAN: Final = 2.0
_MOST_ON_ROWS: Final = 0.95
_MIN_ROWS: Final = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class Participation:
    """Whose sum it is.

    Parameters
    ----------
    share_k : float array of shape (n_sites,)
        Of the sum of amplitudes; all zero where nothing moves the sum.
    direction_k : float array of shape (n_sites,)
        Largest share of the energy that a site has in any direction.
    """

    share_k: Array
    direction_k: Array

    @property
    def effective(self) -> float:
        """How many equal sites the amplitudes are worth."""
        squares = float((self.share_k**2).sum())
        return float(self.share_k.sum()) ** 2 / squares if squares > 0.0 else 0.0


def participation(responses_kbs: Array) -> Participation:
    """Measure the sites' parts of a sum.

    Parameters
    ----------
    responses_kbs : float array of shape (n_sites, n_answers, width)
        Scores of each site, for the answers that it is tried with.

    Examples
    --------
    >>> equal = np.tile(np.eye(2), (4, 1, 1))
    >>> participation(equal).effective
    4.0
    >>> participation(equal).direction_k
    array([0.25, 0.25, 0.25, 0.25])
    """
    centred = responses_kbs - responses_kbs.mean(axis=1, keepdims=True)
    energy_kss = np.einsum("kbs,kbt->kst", centred, centred)
    amplitude_k = np.sqrt(np.trace(energy_kss, axis1=1, axis2=2))
    whole = amplitude_k.sum()
    share_k = amplitude_k / whole if whole > 0.0 else np.zeros(len(centred))
    values, vectors = np.linalg.eigh(energy_kss.sum(axis=0))
    # Directions in which nothing moves hold rounding errors of those in which much does.
    kept = values > 1e-12 * max(float(values.max()), 1e-300)
    whitened = vectors[:, kept] / np.sqrt(values[kept])
    direction_k = [
        float(np.linalg.eigvalsh(whitened.T @ e @ whitened).max()) if kept.any() else 0.0
        for e in energy_kss
    ]
    return Participation(share_k=share_k, direction_k=np.array(direction_k))


def stack_scores(fitted: FittedAggregator, answers_kbc: Array) -> Array:
    """Return the scores that each site of the roster makes of its probabilities.

    Parameters
    ----------
    answers_kbc : float array of shape (n_sites, n_rows, n_classes)

    Returns
    -------
    scores_kbs : float array of shape (n_sites, n_rows, width)
    """
    rule = make_rule(fitted.kind, {"stack": remember(fitted)})
    present = np.ones(len(fitted.classes), np.bool_)
    logits_kbc = np.log(np.maximum(answers_kbc, 1e-300))
    contexts = [SiteContext(present=present, key_id=key_id) for key_id in fitted.sites]
    return np.stack([rule.score(z, c) for z, c in zip(logits_kbc, contexts, strict=True)])


def check_participation(
    fitted: FittedAggregator, *, key_ids: Sequence[str] = (), least: int = 0
) -> Participation | None:
    """Require that no site is the sum, by the parameters alone.

    Parameters
    ----------
    key_ids : sequence of str
        Sites that are asked; default all of the aggregator's.
    least : int
        Fewest of them whose sum is opened, where others may be called dropped.

    Returns
    -------
    Participation or None
        None for kinds that work on single scores, which hide nobody.

    Raises
    ------
    ProtectionRefusedError
        If a site has too large a part.

    Privacy
    -------
    For a site before it answers with a stack, and for a querier before it pays for one.
    """
    if make_rule(fitted.kind).discloses is Disclosure.SCORES:
        return None
    n_sites, n_classes = len(fitted.sites), len(fitted.classes)
    sure = np.tile(np.eye(n_classes), (n_sites, 1, 1))
    responses = stack_scores(fitted, sure)
    if key_ids and fitted.kind != "deep-set":
        responses = responses[[fitted.sites.index(k) for k in key_ids if k in fitted.sites]]
        n_sites = len(responses)
    found = participation(responses)
    _check_fewest(found.share_k, least)
    limit = max(_MAX_SHARE, _SLACK / n_sites)
    if float(found.share_k.max()) > limit or found.effective < MIN_EFFECTIVE * n_sites:
        raise _refused("one site's answers would make up most of the sum")
    if n_sites > 1 and float(found.direction_k.max()) > MAX_DIRECTION:
        raise _refused("a part of the sum would be one site's answer alone")
    return found


def _check_fewest(share_k: Array, least: int) -> None:
    """Require that no site is the sum even where those with most part in it dropped out."""
    if not 1 < least < len(share_k):
        return
    limit = max(_MAX_SHARE, _SLACK / least)
    ascending = np.sort(share_k)
    for own in share_k:
        faint = ascending[: least - 1] if own > ascending[least - 2] else ascending[:least]
        beside = float(faint.sum()) - (0.0 if own > ascending[least - 2] else float(own))
        if own > limit * (own + beside):
            raise _refused("among sites of which others dropped out, one would be the sum")


def check_on_rows(fitted: FittedAggregator, answers_kbc: Array) -> Participation | None:
    """Require of a deep set that its embedding is no one site's, on rows all have answered.

    A site whose answers hardly vary has a small part in any rule, so the limit is 60 % of
    the embedding's amplitudes, or twice the part in the mean probability if that is more,
    and 95 % at most.

    Parameters
    ----------
    answers_kbc : float array of shape (n_sites, n_rows, n_classes)
        Answers to the site's held-out rows, from the exchange before training.

    Returns
    -------
    Participation or None
        None for fewer than ten rows, which cannot tell, and for kinds whose parameters
        alone tell more (`check_participation`).

    Raises
    ------
    ProtectionRefusedError
        If a site has too large a part.
    """
    n_sites, n_rows, n_classes = answers_kbc.shape
    if n_rows < _MIN_ROWS or fitted.kind != "deep-set":
        return None
    found = participation(stack_scores(fitted, answers_kbc)[:, :, n_classes:])
    plain_k = participation(answers_kbc).share_k
    floor = max(_MAX_ON_ROWS, _SLACK / n_sites)
    limit_k = np.minimum(np.maximum(floor, _MORE_THAN_MEAN * plain_k), _MOST_ON_ROWS)
    if bool((found.share_k > limit_k).any()):
        raise _refused("on this site's held-out rows its embedding would be one site's")
    return found


def load_stack(folder: Path) -> EnsembleRule:
    """Read a saved stack as its querier, check it, and return the rule that uses it.

    Raises
    ------
    ProtectionRefusedError
        If the sum would be one site's answer.
    EnvelopeError
        If the files are damaged, or not what their card says.
    """
    fitted = FittedAggregator.load(folder)
    check_participation(fitted)
    return make_rule(fitted.kind, {"stack": remember(fitted)})


def _refused(why: str) -> ProtectionRefusedError:
    return ProtectionRefusedError(
        f"this stack is not used: {why}",
        hint="train it with more sites or more held-out rows; see stack_participation",
    )
