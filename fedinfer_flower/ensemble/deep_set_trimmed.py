"""Deep set with a trimmed mean: trained against hostile sites, needs to see single answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from fedinfer_flower.ensemble.base import RULES, Array, Disclosure, EnsembleRule
from fedinfer_flower.ensemble.deep_set import DeepSet
from fedinfer_flower.ensemble.fitted import require_digest
from fedinfer_flower.ensemble.options import option
from fedinfer_flower.errors import InvalidValueError

__all__ = ["KIND", "DeepSetTrimmed", "trainer_name", "trimmed_mean"]

KIND: Final = "deep-set"
"""Its parameters are those of a deep set; the card's trainer tells them apart."""


def trainer_name(trim: int) -> str:
    """Return what the card of an aggregator says that was trained for this trim.

    Examples
    --------
    >>> trainer_name(1)
    'adversarial, trim 1'
    """
    return f"adversarial, trim {trim}"


def trimmed_mean(values: Array, trim: int) -> Array:
    """Return the mean over the first axis without the `trim` extremes at each end.

    With few sites fewer are dropped, so that one or two remain.

    Examples
    --------
    >>> trimmed_mean(np.array([0.9, 0.5, 0.3, 0.0]), 1)
    array(0.4)
    """
    cut = min(trim, (len(values) - 1) // 2)
    return np.asarray(np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0))


@RULES.register("deep-set-trimmed")
@dataclass(frozen=True, kw_only=True)
class DeepSetTrimmed(DeepSet):
    """Trained embedding of each answer, averaged without extremes, decoded by a trained network.

    Score: as `deep-set`. Total: the trimmed mean of the sites' scores, entry by entry.
    Decision: ``skip t_p + relu(t M + m) N + n``, logits, of the total t. Untrained: the
    trimmed mean of probabilities. Trained by `train_deep_set_trimmed` on rows of which some
    sites' answers were replaced by the worst that it could find: for up to `trim` hostile
    sites, and attacks like those. No certificate comes with it.

    Prefer `dawid-skene` where no held-out answers can be exchanged. Where sites know
    different classes, trimming takes the specialist for an extreme, as other order
    statistics do; training makes up for some of it.

    Parameters
    ----------
    stack : str
        Digest of a fitted aggregator that was trained for this `trim`, or "untrained".
    trim : int
        Values dropped at each end.

    Raises
    ------
    InvalidValueError
        When built, if this process does not know the digest, or it was trained for
        something else.

    Source: arXiv 2510.00310, DeepSet-TM.

    Privacy
    -------
    Needs each site's own score, more numbers than its probabilities: the coordinator sees
    them, with noise under `dp`. Training needs all sites' answers to shared held-out rows
    in one place.

    Examples
    --------
    >>> DeepSetTrimmed().combine(np.array([[[0.9, 0.1]], [[0.8, 0.2]], [[0.0, 1.0]]]))
    array([[0.8, 0.2]])
    """

    trim: int = option(1, low=0, high=1_000_000)
    allow_skew: bool = False

    discloses = Disclosure.SCORES

    def __post_init__(self) -> None:
        # Not the base's check: the kind is that of `deep-set`.
        EnsembleRule.__post_init__(self)
        require_digest(self.stack)
        fitted = self.fitted
        wanted = trainer_name(self.trim)
        if fitted is not None and (fitted.kind, fitted.card["trainer"]) != (KIND, wanted):
            raise InvalidValueError(
                f"aggregator {self.stack[:16]} was not trained for rule 'deep-set-trimmed' with"
                f" trim {self.trim}",
                hint="train_deep_set_trimmed(..., trim=...)",
            )

    def combine(self, scores: Array) -> Array:
        """Return the coordinate-wise trimmed mean."""
        return trimmed_mean(scores, self.trim)
