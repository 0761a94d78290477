"""Answers that are somebody's already: another site's, or one's own under a second name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedinfer_flower.attacks.cheating.base import (
    CHEATS,
    Array,
    Cheat,
    Cheated,
    IntArray,
    Knowledge,
    by_accuracy,
    one_hot,
)
from fedinfer_flower.ensemble.options import option

__all__ = ["Clones", "Copycat", "DisguisedClones"]


@CHEATS.register("copycat")
@dataclass(frozen=True, kw_only=True)
class Copycat(Cheat):
    """Join without a model, and answer what the most accurate site answers.

    Examples
    --------
    >>> honest, rng = np.array([[[0.9, 0.1]], [[0.2, 0.8]]]), np.random.default_rng(0)
    >>> cheated = Copycat()(honest, np.array([1]), rng)
    >>> cheated.copies, cheated.answers_anc[0, 0]
    ((1,), array([0.2, 0.8]))
    """

    knows = frozenset({Knowledge.ONE_SITES_ANSWER})
    pays_because = "it is as accurate as the best site, with which it then shares the pay of both"
    stopped_by = (
        "sealed, masked or encrypted answers: no site sees another's, in the round or after;"
        " under `plain` whoever combines them could pass one on"
    )

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],  # noqa: ARG002
    ) -> Cheated:
        """Return one attacker's answers."""
        best = by_accuracy(answers, labels)[0]
        return Cheated(answers_anc=answers[best][None], copies=(best,))


@CHEATS.register("clones")
@dataclass(frozen=True, kw_only=True)
class Clones(Cheat):
    """Join again under other names, with one's own answers.

    Parameters
    ----------
    n_clones : int
        Names beside the first.

    Examples
    --------
    >>> honest, rng = np.array([[[0.9, 0.1]], [[0.2, 0.8]]]), np.random.default_rng(0)
    >>> Clones(n_clones=2)(honest, np.array([1]), rng).answers_anc.shape
    (2, 1, 2)
    """

    n_clones: int = option(1, low=1, high=64)

    knows = frozenset({Knowledge.OWN_ANSWER})
    has_model = True
    pays_because = "two names are paid for what one knows"
    stopped_by = "one pay for each owner, or for each group of sites that err alike (quotient)"

    def forge(
        self,
        answers: Array,
        labels: IntArray,  # noqa: ARG002
        rng: np.random.Generator,  # noqa: ARG002
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return the clones' answers."""
        copied = np.repeat(answers[list(sites)], self.n_clones, axis=0)
        return Cheated(answers_anc=copied, keeps=sites, copies=sites)


@CHEATS.register("disguised-clones")
@dataclass(frozen=True, kw_only=True)
class DisguisedClones(Cheat):
    """Clones that each answer some rows by chance, so as not to err alike.

    Parameters
    ----------
    n_clones : int
        Names beside the first.
    disguise : float
        Share of rows that a clone answers by chance.

    Examples
    --------
    >>> honest, rng = np.array([[[0.9, 0.1]] * 100]), np.random.default_rng(0)
    >>> cheated = DisguisedClones(disguise=0.5)(honest, np.zeros(100, dtype=int), rng)
    >>> bool(20 < (cheated.answers_anc[0, :, 0] != 0.9).sum() < 80)
    True
    """

    n_clones: int = option(1, low=1, high=64)
    disguise: float = option(0.2, low=0.0, high=1.0)

    knows = frozenset({Knowledge.OWN_ANSWER})
    has_model = True
    pays_because = "two names are paid for what one knows, and no longer err alike"
    stopped_by = "one pay for each owner; errors that differ hide clones from the quotient"

    def forge(
        self,
        answers: Array,
        labels: IntArray,
        rng: np.random.Generator,
        sites: tuple[int, ...],
    ) -> Cheated:
        """Return the clones' answers."""
        n_rows, n_classes = len(labels), answers.shape[-1]
        clones = np.repeat(answers[list(sites)], self.n_clones, axis=0)
        for clone in clones:
            hidden = rng.random(n_rows) < self.disguise
            drawn = rng.integers(0, n_classes, int(hidden.sum()))
            clone[hidden] = one_hot(drawn, n_classes)
        return Cheated(answers_anc=clones, keeps=sites, copies=sites)
